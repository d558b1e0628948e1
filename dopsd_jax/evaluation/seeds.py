"""The noise from which a picture starts: the rule of upstream's evaluation, for several seeds.

Upstream's small-set protocol (d-opsd, evaluation) draws one picture a prompt with the seed
base + 100 row for a row's own caption and base + 100 row + k + 1 for its test prompt k. Further
pictures of a prompt add multiples of `FURTHER`. All models draw a picture from the same noise.
"""

BASE, ROW, FURTHER = 30, 100, 1_000_000
MOST = 2000  # pictures of a prompt: all seeds have 32 bits


def case_seed(base: int, row: int, test: int | None = None) -> int:
    """Seed of the first picture of a row's own caption, or of its test prompt number `test`."""
    return base + ROW * row + (0 if test is None else test + 1)


def picture_seed(first: int, number: int) -> int:
    """Seed of picture `number`, from 0, of a prompt."""
    return first + FURTHER * number
