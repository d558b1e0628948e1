"""A seventh method is one record, one loss and its rows in the documents."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from dopsd_jax.common.config_fields import Field
from dopsd_jax.common.errors import UserError
from dopsd_jax.config import loading, schema
from dopsd_jax.config.fields import conditions, declared
from dopsd_jax.config.reference import help_text, markdown
from dopsd_jax.dopsd import Losses
from dopsd_jax.estimation.abstract_step import Workload, make_program
from dopsd_jax.families.zimage import family
from dopsd_jax.methods import registry
from dopsd_jax.methods.method import Method, Needs, Passes
from dopsd_jax.models import zimage_config
from dopsd_jax.parallel import sharding

SIZE = zimage_config.ZImageConfig(
    dim=32, layers=1, refiner_layers=0, heads=2, caption_dim=16, axes_dims=(4, 6, 6)
)
STRENGTH = Field("toy.strength", 0.5, "of the pull to zero", low=0, high=1)


def toy_loss(setup, student, teacher, base, batch, draws, key):
    """Pulls every trained number to zero."""
    strength = setup.config["toy"]["strength"]
    loss = lambda s: strength * sum(jnp.mean(jnp.square(x)) for x in jax.tree.leaves(s))
    value, gradient = jax.value_and_grad(loss)(student)
    return Losses(value, value[None], value[None], jnp.ones((1, 2))), gradient


TOY = Method(
    name="toy",
    summary="to zero",
    source="this test",
    fields=(STRENGTH,),
    needs=lambda config: Needs(),
    keeps="none",
    passes=lambda config, n: Passes(n.steps),
    loss=toy_loss,
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(registry.METHODS, "toy", TOY)


def test_everything_about_the_configuration_follows_from_the_record(toy):
    config = loading.load("zimage:random", {"method": "toy", "toy.strength": "0.25"})
    assert config.toy.strength == 0.25
    schema.check(config, ["toy.strength"])
    assert conditions(declared()["toy.strength"]) == {"method": ("toy",)}
    assert "toy.strength" in markdown() and "--config.toy.strength=0.5" in help_text()
    other = loading.load("zimage:random", {"toy.strength": "0.25"})
    with pytest.raises(
        UserError, match=r"toy\.strength: has no effect with config\.method = dopsd"
    ):
        schema.check(other, ["toy.strength"])
    with pytest.raises(UserError, match=r"config\.loss: has no effect with config\.method = toy"):
        schema.check(config, ["loss"])
    with pytest.raises(UserError, match="names the teacher, which has no weights"):
        schema.check(loading.load("zimage:random", {"method": "toy", "offload": "teacher"}))


def test_it_trains_a_step_through_the_plan(toy):
    fields = {"method": "toy", "batch_size": "1", "lora.targets": "attention"}
    config = loading.load("zimage:random", fields)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    case = Workload(family, SIZE, height=32, width=32, rows_student=32, rows_teacher=32)
    zeros = lambda tree: jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), tree
    )
    with jax.set_mesh(mesh):
        program = make_program(config, case, mesh, "cpu")
        student = jax.tree.map(jnp.ones_like, zeros(program.plan.abstract_state.student))
        state = program.plan.initial_state(student)
        assert state.teacher is None
        state, metrics = program.plan.step(
            state, zeros(program.base), zeros(program.batch), 0, latent=program.latent
        )
    assert int(state.step) == 1
    leaves = jax.tree.leaves(state.student)
    assert float(metrics["loss"]) == pytest.approx(0.5 * len(leaves))
    assert all(np.all(np.asarray(x) < 1) for x in leaves)
    assert registry.passes(config, program.plan.grid) == (Passes(4), None)


def test_the_document_has_every_method_in_its_tables():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    cost = text.partition("## What a step costs")[2].partition("\n## ")[0]
    gaps = text.partition("## What the metrics mean")[2].partition("\n## ")[0]
    said = {"teacher": "teacher, unless live", "start": "start", "none": ""}
    for method in registry.METHODS.values():
        assert re.search(rf"^\| `{method.name}` \|", text, flags=re.M), method.name
        row = re.search(rf"^\| `{method.name}` \|.*\|$", cost, flags=re.M).group()
        assert row.split("|")[-2].strip() == said[method.keeps]
        row = re.search(rf"^\|.*`{method.name}`.*\|$", gaps, flags=re.M).group()
        assert ("student against teacher" in row) == (method.gap == "student and teacher")
