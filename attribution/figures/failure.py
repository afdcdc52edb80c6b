"""The figure of a misclassified image: the causes of the error, two corrections, and the probabilities of both classes."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from attribution.figures.drawn import DrawnFailure, DrawnRepair, whole_of
from attribution.figures.style import (
    INK,
    Figure,
    as_written,
    border_segments,
    class_text,
    dimmed_photo,
    draw_colorbar,
    draw_crop,
    draw_title,
    gray_photo,
    seen_pixels,
    shown_pixels,
    style_curves,
)

_TRUE, _PREDICTED = "#0072b2", "#d55e00"


def plot_failure(failure: DrawnFailure) -> Figure:
    """Draw photo, causes of the error and support of the truth, smallest removal, smallest sufficient set, and both curves."""
    height, width = failure.truth.image.shape[1:]
    panel = min(max(height / width, 0.55), 1.4)
    figure = Figure(figsize=(17.5, 3.4 * panel + 1.1), layout="constrained", dpi=110)
    grid = figure.add_gridspec(1, 5, width_ratios=[1, 1.08, 1, 1, 1.3])
    axes = [figure.add_subplot(grid[0, column]) for column in range(5)]
    probabilities = failure.truth.probabilities
    assert failure.truth.regions is not None
    _draw_image(axes[0], shown_pixels(failure.truth.image))
    draw_crop(axes[0], failure.truth.regions.seen)
    wrong, right = float(probabilities[failure.mistake.target]), float(probabilities[failure.truth.target])
    draw_title(axes[0], f"predicted {_predicted(failure)}, p = {wrong:.2f}\nshows {_true(failure)}, p = {right:.2f}")
    _draw_causes(axes[1], failure)
    _draw_repair(axes[2], failure, failure.cause, hide=True)
    _draw_repair(axes[3], failure, failure.sufficient, hide=False)
    _draw_curves(axes[4], failure)
    return as_written(figure)


def _true(failure: DrawnFailure) -> str:
    return class_text(failure.true_name, failure.truth.target)


def _predicted(failure: DrawnFailure) -> str:
    return class_text(failure.predicted_name, failure.mistake.target)


def _draw_causes(ax: Axes, failure: DrawnFailure) -> None:
    regions = failure.truth.regions
    assert regions is not None
    values = np.where(seen_pixels(regions.labels.shape, regions.seen), failure.causes[regions.labels].numpy(), np.nan)
    ax.imshow(gray_photo(failure.truth.image, 0.3), cmap="gray", vmin=0, vmax=1)
    image = ax.imshow(values, cmap="RdBu", vmin=-1, vmax=1, alpha=0.62, interpolation="nearest")
    draw_colorbar(ax, image, [-1, 0, 1], ["cause", "0", "support"], fraction=0.04, fontsize=8)
    ax.set_axis_off()
    draw_title(ax, f"from cause of the error\nto support of {_true(failure)}")


def _draw_repair(ax: Axes, failure: DrawnFailure, repair: DrawnRepair | None, hide: bool) -> None:
    """Draw the image that the model classifies correctly: without the causing regions, or with only the sufficient ones."""
    regions = failure.truth.regions
    assert regions is not None
    if repair is None:
        _draw_image(ax, 0.75 + 0.25 * shown_pixels(failure.truth.image))
        draw_title(ax, "no removal corrects it" if hide else "no regions alone suffice")
        return
    seen = seen_pixels(regions.labels.shape, regions.seen)
    inside = np.isin(regions.labels.numpy(), repair.regions.numpy()) & seen
    shown = ~inside if hide else inside
    pixels = np.where(shown[:, :, None], shown_pixels(failure.truth.image), shown_pixels(failure.fill))
    _draw_image(ax, np.where(seen[:, :, None], pixels, dimmed_photo(failure.truth.image)))
    ax.add_collection(LineCollection(border_segments(np.where(inside, 1, 0)), colors=_PREDICTED if hide else _TRUE, linewidths=1.4))
    count = f"{len(repair.regions)} region{'s' if len(repair.regions) > 1 else ''}, {repair.area:.0%} of {whole_of(regions)}"
    draw_title(ax, f"{'without' if hide else 'only'} {count}:\n{_true(failure)}, p = {repair.true:.2f}")


def _draw_curves(ax: Axes, failure: DrawnFailure) -> None:
    area = failure.truth.area.numpy()
    for scores, colour, name in (
        (failure.shown.true, _TRUE, _true(failure)),
        (failure.shown.predicted, _PREDICTED, _predicted(failure)),
    ):
        ax.plot(area, scores.numpy(), color=colour, linewidth=1.9, label=name)
    right = failure.shown.right.numpy()
    ax.fill_between(area, 0, 1, where=right, step="mid", color=_TRUE, alpha=0.07, linewidth=0, transform=ax.get_xaxis_transform())
    peak = failure.peak
    ax.plot(area[peak], float(failure.shown.true[peak]), "o", color=_TRUE, markeredgecolor="white", markersize=8, zorder=3)
    ax.axvline(area[peak], color=INK, linewidth=0.8, linestyle=":")
    assert failure.truth.regions is not None
    style_curves(ax, f"share of {whole_of(failure.truth.regions)} shown, support of the truth first", "probability", fontsize=8.5)
    draw_title(ax, f"highest p({_true(failure)}) = {float(failure.shown.true[1:].max()):.2f}\nshaded: the model is right")


def _draw_image(ax: Axes, pixels: np.ndarray) -> None:
    ax.imshow(pixels, interpolation="nearest")
    ax.set_axis_off()
