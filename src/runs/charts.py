"""Line charts as SVG for a page: they take the page's colours, and need no script."""

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 30, 34
COLOURS = 6

Line = tuple[str, Sequence[tuple[float, float]]]


def line_chart(title: str, lines: Sequence[Line], x_title: str = "epoch", dashed: Sequence[str] = ()) -> str:
    """An SVG of ``lines``, [(name, [(x, y)])]; a line has the colour of its number, and dashes if its name is in ``dashed``.

    Each point has its name and figures as a tooltip. Points that are not finite are left out.
    """
    lines = [(name, [(x, y) for x, y in points if math.isfinite(y)]) for name, points in lines]
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    if not xs:
        return ""
    across = _Scale(xs, _LEFT, _WIDTH - _RIGHT, whole=True)
    up = _Scale(ys, _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
             f'<text class="title" x="{_LEFT}" y="16">{escape(title)}</text>']
    for tick in up.ticks:
        y = up(tick)
        parts += [f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
                  f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>']
    for tick in across.ticks:
        parts.append(f'<text x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(x_title)}</text>')
    for number, (name, points) in enumerate(lines):
        style = f"c{number % COLOURS}" + (" dashed" if name in dashed else "")
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="{style}" points="{path}"/>')
        parts += [f'<circle class="{style}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="{2.2 if len(points) < 80 else 1}">'
                  f"<title>{escape(name)}, {escape(x_title)} {x:g}: {y:g}</title></circle>" for x, y in points]
    return "".join([*parts, "</svg>"])


class _Scale:
    """Numbers to places between ``begin`` and ``end``, and ticks at round numbers."""

    def __init__(self, values: Sequence[float], begin: float, end: float, whole: bool = False) -> None:
        low, high = min(values), max(values)
        if high == low:
            low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
        step = 10 ** math.floor(math.log10(high - low))
        step = next(step * factor for factor in (0.2, 0.5, 1, 2, 5) if (high - low) / (step * factor) <= 6)
        step = max(step, 1) if whole else step
        first = math.ceil(low / step - 1e-9)
        self.ticks = [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]
        self._low, self._high, self._begin, self._end = low, high, begin, end

    def __call__(self, value: float) -> float:
        return self._begin + (value - self._low) / (self._high - self._low) * (self._end - self._begin)
