"""The autoencoder against diffusers, module by module and whole."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2KleinPipeline
from fill import fill
from flax import nnx

from dopsd_jax.common.errors import UserError
from dopsd_jax.models import autoencoder, flux2_autoencoder
from dopsd_jax.models.autoencoder import Autoencoder, Conv, names, to_uint8
from dopsd_jax.models.autoencoder_config import AutoencoderConfig
from dopsd_jax.models.tiling import Tiling, run_tiled

DATA = pathlib.Path(__file__).parent / "data"
TOLERANCE = 1e-5

BASE = dict(
    in_channels=3, out_channels=3, block_out_channels=(8, 12), layers_per_block=1, act_fn="silu",
    latent_channels=4, norm_num_groups=4, scaling_factor=0.3611, shift_factor=0.1159,
    sample_size=32, use_quant_conv=False, use_post_quant_conv=False, force_upcast=True,
    mid_block_add_attention=True,
)  # fmt: skip
CONFIGS = {
    "four levels as published": dict(
        block_out_channels=(8, 16, 24, 24), layers_per_block=2, norm_num_groups=8,
        latent_channels=16,
    ),
    "one level, quant convs, no shift": dict(
        block_out_channels=(6,), norm_num_groups=3, use_quant_conv=True, use_post_quant_conv=True,
        shift_factor=None,
    ),
    "widths that fall, one group, other channels": dict(
        block_out_channels=(12, 8, 12), norm_num_groups=1, layers_per_block=2, in_channels=1,
        out_channels=2, latent_channels=3,
    ),
    "no attention, one quant conv": dict(
        mid_block_add_attention=False, use_post_quant_conv=True, norm_num_groups=2
    ),
}  # fmt: skip


FLUX2_HAS_NO = ("scaling_factor", "shift_factor", "force_upcast")
FLUX2_TINY = dict(
    block_out_channels=(8,), norm_num_groups=4, latent_channels=2, layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
)  # fmt: skip


def build(overrides=None, seed=0):
    """A diffusers autoencoder with random, non-degenerate weights, and ours with the same."""
    torch.manual_seed(seed)
    config = BASE | (overrides or {})
    levels = len(config["block_out_channels"])
    model = AutoencoderKL(
        **config,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.2 if p.ndim == 1 else p[0].numel() ** -0.5))
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    cfg = AutoencoderConfig.from_dict(dict(model.config), "config.json")
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    abstract = nnx.eval_shape(lambda: Autoencoder(cfg, rngs=nnx.Rngs(0)))
    return model, fill(abstract, names(cfg), tensors)


def random(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def torch_call(function, x):
    """Calls a channels-first torch function on a channels-last array."""
    with torch.no_grad():
        y = function(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous())
    return y.permute(0, 2, 3, 1).numpy()


MODULES = {
    "residual block": (
        lambda m: m.decoder.levels[0].resnets[1], lambda t: t.decoder.up_blocks[0].resnets[1], 12),
    "residual block of changing width": (
        lambda m: m.encoder.levels[1].resnets[0], lambda t: t.encoder.down_blocks[1].resnets[0], 8),
    "mid attention": (
        lambda m: m.encoder.mid.attention, lambda t: t.encoder.mid_block.attentions[0], 12),
    "mid block": (lambda m: m.decoder.mid, lambda t: t.decoder.mid_block, 12),
    "downsampling": (
        lambda m: m.encoder.levels[0].downsample,
        lambda t: t.encoder.down_blocks[0].downsamplers[0], 8),
    "down level": (lambda m: m.encoder.levels[0], lambda t: t.encoder.down_blocks[0], 8),
    "up level": (lambda m: m.decoder.levels[0], lambda t: t.decoder.up_blocks[0], 12),
    "group norm": (lambda m: m.encoder.norm_out, lambda t: t.encoder.conv_norm_out, 12),
}  # fmt: skip


@pytest.fixture(scope="module")
def two_levels():
    return build()


@pytest.mark.parametrize("module", MODULES)
def test_each_module_equals_diffusers(module, two_levels):
    torch_model, model = two_levels
    ours, theirs, channels = MODULES[module]
    x = 3 * random(2, 10, 6, channels) + 0.5
    x = x[:, :, :5] if module in ("residual block", "mid attention", "up level") else x
    expected = torch_call(lambda x: _call_theirs(theirs(torch_model), x), x)
    assert relative_error(jax.jit(ours(model))(x), expected) <= TOLERANCE


def _call_theirs(module, x):
    return module(x, None) if type(module).__name__ == "ResnetBlock2D" else module(x)


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_autoencoder_equals_diffusers(name):
    torch_model, model = build(CONFIGS[name])
    cfg, factor = model.cfg, model.cfg.factor
    images = np.tanh(random(2, 6 * factor, 4 * factor, cfg.in_channels))
    mean, logvar = jax.jit(Autoencoder.encode)(model, images)
    assert mean.shape == logvar.shape == (2, 6, 4, cfg.latent_channels)
    encode = lambda x: torch_model.encode(x).latent_dist
    assert relative_error(mean, torch_call(lambda x: encode(x).mean, images)) <= TOLERANCE
    assert relative_error(logvar, torch_call(lambda x: encode(x).logvar, images)) <= TOLERANCE
    z = random(2, 5, 3, cfg.latent_channels)
    expected = torch_call(lambda z: torch_model.decode(z).sample, z)
    assert relative_error(jax.jit(Autoencoder.decode)(model, z), expected) <= TOLERANCE


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 2, 4)])
def test_a_convolution_of_the_doubled_picture_is_torchs(shape):
    """Though it never makes the doubled picture; at the borders too, and with sides of one."""
    conv = Conv(4, 6, 3, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(6.0)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    doubled = torch.nn.functional.interpolate(
        torch.from_numpy(x).permute(0, 3, 1, 2), scale_factor=2, mode="nearest"
    )
    kernel = torch.from_numpy(np.array(conv.kernel[...])).permute(3, 2, 0, 1)
    bias = torch.from_numpy(np.array(conv.bias[...]))
    expected = torch.nn.functional.conv2d(doubled, kernel, bias, padding=1).permute(0, 2, 3, 1)
    assert relative_error(conv.of_doubled(jnp.asarray(x)), expected.numpy()) < 1e-6


def test_log_variance_is_clipped():
    moments = jnp.array([[[[1.0, 2.0, 50.0, -50.0]]]])
    mean, logvar = autoencoder.split_moments(moments)
    assert mean.ravel().tolist() == [1.0, 2.0] and logvar.ravel().tolist() == [20.0, -30.0]


def test_bfloat16_is_as_near_to_float32_as_torch_is():
    torch_model, model = build(dict(block_out_channels=(16, 24), norm_num_groups=8))
    images, z = np.tanh(random(1, 24, 16, 3)), random(1, 6, 8, 4)
    exact_mean = torch_call(lambda x: torch_model.encode(x).latent_dist.mean, images)
    exact_image = torch_call(lambda x: torch_model.decode(x).sample, z)
    mean = jax.jit(Autoencoder.encode)(model, jnp.asarray(images, jnp.bfloat16))[0]
    image = jax.jit(Autoencoder.decode)(model, jnp.asarray(z, jnp.bfloat16))
    assert mean.dtype == image.dtype == jnp.bfloat16
    half = torch_model.to(torch.bfloat16)
    their_mean = torch_call(lambda x: half.encode(x.bfloat16()).latent_dist.mean.float(), images)
    their_image = torch_call(lambda x: half.decode(x.bfloat16()).sample.float(), z)
    assert relative_error(mean, exact_mean) <= 2 * relative_error(their_mean, exact_mean)
    assert relative_error(image, exact_image) <= 2 * relative_error(their_image, exact_image)


def test_latents_are_shifted_and_scaled_as_in_the_pipeline(two_levels):
    _, model = two_levels
    z = random(1, 2, 2, 4)
    np.testing.assert_allclose(model.to_latent(z), (z - 0.1159) * 0.3611, rtol=1e-6)
    np.testing.assert_allclose(model.from_latent(model.to_latent(z)), z, rtol=1e-5, atol=1e-6)


def test_images_are_encoded_and_decoded_as_in_the_pipeline(two_levels):
    from diffusers.image_processor import VaeImageProcessor

    torch_model, model = two_levels
    processor = VaeImageProcessor(vae_scale_factor=2)
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 8, 3), np.uint8)
    with torch.no_grad():
        x = processor.preprocess(images.astype(np.float32) / 255)
        latents = (torch_model.encode(x).latent_dist.mode() - 0.1159) * 0.3611
        decoded = torch_model.decode(latents / 0.3611 + 0.1159).sample
    expected = processor.postprocess(decoded, output_type="np")
    ours = model.encode_images(images)
    assert relative_error(ours, latents.permute(0, 2, 3, 1).numpy()) <= TOLERANCE
    floats = model.decode_images(ours)
    assert floats.dtype == jnp.float32 and relative_error(floats, expected * 255) <= TOLERANCE
    assert to_uint8(floats).dtype == jnp.uint8
    assert np.abs(np.asarray(to_uint8(floats), int) - (expected * 255).round()).max() <= 1


def test_a_key_samples_the_posterior(two_levels):
    _, model = two_levels
    image = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), np.uint8)
    images = np.repeat(image, 1000, 0)
    mean, logvar = jax.jit(Autoencoder.encode)(model, autoencoder.from_uint8(image))
    draws = np.asarray(model.encode_images(images, jax.random.key(0)))
    assert relative_error(draws.mean(0), model.to_latent(mean)[0]) < 0.1
    assert relative_error(draws.std(0), np.exp(0.5 * logvar[0]) * 0.3611) < 0.1
    assert (draws == model.encode_images(images, jax.random.key(0))).all()
    assert (draws != model.encode_images(images, jax.random.key(1))).any()


def test_images_whose_sides_do_not_fit_are_refused(two_levels):
    _, model = two_levels
    with pytest.raises(ValueError, match=r"9x8.*multiples of 2"):
        model.encode_images(np.zeros((1, 9, 8, 3), np.uint8))


def test_attention_is_the_same_whatever_rows_exist_at_a_time(two_levels, monkeypatch):
    _, model = two_levels
    x = random(2, 7, 5, 12)
    outputs = []
    for rows in (1, 10, 35):
        monkeypatch.setattr(autoencoder, "ATTENTION_ROWS", rows)
        # A new function each time: what has been traced would not be traced again.
        outputs.append(jax.jit(lambda m, x: m(x))(model.encoder.mid.attention, x))
    assert relative_error(outputs[0], outputs[2]) <= 1e-6
    assert relative_error(outputs[1], outputs[2]) <= 1e-6


@pytest.fixture(scope="module")
def tiled():
    """Two levels and quant convs; diffusers with tiles of 16 pixels."""
    torch_model, model = build(dict(use_quant_conv=True, use_post_quant_conv=True, sample_size=16))
    torch_model.enable_tiling()
    assert torch_model.tile_sample_min_size == 16 and torch_model.tile_latent_min_size == 8
    return torch_model, model


def test_tiles_give_what_diffusers_tiles_give(tiled):
    torch_model, model = tiled
    h, w = 11, 6
    z = random(2, h, w, 4)
    expected = torch_call(lambda z: torch_model.decode(z).sample, z)
    images = model.decode_images(model.to_latent(z), tiling=Tiling(16))
    assert relative_error(images, np.clip(expected * 127.5 + 127.5, 0, 255)) <= TOLERANCE
    pixels = np.random.default_rng(0).integers(0, 256, (1, 2 * h, 2 * w, 3), np.uint8)
    x = np.array(autoencoder.from_uint8(pixels))
    expected = torch_call(lambda x: torch_model.encode(x).latent_dist.mean, x)
    latents = model.encode_images(pixels, tiling=Tiling(16))
    assert relative_error(latents, (expected - 0.1159) * 0.3611) <= TOLERANCE


class Upscale(torch.nn.Module):
    """In place of a decoder: depends on what else is in the tile, so that blending shows."""

    def forward(self, x):
        x = x + x.mean((1, 2, 3), keepdim=True)
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.0])
def test_tiles_of_any_image_are_cut_and_blended_as_in_diffusers(overlap):
    torch_model, _ = build(dict(sample_size=16))
    torch_model.enable_tiling()
    torch_model.tile_overlap_factor = overlap
    torch_model.decoder = Upscale()

    def upscale(x):
        x = np.asarray(x)
        x = x + x.mean((1, 2, 3), keepdims=True)
        return x.repeat(2, 1).repeat(2, 2)

    for h, w in ((32, 32), (28, 18), (6, 30), (26, 14), (9, 25), (13, 8), (14, 3)):
        z = random(2, h, w, 4)
        expected = torch_call(lambda z: torch_model.decode(z).sample, z)
        assert relative_error(run_tiled(upscale, z, 8, 16, overlap), expected) <= 1e-6


def test_tiles_differ_from_the_whole_and_serve_only_large_images(tiled):
    _, model = tiled
    latents = random(1, 8, 12, 4)
    whole = model.decode_images(latents)
    cut = model.decode_images(latents, tiling=Tiling(16))
    assert cut.shape == whole.shape and (cut != whole).any()
    assert (model.decode_images(latents, tiling=Tiling(16, above=16 * 24)) == whole).all()
    assert (model.decode_images(latents, tiling=Tiling(32)) == whole).all()


def test_each_shape_of_tile_is_compiled_once(tiled):
    _, model = tiled
    autoencoder._decode.clear_cache()
    # Tiles start at 0, 6, ... 30: five whole ones and an edge of 2.
    for seed in (1, 2):
        model.decode_images(random(1, 6, 32, 4, seed=seed), tiling=Tiling(16))
        assert autoencoder._decode._cache_size() == 2


def test_bad_tilings_are_refused(tiled):
    with pytest.raises(UserError) as error:
        Tiling(0, overlap=0.75, above=-1)
    assert [p.split()[0] for p in error.value.problems] == [
        "tiling.sample_size", "tiling.overlap", "tiling.above",
    ]  # fmt: skip
    _, model = tiled
    with pytest.raises(UserError, match=r"sample_size is 15.*multiple of 2"):
        model.decode_images(random(1, 16, 16, 4), tiling=Tiling(15))
    with pytest.raises(UserError, match=r"overlap.*whole"):
        model.decode_images(random(1, 16, 16, 4), tiling=Tiling(14))


def published():
    facts = json.loads((DATA / "zimage_vae.json").read_text())
    return facts["config"], {name: tuple(shape) for name, shape in facts["tensors"].items()}


def test_every_published_tensor_has_one_place():
    config, shapes = published()
    cfg = AutoencoderConfig.from_dict(config, "vae/config.json")
    assert cfg.factor == 8
    leaves = names(cfg)
    sources = [source for leaf in leaves for source in leaf.sources]
    assert len(sources) == len(shapes) == 244
    assert {s.name: s.shape for s in sources} == shapes
    model = nnx.eval_shape(lambda: Autoencoder(cfg, rngs=nnx.Rngs(0)))
    ours = {".".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(nnx.state(model))}
    assert {leaf.path: leaf.shape for leaf in leaves} == ours
    assert len(leaves) == len(ours) == 236  # q, k, v are one


def test_a_bad_config_is_refused_with_every_fault():
    config, _ = published()
    bad = config | {
        "_class_name": "AutoencoderKLFlux2", "act_fn": "gelu", "norm_num_groups": 24,
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "use_quant_conv": "no", "shift_factor": float("nan"), "latents_mean": [0.0],
        "patch_size": [2, 2], "layers_per_block": 0,
    }  # fmt: skip
    del bad["scaling_factor"], bad["in_channels"]
    with pytest.raises(UserError) as error:
        AutoencoderConfig.from_dict(bad, "vae/config.json")
    problems = error.value.problems
    assert all(p.startswith("vae/config.json: ") for p in problems)
    for field in (
        "_class_name", "act_fn", "norm_num_groups", "down_block_types", "use_quant_conv",
        "shift_factor", "latents_mean", "patch_size", "layers_per_block", "scaling_factor",
        "in_channels",
    ):  # fmt: skip
        assert any(f"field {field} " in p for p in problems), field


def test_older_configs_mean_what_they_meant():
    config, _ = published()
    later = ("shift_factor", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
    old = {k: v for k, v in config.items() if k not in later}
    cfg = AutoencoderConfig.from_dict(old, "config.json")
    assert cfg.shift_factor == 0 and cfg.use_quant_conv and cfg.use_post_quant_conv
    assert cfg.mid_block_add_attention


@pytest.mark.parametrize("name", ["four levels as published", "one level, quant convs, no shift"])
def test_flux2_folds_and_normalises_as_diffusers(name):
    torch.manual_seed(0)
    own = {n: v for n, v in (BASE | CONFIGS[name]).items() if n not in FLUX2_HAS_NO}
    levels = len(own["block_out_channels"])
    config = own | {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    theirs = AutoencoderKLFlux2(**config).eval()
    with torch.no_grad():
        theirs.bn.running_mean.normal_()
        theirs.bn.running_var.uniform_(0.5, 2.0)
    cfg = flux2_autoencoder.Flux2AutoencoderConfig.from_dict(dict(theirs.config), "config.json")
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    unused = {s.name for s in flux2_autoencoder.unused(cfg)}
    leaves = flux2_autoencoder.names(cfg)
    assert {s.name for leaf in leaves for s in leaf.sources} | unused == set(tensors)
    abstract = nnx.eval_shape(lambda: flux2_autoencoder.Flux2Autoencoder(cfg, rngs=nnx.Rngs(0)))
    ours = fill(abstract, leaves, {k: v for k, v in tensors.items() if k not in unused})
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3 * cfg.factor, 2 * cfg.factor, 3), np.uint8)
    pixels = torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        pipe = Flux2KleinPipeline.__new__(Flux2KleinPipeline)
        pipe.vae = theirs
        expected = pipe._encode_vae_image(pixels, None).permute(0, 2, 3, 1).numpy()
    latents = ours.encode_images(images)
    assert latents.shape == (2, 3, 2, cfg.channels)
    assert relative_error(latents, expected) <= TOLERANCE
    back = ours.to_latent(ours.from_latent(latents))
    assert relative_error(back, latents) <= TOLERANCE
    z = ours.from_latent(latents)
    with torch.no_grad():
        decoded = theirs.decode(torch.tensor(np.array(z)).permute(0, 3, 1, 2)).sample
    expected = np.clip(decoded.permute(0, 2, 3, 1).numpy() * 127.5 + 127.5, 0, 255)
    assert relative_error(ours.decode_images(latents), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("field", "value"),
    [("patch_size", [4, 4]), ("batch_norm_eps", 0), ("_class_name", "AutoencoderKL")],
)
def test_flux2_of_another_kind_is_refused(field, value):
    config = dict(AutoencoderKLFlux2(**FLUX2_TINY).config) | {field: value}
    with pytest.raises(UserError, match=field):
        flux2_autoencoder.Flux2AutoencoderConfig.from_dict(config, "config.json")
