"""The configurations for cards: each fits, is valid, and trains on a small network."""

import functools
import itertools
import os
import re
import subprocess
import sys

import gpus
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from dopsd_jax import families
from dopsd_jax.common import gpu_memory
from dopsd_jax.config import schema
from dopsd_jax.estimation import counted_step, encoders
from dopsd_jax.estimation.abstract_step import Workload, make_program
from dopsd_jax.models import zimage_config
from dopsd_jax.models.flux2_config import Flux2Config
from dopsd_jax.parallel import sharding

PACKAGED = gpus.packaged()
report_of = functools.cache(gpus.Packaged.report)
# What a card's memory may change: how a step is computed, the base, the pictures and the rank.
CHANGED = {
    "batch_size", "accumulate", "base_dtype", "data.resolution", "lora.rank", "lora.alpha", "remat",
}  # fmt: skip


@pytest.mark.parametrize("one", PACKAGED, ids=lambda one: one.spec)
def test_a_card_holds_its_step_with_room_to_spare(one):
    report, case = report_of(one)
    assert report.fits and gpus.free(report) >= gpus.MARGIN
    line = " ".join(encoders.describe(one.config(), case, report.capacity))
    fits = encoders.fits(encoders.text_encoder(one.config(), case), report.capacity)
    assert ("JAX_PLATFORMS=cpu" in line) != fits


@pytest.mark.parametrize("one", PACKAGED, ids=lambda one: one.spec)
def test_it_is_the_recipe_but_for_what_memory_asks(one):
    config, changes, recipe = one.config(), one.changes(), gpus.read(one.recipe)
    with config.unlocked():
        config.data.path = "photos"
    schema.check(config, changes)
    assert changes.keys() <= CHANGED
    images = recipe.batch_size * recipe.accumulate
    assert config.batch_size * config.accumulate == images
    assert config.lora.alpha / config.lora.rank == recipe.lora.alpha / recipe.lora.rank


def test_the_page_lists_every_one_of_them():
    page = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8")
    for one in PACKAGED:
        (line,) = [line for line in page.splitlines() if f"`{one.spec}`" in line and "|" in line]
        report, _ = report_of(one)
        assert f"| {report.needed / 2**30:.1f} | {gpus.free(report):.0%} |" in line


def test_the_short_table_of_the_readme_says_the_same():
    """Of each card a row, of each model a column: configuration, GiB, seconds a step, hours."""
    read = lambda *path: ROOT.joinpath(*path).read_text(encoding="utf-8").splitlines()
    cells = lambda line: [cell.strip() for cell in line.split("|")[1:-1]]
    expected = {}
    for row in map(cells, filter(re.compile(r"\| \d+ GB ").match, read("docs", "gpus.md"))):
        card, model, spec, _, gib, _, _, seconds, hours = row
        name = spec.strip("`").partition(":")[2]
        expected[card, model] = f"`{name}` {gib}, {seconds}, {hours}"
    lines = read("README.md")
    (start,) = [i for i, line in enumerate(lines) if line.startswith("| GiB, s a step, hours")]
    models, found = cells(lines[start])[1:], {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]):
        card, *own = cells(line)
        found |= {(card, model): cell for model, cell in zip(models, own, strict=True)}
    assert found == expected and len(found) == len(PACKAGED)


def test_a_text_encoder_is_the_one_that_the_transformer_was_made_for():
    for name, (sizes, states) in {"zimage": (1, 1), "flux2_klein": (2, 3)}.items():
        family = families.load(name)
        assert family.TEXT_ENCODERS.keys() == family.PUBLISHED.keys()
        assert len(family.PUBLISHED) == sizes
        for key, size in family.PUBLISHED.items():
            width = size.caption_dim if name == "zimage" else size.text_dim
            assert family.TEXT_ENCODERS[key].hidden_size * states == width


SMALL = {
    "zimage": zimage_config.ZImageConfig(
        dim=32, layers=1, refiner_layers=0, heads=2, caption_dim=8, axes_dims=(4, 6, 6)
    ),
    "flux2_klein": Flux2Config(
        heads=2, double_layers=1, single_layers=1, text_dim=16, head_dim=32, axes_dims=(8,) * 4
    ),
}
# One of each family, base and number of micro-batches: sizes change no program.
TWINS = {
    (one.spec.partition(":")[0], one.config().base_dtype, one.config().accumulate): one
    for one in PACKAGED
    if one.changes()
}


@pytest.mark.parametrize("one", TWINS.values(), ids=lambda one: one.spec)
def test_its_small_twin_trains(one):
    """The same settings, on a small network and two noise levels."""
    config = one.config().copy_and_resolve_references()
    name = one.spec.partition(":")[0]
    config.grid, config.learning_rate, config.data.resolution = "1,0.5", 0.01, 32
    family, mesh = families.load(name), sharding.make_mesh({"data": 1}, jax.devices()[:1])
    rows = (32, 64) if name == "zimage" else family.ROWS
    case = Workload(
        family, SMALL[name], height=32, width=32, rows_student=rows[0], rows_teacher=rows[1]
    )
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        program = make_program(config, case, mesh, "cpu")
        plan = program.plan
        fill = lambda tree: jax.tree.map(lambda x: filled(x, rng), tree)
        base, student, batch = map(fill, (program.base, plan.abstract_state.student, program.batch))
        before = norm(student)
        state = plan.initial_state(student)
        state, metrics = plan.step(state, base, batch, 0, None, latent=program.latent)
    assert np.isfinite(metrics["loss"]) and np.all(metrics["finite"])
    assert int(state.step) == 1 and np.isfinite(norm(state.student))
    assert norm(state.student) != before


def filled(like, rng):
    """Codes of few bits too."""
    whole = jnp.issubdtype(like.dtype, jnp.integer)
    drawn = rng.integers(1, 7, like.shape) if whole else 0.1 * rng.standard_normal(like.shape)
    return jax.device_put(jnp.asarray(drawn, like.dtype), like.sharding)


def norm(tree):
    return float(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


@pytest.mark.parametrize("name", ["", *gpu_memory.NAMES])
def test_programs_may_use_what_estimates_count_unless_jax_is_told_otherwise(name):
    own = {k: v for k, v in os.environ.items() if k not in gpu_memory.NAMES}
    told = {name: "0.5"} if name else {}
    code = (
        "import os, jax; from dopsd_jax.common import gpu_memory, program;"
        "program.run(lambda: print(*(os.environ.get(n, '-') for n in gpu_memory.NAMES)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=own | told, capture_output=True,
                          text=True, check=True)  # fmt: skip
    values = dict(zip(gpu_memory.NAMES, done.stdout.split(), strict=True))
    expected = told or {gpu_memory.NAMES[0]: str(gpu_memory.SHARE)}
    assert {k: v for k, v in values.items() if v != "-"} == expected
    assert counted_step.find_gpu("10GB").usable == gpu_memory.SHARE * (10 << 30)
