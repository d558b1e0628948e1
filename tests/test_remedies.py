"""What is advised where a step does not fit, and with which memory."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from test_estimate import CASE, FULL_SIZE, GIB, load_config

from dopsd_jax.estimation import (
    abstract_step,
    compiled_step,
    counted_step,
    flops,
    memory,
    remedies,
)
from dopsd_jax.parallel import sharding


def test_advice_is_priced():
    """Four devices: what the compiler needed beyond the account goes with a device's images."""
    config = load_config("random", **{"batch_size": 8, "mesh.data": 4, "base_dtype": "float32"})
    axes = (AxisType.Auto,) * 4

    def total(config, shape):
        mesh = AbstractMesh(shape, sharding.AXES, axis_types=axes)
        return memory.count(config, abstract_step.make_program(config, CASE, mesh, "tpu"), mesh)

    now, rest = total(config, (4, 1, 1, 1)), 12345
    report = compiled_step.Report(
        device_kind="TPU v6 lite",
        mesh={"data": 4, "fsdp": 1, "context": 1, "tensor": 1},
        attention="xla",
        images=8,
        account=now,
        work=flops.StepWork(1, 1),
        capacity=now.lasting + now.activations / 10,
        needed=now.total + rest,
        problem="Used too much",
    )
    single, together, _ = remedies.advise(config, CASE, report)
    fields = [remedy.fields for remedy in single]
    assert fields[0] == {"batch_size": 4, "accumulate": 2}
    assert {"mesh.data": 1, "mesh.fsdp": 4} in fields and {"remat": "full"} in fields
    assert {"attention": "auto"} not in fields, "no kernel knows heads of this size"
    split = load_config("random", **{"batch_size": 8, "mesh.data": 1, "mesh.fsdp": 4})
    assert single[1].needed == total(split, (1, 4, 1, 1)).total + rest < report.needed
    # One image instead of two, and the sum of gradients beside a micro-batch's own.
    other = now.gradient - now.activations / 2
    assert single[0].needed == pytest.approx(report.needed + other, rel=0.02)
    # The fewest that suffice, each priced with those before it.
    needed = [remedy.needed for remedy in together]
    assert len(needed) > 1 and needed == sorted(needed, reverse=True)
    assert needed[-1] <= report.capacity < needed[-2]
    changes = {name: value for remedy in together for name, value in remedy.fields.items()}
    mended = load_config("random", **changes)
    assert mended.batch_size == 4
    assert needed[-1] == pytest.approx(total(mended, (1, 4, 1, 1)).total + rest / 2, abs=1)


@pytest.mark.parametrize("changes", [{"batch_size": 4}, {"train": "full", "batch_size": 8}])
def test_advice_for_a_card_is_what_the_changed_configuration_is_counted_to_need(changes):
    config, gpu = load_config("random", **changes), counted_step.find_gpu("24GB")
    report = dataclasses.replace(counted_step.count_step(config, CASE, gpu), capacity=1.0)
    single, _, _ = remedies.advise(config, CASE, report)
    assert {"batch_size": 1, "accumulate": changes["batch_size"]} in [r.fields for r in single]
    for remedy in single:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(remedy.fields)
        expected = counted_step.count_step(changed, CASE, gpu).needed
        assert remedy.needed == pytest.approx(expected, abs=1), remedy.fields


@pytest.mark.parametrize("remat", ["none", "unrolled"])
def test_what_products_gave_is_kept_before_all_is_computed_again(remat):
    """The cheaper one alone where it suffices; where it does not, the other one alone."""
    config = load_config("random", batch_size=1, remat=remat, base_dtype="bfloat16")
    gpu = counted_step.find_gpu("24GB")
    report = counted_step.count_step(config, CASE, gpu)
    short = lambda capacity: remedies.advise(
        config, CASE, dataclasses.replace(report, capacity=float(capacity))
    )
    single, _, _ = short(1)
    fields = [remedy.fields for remedy in single]
    dots, full = fields.index({"remat": "dots"}), fields.index({"remat": "full"})
    assert dots < full and single[full].needed < single[dots].needed < report.needed
    cheaper = single[:dots]  # none of which is about what is kept
    assert not any("remat" in remedy.fields for remedy in cheaper)
    for enough, name in ((single[dots], "dots"), (single[full], "full")):
        _, together, _ = short(enough.needed)
        changes = [remedy.fields for remedy in together]
        assert changes[-1] == {"remat": name}
        assert [change.get("remat") for change in changes].count("dots") == (name == "dots")


def test_what_products_gave_is_advised_to_none_who_keeps_less():
    gpu = counted_step.find_gpu("24GB")
    for remat in ("dots", "full"):
        config = load_config("random", batch_size=1, remat=remat)
        report = dataclasses.replace(counted_step.count_step(config, CASE, gpu), capacity=1.0)
        assert {"remat": "dots"} not in [
            each.fields for each in remedies.advise(config, CASE, report)[0]
        ]


def test_hopeless_runs_are_told_how_many_devices_they_need(monkeypatch):
    """Full fine-tuning on one v6e chip: no compiler is needed to see that it does not fit."""
    config = load_config("full", batch_size=1)
    failing = lambda self: pytest.fail("compiled")
    monkeypatch.setattr(jax.stages.Lowered, "compile", failing)
    monkeypatch.setattr(flops, "device_memory", lambda kind: 31.25 * GIB)
    report = compiled_step.compile_step(config, FULL_SIZE, jax.devices()[:1])
    assert report.problem == "what lives through the run takes 91.72 GiB by itself"
    lines = "\n".join(remedies.describe(config, FULL_SIZE, report))
    assert "at least" in lines and "or 8 devices: --config.mesh.data=1" in lines
    assert "mesh.context" not in lines
    config.mesh.data, config.mesh.fsdp, config.mesh.context = 1, 1, -1  # is priced as 1, and set so
    lines = "\n".join(remedies.describe(config, FULL_SIZE, report))
    assert "--config.mesh.fsdp=-1 --config.mesh.context=1 --config.batch_size=8" in lines


@pytest.mark.parametrize(
    ("buckets", "field"), [("", "data.resolution"), ("1024x1024,768x768", "data.buckets")]
)
def test_where_nothing_helps_the_field_that_says_the_sizes_is_named(monkeypatch, buckets, field):
    """Beside data.buckets, data.resolution has no effect and is refused."""
    config = load_config("16gb", **{"data.buckets": buckets})
    gpu = counted_step.find_gpu("24GB")
    report = counted_step.count_step(load_config("random"), CASE, gpu)
    monkeypatch.setattr(remedies, "advise", lambda *_: ([], [], None))
    assert f" smaller --config.{field} or " in remedies.describe(config, CASE, report)[-1]
