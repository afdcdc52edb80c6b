"""The figure of a neuron path: unit and share of the score in each layer, classes that it supports, images that excite it most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.gridspec import GridSpec
from torch import Tensor

from attribution.errors import UserError
from attribution.figures.style import DELETION, INK, INSERTION, Figure, as_written, class_text, one_line
from attribution.image import load_image
from attribution.neurons.decode import Decoded, Exemplar
from attribution.neurons.path import NeuronPath

_SIGNIFICANT = 0.05
_MUTED = "#6b7280"
_COLUMN = 1.25  # inches of a layer
_TITLE = 0.9  # inches for title and margins


def plot_path(
    path: NeuronPath,
    image: Tensor | None = None,
    decoded: Sequence[Decoded] = (),
    exemplars: Sequence[Sequence[Exemplar]] = (),
    pictures: Sequence[Tensor] = (),
    *,
    width: int | None = None,
    shown: int = 3,
) -> Figure:
    """Draw a path over layers and units, and below each neuron its share of the score, its classes and its images.

    Args:
        path: with one neuron in each layer.
        image: float32 [3, H, W] in [0, 1], the image explained.
        decoded: the neuron of each layer, from ``NeuronDecoder.top_classes``.
        exemplars: for each layer, from ``exemplars``. Patches at which the neuron is not active are dimmed.
        pictures: float32 [3, H, W], the images that exemplars are indices into.
        width: F, the upper end of the unit axis; by default that of the largest candidate.
        shown: number of exemplars of each neuron.

    Raises:
        UserError: a path with several neurons in a layer.
    """
    if path.neurons.ndim > 1:
        raise UserError(f"the path has {path.neurons.shape[1]} neurons in each layer: expected one")
    layers = len(path.neurons)
    rows = min(shown, max((len(found) for found in exemplars), default=0))
    heights = [2.3, 0.9, *([0.85] if decoded else []), *([1.05] * rows)]
    left = 1.9 if image is not None else 0.9
    figure = Figure(figsize=(left + _COLUMN * layers, sum(heights) + _TITLE), dpi=130)
    grid = figure.add_gridspec(
        len(heights),
        layers,
        height_ratios=heights,
        left=(left + 0.05) / (left + _COLUMN * layers),
        right=0.99,
        top=1 - 0.62 / (sum(heights) + _TITLE),
        bottom=0.03,
        hspace=0.12,
        wspace=0.08,
    )
    _draw_units(figure.add_subplot(grid[0, :]), path, width)
    _draw_shares(figure.add_subplot(grid[1, :]), path)
    if decoded:
        _draw_classes(figure.add_subplot(grid[2, :]), path, decoded)
    if rows:
        _draw_exemplars(figure, grid, len(heights) - rows, exemplars, pictures)
    if image is not None:
        _draw_photo(figure, image)
    model, target = one_line(path.provenance.get("model", "neuron path")), class_text(path.target_name, path.target)
    title = f"{model}: {target}, p = {path.target_score:.2f}"
    figure.suptitle(f"{title}; {path.kind}, joint score {path.score:.3f}", x=0.012, ha="left", fontsize=10.5, color=INK)
    return as_written(figure)


def _draw_exemplars(
    figure: Figure, grid: GridSpec, first: int, exemplars: Sequence[Sequence[Exemplar]], pictures: Sequence[Tensor]
) -> None:
    """Draw the exemplars of each layer, in a column from row ``first`` of the grid to its last one."""
    for row in range(grid.nrows - first):
        for layer in range(grid.ncols):
            ax = figure.add_subplot(grid[first + row, layer])
            ax.set_axis_off()
            if layer < len(exemplars) and row < len(exemplars[layer]):
                ax.imshow(shown_exemplar(pictures[exemplars[layer][row].index], exemplars[layer][row]), interpolation="nearest")
    corner = figure.axes[-grid.ncols * (grid.nrows - first)].get_position()
    label = "images that\nexcite it most;\nin colour where\npatches do"
    figure.text(corner.x0 - 0.012, corner.y1, label, ha="right", va="top", fontsize=8, color=_MUTED)


def _draw_photo(figure: Figure, image: Tensor) -> None:
    top = figure.axes[0].get_position()
    ax = figure.add_axes((0.012, top.y0 + 0.25 * top.height, _COLUMN / figure.get_figwidth(), 0.6 * top.height))
    ax.imshow(load_image(image).permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_axis_off()


def _draw_units(ax: Axes, path: NeuronPath, width: int | None) -> None:
    """Draw candidates as dots, larger for larger values, and the path as a line through its neurons."""
    layers = np.arange(len(path.neurons))
    for layer in layers:
        units, values = path.candidates[layer].numpy(), path.candidate_scores[layer].numpy()
        sizes = 8 + 46 * np.clip(values / max(float(np.abs(values).max()), 1e-12), 0, 1)
        ax.scatter(np.full(len(units), layer), units, s=sizes, color="#c3c9d1", linewidths=0, zorder=2)
    chosen = path.neurons.numpy()
    ax.plot(layers, chosen, color=INSERTION, linewidth=1.6, zorder=3)
    ax.scatter(layers, chosen, s=58, color=INSERTION, edgecolor="white", linewidth=0.9, zorder=4)
    top = width or int(path.candidates.max()) + 1
    for layer, unit in zip(layers, chosen, strict=True):
        near_top = unit > 0.88 * top
        ax.annotate(
            str(unit),
            (layer, unit),
            xytext=(0, -9 if near_top else 8),
            textcoords="offset points",
            ha="center",
            va="top" if near_top else "bottom",
            fontsize=8.5,
            color=INK,
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            zorder=5,
        )
    ax.set_ylim(-0.04 * top, 1.04 * top)
    _columns(ax, len(layers), "unit")
    ax.set_xticks(layers, [f"layer {layer + 1}" for layer in layers], fontsize=8)
    ax.xaxis.tick_top()
    ax.tick_params(axis="x", length=0)


def _draw_shares(ax: Axes, path: NeuronPath) -> None:
    """Draw each layer's share of the joint score as a bar, with the neuron's activation."""
    shares = path.shares.numpy()
    finite = np.where(np.isfinite(shares), shares, 0)
    layers = np.arange(len(shares))
    ax.bar(layers, finite, width=0.5, color=[INSERTION if value >= 0 else DELETION for value in finite], alpha=0.85)
    low, high = min(0.0, float(finite.min())), max(0.05, float(finite.max()))
    for layer in layers:
        text = f"{shares[layer]:.0%}\n" if np.isfinite(shares[layer]) else ""
        text += f"a = {path.activations[layer]:.2f}"
        ax.text(float(layer), max(finite[layer], 0), text, ha="center", va="bottom", fontsize=7.5, color=INK)
    ax.set_ylim(low * 1.1, high + 0.75 * (high - low))
    ax.axhline(0, color=_MUTED, linewidth=0.6)
    _columns(ax, len(layers), "share of\nthe score")
    ax.set_xticks([])
    ax.set_yticks([])


def _draw_classes(ax: Axes, path: NeuronPath, decoded: Sequence[Decoded]) -> None:
    """Write the classes that each neuron supports: significant ones dark, others gray, a significant target in bold."""
    ax.set_ylim(0, 3)
    _columns(ax, len(path.neurons), "speaks for")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    for layer, neuron in enumerate(decoded):
        for place, effect in enumerate(neuron.top[:3]):
            significant = effect.p < _SIGNIFICANT
            ax.text(
                layer,
                2.5 - place,
                class_text(effect.name, effect.index)[:16],
                ha="center",
                va="center",
                fontsize=8,
                color=INK if significant else to_rgba(_MUTED, 0.65),
                fontweight="bold" if effect.index == path.target and significant else "normal",
            )


def _columns(ax: Axes, count: int, name: str) -> None:
    ax.set_xlim(-0.5, count - 0.5)
    ax.set_ylabel(name, fontsize=8, color=_MUTED)
    ax.tick_params(labelsize=7.5, colors=_MUTED)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25, linewidth=0.5)


def shown_exemplar(picture: Tensor, exemplar: Exemplar) -> np.ndarray:
    """The image, enlarged for a smooth edge of the region, and gray and pale where the neuron is not active: [H, W, 3]."""
    image = load_image(picture)
    scale = max(1, -(-96 // min(image.shape[1:])))
    image = torch.nn.functional.interpolate(image[None], scale_factor=scale, mode="nearest")[0]
    inside = exemplar.mask(image.shape[1], image.shape[2])
    pale = 0.45 + 0.55 * image.mean(dim=0, keepdim=True).expand(3, -1, -1)
    return torch.where(inside, image, pale).permute(1, 2, 0).numpy()
