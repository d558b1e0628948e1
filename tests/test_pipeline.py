"""The whole pipeline against diffusers' and transformers' own, on the miniature."""

import gc
import json
import shutil
import weakref

import jax
import numpy as np
import pytest
import torch
from conftest import relative_error
from flax import nnx
from torch_reference import sample_with_diffusers
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import dopsd_jax
from dopsd_jax.common.errors import UserError
from dopsd_jax.families.sampling import start_noise
from dopsd_jax.weights.safetensors_io import TensorFiles

PROMPTS = ["a red circle", "a large blue star on the left, on a striped grey background"]


@pytest.fixture(scope="module")
def pipe(random_model):
    return dopsd_jax.load_pipeline(str(random_model))


@pytest.fixture(scope="module")
def latents():
    return np.asarray(start_noise(5, 2, (12, 16, 16)))


def worst(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_images_equal_diffusers_with_and_without_lora(random_model, pipe, latents, lora_file):
    plain = pipe(list(PROMPTS), height=96, width=128, latents=latents)
    assert worst(plain, sample_with_diffusers(random_model, PROMPTS, latents)) <= 2
    tuned = dopsd_jax.load_pipeline(str(random_model), lora=str(lora_file))
    images = tuned(list(PROMPTS), height=96, width=128, latents=latents)
    assert worst(images, plain) > 50, "the adapter changes nothing"
    assert worst(images, sample_with_diffusers(random_model, PROMPTS, latents, lora=lora_file)) <= 2


def test_a_prompt_in_a_batch_is_the_prompt_alone(pipe, latents):
    both = pipe(PROMPTS, height=96, width=128, latents=latents, steps=2)
    for i, prompt in enumerate(PROMPTS):
        alone = pipe([prompt], height=96, width=128, latents=latents[i : i + 1], steps=2)
        assert worst(alone[0], both[i]) <= 1


def test_noise_of_an_image_depends_on_seed_and_its_number_only():
    four = start_noise(3, 4, (2, 2, 1))
    np.testing.assert_array_equal(four[:2], start_noise(3, 2, (2, 2, 1)))
    np.testing.assert_array_equal(four[3:], start_noise(3, 1, (2, 2, 1), first=3))
    assert abs(float(start_noise(3, 1, (64, 64, 4)).std()) - 1) < 0.02


def test_velocity_has_the_projects_sign(pipe, latents):
    """The network answers x0 - noise at t = 1 - sigma; the pipeline gives noise - x0 at sigma."""
    context = pipe.encode_prompt(PROMPTS)
    v = np.asarray(pipe.velocity(latents, 0.75, context))
    model = pipe.transformer
    caption = model.refine(context.features, context.lengths)
    raw = model(latents, np.full(2, 0.25, np.float32), caption, context.lengths)
    assert relative_error(v, -np.asarray(raw)) < 1e-6
    assert v.dtype == np.float32 and v.shape == latents.shape


def test_the_teachers_context_is_qwen3_vl_on_the_models_own_text_encoder(random_model, pipe):
    """Against transformers: Qwen3-VL with its language model overwritten."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        random_model / "vlm", dtype=torch.float32, local_files_only=True
    ).eval()
    stored = TensorFiles.open(random_model / "text_encoder")
    tensors = {
        name.removeprefix("model."): torch.tensor(np.float32(stored.read(name)))
        for name in stored.infos
        if name.startswith("model.")
    }
    missing, unexpected = model.model.language_model.load_state_dict(tensors, strict=False)
    assert not missing and not unexpected
    settings = json.loads((random_model / "vlm" / "preprocessor_config.json").read_text())
    processor = Qwen2VLImageProcessorPil(
        **{k: settings[k] for k in ("patch_size", "merge_size", "temporal_patch_size")},
        image_mean=settings["image_mean"], image_std=settings["image_std"], size=settings["size"],
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(random_model / "vlm", local_files_only=True)
    rng = np.random.default_rng(0)
    # Sides that need no resizing: resampling is compared elsewhere.
    images = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((96, 128, 3), (128, 64, 3))]
    bounds = dict(min_pixels=64 * 64, max_pixels=128 * 128)
    ours = pipe.encode_prompt_with_image(PROMPTS, images, **bounds)
    for i, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True)):
        found = processor(images=[image], return_tensors="np", input_data_format="channels_last")
        count = int(np.prod(found["image_grid_thw"])) // 4
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                pixel_values=torch.tensor(found["pixel_values"]),
                image_grid_thw=torch.tensor(found["image_grid_thw"]),
                output_hidden_states=True,
            ).hidden_states[-2]
        assert ours.lengths[i] == ids.shape[1]
        first, seen = ours.picture[i]
        where = np.flatnonzero(ids[0].numpy() == model.config.image_token_id)
        assert where.tolist() == list(range(first, first + seen))
        assert relative_error(ours.features[i, : ids.shape[1]], hidden[0].numpy()) < 1e-5


def test_the_doubled_template_and_the_image_change_the_teachers_context(pipe):
    image = [np.full((96, 96, 3), 120, np.uint8)]
    bounds = dict(min_pixels=64 * 64, max_pixels=128 * 128)
    clean = pipe.encode_prompt_with_image(PROMPTS[:1], image, **bounds)
    doubled = pipe.encode_prompt_with_image(PROMPTS[:1], image, doubled_template=True, **bounds)
    assert doubled.lengths[0] > clean.lengths[0]
    other = pipe.encode_prompt_with_image(PROMPTS[:1], [255 - image[0] // 2], **bounds)
    assert relative_error(other.features, clean.features) > 1e-3


def test_a_text_is_one_prompt(pipe):
    found = pipe.encode_prompt("a red cube")
    np.testing.assert_array_equal(found.features, pipe.encode_prompt(["a red cube"]).features)
    assert pipe("ox", height=32, width=32).shape[0] == 1


def test_pictures_to_edit_are_refused_in_a_line(pipe):
    shown = np.zeros((96, 96, 3), np.uint8)
    for call in (pipe.encode_prompt, pipe.encode_prompt_with_image):
        given = ["x"], *([[shown]] if call != pipe.encode_prompt else []), [shown]
        with pytest.raises(UserError, match="reference 1: models of the family zimage edit no"):
            call(*given)


def test_an_option_that_the_family_has_not_is_refused(pipe):
    with pytest.raises(TypeError, match="doubled: no option of this family, which has min_pixels"):
        pipe.encode_prompt_with_image(["x"], [np.zeros((96, 96, 3), np.uint8)], doubled=True)


def test_latents_survive_the_autoencoder_door(pipe):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1, 32, 48, 3), dtype=np.uint8)
    latents = pipe.encode_image(images)
    assert latents.shape == (1, 4, 6, 16) and latents.dtype == np.float32
    assert pipe.decode(latents).shape == images.shape


def test_encoders_leave_memory(pipe):
    pipe.encode_prompt(PROMPTS[:1])
    held = weakref.ref(jax.tree.leaves(nnx.state(pipe.text_encoder))[0])
    assert held() is not None
    pipe.release_encoders()
    gc.collect()
    assert held() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "scheduler_config.json"),
        (
            lambda f: _edit(f / "scheduler/scheduler_config.json", use_dynamic_shifting=True),
            "dynamic",
        ),
        (lambda f: _edit(f / "transformer/config.json", n_layers=4), "layers.3"),
        (lambda f: _edit(f / "text_encoder/config.json", hidden_size=32), "text_encoder"),
        (
            lambda f: (f / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b""),
            "empty",
        ),
        (lambda f: _truncate(f / "transformer/diffusion_pytorch_model.safetensors"), "diffusion"),
        (lambda f: shutil.rmtree(f / "vae"), "vae"),
        (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
    ],
)
def test_broken_model_folders_are_named(random_model, tmp_path, change, message):
    folder = tmp_path / "model"
    shutil.copytree(random_model, folder)
    change(folder)
    with pytest.raises(UserError, match=message):
        dopsd_jax.load_pipeline(str(folder))(["a"], height=32, width=32, steps=1)


def test_sizes_and_prompts_the_model_cannot_take_are_named(pipe):
    with pytest.raises(UserError, match="width 100: must be a multiple of 16"):
        pipe(["a"], height=96, width=100)
    size = {"min_pixels": 2**20, "max_pixels": 2**20}
    with pytest.raises(UserError, match=r"tokens .* of them for the picture.*teacher\.max_pixels"):
        pipe.encode_prompt_with_image(["x"], np.zeros((1, 64, 64, 3), np.uint8), **size)
    with pytest.raises(UserError, match="512; shorten it"):
        pipe(["word " * 600], height=32, width=32)
    with pytest.raises(UserError, match="no such folder"):
        dopsd_jax.load_pipeline("/no/such/model")
    with pytest.raises(UserError, match="dtype: 'fp16' is not one of bfloat16, float32, float16"):
        dopsd_jax.load_pipeline(str(pipe.folder), dtype="fp16")


def _edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_lora_files_with_faults_are_told_when_the_model_is_opened(
    random_model, lora_file, tmp_path
):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(lora_file.read_bytes()[:-100])
    with pytest.raises(UserError, match="broken"):
        dopsd_jax.load_pipeline(str(random_model), lora=[str(lora_file), str(broken)])
    pipe = dopsd_jax.load_pipeline(str(random_model), lora=str(lora_file))
    assert "adapters" in pipe.__dict__ and "transformer" not in pipe.__dict__
    _ = pipe.transformer
    assert "adapters" not in pipe.__dict__  # the transformer has them
