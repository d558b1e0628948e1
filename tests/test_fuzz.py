"""Damaged files of every kind: the answer is one clear error or a result, never a traceback."""

import random

import pytest
from fuzz import run_case
from fuzz_damage import damaged
from fuzz_readers import readers
from hypothesis import HealthCheck, given, settings, strategies


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    found = readers(tmp_path_factory.mktemp("fuzz"))
    return [(name, reader, reader.path.read_bytes()) for name, reader in found.items()]


@settings(
    max_examples=6,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(strategies.integers(0, 2**32))
def test_no_reader_raises_anything_but_a_users_error(table, seed):
    for name, reader, good in table:
        error = run_case(reader, good, f"{seed}")
        assert error is None, f"{name}, seed {seed}: {error!r}"


def test_good_files_are_read(table):
    for _, reader, good in table:
        reader.read()
        reader.path.write_bytes(good)  # a lock goes with its holder


def test_cases_are_the_same_for_the_same_seed(table):
    for _, reader, good in table[:8]:
        cases = [damaged(random.Random(f"{seed}"), good, reader.kind) for seed in range(10)]
        assert cases == [damaged(random.Random(f"{seed}"), good, reader.kind) for seed in range(10)]
        assert sum(case != good for case in cases) >= 8
