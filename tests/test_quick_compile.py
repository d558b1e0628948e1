"""With less effort the compiler says the same; where it might not, it is asked for all of it."""

import types

import jax
import pytest
from test_estimate import load_config, needs_libtpu

from dopsd_jax import estimate, families
from dopsd_jax.estimation import abstract_step, compiled_step, flops, memory, tpu_topologies
from dopsd_jax.models import zimage_config
from dopsd_jax.models.interleaved import Interleaved

FULL = {}


def report(needed=None, capacity=100.0, **changes):
    return compiled_step.Report(
        device_kind="TPU v6 lite",
        mesh={"data": 1, "fsdp": 1, "context": 1, "tensor": 1},
        attention="splash",
        images=1,
        account=memory.Account({}, {}, 0, 0),
        work=flops.StepWork(1, 1),
        capacity=capacity,
        needed=needed,
        **changes,
    )


@pytest.fixture
def compiled(monkeypatch):
    """`ask(found, quick)`: the report, and the efforts that were asked for."""

    def ask(found, quick=True, platform="tpu"):
        efforts = []

        def answer(start, lowered, program, case, platform, effort):
            efforts.append(effort)
            return found(effort)

        monkeypatch.setattr(compiled_step, "digest", lambda lowered: "d")
        monkeypatch.setattr(compiled_step, "prepare", lambda *_: (report(), lambda: (None, None)))
        monkeypatch.setattr(compiled_step, "_compiled", answer)
        devices = [types.SimpleNamespace(platform=platform)]
        return compiled_step.compile_step(None, None, devices, quick=quick), efforts

    return ask


def test_one_compilation_where_the_verdict_is_plain(compiled):
    for needed in (50, 96.9, 103.1, 200):
        found, efforts = compiled(lambda effort, n=needed: report(n, seconds=2.0, quick=True))
        assert efforts == [compiled_step.QUICK]
        assert (found.needed, found.seconds, found.quick) == (needed, 2.0, True)
    found, efforts = compiled(lambda effort: report(50, capacity=None, quick=True))
    assert efforts == [compiled_step.QUICK]


def test_where_it_is_close_or_there_is_no_program_the_whole_effort_decides(compiled):
    for first in ({"needed": 98}, {"needed": 102}, {"needed": None, "problem": "no schedule"}):
        answers = lambda effort, first=first: (
            report(**first, seconds=2.0, quick=True) if effort else report(99, seconds=5.0)
        )
        found, efforts = compiled(answers)
        assert efforts == [compiled_step.QUICK, FULL]
        assert (found.needed, found.seconds, found.quick) == (99, 7.0, False)
        assert found.fits


@pytest.mark.parametrize(("quick", "platform"), [(False, "tpu"), (True, "cpu")])
def test_only_a_tpu_s_compiler_has_less_effort(compiled, quick, platform):
    found, efforts = compiled(lambda effort: report(98), quick, platform)
    assert efforts == [FULL] and not found.quick


SIZE = zimage_config.ZImageConfig(
    dim=768, layers=12, refiner_layers=1, heads=6, caption_dim=64, axes_dims=(32, 48, 48)
)


def compiled_for(slice_name, quick=True, **changes):
    """LoRA of rank 4 on a network of `SIZE`, 512 x 512."""
    case = abstract_step.Workload(
        families.load("zimage"), SIZE, height=512, width=512, rows_student=32, rows_teacher=64
    )
    devices = tpu_topologies.devices(slice_name)
    own = {"lora.rank": 4, "lora.alpha": 8.0, "batch_size": len(devices)}
    config = load_config(**own, **changes)
    with jax.default_matmul_precision("default"):
        report = compiled_step.compile_step(config, case, devices, quick=quick)
    return report, "\n".join(estimate.describe(report, config, case))


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.slow
def test_the_peak_is_that_of_a_run_and_no_layer_s_weights_are_turned_round():
    """As splitting the outputs with an axis of blocks would have it: 1.16 of the base."""
    (quick, told), (full, told_of_full) = (compiled_for("v6e-1", q) for q in (True, False))
    assert quick.quick and not full.quick and quick.digest == full.digest
    assert abs(quick.needed / full.needed - 1) < compiled_step.CLOSE
    assert quick.sent.traffic == full.sent.traffic
    assert max(quick.temporaries, full.temporaries) < 0.6 * full.account.live["base"]
    assert "less effort" in told and "less effort" not in told_of_full


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.slow
def test_outputs_are_cut_on_the_devices_that_split_them(monkeypatch):
    """What devices send each other is the same as with an axis of blocks."""
    found, _ = compiled_for("v6e-4", **{"mesh.data": 2, "mesh.tensor": 2})
    monkeypatch.setattr(Interleaved, "gathered", lambda order, x, devices: order.split(x))
    expected, _ = compiled_for("v6e-4", **{"mesh.data": 2, "mesh.tensor": 2})
    assert found.digest != expected.digest and found.sent.traffic == expected.sent.traffic
