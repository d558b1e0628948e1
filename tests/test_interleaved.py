"""Parts of an axis in blocks, so that devices that split the axis have some of each."""

import jax
import numpy as np
import pytest

from dopsd_jax.models.interleaved import Interleaved


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_both_ways_to_split_an_axis_undo_a_join(groups):
    order = Interleaved((8, 4, 12), groups)
    parts = [jax.random.normal(jax.random.key(k), (3, size)) for k, size in enumerate(order.sizes)]
    joined = order.join(parts)
    ways = [order.split(joined), order.gathered(joined), order.gathered(joined, groups)]
    for found in ways:
        jax.tree.map(np.testing.assert_array_equal, found, parts)
