"""The figure of quality against evaluations (matplotlib); it is returned, never shown or kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from attribution.figures.style import Figure, as_written, one_line
from evaluation.pareto.settings import POLISHED, SAMPLED
from evaluation.pareto.summary import Row
from evaluation.study.style import FAMILY_COLOURS, INK, MUTED, PAPER, figure_style, has_interval

_DASHES: dict[str, Any] = {"rise": "-", "kernel_shap": (0, (5, 1.5)), "hsic": (0, (1.2, 1.4)), "occlusion": (0, (6, 1.5, 1.2, 1.5))}


def plot_pareto(rows: Sequence[Row]) -> Figure:
    """Mean Insertion - Deletion over the images forwarded, one panel for each model and partition, bands of 95 %."""
    panels = list(dict.fromkeys((row.partition, row.model) for row in rows))
    partitions, models = (list(dict.fromkeys(each)) for each in zip(*panels, strict=True))
    with figure_style():
        figure = Figure(figsize=(5.6 * len(models), 0.5 + 3.7 * len(partitions)), layout="constrained", dpi=130)
        axes = figure.subplots(len(partitions), len(models), squeeze=False, sharex=True, sharey="row")
        for down, partition in enumerate(partitions):
            for across, model in enumerate(models):
                shown = [row for row in rows if (row.partition, row.model) == (partition, model)]
                _panel(axes[down][across], shown)
                counts = sorted({row.quality.count for row in shown})
                images = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1]))) if counts else "no"
                axes[down][across].set_title(f"{one_line(model)}, {partition} regions, {images} images")
            axes[down][0].set_ylabel("Insertion - Deletion")
        for ax in axes[-1]:
            ax.set_xlabel("images forwarded")
    return as_written(figure)


def _panel(ax: Axes, rows: Sequence[Row]) -> None:
    ends: list[tuple[float, float, str, str]] = []
    for method in dict.fromkeys(row.method for row in rows):
        line = sorted((row for row in rows if row.method == method), key=lambda row: row.evaluations)
        x, y = [row.evaluations for row in line], [row.quality.estimate for row in line]
        banded = [row for row in line if has_interval(row.quality)]
        if len(line) > 1:
            colour = _colour(method)
            bands = np.array([(row.evaluations, row.quality.low, row.quality.high) for row in banded]).reshape(-1, 3)
            ax.fill_between(*bands.T, color=colour, alpha=0.15, linewidth=0)
            width = 2.6 if method == "budget" else 1.5
            ax.plot(x, y, color=colour, linestyle=_DASHES.get(method, "-"), linewidth=width, zorder=4 if method == "budget" else 3)
            ends.append((x[-1], y[-1], method, colour))
        else:
            for row in banded:
                ax.plot([x[0], x[0]], [row.quality.low, row.quality.high], color=INK, linewidth=1, zorder=4)
            ax.plot(x, y, "D", color=INK, markeredgecolor=PAPER, markersize=6, zorder=5)
            ends.append((x[0], y[0], method, INK))
    ax.set_xscale("log", base=2)
    right = 2.4 * max(x for x, *_ in ends)  # room for the names behind the lines
    ticks = [2**power for power in range(4, 20) if 2**power < right]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xlim(right=max(right, ax.get_xlim()[1]))
    ax.minorticks_off()
    _name(ax, ends)


def _name(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Each line or point by its name to the right of it, moved down where another stands."""
    low, high = ax.get_ylim()
    step = (high - low) / 21
    taken: list[tuple[float, float]] = []
    for x, y, method, colour in sorted(ends, key=lambda end: -end[1]):
        place = y
        while any(abs(place - other) < step and 0.2 < x / at < 5 for at, other in taken):
            place -= step / 4
        taken.append((x, place))
        ax.annotate(
            method.replace("_", " "),
            (x, y),
            (x * 1.08, place),
            color=colour,
            fontsize=8,
            va="center",
            fontweight="bold" if method == "budget" else "normal",
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
            if abs(place - y) > step / 2
            else None,
        )


def _colour(method: str) -> str:
    if method in SAMPLED:
        return FAMILY_COLOURS["perturbation"]
    return FAMILY_COLOURS["gradient"] if method == POLISHED else FAMILY_COLOURS["region search"]
