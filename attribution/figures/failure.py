"""A misclassified image as a figure: what caused the wrong class, what restores the right one, and both classes along the way."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor

from attribution.figures.drawn import DrawnFailure, DrawnRepair
from attribution.figures.style import INK, Figure, border_segments

_TRUE, _PREDICTED = "#0072b2", "#d55e00"


def plot_failure(failure: DrawnFailure) -> Figure:
    """Photo, causes of the error against support of the truth, the smallest removal, the smallest sufficient set, both curves."""
    height, width = failure.truth.image.shape[1:]
    panel = min(max(height / width, 0.55), 1.4)
    figure = Figure(figsize=(17.5, 3.4 * panel + 1.1), layout="constrained", dpi=110)
    grid = figure.add_gridspec(1, 5, width_ratios=[1, 1.08, 1, 1, 1.3])
    axes = [figure.add_subplot(grid[0, column]) for column in range(5)]
    probabilities = failure.truth.probabilities
    _draw_image(axes[0], _photo(failure))
    wrong, right = float(probabilities[failure.mistake.target]), float(probabilities[failure.truth.target])
    _title(axes[0], f"predicted {failure.predicted_name}, p = {wrong:.2f}\nshows {failure.true_name}, p = {right:.2f}")
    _draw_causes(axes[1], failure)
    _draw_repair(axes[2], failure, failure.cause, hide=True)
    _draw_repair(axes[3], failure, failure.sufficient, hide=False)
    _draw_curves(axes[4], failure)
    return figure


def _draw_causes(ax: Axes, failure: DrawnFailure) -> None:
    regions = failure.truth.regions
    assert regions is not None
    values = failure.causes[regions.labels].numpy()
    ax.imshow(0.3 + 0.7 * _photo(failure).mean(axis=2), cmap="gray", vmin=0, vmax=1)
    image = ax.imshow(values, cmap="RdBu", vmin=-1, vmax=1, alpha=0.62, interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["cause", "", "support"], fontsize=8)
    bar.outline.set_visible(False)
    ax.set_axis_off()
    _title(ax, f"from cause of the error\nto support of {failure.true_name}")


def _draw_repair(ax: Axes, failure: DrawnFailure, repair: DrawnRepair | None, hide: bool) -> None:
    """The image as the model gets it right: without the causing regions, or with nothing but the sufficient ones."""
    regions = failure.truth.regions
    assert regions is not None
    if repair is None:
        _draw_image(ax, 0.75 + 0.25 * _photo(failure))
        _title(ax, "no removal makes it right" if hide else "no part alone is enough")
        return
    inside = np.isin(regions.labels.numpy(), repair.regions.numpy())
    shown = ~inside if hide else inside
    _draw_image(ax, np.where(shown[:, :, None], _photo(failure), _fill_of(failure)))
    ax.add_collection(LineCollection(border_segments(np.where(inside, 1, 0)), colors=_PREDICTED if hide else _TRUE, linewidths=1.4))
    count = f"{len(repair.regions)} region{'s' if len(repair.regions) > 1 else ''}, {repair.area:.0%} of the image"
    _title(ax, f"{'without' if hide else 'only'} {count}:\n{failure.true_name}, p = {repair.true:.2f}")


def _draw_curves(ax: Axes, failure: DrawnFailure) -> None:
    area = failure.truth.area.numpy()
    for scores, colour, name in (
        (failure.shown.true, _TRUE, failure.true_name),
        (failure.shown.predicted, _PREDICTED, failure.predicted_name),
    ):
        ax.plot(area, scores.numpy(), color=colour, linewidth=1.9, label=name)
    right = failure.shown.right.numpy()
    ax.fill_between(area, 0, 1, where=right, step="mid", color=_TRUE, alpha=0.07, linewidth=0, transform=ax.get_xaxis_transform())
    peak = failure.peak
    ax.plot(area[peak], float(failure.shown.true[peak]), "o", color=_TRUE, markeredgecolor="white", markersize=8, zorder=3)
    ax.axvline(area[peak], color=INK, linewidth=0.8, linestyle=":")
    ax.set_xlim(0, 1)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("share of the image shown, support of the truth first", fontsize=9)
    ax.set_ylabel("probability", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    legend = ax.legend(fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none", loc="best")
    for text in legend.get_texts():
        text.set_parse_math(False)
    _title(ax, f"highest p({failure.true_name}) = {float(failure.shown.true[1:].max()):.2f}\nshaded: the model is right")


def _photo(failure: DrawnFailure) -> np.ndarray:
    return failure.truth.image.detach().cpu().permute(1, 2, 0).numpy().clip(0, 1)


def _fill_of(failure: DrawnFailure) -> np.ndarray:
    """What hidden regions showed."""
    return failure.fill.detach().cpu().permute(1, 2, 0).numpy().clip(0, 1)


def _draw_image(ax: Axes, pixels: np.ndarray | Tensor) -> None:
    ax.imshow(pixels.numpy() if isinstance(pixels, torch.Tensor) else pixels, interpolation="nearest")
    ax.set_axis_off()


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, fontsize=10, color=INK, parse_math=False)
