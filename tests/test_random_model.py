"""The miniature model folder is taken by diffusers and transformers like the published one."""

import filecmp
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from safetensors import safe_open
from torch_reference import sample_with_diffusers
from transformers import AutoTokenizer, Qwen3Model, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dopsd_jax.random_model import Size, write_random_model
from dopsd_jax.random_model.tokenizer import IDS, OTHER_TOKENS, SPECIAL_TOKENS, VOCABULARY

LOAD = {"dtype": torch.float32, "local_files_only": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_seed_gives_the_same_bytes(folder, tmp_path):
    names = files(folder)
    again, other = (
        write_random_model(tmp_path / "again"),
        write_random_model(tmp_path / "other", seed=1),
    )
    assert files(again) == names
    assert filecmp.cmpfiles(folder, again, names, shallow=False) == (names, [], [])
    different = filecmp.cmpfiles(folder, other, names, shallow=False)[1]
    assert different == [n for n in names if n.endswith(".safetensors")]
    assert sum((folder / n).stat().st_size for n in names) < 6e6


def test_types_are_the_published_ones(folder):
    expected = {"transformer": "F32", "vae": "BF16", "text_encoder": "BF16", "vlm": "BF16"}
    for name, dtype in expected.items():
        (path,) = (folder / name).glob("*.safetensors")
        with safe_open(path, "numpy") as file:
            assert {file.get_slice(k).get_dtype() for k in file.keys()} == {dtype}  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("part", "cls"),
    [
        ("transformer", ZImageTransformer2DModel),
        ("vae", AutoencoderKL),
        ("text_encoder", Qwen3Model),
        ("vlm", Qwen3VLForConditionalGeneration),
    ],
)
def test_every_tensor_is_where_the_library_wants_it(folder, part, cls):
    _, info = cls.from_pretrained(folder / part, output_loading_info=True, **LOAD)
    assert {k: list(v) for k, v in info.items() if v} == {}


def test_other_sizes_load(tmp_path):
    size = Size(
        dim=48,
        layers=1,
        refiner_layers=1,
        heads=2,
        axes=(8, 8, 8),
        latent_channels=4,
        text_dim=32,
        text_layers=5,
        vae_channels=(8, 8, 16, 16),
    )
    pipe = ZImagePipeline.from_pretrained(write_random_model(tmp_path / "model", size=size), **LOAD)
    assert pipe.transformer.config.dim == 48
    assert pipe.text_encoder.config.num_hidden_layers == 5


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="axes"):
        Size(dim=96)
    with pytest.raises(ValueError, match="text_layers"):
        Size(text_layers=3)


def test_diffusers_samples_pictures_that_follow_the_prompt(folder):
    prompts = ["a red circle on the left", "2 blue stars"]
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 16), dtype=np.float32)
    latents = np.repeat(noise, 2, 0)
    images = sample_with_diffusers(folder, prompts, latents)
    assert images.shape == (2, 32, 64, 3) and images.dtype == np.uint8
    assert images.std() > 20
    assert ((images > 0) & (images < 255)).mean() > 0.8  # not clipped away
    difference = np.abs(images[0].astype(int) - images[1].astype(int))
    assert np.median(difference) > 2
    assert prompts == ["a red circle on the left", "2 blue stars"]


def test_predictions_have_unit_size_and_nothing_is_idle(folder):
    model = ZImageTransformer2DModel.from_pretrained(folder / "transformer", **LOAD)
    torch.manual_seed(0)
    x, caption = torch.randn(16, 1, 4, 6), torch.randn(9, 64)

    def change(parameter=None):
        saved = None if parameter is None else parameter.clone()
        with torch.no_grad():
            if parameter is not None:
                parameter.add_(0.5 * parameter.std() * torch.randn_like(parameter))
            (out,) = model([x], torch.tensor([0.3]), [caption], return_dict=False)[0]
            if parameter is not None:
                parameter.copy_(saved)
        return out

    base = change()
    assert 0.3 < base.std() < 3
    idle = [n for n, p in model.named_parameters() if (change(p) - base).abs().max() < 1e-3]
    assert idle == []


def test_special_tokens_are_qwens(tokenizer):
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.bos_token is None
    for token in SPECIAL_TOKENS + OTHER_TOKENS:
        assert tokenizer(f"a{token}b").input_ids[1:-1] == [IDS[token]]
    first = IDS["<|endoftext|>"]
    assert list(IDS.values()) == list(range(first, first + 26))
    assert len(tokenizer) == first + 26 <= VOCABULARY
    assert IDS["<|image_pad|>"] - first == 151655 - 151643
    assert IDS["</think>"] - first == 151668 - 151643
    skipped = tokenizer.decode(
        tokenizer("<|im_start|>a<think>").input_ids, skip_special_tokens=True
    )
    assert skipped == "a<think>"


def test_text_survives_the_tokenizer(tokenizer):
    for text in ("a red circle", "[V]'s 造相\n\n émigré  🚀\ttab", "  two  spaces ", ""):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert max(ids, default=0) < IDS["<|endoftext|>"]


def test_words_are_merged_digits_are_not_and_text_is_nfc(tokenizer):
    assert len(tokenizer(" red circle").input_ids) < 6
    assert len(tokenizer("2024").input_ids) == 4
    assert tokenizer("é").input_ids == tokenizer("e\u0301").input_ids


def test_chat_templates_are_qwens(folder, tokenizer):
    render = lambda tok, content, **kwargs: tok.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
        **kwargs,
    )
    turn = "<|im_start|>user\na red star<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, "a red star", enable_thinking=True) == turn
    closed = turn + "<think>\n\n</think>\n\n"
    assert render(tokenizer, "a red star", enable_thinking=False) == closed
    vlm = AutoTokenizer.from_pretrained(folder / "vlm", local_files_only=True)
    assert vlm.get_vocab() == tokenizer.get_vocab()
    assert render(vlm, "a red star") == turn
    shown = render(vlm, [{"type": "image"}, {"type": "text", "text": "a red star"}])
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert shown == turn.replace("a red", f"{image}a red")
    template = json.loads((folder / "vlm" / "chat_template.json").read_text())["chat_template"]
    assert vlm.chat_template == template


def test_diffusers_loads_the_same_tokenizer(folder, tokenizer):
    pipe = ZImagePipeline.from_pretrained(
        folder, transformer=None, vae=None, text_encoder=None, **LOAD
    )
    text = "<|im_start|>user\na 30 m tall 造相<|im_end|>\n"
    assert pipe.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert type(pipe.tokenizer).__name__ == "Qwen2Tokenizer"


def test_vlm_sees_the_image(folder):
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder / "vlm", **LOAD).eval()
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "vlm", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "vlm", local_files_only=True)
    rng = np.random.default_rng(0)

    def features(image):
        batch = processor(images=[image], return_tensors="pt")
        tokens = int(batch["image_grid_thw"].prod()) // 4
        text = f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>a red star"
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model(
                input_ids=ids,
                mm_token_type_ids=(ids == IDS["<|image_pad|>"]).int(),
                output_hidden_states=True,
                **batch,
            )
        return tokens, out.hidden_states[-2][0, -1]

    tokens, one = features(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    assert tokens == 6
    _, other = features(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    assert (one - other).abs().max() > 0.05
    assert 0.3 < one.std() < 10
