"""A neuron path as a picture: which unit in each layer, its share of the score, the classes it speaks for, images that excite it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from torch import Tensor

from attribution.errors import UserError
from attribution.figures.style import DELETION, INK, INSERTION, Figure
from attribution.image import load_image
from attribution.neurons.decode import Decoded, Exemplar
from attribution.neurons.path import NeuronPath

_SIGNIFICANT = 0.05
_MUTED = "#6b7280"


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
    """A path as layers x units, with what is known of each neuron below it.

    Args:
        path: of one neuron a layer.
        image: float32 [3, H, W] in [0, 1], the image explained.
        decoded: of ``NeuronDecoder.top_classes``, one for each layer.
        exemplars: of ``exemplars``, for each layer; what the neuron does not see is dimmed.
        pictures: the images that exemplars are indices into, float32 [3, H, W].
        width: F, the top of the unit axis; that of the largest candidate when None.
        shown: exemplars of each neuron.
    """
    if path.neurons.ndim > 1:
        raise UserError(f"a path of {path.neurons.shape[1]} neurons a layer was given: expected one a layer")
    layers = len(path.neurons)
    rows = min(shown, max((len(found) for found in exemplars), default=0))
    heights = [2.3, 0.9, *([0.85] if decoded else []), *([1.05] * rows)]
    left = 1.9 if image is not None else 0.9
    figure = Figure(figsize=(left + 1.25 * layers, sum(heights) + 0.9), dpi=130)
    grid = figure.add_gridspec(
        len(heights),
        layers,
        height_ratios=heights,
        left=(left + 0.05) / (left + 1.25 * layers),
        right=0.99,
        top=1 - 0.62 / (sum(heights) + 0.9),
        bottom=0.03,
        hspace=0.12,
        wspace=0.08,
    )
    _draw_units(figure.add_subplot(grid[0, :]), path, width)
    _draw_shares(figure.add_subplot(grid[1, :]), path)
    at = 2
    if decoded:
        _draw_classes(figure.add_subplot(grid[2, :]), path, decoded)
        at = 3
    for row in range(rows):
        for layer in range(layers):
            ax = figure.add_subplot(grid[at + row, layer])
            ax.set_axis_off()
            if layer < len(exemplars) and row < len(exemplars[layer]):
                ax.imshow(shown_exemplar(pictures[exemplars[layer][row].index], exemplars[layer][row]), interpolation="nearest")
    if rows:
        position = figure.axes[-layers * rows].get_position()
        label = "images that\nexcite it most;\nin colour where\npatches do"
        figure.text(position.x0 - 0.012, position.y1, label, ha="right", va="top", fontsize=8, color=_MUTED)
    if image is not None:
        top = figure.axes[0].get_position()
        side = 1.25 / figure.get_figwidth()
        ax = figure.add_axes((0.012, top.y0 + 0.25 * top.height, side, 0.6 * top.height))
        ax.imshow(load_image(image).permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_axis_off()
    title = f"{path.provenance.get('model', 'neuron path')}: {path.target_name}, p = {path.target_score:.2f}"
    figure.suptitle(
        f"{title}; {path.method} path, joint score {path.score:.3f}", x=0.012, ha="left", fontsize=10.5, color=INK, parse_math=False
    )
    return figure


def _draw_units(ax: Axes, path: NeuronPath, width: int | None) -> None:
    """Candidates as dots, larger for larger values, and the path through them."""
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
    """Bars of each layer's share of the joint score, with the activation."""
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
    """The classes that each neuron speaks for, those beyond chance in ink; the target in bold."""
    ax.set_ylim(0, 3)
    _columns(ax, len(path.neurons), "speaks for")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    for layer, neuron in enumerate(decoded):
        for place, effect in enumerate(neuron.top[:3]):
            beyond = effect.p < _SIGNIFICANT
            ax.text(
                layer,
                2.5 - place,
                effect.name[:16],
                ha="center",
                va="center",
                fontsize=8,
                color=INK if beyond else to_rgba(_MUTED, 0.65),
                fontweight="bold" if effect.index == path.target and beyond else "normal",
                parse_math=False,
            )


def _columns(ax: Axes, count: int, name: str) -> None:
    ax.set_xlim(-0.5, count - 0.5)
    ax.set_ylabel(name, fontsize=8, color=_MUTED)
    ax.tick_params(labelsize=7.5, colors=_MUTED)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25, linewidth=0.5)


def shown_exemplar(picture: Tensor, exemplar: Exemplar) -> np.ndarray:
    """The image, gray and pale where the neuron is not active; at least 64 pixels high, so that the region has a smooth edge."""
    image = load_image(picture)
    scale = max(1, -(-96 // min(image.shape[1:])))
    image = torch.nn.functional.interpolate(image[None], scale_factor=scale, mode="nearest")[0]
    inside = exemplar.mask(image.shape[1], image.shape[2])
    pale = 0.45 + 0.55 * image.mean(dim=0, keepdim=True).expand(3, -1, -1)
    return torch.where(inside, image, pale).permute(1, 2, 0).numpy()
