"""FLUX.2-klein against diffusers' pipeline: texts, references, noise levels, pictures."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import ROOT, relative_error
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from weights_helpers import tensors_of

from dopsd_jax import families
from dopsd_jax.adapters import attach
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.lora_options import LoraOption
from dopsd_jax.conditioning.features import Features
from dopsd_jax.config import loading
from dopsd_jax.conversion.export import export_diffusers
from dopsd_jax.conversion.importing import import_model
from dopsd_jax.data.buckets import make_buckets
from dopsd_jax.families.base import STUDENT, TEACHER
from dopsd_jax.families.flux2_klein import family
from dopsd_jax.families.flux2_klein.options import INSTRUCTIONS
from dopsd_jax.families.flux2_klein.references import prepare_reference, reference_size
from dopsd_jax.families.lora import lora_layers
from dopsd_jax.families.pipeline import pipeline
from dopsd_jax.run import data_set
from dopsd_jax.weights.lora_files import LoraModule
from dopsd_jax.weights.lora_write import write_lora

PROMPT = "a large red circle on the left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return family.write_random_model(tmp_path_factory.mktemp("klein") / "model")


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    found = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def picture(height, width, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def test_references_are_in_the_order_of_their_numbers():
    """Ten are allowed, and the wanted result is one more."""
    features = {f"reference{k}": np.full((1, 1, 1), k) for k in range(11)}
    context = family.collate([{"text": np.zeros((1, 1))} | features], ())
    assert [int(latent.item()) for latent in context.references] == list(range(11))


def test_the_folder_names_its_family(folder):
    assert families.of_folder(folder) is family


@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_texts_are_those_of_diffusers_with_all_their_rows(pipe, theirs, prompt):
    with torch.no_grad():
        expected = theirs.encode_prompt(prompt)[0][0].numpy()
    (features,) = pipe.encode(STUDENT, [pipe.request(STUDENT, prompt)], [])
    assert features["text"].shape == (512, pipe.config.text_dim)
    assert relative_error(features["text"], expected) <= 1e-5


def test_a_picture_is_that_of_diffusers(pipe, theirs):
    noise = np.random.default_rng(0).standard_normal((1, 6, 4, pipe.config.channels), np.float32)
    packed = torch.tensor(noise).permute(0, 3, 1, 2)
    expected = theirs(
        prompt=PROMPT, height=96, width=64, num_inference_steps=4, latents=packed, output_type="np"
    ).images[0]
    actual = pipe([PROMPT], height=96, width=64, latents=noise)[0]
    assert np.abs(actual - np.round(255 * expected)).max() <= 2
    assert len(np.unique(actual)) > 50


@pytest.mark.parametrize("size", [(96, 64), (70, 150)])
def test_the_teacher_is_the_editing_branch_of_diffusers(pipe, theirs, size):
    """Caption and instruction, with the picture as reference, of its own size."""
    noise = np.random.default_rng(1).standard_normal((1, 4, 6, pipe.config.channels), np.float32)
    shown, said = picture(80, 160)[: size[0], : size[1]], INSTRUCTIONS["edit_ref"]
    expected = theirs(
        prompt=f"{PROMPT} {said}", image=Image.fromarray(shown), height=64, width=96,
        num_inference_steps=4, latents=torch.tensor(noise).permute(0, 3, 1, 2), output_type="np",
    ).images[0]  # fmt: skip
    context = pipe.encode_prompt_with_image([PROMPT], [shown])
    grid = pipe.deployed_grid((4, 6))
    actual = pipe.decode(pipe.sample(pipe.split[1], jnp.asarray(noise), context, grid))[0]
    assert np.abs(actual - np.round(255 * expected)).max() <= 2
    alone = pipe([PROMPT], height=64, width=96, latents=noise)[0]
    assert np.abs(alone.astype(int) - actual).max() > 2  # and the reference is seen


def test_the_time_in_bfloat16_is_rounded_as_diffusers_rounds_it():
    """To the bit, at any noise level; the network gets 968, 908 and 768 at 1024 x 1024."""
    grid = np.float32(family.grid("nodes4", None, 64, 64)[:-1])
    sigma = np.concatenate([grid, np.random.default_rng(0).uniform(0, 1, 5000).astype(np.float32)])
    told = jax.jit(lambda s: family.told_time(s, jnp.dtype("bfloat16")))(sigma)
    pipelines = torch.tensor(1000 * sigma).to(torch.bfloat16) / 1000
    np.testing.assert_allclose(1000 * told, (pipelines * 1000).float().numpy(), rtol=2e-7)
    np.testing.assert_allclose(1000 * told[:4], [1000, 968, 908, 768], rtol=2e-7)
    assert family.told_time(sigma, jnp.dtype("float32")) is sigma


def test_bfloat16_is_that_of_diffusers(folder, pipe, theirs):
    """Each encoder is as near to its float32 as theirs is; a picture is nearer to theirs than
    either is to float32. With the time that float32 tells the network, it is at 2.0 of 255.
    """
    ours = pipeline(folder, dtype="bfloat16", base_dtype="bfloat16")
    rounded = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    rounded.set_progress_bar_config(disable=True)
    shown = picture(96, 64)[None]
    pixels = torch.tensor(shown / 127.5 - 1).permute(0, 3, 1, 2)

    def ours_of(pipe):
        text = pipe.encode(STUDENT, [pipe.request(STUDENT, PROMPT)], [])[0]["text"]
        return np.asarray(text, np.float32), np.asarray(pipe.encode_image(shown))

    def theirs_of(pipe):
        with torch.no_grad():
            latent = pipe._encode_vae_image(pixels.to(pipe.vae.dtype), None)
            text = pipe.encode_prompt(PROMPT)[0][0]
        return text.float().numpy(), latent.float().permute(0, 2, 3, 1).numpy()

    off = lambda a, b: np.abs(a - b).mean() / np.abs(b).mean()
    for exact, mine, other in zip(*map(ours_of, (pipe, ours)), theirs_of(rounded), strict=True):
        assert off(mine, exact) <= 1.5 * off(other, exact) < 0.05

    noise = np.random.default_rng(0).standard_normal((1, 6, 4, pipe.config.channels), np.float32)
    packed = torch.tensor(noise, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    size = {"height": 96, "width": 64}
    expected = rounded(
        prompt=PROMPT, **size, num_inference_steps=4, latents=packed, output_type="np"
    ).images[0]
    actual = ours([PROMPT], **size, latents=noise)[0]
    assert np.abs(actual - 255 * expected).mean() <= 1.4


def test_two_references_of_different_sizes_are_edited_as_in_diffusers(pipe, theirs):
    noise = np.random.default_rng(2).standard_normal((1, 4, 4, pipe.config.channels), np.float32)
    shown = [picture(96, 64, seed=1), picture(64, 160, seed=2)]
    expected = theirs(
        prompt=PROMPT, image=[Image.fromarray(one) for one in shown], height=64, width=64,
        num_inference_steps=4, latents=torch.tensor(noise).permute(0, 3, 1, 2), output_type="np",
    ).images[0]  # fmt: skip
    actual = pipe([PROMPT], height=64, width=64, latents=noise, images=shown)[0]
    assert np.abs(actual - np.round(255 * expected)).max() <= 2
    one = pipe([PROMPT], height=64, width=64, latents=noise, images=np.stack(shown[:1]))[0]
    assert np.abs(one.astype(int) - actual).max() > 2  # the second is seen


def test_a_family_that_edits_nothing_refuses_references(random_model):
    with pytest.raises(UserError, match="the family zimage edit no pictures"):
        pipeline(random_model).encode_prompt([PROMPT], [picture(64, 64)])


def test_grids_are_those_of_diffusers_for_every_bucket():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    sizes = [(b.height // 16, b.width // 16) for b in make_buckets(1024, 16)]
    assert len(sizes) > 5
    for height, width in [*sizes, (16, 16), (32, 32), (96, 96)]:
        mu = compute_empirical_mu(height * width, 4)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4), mu=mu)
        wanted = scheduler.sigmas.numpy()
        np.testing.assert_allclose(family.grid("nodes4", None, height, width), wanted, atol=2e-6)
        assert family.deployed_grid(4, None, height, width) == family.grid(
            "nodes4", None, height, width
        )
        scheduler.set_timesteps(4, mu=mu)
        wanted = scheduler.sigmas.numpy()
        np.testing.assert_allclose(family.grid("upstream4", None, height, width), wanted, atol=2e-6)


def test_a_mask_lies_on_the_cells_of_its_latents(pipe, tmp_path):
    Image.fromarray(picture(64, 96)).save(tmp_path / "a.png")
    mask = np.zeros((64, 96), np.uint8)
    mask[:32, :48] = 255  # a quarter
    Image.fromarray(mask).save(tmp_path / "a_mask.png")
    (tmp_path / "a.txt").write_text(PROMPT)
    given = {"data.path": str(tmp_path), "data.buckets": "96x64", "data.masks": "files"}
    config = loading.load("flux2_klein:random", given)
    features = Features(pipe, data_set.open_data(config, tmp_path, pipe), config, tmp_path)
    features.store.compute()
    (region,) = features.regions([0])
    assert region.shape == (*pipe.latent_shape(64, 96)[:2], 1) == (4, 6, 1)
    expected = np.zeros((4, 6))
    expected[:2, :3] = 4.0
    np.testing.assert_array_equal(region[..., 0], expected)


@pytest.mark.parametrize("own", families.every(), ids=lambda own: own.NAME)
def test_the_shift_is_that_of_the_deployed_sampler(own):
    """It moves equally spaced levels to the sampler's, for every size."""
    for height, width in ((64, 64), (40, 96)):
        s, n = own.shift(own.SCHEDULER, height, width), own.DEPLOYED_STEPS
        level = 1 - np.arange(n + 1) / n
        wanted = own.deployed_grid(n, own.SCHEDULER, height, width)
        np.testing.assert_allclose(s * level / (1 + (s - 1) * level), wanted, rtol=1e-6)


def test_published_grids():
    np.testing.assert_allclose(
        family.grid("nodes4", None, 64, 64), [1, 0.967384, 0.908144, 0.767200, 0], atol=1e-6
    )
    upstream = family.grid("upstream4", None, 64, 64)
    np.testing.assert_allclose(upstream, [1, 0.9519, 0.8322, 0.0098, 0], atol=5e-5)


@pytest.mark.parametrize("size", [(64, 64), (1000, 700), (1100, 1300), (2000, 250), (65, 513)])
def test_references_are_prepared_as_diffusers_does(size):
    shown = picture(*(side + -side % 8 for side in size))[: size[0], : size[1]]
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    image = Image.fromarray(shown)
    if image.width * image.height > 1024 * 1024:
        image = processor._resize_to_target_area(image, 1024 * 1024)
    sides = {"height": image.height // 16 * 16, "width": image.width // 16 * 16}
    pixels = processor.preprocess(image, resize_mode="crop", **sides)[0].permute(1, 2, 0).numpy()
    actual = prepare_reference(shown, 1024 * 1024, 16)
    np.testing.assert_array_equal(actual, np.round((pixels + 1) * 127.5))
    assert actual.shape[:2] == reference_size(*size, 1024 * 1024, 16)


def test_references_fill_the_cells_of_the_models_own_autoencoder():
    """The shipped miniature's have 8 pixels a side, the published ones' 16."""
    small = pipeline(ROOT / "examples" / "klein_miniature" / "model")
    assert small.size_multiple == 8 and small.reference_size(72, 88, "") == (72, 88)
    pictures = [picture(72, 88), picture(64, 72)]
    sizes, own = [p.shape[:2] for p in pictures], {"instruction": ""}
    shapes = small.request(TEACHER, "dax", sizes=sizes, options=own).shapes
    found = small.features(TEACHER, "dax", pictures, own)
    for name, sides in (("reference0", (9, 11)), ("reference1", (8, 9))):
        assert shapes[name].shape == found[name].shape == (*sides, small.config.channels)


def test_a_long_picture_is_encoded_whole_as_in_diffusers(pipe, theirs, monkeypatch):
    """Tiles would be off by a fifth of the latents' mean size.

    Diffusers computes in float64: on long pictures its own float32 is farther off than ours.
    """
    shown = picture(64, 1568)
    pixels = torch.tensor(shown[None] / 127.5 - 1, dtype=torch.float64).permute(0, 3, 1, 2)
    monkeypatch.setattr(theirs, "vae", copy.deepcopy(theirs.vae).double())
    with torch.no_grad():
        expected = theirs._encode_vae_image(pixels, None).permute(0, 2, 3, 1)
    assert relative_error(pipe.encode_image(shown[None]), expected) <= 1e-5


@pytest.mark.parametrize(
    ("size", "pixels", "message"),
    [
        ((63, 200), 2**20, "dog.png: is 200x63; a reference has at least 64 pixels a side"),
        ((64, 520), 2**20, "dog.png: is 520x64; a reference is at most 8 times as long as wide"),
        ((64, 512), 64 * 16, "dog.png: 90x11 is left of it under config.teacher.reference_pixels"),
    ],
)
def test_references_that_cannot_be_are_one_line(size, pixels, message):
    with pytest.raises(UserError, match=message):
        reference_size(*size, pixels, 16, "dog.png")


def test_a_smaller_reference_is_fewer_tokens(pipe):
    request = lambda pixels: pipe.request(
        TEACHER, PROMPT, sizes=[(128, 128)], options={"reference_pixels": pixels, "instruction": ""}
    )
    assert request(2**20).shapes["reference0"].shape[:2] == (8, 8)
    assert request(64 * 64).shapes["reference0"].shape[:2] == (4, 4)
    # That is of the row's own picture, the last: those that are edited keep their size.
    options = {"reference_pixels": 64 * 64, "instruction": ""}
    both = pipe.request(TEACHER, PROMPT, sizes=[(128, 128)] * 2, options=options).shapes
    assert [both[f"reference{k}"].shape[:2] for k in (0, 1)] == [(8, 8), (4, 4)]
    # One of 8 to 1 is longer than any picture that is drawn, and is taken all the same.
    long = pipe.request(STUDENT, PROMPT, sizes=[(360, 2880)])
    assert long.shapes["reference0"].shape[:2] == (22, 180)


def test_a_prompt_that_is_too_long_is_refused(pipe):
    with pytest.raises(UserError, match="the model takes 512; shorten it"):
        pipe.request(STUDENT, "red circle " * 600)


def test_a_lora_of_ours_is_loaded_by_diffusers(folder, theirs, tmp_path):
    """Every preset layer adapted: the same picture."""
    rng = np.random.default_rng(0)
    cfg = pipeline(folder).config
    slots = attach.slots(family.NETWORKS["transformer"].names(cfg))
    chosen = attach.select(slots, "blocks", family.LORA_PRESETS)
    modules = {
        path: LoraModule(
            rng.standard_normal((4, slot.din)).astype(np.float32) / slot.din**0.5,
            0.3 * rng.standard_normal((slot.dout, 4)).astype(np.float32),
            1.0,
        )
        for path, slot in chosen.items()
    }
    file = tmp_path / "lora.safetensors"
    write_lora(file, modules, lora_layers(family, cfg))
    noise = np.random.default_rng(0).standard_normal((1, 4, 4, cfg.channels), np.float32)
    plain, tuned = (
        pipeline(folder, loras=loras)([PROMPT], height=64, width=64, latents=noise)[0]
        for loras in ((), (LoraOption(file),))
    )
    assert np.abs(plain.astype(int) - tuned).max() > 20
    theirs.load_lora_weights(str(tmp_path), weight_name=file.name, local_files_only=True)
    expected = theirs(
        prompt=PROMPT, height=64, width=64, num_inference_steps=4,
        latents=torch.tensor(noise).permute(0, 3, 1, 2), output_type="np",
    ).images[0]  # fmt: skip
    theirs.unload_lora_weights()
    assert np.abs(tuned - np.round(255 * expected)).max() <= 2


def test_a_model_is_imported_and_exported_exactly(folder, tmp_path):
    import_model(folder, tmp_path / "converted")
    assert families.of_folder(tmp_path / "converted") is family
    export_diffusers(tmp_path / "converted", tmp_path / "back")
    for name in ("transformer", "vae", "text_encoder"):
        assert tensors_of(folder / name) == tensors_of(tmp_path / "back" / name)
