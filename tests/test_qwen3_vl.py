"""Qwen3-VL against transformers: vision tower, positions, deepstack, whole."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import relative_error
from fill import fill
from flax import nnx
from shape_checks import unchecked
from test_qwen3 import fast_jit, numpy_state, randomize
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from dopsd_jax.common.errors import UserError
from dopsd_jax.models import qwen3
from dopsd_jax.models.qwen3 import Qwen3, Qwen3Config
from dopsd_jax.models.qwen3_vl import (
    Qwen3VL,
    Qwen3VLConfig,
    encode,
    mrope,
    mrope_positions,
    names,
    unused,
)
from dopsd_jax.models.qwen3_vl_vision import interpolation, patch_coordinates

DATA = pathlib.Path(__file__).parent / "data"
TOLERANCE = 1e-5
IMAGE, START, END = 57, 58, 59
LANGUAGE = dict(
    vocab_size=60,
    hidden_size=24,
    head_dim=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=44,
    num_hidden_layers=4,
    rms_norm_eps=1e-6,
)
VISION = dict(
    hidden_size=32,
    num_heads=2,
    intermediate_size=40,
    depth=4,
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
    out_hidden_size=24,
    num_position_embeddings=25,
    deepstack_visual_indexes=[0, 2],
)
THREE_LEVELS = dict(VISION, deepstack_visual_indexes=[0, 1, 3], hidden_size=24, num_heads=1)
NO_LEVELS = dict(VISION, deepstack_visual_indexes=[], num_position_embeddings=16)
# Vision settings, layers of the language model, patch grid. With 3 layers and 3 levels the last
# addition comes after the last layer, before the final norm.
CASES = {
    "wide": (VISION, 4, (4, 6)),
    "tall": (THREE_LEVELS, 3, (8, 2)),
    "plain": (NO_LEVELS, 2, (2, 2)),
}


def torch_config(vision: dict, layers: int, sections=(4, 2, 2), theta=5e6):
    rope = {
        "rope_type": "default",
        "rope_theta": theta,
        "mrope_section": list(sections),
        "mrope_interleaved": True,
    }
    text = dict(LANGUAGE, num_hidden_layers=layers, rope_parameters=rope)
    return transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=56,
    )


@functools.cache
def pair(case: str):
    """Torch model, our config and our model of one case."""
    vision, layers, _ = CASES[case]
    config = torch_config(vision, layers)
    model = randomize(transformers.Qwen3VLModel(config))
    cfg = Qwen3VLConfig.from_dict(config.to_dict(), "config.json")
    module = nnx.eval_shape(lambda: Qwen3VL(cfg, rngs=nnx.Rngs(0)))
    return model, cfg, fill(module, names(cfg), numpy_state(model, "model."))


def batch(cfg: Qwen3VLConfig, grid: tuple[int, int], seed: int = 0):
    """Texts with an image at different places, of different length; normalised patches."""
    random = np.random.default_rng(seed)
    count = cfg.vision.image_tokens(grid)
    rows = [
        [*random.integers(0, 50, before), START, *[IMAGE] * count, END, *random.integers(0, 50, n)]
        for before, n in ((0, 5), (6, 0), (2, 1))
    ]
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), max(lengths) + 2), 3)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    shape = (len(rows), grid[0] * grid[1], cfg.vision.patch_dim)
    return ids, lengths, random.normal(size=shape).astype(np.float32)


def torch_inputs(ids, lengths, patches, grid) -> dict:
    return dict(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(np.arange(ids.shape[1]) < lengths[:, None]).long(),
        pixel_values=torch.tensor(patches).reshape(-1, patches.shape[-1]),
        image_grid_thw=torch.tensor([[1, *grid]] * len(ids)),
        mm_token_type_ids=torch.tensor(ids == IMAGE).int(),
    )


def torch_states(model, inputs) -> list[np.ndarray]:
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    return [h.float().numpy() for h in out.hidden_states]


@functools.partial(fast_jit, static_argnames=("cfg", "grid", "hidden", "dtype"))
def run(vision, language, cfg, ids, lengths, patches, grid, hidden, dtype=jnp.float32):
    return encode(vision, language, cfg, ids, lengths, patches, grid, hidden=hidden, dtype=dtype)


@pytest.mark.parametrize("case", CASES)
def test_every_hidden_state_equals_transformers(case):
    model, cfg, ours = pair(case)
    grid = CASES[case][2]
    ids, lengths, patches = batch(cfg, grid)
    expected = torch_states(model, torch_inputs(ids, lengths, patches, grid))
    entries = (-2, -1, *range(len(expected)))
    forward = fast_jit(lambda m, *arrays: m(*arrays, grid, hidden=entries))
    states = forward(ours, ids, lengths, patches)
    for entry, state in zip(entries, states, strict=True):
        # Padding rows too: they see the real tokens and stand at position 0.
        assert relative_error(state, expected[entry]) <= TOLERANCE, f"hidden state {entry}"


@pytest.mark.parametrize("case", ["wide", "tall"])
def test_vision_blocks_merger_and_deepstack_equal_transformers(case):
    model, cfg, ours = pair(case)
    grid = CASES[case][2]
    _, _, patches = batch(cfg, grid, seed=1)
    count = len(patches)
    split = lambda t: t.numpy().reshape(count, -1, t.shape[-1])
    inputs = {}
    handles = [
        block.register_forward_hook(lambda m, a, out, i=i: inputs.update({i: (a[0], out)}))
        for i, block in enumerate(model.visual.blocks)
    ]
    with torch.no_grad():
        flat = torch.tensor(patches).reshape(-1, patches.shape[-1])
        out = model.visual(flat, grid_thw=torch.tensor([[1, *grid]] * count))
    for handle in handles:
        handle.remove()

    @fast_jit
    def parts(vision, patches, block_input, last):
        block = jax.tree.map(lambda a: a[1], vision.blocks)
        return (
            vision.embed(patches, grid, jnp.float32),
            block(block_input, *vision.rope(grid)),
            vision.merger(last),
            *vision(patches, grid),
        )

    embedded, block_output, merged_alone, merged, deepstack = parts(
        ours.vision, patches, split(inputs[1][0]), split(out.last_hidden_state)
    )
    assert relative_error(embedded, split(inputs[0][0])) <= TOLERANCE
    assert relative_error(block_output, split(inputs[1][1])) <= TOLERANCE
    assert relative_error(merged_alone, split(out.pooler_output)) <= TOLERANCE
    assert relative_error(merged, split(out.pooler_output)) <= TOLERANCE
    assert len(deepstack) == len(cfg.vision.deepstack)
    for level, found in enumerate(deepstack):
        expected = split(out.deepstack_features[level])
        assert relative_error(found, expected) <= TOLERANCE, f"level {level}"


@pytest.mark.parametrize("grid", [(48, 32), (20, 36), (2, 128), (4, 4), (94, 50)])
def test_position_interpolation_equals_transformers(grid):
    expected = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, *grid]]), 48, "bilinear", align_corners=True, spatial_merge_size=2
    )
    indices, weights = interpolation(grid, 2, 48)
    np.testing.assert_array_equal(indices, expected[0].numpy())
    assert np.abs(weights - expected[1].numpy()).max() <= 1e-6


def test_vision_rotary_coordinates_equal_transformers():
    from transformers.vision_utils import get_vision_position_ids

    for grid, merge in (((6, 4), 2), ((2, 10), 2), ((6, 9), 3)):
        expected = get_vision_position_ids(torch.tensor([[1, *grid]]), merge).numpy()
        np.testing.assert_array_equal(np.stack(patch_coordinates(grid, merge), -1), expected)


@pytest.mark.parametrize("grid", [(4, 6), (8, 2), (2, 2)])
def test_multi_axis_positions_equal_transformers(grid):
    model, cfg, _ = pair("wide")
    ids, lengths, patches = batch(cfg, grid)
    inputs = torch_inputs(ids, lengths, patches, grid)
    expected, _ = model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    found = mrope_positions(ids == IMAGE, lengths, (grid[0] // 2, grid[1] // 2))
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize(
    ("head_dim", "sections"),
    [(16, (4, 2, 2)), (128, (24, 20, 20)), (20, (4, 3, 3)), (14, (5, 2, 0))],
)
def test_interleaved_rotary_tables_equal_transformers(head_dim, sections):
    config = torch_config(VISION, 1, sections).text_config
    config.head_dim = head_dim
    module = transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextRotaryEmbedding(config)
    positions = np.random.default_rng(0).integers(0, 1000, (3, 2, 40))
    cos, sin = module(torch.zeros(()), torch.tensor(positions))
    for found, expected in zip(
        mrope(jnp.asarray(positions), head_dim, 5e6, sections), (cos, sin), strict=True
    ):
        # An angle of 1000 is itself rounded by up to 6e-5 in float32.
        assert np.abs(np.asarray(found) - expected[..., : head_dim // 2].numpy()).max() <= 1e-4


def test_another_language_model_takes_the_place_under_the_same_rotary_settings():
    vlm, cfg, ours = pair("wide")
    grid = CASES["wide"][2]
    text = transformers.Qwen3Config(
        **LANGUAGE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    encoder = randomize(transformers.Qwen3Model(text), seed=7)
    encoder_cfg = Qwen3Config.from_dict(text.to_dict(), "text_encoder/config.json")
    cfg.accept_language(encoder_cfg, "text_encoder/config.json")
    module = nnx.eval_shape(lambda: Qwen3(encoder_cfg, rngs=nnx.Rngs(0)))
    language = fill(module, qwen3.names(encoder_cfg), numpy_state(encoder, "model."))

    replaced = transformers.Qwen3VLModel(torch_config(*CASES["wide"][:2])).eval()
    replaced.visual.load_state_dict(vlm.visual.state_dict())
    replaced.language_model.load_state_dict(encoder.state_dict())
    ids, lengths, patches = batch(cfg, grid)
    expected = torch_states(replaced, torch_inputs(ids, lengths, patches, grid))
    (state,) = run(ours.vision, language, cfg, ids, lengths, patches, grid, (-2,))
    assert relative_error(state, expected[-2]) <= TOLERANCE


def test_a_language_model_of_other_sizes_is_refused():
    _, cfg, _ = pair("tall")
    small = Qwen3Config(40, 16, 44, 2, 4, 2, 8, 1e-6, 1e6, True)
    with pytest.raises(UserError) as caught:
        cfg.accept_language(small, "enc/config.json")
    assert len(caught.value.problems) == 4
    assert all(p.startswith("enc/config.json: ") for p in caught.value.problems)


def test_bfloat16_is_as_near_float32_as_torch_is():
    vision, layers, grid = CASES["wide"]
    config = torch_config(vision, layers)
    model = randomize(transformers.Qwen3VLModel(config), seed=5).to(torch.bfloat16)
    cfg = Qwen3VLConfig.from_dict(config.to_dict(), "config.json")
    ids, lengths, patches = batch(cfg, grid, seed=5)
    inputs = torch_inputs(ids, lengths, patches, grid)
    theirs = torch_states(model, inputs)
    module = nnx.eval_shape(lambda: Qwen3VL(cfg, rngs=nnx.Rngs(0)))
    ours = fill(module, names(cfg), numpy_state(model, "model."))
    exact = torch_states(model.float(), inputs)
    states = run(
        ours.vision, ours.language, cfg, ids, lengths, patches, grid, (-2, -1), jnp.bfloat16
    )
    for entry, state in zip((-2, -1), states, strict=True):
        assert state.dtype == jnp.bfloat16
        bound = 2 * relative_error(theirs[entry], exact[entry])
        assert relative_error(state, exact[entry]) <= bound, f"hidden state {entry}"


def test_grids_and_patches_that_disagree_are_refused():
    _, cfg, ours = pair("plain")
    patches = np.zeros((1, 6, cfg.vision.patch_dim), np.float32)
    for grid in ((2, 3), (2, 2), (0, 2)):
        with pytest.raises(ValueError, match="grid"), unchecked():
            ours.vision.embed(patches, grid, jnp.float32)


def published() -> dict:
    return json.loads((DATA / "qwen3_vl_4b.json").read_text())


def test_every_published_tensor_maps_once():
    cfg = Qwen3VLConfig.from_dict(published()["config"], "config.json")
    leaves = names(cfg)
    sources = [s for leaf in leaves for s in leaf.sources]
    ours = {s.name: list(s.shape) for s in sources}
    assert len(ours) == len(sources) == 713
    assert ours == {
        name.format(i): shape
        for name, (count, shape) in published()["tensors"].items()
        for i in range(count)
    }
    assert [s.name for s in unused(cfg)] == ["lm_head.weight"]
    module = nnx.eval_shape(lambda: Qwen3VL(cfg, rngs=nnx.Rngs(0)))
    flat = {".".join(p): v.shape for p, v in nnx.to_flat_state(nnx.state(module))}
    layers = {path: sum(x.path == path for x in leaves) for path in {x.path for x in leaves}}
    stacked = {
        leaf.path: leaf.shape if leaf.index is None else (layers[leaf.path], *leaf.shape)
        for leaf in leaves
    }
    assert stacked == flat


def test_published_config_is_read_and_survives_transformers_5():
    old = Qwen3VLConfig.from_dict(published()["config"], "config.json")
    resaved = transformers.Qwen3VLConfig(**published()["config"]).to_dict()
    assert old == Qwen3VLConfig.from_dict(resaved, "config.json")
    assert old.mrope_sections == (24, 20, 20)
    assert (old.text.rope_theta, old.text.hidden_size, old.image_token_id) == (5e6, 2560, 151655)
    assert old.vision.deepstack == (5, 11, 17)
    assert (old.vision.patch_dim, old.vision.image_tokens((32, 48))) == (1536, 384)


@pytest.mark.parametrize(
    ("part", "changes", "word"),
    [
        (None, dict(model_type="qwen2_vl"), "model_type is 'qwen2_vl'"),
        (None, dict(image_token_id=None), "image_token_id is missing"),
        (None, dict(image_token_id=151936), "below vocab_size"),
        (None, dict(text_config=None), "text_config is missing"),
        (None, dict(vision_config=[]), "vision_config is []"),
        ("text_config", dict(hidden_size=2048), "out_hidden_size"),
        ("text_config", dict(num_hidden_layers=2), "deepstack_visual_indexes has 3"),
        ("text_config", dict(head_dim=64), "mrope_section"),
        ("text_config", dict(attention_bias=True), "attention_bias"),
        ("text_config", dict(rope_scaling=None), "mrope_section is missing"),
        (
            "text_config",
            dict(rope_scaling={"mrope_section": [24, 20, 20], "mrope_interleaved": False}),
            "mrope_interleaved is false",
        ),
        (
            "text_config",
            dict(rope_scaling={"mrope_section": [30, 30, 4], "mrope_interleaved": True}),
            "interleaves as",
        ),
        ("vision_config", dict(hidden_act="gelu"), "hidden_act"),
        ("vision_config", dict(depth=None), "depth is missing"),
        ("vision_config", dict(depth=17), "stay below depth"),
        ("vision_config", dict(deepstack_visual_indexes=[5, 5]), "must grow"),
        ("vision_config", dict(deepstack_visual_indexes="5"), "deepstack_visual_indexes is '5'"),
        ("vision_config", dict(num_heads=3), "multiple of 4 num_heads"),
        ("vision_config", dict(num_position_embeddings=2303), "not a square"),
        ("vision_config", dict(rope_parameters={"rope_theta": 5.0}), "rope_parameters"),
    ],
)
def test_each_unsupported_field_is_named(part, changes, word):
    config = published()["config"]
    (config[part] if part else config).update(changes)
    with pytest.raises(UserError) as caught:
        Qwen3VLConfig.from_dict(config, "vlm/config.json")
    assert any(word in p for p in caught.value.problems), caught.value.problems
    assert all(p.startswith("vlm/config.json") for p in caught.value.problems)
