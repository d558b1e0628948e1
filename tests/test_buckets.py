import math

import numpy as np
import pytest

from dopsd_jax.common.errors import UserError
from dopsd_jax.data.buckets import UPSTREAM, Bucket, make_buckets, nearest, parse_buckets


def test_buckets_at_1024_are_upstreams():
    assert make_buckets(1024) == UPSTREAM
    assert [str(b) for b in UPSTREAM[:3]] == ["1024x1024", "1152x896", "896x1152"]
    assert len(UPSTREAM) == 11


@pytest.mark.parametrize("resolution", [16, 32, 64, 96, 256, 512, 528, 768, 1280, 1536, 2048])
def test_scaled_buckets_keep_the_area_the_step_and_the_symmetry(resolution):
    buckets = make_buckets(resolution)
    assert buckets[0] == (resolution, resolution)
    assert len(set(buckets)) == len(buckets)
    for width, height in buckets:
        assert width % 16 == 0 and height % 16 == 0 and min(width, height) > 0
        assert width * height <= resolution**2
        assert (height, width) in buckets


def test_scaled_buckets_keep_the_shapes_where_there_is_room():
    for resolution in (768, 1536, 2048):
        for ours, theirs in zip(make_buckets(resolution), UPSTREAM, strict=True):
            shift = math.log(ours.width / ours.height) - math.log(theirs.width / theirs.height)
            assert abs(shift) < 0.03, (resolution, ours, theirs)


def test_the_step_is_free():
    assert (72, 56) in make_buckets(64, step=8)


@pytest.mark.parametrize(
    ("width", "height", "bucket"),
    [
        (1264, 832, "1248x832"),
        (1773, 2364, "864x1152"),
        (780, 780, "1024x1024"),
        (100, 10, "1344x576"),
        (10, 100, "576x1344"),
    ],
)
def test_nearest_has_the_known_answers(width, height, bucket):
    assert str(nearest(width, height, UPSTREAM)) == bucket


def test_nearest_is_the_least_distance_of_logarithms():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 4000, (500, 2)).tolist():
        chosen = nearest(width, height, UPSTREAM)
        distances = [abs(math.log(width / height) - math.log(w / h)) for w, h in UPSTREAM]
        assert distances[UPSTREAM.index(chosen)] <= min(distances) + 1e-12


def test_ties_go_to_the_first():
    wide, tall = Bucket(1152, 864), Bucket(864, 1152)
    assert nearest(500, 500, (wide, tall)) == wide
    assert nearest(500, 500, (tall, wide)) == tall


@pytest.mark.parametrize("resolution", [1000, 0, -16, True, "512", 512.0, 8])
def test_a_resolution_off_the_step_is_refused(resolution):
    with pytest.raises(UserError, match=r"data.resolution .* is not a multiple of 16; use"):
        make_buckets(resolution)


def test_an_explicit_list_is_taken_as_it_is():
    assert parse_buckets(["64x48", (32, 96), "96*32"]) == ((64, 48), (32, 96), (96, 32))


def test_every_fault_of_an_explicit_list_is_told():
    with pytest.raises(UserError) as caught:
        parse_buckets(
            ["100x64", (3, 4), "64x64", "64x64", "x", [64, 64.0], (True, 64), -1, (0, 16)]
        )
    problems = "\n".join(caught.value.problems)
    assert "100x64: 100 is not a multiple of 16; use 96 or 112" in problems
    assert "3x4: 3 is not" in problems and "3x4: 4 is not" in problems
    assert "64x64 is there twice" in problems
    assert "0x16: 0 is not a multiple of 16; use 16 or more" in problems
    for wrong in ("'x'", "64,64.0", "(True, 64)", "-1"):
        assert f"{wrong} is not a size" in problems
    for empty in ([], (), "64x64", None):
        with pytest.raises(UserError, match="must be a list"):
            parse_buckets(empty)
