"""With less effort the compiler says the same; where it might not, it is asked for all of it."""

import types

import jax
import pytest
from test_estimate import load_config, needs_libtpu

from dopsd_jax import estimate, families
from dopsd_jax.estimation import abstract_step, compiled_step, flops, memory, tpu_topologies
from dopsd_jax.models import zimage_config

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


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.slow
def test_the_peak_is_that_of_a_run_and_no_layer_s_weights_are_turned_round():
    """As splitting the outputs with an axis of blocks would have it: 1.16 of the base."""
    size = zimage_config.ZImageConfig(
        dim=768, layers=12, refiner_layers=1, heads=6, caption_dim=64, axes_dims=(32, 48, 48)
    )
    case = abstract_step.Workload(
        families.load("zimage"), size, height=512, width=512, rows_student=32, rows_teacher=64
    )
    config = load_config(batch_size=1, **{"lora.rank": 4, "lora.alpha": 8.0})
    devices = tpu_topologies.devices("v6e-1")
    ask = lambda quick: compiled_step.compile_step(config, case, devices, quick=quick)
    with jax.default_matmul_precision("default"):
        quick, full = ask(True), ask(False)
    assert quick.quick and not full.quick and quick.digest == full.digest
    assert abs(quick.needed / full.needed - 1) < compiled_step.CLOSE
    assert quick.sent.traffic == full.sent.traffic
    assert max(quick.temporaries, full.temporaries) < 0.6 * full.account.live["base"]
    assert "less effort" in "\n".join(estimate.describe(quick, config, case))
    assert "less effort" not in "\n".join(estimate.describe(full, config, case))
