"""Figures of explanations with matplotlib. Each ``plot_`` function returns a new Figure and does not show it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from scipy.ndimage import distance_transform_edt

from attribution.errors import UserError
from attribution.figures.drawn import DrawnExplanation, whole_of
from attribution.figures.style import (
    DELETION,
    INK,
    INSERTION,
    Figure,
    as_written,
    border_segments,
    class_text,
    dimmed_photo,
    draw_colorbar,
    draw_crop,
    draw_title,
    gray_photo,
    one_line,
    seen_pixels,
    shown_pixels,
    style_curves,
)

_NUMBERED = 30  # more numbers than this are unreadable on a slide


def plot_explanation(explanation: DrawnExplanation, share: float = 0.95) -> Figure:
    """Draw an explanation as one row: photo, heatmap, selected regions with their ranks, insertion and deletion curves.

    Args:
        explanation: of a search, or of a method that yields only a map; then only photo and heatmap are drawn.
        share: the regions shown are the first that reach this share of the target's probability for the whole image. If none do, or
            the fill alone does, they are the first regions with the highest probability.
    """
    return plot_explanations([explanation], share)


def plot_explanations(explanations: Sequence[DrawnExplanation], share: float = 0.95) -> Figure:
    """Draw several explanations, one row each (see ``plot_explanation``)."""
    if not explanations:
        raise UserError("no explanations to plot: give at least one")
    searched = any(e.insertion_scores is not None for e in explanations)
    columns = 4 if searched else 2
    height, width = explanations[0].image.shape[1:]
    panel = min(max(height / width, 0.55), 1.4)
    figure = Figure(figsize=(3.7 * columns, (3.5 * panel + 0.9) * len(explanations)), layout="constrained", dpi=130)
    grid = figure.add_gridspec(len(explanations), columns, width_ratios=[1, 1, 1, 1.15][:columns])
    for row, explanation in enumerate(explanations):
        axes = [figure.add_subplot(grid[row, column]) for column in range(columns)]
        draw_photo(axes[0], explanation)
        draw_heatmap(axes[1], explanation)
        if not searched:
            continue
        if explanation.insertion_scores is None:
            for ax in axes[2:]:
                ax.set_axis_off()
            continue
        chosen = chosen_prefix(explanation, share)
        draw_regions(axes[2], explanation, chosen, share)
        draw_curves(axes[3], explanation, chosen)
    return as_written(figure)


def chosen_prefix(explanation: DrawnExplanation, share: float = 0.95) -> int:
    """The smallest k for which the first k regions reach a share of the target's probability for the whole image.

    If no k does, or the fill alone does: the k with the highest probability.
    """
    scores = explanation.insertion_scores
    assert scores is not None
    needed = explanation.regions_needed(share * explanation.confidence)
    return needed or int(scores[1:].argmax()) + 1


def draw_photo(ax: Axes, explanation: DrawnExplanation) -> None:
    """Draw the image, with the class and its probability as title."""
    ax.imshow(shown_pixels(explanation.image))
    draw_crop(ax, _crop(explanation))
    model = one_line(explanation.provenance.get("model", ""))
    title = f"{model}: {class_text(explanation.target_name, explanation.target)}, p = {explanation.confidence:.2f}".removeprefix(": ")
    if explanation.target not in explanation.predicted:
        names, values = explanation.class_names, explanation.probabilities.tolist()
        others = [f"{class_text(names[each], each)}, p = {values[each]:.2f}" for each in explanation.predicted[:3]]
        title += f"\npredicted {'; '.join(others) or 'no label, as none is above 0.5'}"
    draw_title(ax, title)
    ax.set_axis_off()


def draw_heatmap(ax: Axes, explanation: DrawnExplanation) -> None:
    """Draw the map over the gray photo, without colour where the model's crop leaves pixels out.

    A signed map has two colours around zero. The title of a constant map says so.
    """
    signed = explanation.pixel_map if explanation.order is None else None
    values = (explanation.heatmap if signed is None else signed).detach().cpu().numpy().astype(float)
    broken = ~np.isfinite(values)
    values = np.where(broken, 0.0, values)
    ax.imshow(gray_photo(explanation.image), cmap="gray", vmin=0, vmax=1)
    top = float(np.abs(values).max())
    seen = np.where(seen_pixels(values.shape, _crop(explanation)), values, np.nan)
    method = explanation.provenance.get("settings", {}).get("method")
    note = f" ({int(broken.sum())} values not finite)" if broken.any() else ""
    if "layer" in explanation.provenance:
        note += f"\nlayer {explanation.provenance['layer']}"
    if top == 0 or np.ptp(values) == 0:
        draw_title(ax, f"{method or 'heatmap'}: constant{note}")
    elif values.min() < 0:
        image = ax.imshow(seen, cmap="RdBu_r", vmin=-top, vmax=top, alpha=0.65, interpolation="nearest")
        draw_colorbar(ax, image, [-top, 0, top], ["against", "0", "for"])
        draw_title(ax, f"{method or 'heatmap'}, signed{note}")
    else:
        image = ax.imshow(seen, cmap="inferno", vmin=0, vmax=top, alpha=0.6, interpolation="nearest")
        draw_colorbar(ax, image, [0, top], ["last", "first"] if explanation.order is not None else ["0", "max"])
        draw_title(ax, f"{method or 'importance'}{note}")
    ax.set_axis_off()


def _crop(explanation: DrawnExplanation) -> list[int] | None:
    """The part of the photo that the model sees: top, left, bottom, right; None if it sees all of it."""
    return explanation.provenance.get("settings", {}).get("regions", {}).get("crop")


def draw_regions(ax: Axes, explanation: DrawnExplanation, chosen: int, share: float) -> None:
    """Draw the first regions of the order in colour with rank and border, the other regions dimmed."""
    regions, order, scores = explanation.regions, explanation.order, explanation.insertion_scores
    assert regions is not None and order is not None and scores is not None
    labels = regions.labels.numpy()
    visible = np.where(seen_pixels(labels.shape, regions.seen), labels, -1)
    there = np.setdiff1d(visible, -1)
    first = [region for region in order[:chosen].tolist() if region in there]
    selected = np.isin(visible, first)
    ax.imshow(np.where(selected[:, :, None], shown_pixels(explanation.image), dimmed_photo(explanation.image)))
    ax.add_collection(LineCollection(border_segments(labels), colors="white", linewidths=0.5, alpha=0.8))
    shown = np.where(selected, labels, -1)
    ax.add_collection(LineCollection(border_segments(shown), colors=INK, linewidths=1.1))
    for rank, (x, y) in enumerate(_label_points(visible, first[:_NUMBERED]), start=1):
        badge = {"boxstyle": "circle,pad=0.18", "facecolor": "white", "edgecolor": INK, "linewidth": 0.7, "alpha": 0.9}
        ax.text(x, y, str(rank), ha="center", va="center", fontsize=6.5, color=INK, bbox=badge)
    ax.set_xlim(-0.5, labels.shape[1] - 0.5)
    ax.set_ylim(labels.shape[0] - 0.5, -0.5)
    count = f"{len(first)} of {len(there)} regions, {float(explanation.area[chosen]):.0%} of {whole_of(regions)}"
    reached = float(scores[chosen])
    enough = explanation.fill_confidence < share * explanation.confidence <= reached
    verb = "gives" if chosen == 1 else "give"
    draw_title(ax, f"{count}\n{verb} {'' if enough else 'the highest '}p = {reached:.2f}")
    ax.set_axis_off()


def draw_curves(ax: Axes, explanation: DrawnExplanation, chosen: int | None = None) -> None:
    """Draw the insertion and deletion scores over the exact share of the image, and mark the chosen prefix."""
    insertion, deletion = explanation.insertion_scores, explanation.deletion_scores
    assert insertion is not None and deletion is not None
    area = explanation.area.numpy()
    for scores, colour, name, auc in (
        (insertion, INSERTION, "insertion", explanation.insertion_auc),
        (deletion, DELETION, "deletion", explanation.deletion_auc),
    ):
        ax.plot(area, scores.numpy(), color=colour, linewidth=1.8, label=f"{name}, AUC {auc:.3f}")
        ax.fill_between(area, scores.numpy(), color=colour, alpha=0.08, linewidth=0)
    if chosen is not None:
        ax.axvline(area[chosen], color=INK, linewidth=0.8, linestyle=":")
        point = (area[chosen], float(insertion[chosen]))
        ax.plot(*point, "o", color=INSERTION, markeredgecolor="white", markersize=8, zorder=3)
    assert explanation.regions is not None
    style_curves(
        ax, f"share of {whole_of(explanation.regions)}, shown / hidden", f"p({class_text(explanation.target_name, explanation.target)})"
    )
    fill = explanation.provenance.get("settings", {}).get("fill")
    title = f"most important first{f', fill {one_line(fill)}' if isinstance(fill, str) else ''}"
    if explanation.is_hardly_seen:
        title += f"\nthe model hardly sees the class, p = {explanation.confidence:.2g}"
    elif explanation.fill_is_informative:
        title += f"\nthe fill alone gives p = {explanation.fill_confidence:.2f}: try another"
    draw_title(ax, title)


def _label_points(labels: np.ndarray, ids: Sequence[int]) -> list[tuple[int, int]]:
    """For each region of labels [H, W], the pixel (x, y) farthest from its border."""
    points = []
    for region in ids:
        depth = distance_transform_edt(np.pad(labels == region, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        points.append((int(x), int(y)))
    return points
