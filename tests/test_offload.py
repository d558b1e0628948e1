"""A frozen network in the host's memory, fetched layer by layer: offload=base."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_cards import SMALL, filled
from test_estimate import CASE, load_config, needs_libtpu

from dopsd_jax import families
from dopsd_jax.common.errors import UserError
from dopsd_jax.config import loading, schema
from dopsd_jax.estimation import (
    abstract_step,
    compiled_step,
    counted_step,
    memory,
    remedies,
    tpu_topologies,
)
from dopsd_jax.models import zimage_config
from dopsd_jax.models.layers import Dense, scan_blocks, stack
from dopsd_jax.parallel import sharding
from dopsd_jax.run import build

HOST = jax.memory.Space.Host


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def flat(base):
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(base)}


def on_host(base):
    found = flat(base).items()
    return {path for path, leaf in found if leaf[...].sharding.memory_kind == sharding.HOST}


def stacks(base):
    """Every kernel of a layer."""
    return {p for p, leaf in flat(base).items() if leaf.ndim == 3 and p.endswith(".kernel")}


@functools.cache
def steps(name, **changes):
    """Two steps from the same arrays: (state, metrics, base)."""
    config = loading.load(f"{name}:random", {"batch_size": 2, "remat": "full", **changes})
    family, mesh = families.load(name), sharding.make_mesh({"data": 1}, jax.devices()[:1])
    rows = (32, 64) if name == "zimage" else family.ROWS
    case = abstract_step.Workload(
        family, SMALL[name], height=32, width=32, rows_student=rows[0], rows_teacher=rows[1]
    )
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        program = abstract_step.make_program(config, case, mesh, "cpu")
        plan = program.plan
        fill = lambda tree: jax.tree.map(lambda x: filled(x, rng), tree)
        base, student, batch = map(fill, (program.base, plan.abstract_state.student, program.batch))
        state = plan.initial_state(student)
        for number in range(2):
            state, metrics = plan.step(state, base, batch, number, latent=program.latent)
    return state, metrics, base


@pytest.mark.parametrize(
    ("name", "base_dtype", "kind"),
    [("zimage", "float32", "lora"), ("flux2_klein", "bfloat16", "lokr")],
)
def test_a_step_gives_the_very_same_numbers(name, base_dtype, kind):
    """Families, types of the base and kinds of adapters, each once."""
    own = {"base_dtype": base_dtype, "lora.kind": kind}
    state, metrics, base = steps(name, **own)
    moved, same, away = steps(name, **own, offload="base")
    assert kinds(base) == kinds(moved) != {sharding.HOST}
    assert on_host(away) == stacks(away)
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, (state, metrics), (moved, same))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_layers_are_fetched_again_for_the_backward_pass(remat):
    """What waits for it on the device is no matrix of a layer."""
    make = lambda rngs: nnx.Dict(block=nnx.Dict(attention=nnx.Dict(out=Dense(64, 64, rngs=rngs))))
    blocks = stack(make, 3, nnx.Rngs(0))
    graphdef, state = nnx.split(blocks)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    places = sharding.state_shardings(state, mesh, away=True)
    kept = {}

    def backward(state, x, remat):
        apply = lambda block, x: jnp.sin(block.block.attention.out(x))
        loss = lambda x: scan_blocks(apply, nnx.merge(graphdef, state), x, remat).sum()
        _, pull = jax.vjp(loss, x)
        kept[remat] = [jax.typeof(leaf) for leaf in jax.tree.leaves(pull)]
        return pull(jnp.float32(1))

    away = jax.device_put(state, places)
    lower = lambda remat: jax.jit(backward, static_argnums=2).lower(away, jnp.ones((2, 64)), remat)
    lower(remat)
    matrices = lambda kept: [
        x for x in kept if x.ndim > 1 and x.size >= 64 * 64 and x.memory_space != HOST
    ]
    assert kept[remat] and not matrices(kept[remat])
    lower("none")
    assert matrices(kept["none"]), "which is why it is refused"


@pytest.mark.parametrize("base_dtype", ["bfloat16", "float32"])
def test_a_model_is_loaded_there_and_predicts_the_same(tmp_path_factory, base_dtype):
    folder = tmp_path_factory.getbasetemp() / "random_for_offload"
    folder.mkdir(exist_ok=True)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])

    def run(**changes):
        own = {"remat": "full", "base_dtype": base_dtype, **changes}
        pipe, _ = build.open_pipeline(loading.load("zimage:random", own), folder, mesh)
        context = pipe.family.collate(
            [{"features": np.ones((9, pipe.config.caption_dim), np.float32)}]
        )
        noise = np.random.default_rng(0).standard_normal((1, 8, 8, pipe.config.channels))
        return pipe, pipe.velocity(jnp.asarray(noise, jnp.float32), 0.7, context)

    (here, expected), (there, found) = run(), run(offload="base")
    np.testing.assert_array_equal(found, expected)
    base = there.split[2]
    assert on_host(base) == stacks(base) != set()
    jax.tree.map(np.testing.assert_array_equal, base, here.split[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "full", "base_dtype": "float32"}, "config.offload: names the base, the frozen"),
        ({"base_dtype": "nf4"}, "fetched one by one only in bfloat16 or float32, not in nf4; set"),
        ({"remat": "none"}, "config.offload: names the base, but config.remat = none keeps"),
        ({"remat": "unrolled"}, "names the base, but config.remat = unrolled keeps all its layers"),
    ],
)
def test_where_it_means_nothing_it_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        schema.check(loading.load("zimage:random", {"offload": "base", "remat": "full"} | changes))


def test_the_account_has_the_layers_on_the_host_and_two_of_them_on_the_device():
    config = loading.load("zimage:lora", {"batch_size": 1, "base_dtype": "bfloat16"})
    family, size, *_ = abstract_step.find_network(config, full_size=True)
    case = abstract_step.Workload(
        family, size, height=1024, width=1024, rows_student=512, rows_teacher=1024
    )
    gpu = counted_step.find_gpu("16GB")
    plain = counted_step.count_step(config, case, gpu)
    assert not plain.fits
    (offered,) = [r for r in remedies.advise(config, case, plain)[0] if "offload" in r.fields
                  and "base" in r.fields["offload"]]  # fmt: skip
    with config.unlocked():
        config.update_from_flattened_dict(offered.fields)
    found = counted_step.count_step(config, case, gpu)
    assert found.fits and found.needed == offered.needed
    moved = found.account.host["base"]
    assert moved > 0.99 * plain.account.live["base"]
    assert found.account.live["base"] + moved == plain.account.live["base"]
    layers = size.layers + 2 * size.refiner_layers
    assert found.account.fetched == pytest.approx(2 * moved / layers, rel=0.02)
    assert plain.needed - found.needed == moved - found.account.fetched


def test_a_chain_of_remedies_keeps_what_is_on_the_host():
    own = {"batch_size": 1, "remat": "full", "moments_dtype": "bfloat16", "lora.rank": 16}
    own |= {"data.resolution": 32, "mesh.data": 1, "base_dtype": "bfloat16"}
    config, everything = load_config("random", **own), "teacher,optimizer,base"
    report = compiled_step.Report(
        device_kind="cpu", mesh=dict.fromkeys(sharding.AXES, 1), attention="xla", images=1,
        account=None, work=None, capacity=None,
    )  # fmt: skip
    need = remedies.Pricing(config, CASE, report).needed
    away, less = (need({"offload": parts}) for parts in (everything, "teacher,optimizer"))
    report = dataclasses.replace(report, capacity=away)
    _, together, _ = remedies.advise(config, CASE, report)
    assert [r.fields["offload"] for r in together] == [everything]
    assert together[0].needed <= away < less


@pytest.mark.parametrize(
    "own",
    [
        {"base_dtype": "float32"},
        {"base_dtype": "int8", "moments_dtype": "bfloat16"},
        {"base_dtype": "bfloat16", "remat": "dots", "offload": "teacher,optimizer,base"},
    ],
)
def test_all_that_is_advised_is_a_configuration_that_can_be_run(own, monkeypatch):
    """Also the changes together, where the last ones do not go with the first."""
    config = load_config("random", **{"remat": "none", "batch_size": 2} | own)
    report = compiled_step.Report(
        device_kind="TPU v6 lite", mesh=dict.fromkeys(sharding.AXES, 1), attention="xla",
        images=2, account=None, work=None, capacity=1,
    )  # fmt: skip
    last, prices = {"optimizer": "adafactor"}, [2.0**40]
    last |= {} if config.offload else {"offload": "teacher,optimizer,base"}

    def needed(self, fields, devices=None):  # each change helps, and the last one is enough
        prices.append(0.9 * prices[-1])
        return 1 if fields.items() >= last.items() else prices[-1]

    monkeypatch.setattr(remedies.Pricing, "needed", needed)
    single, together, _ = remedies.advise(config, CASE, report)
    joined = {name: value for remedy in together for name, value in remedy.fields.items()}
    assert joined.items() >= last.items()
    assert joined.get("base_dtype", config.base_dtype) == "bfloat16"
    for fields in (joined, *(remedy.fields for remedy in single)):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(fields)
        schema.check(changed)


def test_a_report_tells_where_the_base_is():
    config = load_config("random", remat="full", offload="base")
    report = compiled_step.compile_step(config, CASE, jax.devices()[:1])
    assert report.account.host.keys() == {"base"} and report.needed > report.account.lasting
    assert memory.HOST == "pinned_host"


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.slow
def test_the_tpu_compiler_keeps_no_more_than_a_few_layers():
    """Twice the layers: twice the base on the host, nearly the same memory on the device."""

    def needed(layers, **changes):
        size = zimage_config.ZImageConfig(
            dim=768, layers=layers, refiner_layers=1, heads=6, caption_dim=64,
            axes_dims=(32, 48, 48),
        )  # fmt: skip
        case = abstract_step.Workload(
            families.load("zimage"), size, height=128, width=128, rows_student=32, rows_teacher=64
        )
        own = {"lora.rank": 4, "lora.alpha": 8.0, "batch_size": 1}
        with jax.default_matmul_precision("default"):
            devices = tpu_topologies.devices("v5e-1")
            return compiled_step.compile_step(load_config(**own, **changes), case, devices)

    plain = needed(24)
    few, many = needed(12, offload="base"), needed(24, offload="base")
    assert many.needed < plain.needed / 2
    more = many.account.host["base"] - few.account.host["base"]
    assert many.needed - few.needed < more / 4
