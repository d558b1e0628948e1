"""The Qwen3 text encoder against transformers."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from conftest import relative_error
from fill import fill
from flax import nnx

from dopsd_jax.common.errors import UserError
from dopsd_jax.models.layers import scan_blocks, scan_range
from dopsd_jax.models.qwen3 import Qwen3, Qwen3Config, inverse_frequencies, names, unused

DATA = pathlib.Path(__file__).parent / "data"
TOLERANCE = 1e-5
# Small programs run once: most of the time would go into the compiler's optimisations.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# Grouped heads with a head size that is not hidden / heads; one key-value head; no grouping.
GROUPED = dict(hidden_size=24, head_dim=10, num_attention_heads=4, num_key_value_heads=2)
SINGLE = dict(hidden_size=40, head_dim=16, num_attention_heads=3, num_key_value_heads=1)
PLAIN = dict(hidden_size=32, head_dim=8, num_attention_heads=4, num_key_value_heads=4)


def torch_config(sizes: dict, theta: float = 1e6, **more) -> transformers.Qwen3Config:
    return transformers.Qwen3Config(
        vocab_size=60,
        intermediate_size=44,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        rms_norm_eps=1e-6,
        **({"num_hidden_layers": 4} | sizes),
        **more,
    )


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights large enough that every part changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if "norm" in name and p.ndim == 1 else 0.2 * noise)
    return module.eval()


def numpy_state(module: torch.nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """The state dict in numpy, each tensor in its own type."""

    def array(t):
        if t.dtype == torch.bfloat16:
            return t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return t.numpy()

    return {f"{prefix}{k}": array(v.detach()) for k, v in module.state_dict().items()}


def reference(sizes: dict, seed: int = 0, **more) -> tuple[transformers.Qwen3Model, Qwen3Config]:
    config = torch_config(sizes, **more)
    model = randomize(transformers.Qwen3Model(config), seed)
    return model, Qwen3Config.from_dict(config.to_dict(), "config.json")


def build(cfg: Qwen3Config, tensors: dict[str, np.ndarray], **settings) -> Qwen3:
    module = nnx.eval_shape(lambda: Qwen3(cfg, **settings, rngs=nnx.Rngs(0)))
    return fill(module, names(cfg), tensors)


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, 60, (3, 11))
    return ids, np.array([11, 4, 1])


@functools.partial(fast_jit, static_argnames=("hidden", "dtype"))
def run(language, ids, lengths, hidden, dtype=jnp.float32):
    return language(ids, lengths, hidden=hidden, dtype=dtype)


def torch_states(model, ids, lengths) -> list[np.ndarray]:
    mask = torch.tensor(np.arange(ids.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        out = model(torch.tensor(ids), attention_mask=mask, output_hidden_states=True)
    return [h.float().numpy() for h in out.hidden_states]


@pytest.mark.parametrize("sizes", [GROUPED, SINGLE, PLAIN], ids=["grouped", "single", "plain"])
def test_every_hidden_state_equals_transformers_padding_rows_included(sizes):
    model, cfg = reference(sizes)
    ids, lengths = batch()
    expected = torch_states(model, ids, lengths)
    language = build(cfg, numpy_state(model, "model."))
    entries = (-1, 0, 1, 3, -2, 4)
    states = run(language, ids, lengths, entries)
    for entry, state in zip(entries, states, strict=True):
        assert relative_error(state, expected[entry]) <= TOLERANCE, f"hidden state {entry}"


def test_attention_and_feed_forward_equal_transformers_alone():
    model, cfg = reference(GROUPED, seed=1)
    language = build(cfg, numpy_state(model, "model."))
    x = np.random.default_rng(0).normal(size=(2, 9, cfg.hidden_size)).astype(np.float32)
    tx, theirs = torch.tensor(x), model.layers[2]
    layer = jax.tree.map(lambda a: a[2], language.layers)
    angles = np.arange(9)[None, :, None] * inverse_frequencies(cfg.head_dim, cfg.rope_theta)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    with torch.no_grad():
        rope = model.rotary_emb(tx, torch.arange(9)[None])
        attended = theirs.self_attn(tx, rope, attention_mask=None)[0].numpy()
        fed = theirs.mlp(tx).numpy()
    half = cfg.head_dim // 2
    assert relative_error(cos, rope[0][..., :half]) <= TOLERANCE
    assert relative_error(sin, rope[1][..., :half]) <= TOLERANCE
    lengths = jnp.full((2,), 9)
    parts = fast_jit(lambda layer, x: (layer.attention(x, lengths, cos, sin), layer.ffn(x)))
    ours_attended, ours_fed = parts(layer, x)
    assert relative_error(ours_attended, attended) <= TOLERANCE
    assert relative_error(ours_fed, fed) <= TOLERANCE


@pytest.mark.parametrize(("dim", "theta"), [(128, 1e6), (128, 5e6), (32, 1e4)])
def test_frequencies_of_the_published_models_equal_torch(dim, theta):
    expected = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    np.testing.assert_array_max_ulp(inverse_frequencies(dim, theta), expected.numpy(), maxulp=2)


def test_padding_does_not_change_the_real_rows():
    model, cfg = reference(GROUPED)
    language = build(cfg, numpy_state(model, "model."))
    ids, lengths = batch()
    padded = run(language, ids, lengths, (-2, 2))
    alone = run(language, ids[1:2, :4], lengths[1:2], (-2, 2))
    for some, one in zip(padded, alone, strict=True):
        assert relative_error(some[1:2, :4], one) <= 1e-6


def test_only_the_layers_needed_are_run():
    _, cfg = reference(GROUPED)
    language = nnx.eval_shape(lambda: Qwen3(cfg, rngs=nnx.Rngs(0)))
    ids, lengths = batch()
    for hidden, layers in (((-2, 2), 3), ((1,), 1), ((0,), 0), ((-1, 0), 4)):
        jaxpr = jax.make_jaxpr(lambda m, h=hidden: m(ids, lengths, hidden=h))(language)
        scans = [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]
        assert sum(scans) == layers, hidden


def test_stacked_weights_are_not_copied_to_stop_early():
    config = torch_config(dict(PLAIN, hidden_size=256, num_hidden_layers=12))
    cfg = Qwen3Config.from_dict(config.to_dict(), "config.json")
    language = nnx.eval_shape(lambda: Qwen3(cfg, rngs=nnx.Rngs(0)))
    ids, lengths = batch()
    memory = run.lower(language, ids, lengths, (-2,)).compile().memory_analysis()
    weights = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(language.layers))
    assert memory.temp_size_in_bytes < weights / 3


def test_an_entry_the_model_lacks_is_refused():
    model, cfg = reference(GROUPED)
    language = build(cfg, numpy_state(model, "model."))
    ids, lengths = batch()
    for hidden in ((5,), (-6,), ()):
        with pytest.raises(ValueError, match="4-layer"):
            language(ids, lengths, hidden=hidden)


def test_scanned_range_equals_a_loop_under_every_remat():
    model, cfg = reference(PLAIN)
    layers = build(cfg, numpy_state(model, "model.")).layers
    x = np.random.default_rng(0).normal(size=(1, 5, cfg.hidden_size)).astype(np.float32)
    apply = lambda layer, x: layer.ffn(x)

    @fast_jit
    def everything(layers, x):
        loop = x
        for i in (1, 2):
            loop = apply(jax.tree.map(lambda a, i=i: a[i], layers), loop)
        remats = ("none", "dots", "full", "unrolled")
        return (
            loop,
            scan_blocks(apply, layers, x),
            [
                (scan_range(apply, layers, x, 1, 3, r), scan_range(apply, layers, x, 0, 4, r))
                for r in remats
            ],
        )

    loop, whole, found = everything(layers, x)
    for some, all_layers in found:
        assert relative_error(some, loop) <= 1e-6
        assert relative_error(all_layers, whole) <= 1e-6
    with pytest.raises(ValueError, match="remat"):
        scan_range(apply, layers, x, 0, 4, "some")


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_bfloat16_is_as_near_float32_as_torch_is(stored):
    model, cfg = reference(GROUPED, seed=3)
    model = model.to(torch.bfloat16)
    ids, lengths = batch(3)
    theirs = torch_states(model, ids, lengths)
    tensors = numpy_state(model, "model.")
    exact = torch_states(model.float(), ids, lengths)
    if stored == "float32":
        tensors = {k: v.astype(np.float32) for k, v in tensors.items()}
    language = build(cfg, tensors)
    states = run(language, ids, lengths, (-2, -1), jnp.bfloat16)
    for entry, state in zip((-2, -1), states, strict=True):
        assert state.dtype == jnp.bfloat16
        bound = 2 * relative_error(theirs[entry], exact[entry])
        assert relative_error(state, exact[entry]) <= bound, f"hidden state {entry}"


@pytest.mark.parametrize("file", ["qwen3_4b.json", "qwen3_8b.json"])
def test_every_published_tensor_maps_once(file):
    published = json.loads((DATA / file).read_text())
    cfg = Qwen3Config.from_dict(published["config"], file)
    sources = [s for leaf in names(cfg) for s in leaf.sources]
    sources += [] if cfg.tied else unused(cfg)
    ours = {s.name: list(s.shape) for s in sources}
    assert len(ours) == len(sources)
    assert ours == {
        name.format(i): shape
        for name, (count, shape) in published["tensors"].items()
        for i in range(count)
    }
    module = nnx.eval_shape(lambda: Qwen3(cfg, rngs=nnx.Rngs(0)))
    flat = {".".join(p): v.shape for p, v in nnx.to_flat_state(nnx.state(module))}
    stacked = {
        leaf.path: leaf.shape if leaf.index is None else (cfg.num_layers, *leaf.shape)
        for leaf in names(cfg)
    }
    assert stacked == flat


def test_config_of_both_transformers_generations_is_read_alike():
    published = json.loads((DATA / "qwen3_4b.json").read_text())["config"]
    old = Qwen3Config.from_dict(published, "config.json")
    new = Qwen3Config.from_dict(transformers.Qwen3Config(**published).to_dict(), "config.json")
    assert old == new
    assert (old.rope_theta, old.tied, old.num_layers, old.head_dim) == (1e6, True, 36, 128)


def faulty(**changes) -> dict:
    config = json.loads((DATA / "qwen3_4b.json").read_text())["config"] | changes
    return {k: v for k, v in config.items() if v is not Ellipsis}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(model_type="qwen2"), "model_type is 'qwen2'"),
        (dict(attention_bias=True), "attention_bias is true"),
        (dict(use_sliding_window=True), "use_sliding_window is true"),
        (dict(layer_types=["sliding_attention"]), "layer_types"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn"),
        (dict(rope_scaling={"factor": 4.0}), "factor"),
        (dict(rope_scaling="yarn"), "rope_scaling"),
        (dict(rope_theta=...), "rope_theta is missing"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), "linear"),
        (dict(rope_theta=..., rope_parameters={"rope_type": "default"}), "rope_theta is missing"),
        (dict(rope_parameters={"rope_type": "default", "rope_theta": 3.0}), "differ"),
        (dict(rope_parameters=3), "rope_parameters is 3"),
        (dict(head_dim=127), "even"),
        (dict(head_dim=0), "head_dim is 0"),
        (dict(num_hidden_layers=True), "num_hidden_layers is true"),
        (dict(vocab_size="big"), "vocab_size is 'big'"),
        (dict(num_key_value_heads=5), "multiple"),
        (dict(rms_norm_eps=-1), "rms_norm_eps"),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings"),
    ],
)
def test_each_unsupported_field_is_named(changes, word):
    with pytest.raises(UserError) as caught:
        Qwen3Config.from_dict(faulty(**changes), "enc/config.json")
    (problem,) = caught.value.problems
    assert problem.startswith("enc/config.json") and word in problem


def test_all_faults_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        Qwen3Config.from_dict(faulty(hidden_size=..., head_dim=..., hidden_act="relu"), "c.json")
    assert len(caught.value.problems) == 3
    with pytest.raises(UserError, match="not a JSON object"):
        Qwen3Config.from_dict(["list"], "c.json")
