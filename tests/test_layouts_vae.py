"""The autoencoder's original layout against the published one, and there and back."""

import json
import pathlib

import numpy as np
import pytest

from dopsd_jax.common.errors import UserError
from dopsd_jax.families.zimage.networks import ZIMAGE
from dopsd_jax.models.autoencoder import names
from dopsd_jax.models.autoencoder_config import AutoencoderConfig
from dopsd_jax.weights.layouts import as_canonical, in_layout, recognise
from dopsd_jax.weights.layouts_vae import original
from dopsd_jax.weights.tensors import ArrayTensors

DATA = pathlib.Path(__file__).parent / "data"


def config(**overrides):
    facts = json.loads((DATA / "zimage_vae.json").read_text())["config"] | overrides
    levels = len(facts["block_out_channels"])
    facts["down_block_types"] = ["DownEncoderBlock2D"] * levels
    facts["up_block_types"] = ["UpDecoderBlock2D"] * levels
    return AutoencoderConfig.from_dict(facts, "config.json")


def layout(cfg):
    return original(names(cfg), len(cfg.block_out_channels))


def small():
    """A small autoencoder's random tensors under LDM's names."""
    cfg = config(
        block_out_channels=(4, 8), norm_num_groups=2, use_quant_conv=True, use_post_quant_conv=True
    )
    rng = np.random.default_rng(0)
    entries = layout(cfg).entries
    return cfg, {e.name: rng.standard_normal(e.shape).astype(np.float16) for e in entries}


def test_names_are_those_of_the_published_file():
    published = json.loads((DATA / "flux1_ae.json").read_text())["tensors"]
    entries = layout(config()).entries
    assert len(entries) == len(published) == 244
    assert {e.name: (list(e.shape), e.sources[0].name) for e in entries} == {
        name: (shape, theirs) for name, (shape, _, theirs) in published.items()
    }
    for entry in entries:
        shape, op, _ = published[entry.name]
        stored = shape[:2] if op == "squeeze_1x1" else shape
        assert len(entry.sources) == 1 and list(entry.sources[0].shape) == stored


@pytest.mark.parametrize("widths", [(8,), (8, 16), (8, 16, 16, 24, 24)])
def test_decoder_levels_are_counted_from_the_output(widths):
    last = len(widths) - 1
    entries = layout(config(block_out_channels=widths, norm_num_groups=8)).entries
    table = {e.sources[0].name: e.name for e in entries}
    assert len(set(table.values())) == len(entries)
    for i in range(len(widths)):
        ours = table[f"decoder.up_blocks.{i}.resnets.0.conv1.weight"]
        assert ours == f"decoder.up.{last - i}.block.0.conv1.weight"
        if i < last:
            ours = table[f"decoder.up_blocks.{i}.upsamplers.0.conv.bias"]
            assert ours == f"decoder.up.{last - i}.upsample.conv.bias"


def test_there_and_back_is_exact():
    cfg, ldm = small()
    assert ldm["decoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    assert "quant_conv.weight" in ldm and "post_quant_conv.bias" in ldm
    tensors = ArrayTensors(ldm, "ae.safetensors")
    found = recognise("ae.safetensors", ldm, ZIMAGE["vae"].layouts(cfg))
    assert found.layout.name == "ldm"
    ours = as_canonical(tensors, found)
    assert {n: i.shape for n, i in ours.infos.items()} == {
        s.name: s.shape for leaf in names(cfg) for s in leaf.sources
    }
    back = in_layout(ours, found)
    assert back.infos == tensors.infos
    for name, tensor in ldm.items():
        assert np.array_equal(back.read(name), tensor)


def test_every_wrong_tensor_is_listed():
    cfg, ldm = small()
    del ldm["encoder.conv_in.bias"], ldm["decoder.mid.attn_1.k.weight"]
    ldm["encoder.norm_out.weight"] = np.zeros(9, np.float32)
    ldm["loss.logvar"] = np.zeros(1, np.float32)
    found = recognise("ae.safetensors", ldm, ZIMAGE["vae"].layouts(cfg))
    with pytest.raises(UserError) as error:
        as_canonical(ArrayTensors(ldm, "ae.safetensors"), found)
    for name in (
        "encoder.conv_in.bias", "decoder.mid.attn_1.k.weight", "encoder.norm_out.weight",
        "loss.logvar",
    ):  # fmt: skip
        assert any(name in problem for problem in error.value.problems), name
    assert len(error.value.problems) == 4
