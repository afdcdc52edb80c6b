"""Places labels beside the points of a figure, so that they do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from attribution.figures.style import Figure, one_line
from evaluation.statistics.intervals import Interval
from evaluation.study.style import MUTED

_Box = tuple[float, float, float, float]


def place_labels(figure: Figure, ax: Axes, points: Sequence[tuple[str, float, Interval, float, str]]) -> None:
    """Write the name of each point at the nearest free place. A thin line joins name and point if they are not adjacent.

    Args:
        figure, ax: drawn once already, so that the positions in pixels are known.
        points: name, x, interval on the y axis, shift in points of 1/72 inch, and colour of each.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    unit = figure.dpi / 72
    frame = ax.get_window_extent(renderer)
    places, taken = [], []
    for method, x, interval, dodge, colour in points:
        ends = ax.transData.transform([(x, interval.estimate), (x, interval.low), (x, interval.high)])
        px, py = ends[0, 0] + dodge * unit, ends[0, 1]
        taken += [(px - 5 * unit, py - 5 * unit, px + 5 * unit, py + 5 * unit), (px - 2, ends[1, 1], px + 2, ends[2, 1])]
        places.append((method, px, py, colour))
    for method, px, py, colour in sorted(places, key=lambda p: (-p[2], p[1])):
        x, y = ax.transData.inverted().transform((px, py))
        text = ax.annotate(
            one_line(method), (x, y), (0, 0), textcoords="offset points", fontsize=8, color=colour, va="center", parse_math=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}, gid=f"label {method}",
        )  # fmt: skip
        text.set_in_layout(False)
        size = text.get_window_extent(renderer)
        extents = (size.width + 2 * unit, size.height + 1 * unit)
        box, near = _free_place((px, py), extents, unit, taken, (frame.x0, frame.y0, frame.x1, frame.y1))
        taken.append(box)
        text.set_position(((box[0] - px) / unit + 1, ((box[1] + box[3]) / 2 - py) / unit))
        if text.arrow_patch is not None:
            text.arrow_patch.set_visible(not near)


def _free_place(
    point: tuple[float, float], size: tuple[float, float], unit: float, taken: Sequence[_Box], frame: _Box
) -> tuple[_Box, bool]:
    """Find the nearest box of a size that overlaps none of those taken and stays in the frame, or else the one that overlaps least."""
    (px, py), (width, height) = point, size
    best: tuple[float, float, _Box] | None = None
    for gap in (7 * unit, 24 * unit, 60 * unit, 110 * unit):
        for level in range(25):
            for dy in {level * height / 2, -level * height / 2}:
                for left in (px + gap, px - gap - width):
                    box = (left, py + dy - height / 2, left + width, py + dy + height / 2)
                    outside = box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]
                    met = sum(_overlap(box, other) for other in taken) + (1e6 if outside else 0)
                    key = (met, math.hypot(gap * 1.5, dy) + (left < px) * unit, box)
                    if best is None or key < best:
                        best = key
    assert best is not None
    box = best[2]
    near = abs((box[1] + box[3]) / 2 - py) <= height / 2 and min(abs(box[0] - px), abs(box[2] - px)) <= 8 * unit
    return box, near


def _overlap(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
