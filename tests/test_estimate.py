"""The step compiles for devices that are not here, at its true size, and says what it needs."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from conftest import run_program
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from dopsd_jax import estimate
from dopsd_jax.common.errors import UserError
from dopsd_jax.estimation import (
    abstract_step,
    collectives,
    compiled_step,
    flops,
    memory,
    tpu_topologies,
)
from dopsd_jax.families.zimage import family
from dopsd_jax.models import attention, zimage, zimage_config
from dopsd_jax.parallel import sharding

ROOT = pathlib.Path(__file__).parents[1]
TINY = zimage_config.ZImageConfig(
    dim=32, layers=2, refiner_layers=1, heads=2, caption_dim=8, axes_dims=(4, 6, 6)
)
CASE = abstract_step.Workload(family, TINY, height=32, width=48, rows_student=32, rows_teacher=64)
PUBLISHED = zimage_config.ZImageConfig()
FULL_SIZE = abstract_step.Workload(
    family, PUBLISHED, height=1024, width=1024, rows_student=512, rows_teacher=1024
)
GIB = 2**30

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
)


def load_config(name=None, **changes):
    spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / "zimage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(name)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def local_report():
    config = load_config("random")
    return config, compiled_step.compile_step(config, CASE, jax.devices()[:1])


def test_a_report_counts_what_the_state_holds(local_report):
    config, report = local_report
    net = nnx.eval_shape(lambda: zimage.ZImage(TINY, rngs=nnx.Rngs(0)))
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(net)))
    scales = 7 * 4 * (TINY.layers + 2 * TINY.refiner_layers)  # float32, one a layer and part
    live = report.account.live
    assert live["base"] == 4 * parameters + scales
    assert live["adapters"] == live["teacher"] > 0
    assert live["optimizer"] == 2 * live["adapters"] + 2 * 4  # and two counters
    rows = CASE.rows_student + CASE.rows_teacher
    # Beside the rows: both lengths, and where the teacher's picture stands.
    assert live["batch"] == 4 * config.batch_size * (rows * TINY.caption_dim + 2 + 2)
    assert report.temporaries > 0
    assert report.needed == sum(live.values()) + report.temporaries
    assert report.fits and report.sent == collectives.Collectives({}, 0, {})


def test_a_report_reads_well(local_report):
    config, report = local_report
    text = "\n".join(estimate.describe(report, config, CASE))
    assert "1 x cpu: data 1, fsdp 1, context 1, tensor 1" in text
    assert "lora rank 8, 2 images a step of 32 x 48, captions of 32 and 64 rows" in text
    assert text.endswith("fits")


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, 4 * 4),  # master, teacher, two moments, of four bytes
        ({"moments_dtype": "bfloat16"}, 4 + 4 + 2 + 2),
        ({"teacher.weights": "live"}, 4 + 2 * 4),
        ({"anchor.share": 0.25}, 5 * 4),  # and the start
        ({"anchor.share": 0.25, "teacher.weights": "frozen"}, 4 * 4),
        ({"offload": "teacher,optimizer"}, 4),
    ],
)
def test_the_account_of_a_full_run(changes, state):
    """Bytes a parameter, split over eight devices that there need not be."""
    sizes = {"batch_size": 8, "mesh.data": 2, "mesh.fsdp": 4}
    config = load_config("random_full", **sizes, **changes)
    mesh = AbstractMesh((2, 4, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    found = memory.count(config, abstract_step.make_program(config, CASE, mesh, "cpu"), mesh)
    split = sum(n for kind, n in found.live.items() if kind != "batch")
    # Vectors are not split.
    assert (
        state * flops.parameters(family, TINY) / 4
        <= split
        < 1.5 * state * flops.parameters(family, TINY) / 4
    )
    held = sum(found.host.values())
    assert held / split == pytest.approx(3 if "offload" in changes else 0, rel=0.01)


@pytest.mark.slow
def test_a_sum_over_micro_batches_is_held_beside_their_gradients():
    """Compiled, of a network whose backward pass needs more than the optimizer's update."""
    net = dataclasses.replace(TINY, dim=192, layers=4, heads=3, axes_dims=(16, 24, 24))
    case = dataclasses.replace(CASE, size=net, height=512, width=512)

    def compiled(**changes):
        config = load_config("random_full", batch_size=1, remat="full", **changes)
        return compiled_step.compile_step(config, case, jax.devices()[:1])

    alone = compiled()
    for changes in ({"accumulate": 2}, {"anchor.share": 0.25}):
        found, gradient = compiled(**changes), alone.account.gradient
        beyond = lambda report: report.account.total - report.account.lasting
        assert beyond(found) - beyond(alone) == gradient
        assert found.temporaries - alone.temporaries == pytest.approx(gradient, rel=0.1)


def test_what_does_not_fit_is_explained(local_report, monkeypatch):
    config = load_config("random", **{"batch_size": 3, "remat": "none"})
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
        "space hbm. Used 40.71G of 31.25G hbm. Exceeded hbm capacity by 9.46G.\n\nTotal: ..."
    )
    failing = lambda self, **given: (_ for _ in ()).throw(jax.errors.JaxRuntimeError(message))
    monkeypatch.setattr(jax.stages.Lowered, "compile", failing)
    report = compiled_step.compile_step(config, CASE, jax.devices()[:1])
    assert not report.fits and report.needed == int(40.71 * GIB)
    assert any(
        "Used 40.71G of 31.25G hbm" in line for line in estimate.describe(report, config, CASE)
    )


def test_other_compiler_errors_are_not_swallowed(monkeypatch):
    failing = lambda self, **given: (_ for _ in ()).throw(
        jax.errors.JaxRuntimeError("INTERNAL: a bug")
    )
    monkeypatch.setattr(jax.stages.Lowered, "compile", failing)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compiled_step.compile_step(load_config("random"), CASE, jax.devices()[:1])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"height": 40}, "--height: 40 must be a multiple of 16, from 16 to 8192"),
        ({"width": 8208}, "--width: 8208 must be a multiple of 16"),
        ({"rows_student": 33}, "--student_rows: 33 must be a multiple of 32, from 32 to 1504"),
        ({"rows_teacher": 1536}, "--teacher_rows: 1536 must be a multiple of 32"),
        ({"references": 2}, "--references: 2: models of the family zimage edit no pictures"),
    ],
)
def test_an_impossible_case_is_refused(case, message):
    fields = {**vars(CASE), **case}
    with pytest.raises(UserError, match=message):
        compiled_step.compile_step(
            load_config("random"), abstract_step.Workload(**fields), jax.devices()[:1]
        )


def test_an_impossible_mesh_is_refused():
    config = load_config("random", **{"mesh.data": 1, "mesh.fsdp": 3})
    with pytest.raises(UserError, match=r"config\.mesh: data 1 x fsdp 3"):
        compiled_step.compile_step(config, CASE, jax.devices()[:1])


def test_sizes_come_from_the_folder_or_are_the_published_ones(tmp_path):
    published = zimage_config.ZImageConfig()

    def size(model, full_size=False):
        return abstract_step.find_network(load_config(model=model), full_size)[1]

    assert size("Tongyi-MAI/Z-Image-Turbo") == size(str(tmp_path), True) == published
    with pytest.raises(UserError, match="not a model folder"):
        size(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        size(str(tmp_path / "nowhere"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(TINY.to_dict()))
    klein = load_config(None, family="flux2_klein", model="black-forest-labs/FLUX.2-klein-9B")
    assert flops.parameters(*abstract_step.find_network(klein, True)[:2]) == 9_078_581_248
    assert size(str(tmp_path)) == TINY and size("random").dim < 512


def test_cells_of_the_latent_are_those_of_the_models_autoencoder():
    tiny = load_config("tiny")
    vae = json.loads((pathlib.Path(tiny.model) / "vae" / "config.json").read_text())
    halvings = len(vae["block_out_channels"]) - 1
    for full_size, side in ((False, 64 >> halvings), (True, 64 // family.LATENT_FACTOR)):
        network = abstract_step.find_network(tiny, full_size)
        rows = {"rows_student": 32, "rows_teacher": 32, "factor": network.factor}
        case = abstract_step.Workload(network.family, network.size, 64, 64, **rows)
        assert case.latent == (side, side)


def test_without_the_tpu_compiler_one_line_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the TPU compiler, libtpu, which this Python does"):
        tpu_topologies.devices("v5p:2x2x1")


@pytest.mark.parametrize(
    ("preset", "options", "counted"),
    [("tiny_edit", [], 1), ("tiny_edit", ["--references=2"], 2), ("tiny", [], 0)],
)
def test_rows_that_edit_are_counted_with_a_reference(preset, options, counted):
    config = f"--config=configs/flux2_klein.py:{preset}"
    done = run_program("estimate", config, "--device=24GB", *options)
    assert done.returncode == 0, done.stderr
    assert f", {counted} references;" in done.stdout


@pytest.mark.slow
def test_the_program_runs():
    done = run_program(
        "estimate", "--config=configs/zimage.py:random", "--student_rows=32", "--teacher_rows=32",
        "--height=32", "--width=32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "network: the random model" in done.stdout and "compiled in" in done.stdout
    options = "--config=configs/zimage.py:random", "--config.attention=splash"
    done = run_program("estimate", *options)
    assert done.returncode == 2 and done.stdout.count("\n") == 1
    assert done.stderr.strip() == (
        "error: config.attention: splash needs a TPU, and this is cpu; and a head size that 128 "
        "divides, and the model's is 16; set config.attention to auto or xla"
    )


@pytest.mark.slow
def test_a_size_of_the_data_that_cannot_be_is_told_by_the_field_that_says_it():
    options = "--config=configs/zimage.py:random", "--config.data.buckets=64x64,100x64"
    done = run_program("estimate", *options)
    assert done.returncode == 2
    assert done.stderr == (
        "error: data.buckets: 100x64: 100 is not a multiple of 16; use 96 or 112\n"
    )


MODULE = """HloModule jit_step, entry_computation_layout={()->f32[]}

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%inner_body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %gather = bf16[4,8]{1,0:T(8,128)} all-gather(%x), channel_id=1, dimensions={0}
  ROOT %t = (s32[], /*index=1*/bf16[4,8]{1,0}) tuple(%i, %gather)
}

%inner_condition (p: (s32[], bf16[4,8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(3), metadata={stack_frame_id=9}
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}

%outer_body (p: (s32[], f32[10])) -> (s32[], f32[10]) {
  %w = (s32[], bf16[4,8]{1,0}) while(%init), condition=%inner_condition, body=%inner_body
  %r = (f32[10]{0}, f32[2,5]{1,0}) all-reduce(%y, %z), channel_id=2, to_apply=%sum
  ROOT %t2 = (s32[], f32[10]{0}) tuple(%i, %q)
}

%outer_condition (p: (s32[], f32[10])) -> pred[] {
  ROOT %c = pred[] fusion(%i), kind=kLoop, calls=%compare
}

%compare (i: s32[]) -> pred[] {
  ROOT %lt2 = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[10]) -> f32[] {
  %w2 = (s32[], f32[10]{0}) while(%init2), condition=%outer_condition, body=%outer_body%KNOWN%
  %s = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%u), channel_id=3, dimensions={0}
  %d = bf16[4,8]{1,0} all-gather-done(%s)
  %m = (f32[6]{0}, f32[6]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%v)
  ROOT %out = f32[] constant(0)
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    found = collectives.collectives(MODULE.replace("%KNOWN%", known))
    assert found.unknown_loops == 0
    assert found.traffic == {
        "all-gather": collectives.Traffic(5 * 3 + 1, (5 * 3 + 1) * 64),
        "all-reduce": collectives.Traffic(5, 5 * 80),
        "collective-permute": collectives.Traffic(1, 24),
    }


def test_a_fused_reduce_scatter_is_no_all_reduce():
    """As a TPU writes it: the all-reduce in the fusion is never done whole."""
    found = collectives.collectives("""
%all-reduce-scatter.4 (input.5: bf16[16,64]) -> bf16[16,16] {
  %all-reduce.3 = bf16[16,64]{1,0} all-reduce(%input.5), channel_id=1, to_apply=%sum
  ROOT %slice = bf16[16,16]{1,0} dynamic-slice(%all-reduce.3, %a, %b)
}

ENTRY %main (a: bf16[16,64]) -> bf16[16,16] {
  ROOT %f = bf16[16,16]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.4
}
""")
    assert found.traffic == {"reduce-scatter": collectives.Traffic(1, 2 * 16 * 16)}
    assert found.arrays == {
        collectives.Carried("reduce-scatter", "bf16", (16, 16)): collectives.Traffic(1, 2 * 16 * 16)
    }


def test_activations_are_known_by_their_tokens():
    t = collectives.Traffic(2, 100)
    arrays = {
        collectives.Carried("all-gather", "bf16", (4, 512, 96)): t,
        collectives.Carried("all-gather", "bf16", (2, 256, 96)): t,  # half of the tokens
        collectives.Carried("all-gather", "f32", (1, 512, 8)): t,  # a parameter of that width
        collectives.Carried("all-reduce", "f32", (96, 64)): t,
    }
    sent = collectives.Collectives({}, 0, arrays)
    assert collectives.activations(sent, {512, 256}, {512 * 8}) == {
        "all-gather": collectives.Traffic(4, 200)
    }
    assert collectives.activations(sent, {64}, {96 * 64}) == {}


def test_a_loop_of_unknown_length_is_told():
    found = collectives.collectives(MODULE.replace("%KNOWN%", ""))
    assert found.unknown_loops == 1
    assert found.traffic["all-gather"].count == 3 + 1


def test_the_text_of_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        collectives.collectives("nothing")


@pytest.fixture
def plain_products():
    """The products of bfloat16 that splash is made of know no higher precision."""
    with jax.default_matmul_precision("default"):
        yield


@pytest.fixture
def v5p(plain_products):
    return tpu_topologies.devices("v5p:2x2x1")


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("n", "causal"), [(200, True), (4608 + 32, False), (5360, False), (3200, False)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["v5e-4", "v5p-8", "v6e-4", "tpu7x-8"])
def test_splash_compiles_for_tpu(plain_products, name, dtype, n, causal):
    """The heads of Z-Image and, causal and grouped, of its text encoder; blocks of every size."""
    heads, groups = (8, 2) if causal else (30, 30)
    place = jax.sharding.SingleDeviceSharding(tpu_topologies.devices(name)[0])
    abstract = lambda h: jax.ShapeDtypeStruct((1, n, h, 128), dtype, sharding=place)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=place)

    def loss(q, k, v, lengths):
        y = attention.attention(q, k, v, lengths=lengths, causal=causal, implementation="splash")
        return jnp.sum(y.astype(jnp.float32))

    arrays = abstract(heads), abstract(groups), abstract(groups), lengths
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays)
    text = lowered.as_text()
    assert text.count("tpu_custom_call") >= 2, "forward and backward kernel"
    compiled = lowered.compile()
    # The probabilities alone would take 4 n^2 bytes a head.
    most = 4 * n**2 * heads / 3 * (jnp.dtype(dtype).itemsize / 2)
    assert causal or compiled.memory_analysis().temp_size_in_bytes < most


def compile_full_size(devices, **changes):
    """The published network, 1024 x 1024, K = 4, rank 64, an image a chip: a few minutes."""
    config = load_config(batch_size=len(devices), **changes)
    assert (config.remat, config.base_dtype, config.lora.rank) == ("full", "bfloat16", 64)
    own, size, *_ = abstract_step.find_network(config, full_size=True)
    case = abstract_step.Workload(own, size, 1024, 1024, 512, 1024)
    report = compiled_step.compile_step(config, case, devices)
    print("\n".join(estimate.describe(report, config, case)))
    assert report.attention == "splash"
    return report


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.slow
def test_the_full_size_step_fits_a_v5p(v5p):
    report = compile_full_size(v5p, **{"mesh.data": -1})
    assert report.account.live["adapters"] == 4 * 158_760_960
    assert report.account.live["base"] >= 2 * 6_154_908_736
    assert report.fits
    assert 15 * GIB < report.needed < 19 * GIB
    # Only gradients of adapters cross the network, K times, in the type of activations.
    assert set(report.sent.traffic) == {"all-reduce"}
    assert report.sent.traffic["all-reduce"].bytes < 4 * 2 * 158_760_960 * 1.01


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.slow
def test_fsdp_gathers_weights_and_no_activations(v5p):
    report = compile_full_size(v5p, **{"mesh.data": 1, "mesh.fsdp": -1})
    assert 0.25 <= report.account.live["base"] / (2 * 6_154_908_736) < 0.26
    assert report.needed < 11 * GIB
    traffic = report.sent.traffic
    # A layer's weights for the teacher, the student, the student again and its backward pass.
    assert traffic["all-gather"].bytes < 4 * 4 * 2 * 6_154_908_736
    moved = sum(traffic[kind].bytes for kind in traffic.keys() - {"all-gather", "all-reduce"})
    assert moved < GIB / 4
