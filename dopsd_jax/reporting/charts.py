"""Curves over steps as inline SVG, coloured by the page's style sheet."""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 54, 22, 24, 40
BINS = 280  # beyond this many steps, a bin of steps is drawn as its mean and range
LOG_RANGE = 50  # values that range more widely may be drawn on a logarithmic axis
NEXT = 24  # units of the drawing: a tick of the steps that is nearer to the first is left out
NEAR = 0.9  # an axis of values above 0 begins at 0, unless all are closer together than this


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve; None stands for a value that was not finite."""

    label: str
    steps: Sequence[int]
    values: Sequence[float | None]

    def finite(self) -> list[tuple[int, float]]:
        pairs = zip(self.steps, self.values, strict=True)
        return [(step, value) for step, value in pairs if value is not None]


@dataclasses.dataclass(frozen=True)
class Bin:
    """Mean and range of the values in some neighbouring steps."""

    step: float
    mean: float
    low: float
    high: float


def chart(
    title: str,
    note: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    log: bool = False,
    remark: str = "",
) -> str:
    """A figure with a caption; says so when there is nothing to draw, or one point only.

    `unit`: what stands at the upright axis. `log`: the axis may be logarithmic, and is if all
    values are positive and range widely. `remark`: small print below.
    """
    series = [one for one in series if one.values]
    finite = [pair for one in series for pair in one.finite()]
    caption = f"<figcaption><b>{html.escape(title)}</b> {html.escape(note)}</figcaption>"
    remarks = [remark] if remark else []
    missing = sum(value is None for one in series for value in one.values)
    if missing:
        are = "value was not finite and is" if missing == 1 else "values were not finite and are"
        remarks.append(f"{missing} {are} left out")
    if not finite:
        remarks.insert(0, "nothing was recorded")
        return _figure(caption, "", remarks)
    if len({step for step, _ in finite}) == 1:
        remarks.insert(0, "one step so far")
    values = [value for _, value in finite]
    log = log and min(values) > 0 and max(values) / min(values) > LOG_RANGE
    if log:
        remarks.append("logarithmic axis")
    x_axis = _Axis.over([step for step, _ in finite], LEFT, WIDTH - RIGHT, whole=True)
    y_axis = _Axis.over(values, HEIGHT - BOTTOM, TOP, log=log)
    parts = [_frame(x_axis, y_axis, unit)]
    for number, one in enumerate(series):
        parts.append(_curve(one, x_axis, y_axis, _colour(number, len(series))))
    label = html.escape(f"{title} against step")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    svg = f"{head}{''.join(parts)}</svg>"
    return _figure(caption + _legend(series), svg, remarks)


def _figure(caption: str, svg: str, remarks: Sequence[str]) -> str:
    small = f'<p class="remark">{html.escape("; ".join(remarks))}</p>' if remarks else ""
    return f"<figure>{caption}{svg}{small}</figure>"


def _colour(number: int, count: int) -> str:
    """The accent for one curve; blue to red for several, as light as the page's theme asks."""
    if count == 1:
        return "var(--accent)"
    hue = 230 - 220 * number / (count - 1)
    return f"hsl({hue:.0f} 65% var(--series))"


def _legend(series: Sequence[Series]) -> str:
    if len(series) == 1:
        return ""
    items = (
        f'<span><i style="background:{_colour(n, len(series))}"></i>{html.escape(one.label)}</span>'
        for n, one in enumerate(series)
    )
    return f'<p class="legend">{"".join(items)}</p>'


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Values from low to high at the places from start to end."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    whole: bool

    @classmethod
    def over(cls, values, start: float, end: float, *, log=False, whole=False) -> "_Axis":
        low, high = min(values), max(values)
        if low == high:
            pad = 1.0 if whole or low == 0 else abs(low) * 0.5
            low, high = low - pad, high + pad
        elif not whole and not log:
            pad = (high - low) * 0.06
            # Never below zero for what is never negative.
            from_zero = 0 <= low < NEAR * high
            low, high = (0.0 if from_zero or 0 <= low < pad else low - pad), high + pad
        return cls(low, high, start, end, log, whole)

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            every = max(1, round((last - first) / 5))
            return [10.0**k for k in range(first, last + 1, every)]
        rough = (self.high - self.low) / 4
        size = 10 ** math.floor(math.log10(rough))
        size *= next(m for m in (1, 2, 5, 10) if m * size >= rough * 0.999)
        if self.whole:
            size = max(1, round(size))
        first = math.ceil(self.low / size - 1e-9)
        return [k * size for k in range(first, math.floor(self.high / size + 1e-9) + 1)]


def _frame(x_axis: _Axis, y_axis: _Axis, unit: str) -> str:
    parts = [
        f'<text x="4" y="12" class="unit">{html.escape(unit)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" class="unit end">step</text>',
    ]
    for value in y_axis.ticks():
        y = f"{y_axis.at(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y}" dy=".32em" class="y">{number(value)}</text>')
    first = x_axis.low  # the first step is named, and no tick right beside it
    for value in [first, *(v for v in x_axis.ticks() if x_axis.at(v) - x_axis.at(first) > NEXT)]:
        x = f"{x_axis.at(value):.1f}"
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 17}" class="x">{int(value)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    return "".join(parts)


def _curve(series: Series, x_axis: _Axis, y_axis: _Axis, colour: str) -> str:
    parts = [f'<g style="color:{colour}">']
    for run in _runs(series):
        bins = _bins(run, x_axis)
        place = lambda step, value: f"{x_axis.at(step):.1f},{y_axis.at(value):.1f}"
        if len(bins) == 1:
            x, y = place(bins[0].step, bins[0].mean).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3"/>')
            continue
        if len(bins) < len(run):
            edge = [place(b.step, b.high) for b in bins]
            edge += [place(b.step, b.low) for b in reversed(bins)]
            parts.append(f'<polygon points="{" ".join(edge)}"/>')
        line = " ".join(place(b.step, b.mean) for b in bins)
        parts.append(f'<polyline points="{line}"/>')
    return "".join(parts) + "</g>"


def _runs(series: Series) -> list[list[tuple[int, float]]]:
    """The stretches between values that were not finite."""
    runs, current = [], []
    for step, value in zip(series.steps, series.values, strict=True):
        if value is not None:
            current.append((step, value))
        elif current:
            runs.append(current)
            current = []
    return [*runs, current] if current else runs


def _bins(points: Sequence[tuple[int, float]], x_axis: _Axis) -> list[Bin]:
    """One bin a point where there is room, otherwise one for each width of the drawing."""
    width = (x_axis.high - x_axis.low) / BINS
    if len(points) <= BINS or width <= 1:
        return [Bin(step, value, value, value) for step, value in points]
    groups: dict[int, list[tuple[int, float]]] = {}
    for step, value in points:
        groups.setdefault(int((step - x_axis.low) / width), []).append((step, value))
    bins = []
    for group in groups.values():
        steps, values = [s for s, _ in group], [v for _, v in group]
        middle = sum(steps) / len(steps)
        bins.append(Bin(middle, sum(values) / len(values), min(values), max(values)))
    return bins


def drawable(value: Any) -> bool:
    """Whether it is a number: charts add and subtract, which overflows near the largest float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e150


def number(value: float) -> str:
    """A number in few characters: 0.012, 1500, 2.5e-05."""
    if value == 0:
        return "0"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.3g}".replace("e-0", "e-")
