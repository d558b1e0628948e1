"""More captions for each row: its tags in other orders, and an empty one.

They are captions like the others, so they are encoded once, cached and prepared as these are.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dopsd_jax.data.draws import permutation
from dopsd_jax.data.table import Captions, DataRow, Derived, RowList

EMPTY = ""  # key of the empty caption, which takes the place of the student's now and then
_TRIES = 16  # for each order; captions with equal tags have fewer orders than they seem to


@dataclass(frozen=True)
class CaptionVariants:
    """What is made of the captions of every row.

    orders: of a caption's tags, the written one among them. keep: tags that stay in front.
    unshuffled: the key of captions that stay as they are; None: no key. empty: whether a row has
    an empty caption besides, under `EMPTY`.
    """

    orders: int = 1
    keep: int = 0
    unshuffled: str | None = None
    empty: bool = False

    def captions(self, captions: Captions) -> Captions:
        """The captions of a row with their variants."""
        found = []
        for key, text in captions:
            orders = 1 if key == self.unshuffled else self.orders
            found += [(key, other) for other in tag_orders(text, self.keep, orders)]
        return (*found, *[(EMPTY, "")] * self.empty)


class Varied(Derived):
    """Rows with more captions; they are made when a row is asked for."""

    def __init__(self, rows: RowList, variants: CaptionVariants):
        self.rows, self.variants = rows, variants

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> DataRow:
        row = self.rows[i]
        return replace(row, captions=self.variants.captions(row.captions))

    def origins(self, numbers: Sequence[int]) -> list[tuple[RowList, Sequence[int]]]:
        return [(self.rows, numbers)]

    def captions(self, numbers: Sequence[int]) -> list[Captions]:
        return list(map(self.variants.captions, self.rows.captions(numbers)))


@functools.lru_cache(maxsize=4096)
def tag_orders(text: str, keep: int, count: int) -> tuple[str, ...]:
    """A caption as it is written, then with its tags, between commas, in other orders.

    At most `count` in all, no two alike; the first `keep` tags stay where they are. The caption
    alone decides the orders, so that runs with different seeds share the encoders' outputs.

    Examples:
      >>> orders = tag_orders("[V] dog, grass, sun", keep=1, count=9)
      >>> sorted(orders)
      ['[V] dog, grass, sun', '[V] dog, sun, grass']
    """
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    first, rest = tags[:keep], tags[keep:]
    found, orders = [text], {tuple(rest)}
    most = min(count, math.factorial(min(len(rest), 12)))  # 12!: more than any count
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16])
    for attempt in range(_TRIES * count):
        if len(found) >= most:
            break
        order = tuple(rest[i] for i in permutation(len(rest), seed, attempt))
        if order not in orders:
            orders.add(order)
            found.append(", ".join((*first, *order)))
    return tuple(found)
