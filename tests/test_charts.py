"""Curves of a run: points stand where their values are, and any values can be drawn."""

import pytest
from page_checks import Page, points

from dopsd_jax.reporting.charts import HEIGHT, WIDTH, Series, chart, number


def test_axes_are_labelled_and_begin_at_zero_where_that_hides_nothing():
    for values, from_zero in (([2.0, 5.0, 3.0], True), ([0.97, 1.0, 0.98], False)):
        page = Page(chart("T", "", [Series("a", [1, 2, 3], values)], unit="images/s"))
        unit, step, *ticks = page.inside("text", "svg")
        assert (unit, step) == ("images/s", "step") and ("0" in ticks) == from_zero
        assert ticks[-3:] == ["1", "2", "3"]
        *grid, base = [float(line["y1"]) for line in page.all("line")]
        assert (base in grid) == from_zero  # the tick of 0 is the axis


def test_points_stand_where_their_values_are():
    page = Page(chart("T", "", [Series("a", [0, 50, 100], [0.0, 1.0, 2.0])]))
    ((start, middle, end),) = points(page)
    assert middle[0] == pytest.approx((start[0] + end[0]) / 2, abs=0.11)
    assert middle[1] == pytest.approx((start[1] + end[1]) / 2, abs=0.11)
    assert start[1] > end[1] and start[0] < end[0]  # upwards is smaller in SVG
    lines = {round(float(a["y1"]), 1) for a in page.all("line")}
    assert middle[1] in lines and "1" in page.text  # the tick of value 1


def test_a_wide_range_may_have_a_logarithmic_axis():
    values = [1.0, 10.0, 100.0]
    page = Page(chart("T", "", [Series("a", [1, 2, 3], values)], log=True))
    ((a, b, c),) = points(page)
    assert b[1] == pytest.approx((a[1] + c[1]) / 2, abs=0.11)
    assert any("logarithmic" in text for text in page.text)
    for series in (values, [0.0, 10.0, 100.0]):  # not asked for; not possible
        text = chart("T", "", [Series("a", [1, 2, 3], series)], log=series[0] == 0)
        assert "logarithmic" not in text


def test_long_runs_are_drawn_as_mean_and_range_without_losing_peaks():
    steps = range(1, 100_001)
    values = [100.0 if step == 77_777 else 1.0 + step % 7 for step in steps]
    text = chart("T", "", [Series("a", steps, values)])
    page = Page(text)
    (band,) = points(page, "polygon")
    assert len(text) < 20_000
    peak = min(band, key=lambda point: point[1])
    span = max(x for x, _ in band) - min(x for x, _ in band)
    assert peak[0] == pytest.approx(min(x for x, _ in band) + span * 0.77777, abs=3)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in band)
    # The mean of 1 to 7 is their middle: off it the one line is where the peak is.
    (line,), half = points(page), len(band) // 2
    edges = zip(line, band[:half], reversed(band[half:]), strict=True)
    off = sorted(abs(y - (high + low) / 2) for (_, y), (_, high), (_, low) in edges)
    assert off[-2] < 0.2 and off[-1] > 10


@pytest.mark.parametrize(
    "values", [[0.0] * 4, [-1.0] * 4, [3e-9] * 4, [-5.0, 5.0] * 2, [1e9, 0] * 2]
)
def test_any_values_can_be_drawn(values):
    page = Page(chart("T", "", [Series("a", [1, 2, 3, 4], values)], log=True))
    (line,) = points(page)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line)
    assert len(page.all("line")) >= 3  # an axis, and at least two ticks


def test_numbers_are_short():
    texts = [number(v) for v in (0, 0.012, 1500, 2.5e-5, 123456.7, -0.5)]
    assert texts == ["0", "0.012", "1500", "2.5e-5", "1.23e+05", "-0.5"]
