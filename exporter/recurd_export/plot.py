"""Errors over time as SVG: every curve as its share of what is allowed, on a logarithmic axis, the bound at 1."""

import math
from collections.abc import Iterator, Sequence

from recurd_export.drift import Curve
from recurd_export.markup import Html, tag

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 34
#: Decades shown at least below the bound and at most at all.
LEAST, MOST = 3, 9


def plot(curves: Sequence[Curve], steps: int) -> Html:
    """The curves in the colours of the classes ``k0``, ``k1`` and so on."""
    low, high = _decades(curves)
    frame = _Frame(steps, low, high)
    label = "Errors over time, as a share of the allowed error, on a logarithmic axis"
    parts = [*_grid(frame), *(_drawn(curve, frame, index) for index, curve in enumerate(curves))]
    return tag(
        "svg", tag("title", label), *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="curves",
        xmlns="http://www.w3.org/2000/svg",
    )  # fmt: skip


class _Frame:
    """From steps and shares to places."""

    def __init__(self, steps: int, low: int, high: int) -> None:
        self.steps, self.low, self.high = steps, low, high

    def x(self, step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / self.steps, 1)

    def y(self, decade: float) -> float:
        inside = min(max(decade, self.low), self.high)
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (self.high - inside) / (self.high - self.low), 1)


def _decade(error: float, bound: float) -> float:
    """The logarithm of the share; far out for no error and for an infinite one."""
    if not math.isfinite(error):
        return math.inf
    return math.log10(error / bound) if error > 0 else -math.inf


def _decades(curves: Sequence[Curve]) -> tuple[int, int]:
    shares = [_decade(error, curve.bound) for curve in curves for error in curve.errors]
    found = [share for share in shares if math.isfinite(share)] or [0.0]
    high = max(1, math.ceil(max(found)) + (math.inf in shares))
    return max(min(math.floor(min(found)), -LEAST), high - MOST), high


def _grid(frame: _Frame) -> Iterator[Html]:
    for decade in range(frame.low, frame.high + 1):
        y = frame.y(decade)
        yield tag("path", d=f"M{LEFT} {y}H{WIDTH - RIGHT}", class_="bound" if decade == 0 else "axis")
        name = "allowed" if decade == 0 else f"{10.0**decade:g}"
        yield tag("text", name, x=LEFT - 5, y=y + 4, text_anchor="end", class_="faint")
    for quarter in range(5):
        step = round(frame.steps * quarter / 4)
        x = frame.x(step)
        yield tag("path", d=f"M{x} {HEIGHT - BOTTOM}v4", class_="axis")
        anchor = "end" if quarter == 4 else "middle"
        yield tag("text", f"{step:,}", x=x, y=HEIGHT - BOTTOM + 16, text_anchor=anchor, class_="faint")
    yield tag("text", "steps", x=(LEFT + WIDTH) / 2, y=HEIGHT - 4, text_anchor="middle", class_="faint")


def _drawn(curve: Curve, frame: _Frame, index: int) -> Html:
    points = [
        (frame.x(step), frame.y(_decade(error, curve.bound)))
        for step, error in zip(curve.steps, curve.errors, strict=True)
    ]
    line = tag("polyline", points=" ".join(f"{x},{y}" for x, y in points), class_="curve")
    few = points if len(points) < 20 else points[-1:]
    dots = [tag("circle", cx=x, cy=y, r=2.5, class_="dot") for x, y in few]
    return tag("g", tag("title", curve.tensor), line, *dots, class_=f"k{index}")
