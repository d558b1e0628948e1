"""What is counted from shapes, against what compilers needed: docs/scaling.jsonl."""

import json
from pathlib import Path

import pytest

from dopsd_jax import families
from dopsd_jax.common.errors import UserError
from dopsd_jax.config.fields import defaults
from dopsd_jax.estimation import counted_step
from dopsd_jax.estimation.memory import Account
from dopsd_jax.families.base import STUDENT

RECORDS = Path(__file__).parents[1] / "docs" / "scaling.jsonl"
COMPILED = [
    record
    for record in map(json.loads, RECORDS.read_text(encoding="utf-8").splitlines())
    if record["report"]["needed"] is not None
]


def network(config: str):
    """The family and the published size of a record's configuration."""
    name, _, preset = config.removeprefix("configs/").partition(".py:")
    family = families.load(name)
    ids = [end for end in family.PUBLISHED if preset[:2] in end.lower()]
    return family, family.PUBLISHED[(ids or list(family.PUBLISHED))[0]]


@pytest.mark.parametrize("record", COMPILED, ids=lambda record: record["name"])
def test_an_estimate_is_near_what_the_compiler_needed(record):
    family, size = network(record["config"])
    report, config = record["report"], defaults()
    config.train, config.dtype = record["fields"]["train"], "bfloat16"
    held = Account(**report["account"])
    latent = 1024 // family.LATENT_FACTOR
    tokens = family.image_tokens(size, latent, latent) + family.ROWS[STUDENT]
    kind = report["device_kind"]
    estimate = held.total + counted_step.rest(config, held, tokens, size.dim, kind)
    assert estimate == pytest.approx(report["needed"], rel=0.04)


@pytest.mark.parametrize(
    ("text", "gib"),
    [("24GB", 24), ("24 GiB", 24), ("H100", 80), ("rtx-4090", 24), ("4090", 24), ("A100 40GB", 40),
     ("NVIDIA GeForce RTX 3060", 12)],
)  # fmt: skip
def test_cards_are_found_by_name_and_by_memory(text, gib):
    found = counted_step.find_gpu(text)
    assert found.memory == gib << 30 and 0.9 < found.usable / found.memory < 1


@pytest.mark.parametrize("text", ["", "0GB", "GB", "RTX", "24", "99999GB"])
def test_an_unknown_card_is_one_line(text):
    with pytest.raises(UserError, match="is not known; give its memory, such as 24GB"):
        counted_step.find_gpu(text)


def test_the_card_that_is_here_needs_no_kernel_of_its_own():
    """Counting traces the step where no GPU is; the report names the GPU's kernel all the same."""
    config = defaults()
    config.family, config.batch_size, config.attention = "zimage", 1, "cudnn"
    family = families.load("zimage")
    size = family.PUBLISHED["Z-Image-Turbo"]
    case = counted_step.Workload(family, size, height=512, width=512, rows_student=128,
                                 rows_teacher=448)  # fmt: skip
    reports = [
        counted_step.count_step(config, case, counted_step.find_gpu(card))
        for card in ("24GB", "12GB")
    ]
    assert [r.fits for r in reports] == [True, False]
    assert reports[0].attention == "cudnn" and reports[0].needed == reports[1].needed
