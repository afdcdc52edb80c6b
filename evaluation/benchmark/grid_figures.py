"""Figures of grid localisation (matplotlib); each returns a Figure and never shows or keeps it.

Box plots and the view by bins follow Rao, Boehle and Schiele, "Towards Better Understanding Attribution Methods", CVPR 2022; the sweep
over kernel sizes follows the same authors' "Better Understanding Differences in Attribution Methods via Systematic Evaluations",
TPAMI 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cbook import boxplot_stats
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from attribution.errors import UserError, describe
from attribution.figures.style import Figure, as_written, one_line
from evaluation.grids.aggregate import Aggregate, examples, saturation
from evaluation.grids.scores import cell_slices, chance, positive_maps
from evaluation.study.style import FAMILY_COLOURS, INK, MUTED, PAPER, figure_style, name_rows

TARGET = "#1446d8"  # the outline of the cell whose class is explained; not on the maps' scale, and rare in photos
POSITIVE = LinearSegmentedColormap.from_list("positive", ["#ffffff", "#8fd19a", "#1f8a4c", "#00331c"])
_SWEEP_COLOURS = ["#0067a8", "#d04a02", "#00825f", "#a8458a", "#8a6a00", "#4b5bd0", "#a02c2c", "#5f6770"]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]


def plot_localization(scores: Mapping[str, Mapping[str, np.ndarray]], families: Mapping[str, str], n: int, title: str = "") -> Figure:
    """Localisation of all methods as box plots, a panel for each layer side by side, best mean in the first panel on top.

    Box: quartiles and median; whiskers: the last values within 1.5 times the box's width; values beyond are not drawn; diamond: mean,
    also written at the right. The dashed line is the chance level 1/n².

    Args:
        scores: panel (such as "input", "middle", "final") -> method -> scores [M] in [0, 1]; a method may be missing in a panel.
        families: method -> key of ``FAMILY_COLOURS``.
        n: cells along each side of the grid.

    Raises:
        UserError: no scores, a score outside [0, 1] or not finite, a method without a known family.
    """
    panels = {panel: {m: _checked_scores(v, m, panel) for m, v in by_method.items()} for panel, by_method in scores.items()}
    methods = _ranked(panels)
    if not methods:
        raise UserError("no scores to plot: give at least one method in one panel")
    for method in methods:
        if families.get(method) not in FAMILY_COLOURS:
            raise UserError(f"the family of {method} is {families.get(method)!r}: expected one of {', '.join(FAMILY_COLOURS)}")
    with figure_style():
        figure = Figure(figsize=(max(6.5, 2.2 + 3.5 * len(panels)), 1.7 + 0.29 * max(len(methods), 3)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (panel, by_method) in zip(axes, panels.items(), strict=True):
            for row, method in enumerate(methods):
                _draw_box(ax, row, by_method.get(method), FAMILY_COLOURS[families[method]])
            ax.axvline(chance(n), color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=2.5)
            ax.text(chance(n) + 0.015, len(methods) - 0.05, f"chance 1/{n * n}", fontsize=8, va="center")
            ax.annotate("mean", (1, -0.6), (8, 2), textcoords="offset points", va="bottom", fontsize=7.5, color=MUTED)
            ax.set_title(one_line(panel), fontweight="bold")
            ax.set_xlim(0, 1)
            ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
            ax.set_xlabel("localisation")
            ax.grid(visible=False, axis="y")
        name_rows(axes[0], {method: FAMILY_COLOURS[families[method]] for method in methods})
        axes[0].set_ylim(len(methods) + 0.4, -0.6)
        figure.get_layout_engine().set(w_pad=0.09)  # type: ignore[union-attr,call-arg]
        _suptitle(figure, title)
        used = [family for family in FAMILY_COLOURS if family in {families[method] for method in methods}]
        handles: list[Any] = [Patch(facecolor=_tint(FAMILY_COLOURS[f]), edgecolor=FAMILY_COLOURS[f], label=f) for f in used]
        handles.append(Line2D([], [], color=INK, marker="D", linestyle="", markersize=5, markeredgecolor=PAPER, label="mean"))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return as_written(figure)


def plot_aggregate(aggregates: Mapping[str, Aggregate], n: int, cell: int, title: str = "") -> Figure:
    """AggAtt: mean positive attribution of each bin, a row for each method, the best localised grids left.

    White is no attribution; a row's darkest green is its ``scale``, the same for all of its bins. The target cell is outlined in
    blue; the number under a map is the mean localisation of its bin.

    Args:
        aggregates: method -> ``aggregate`` of its maps at one head.
        n: cells along each side of the grid.
        cell: the head's cell, row by row from the top left.

    Raises:
        UserError: no aggregates, or a cell that is not on the grid.
    """
    if not aggregates:
        raise UserError("no aggregates to plot: give at least one method")
    columns = max(len(a.bins) for a in aggregates.values())
    height, width = next(iter(aggregates.values())).maps.shape[1:]
    with figure_style():
        names = [bin_names(each.fractions) for each in aggregates.values()]
        side = min(1.6, 9.6 / columns)
        tall, apart = side * height / width, 0.3 if all(each == names[0] for each in names) else 0.55  # room for names between rows
        labels = [f"{one_line(method)}\nmean {float(found.scores.mean()):.2f}" for method, found in aggregates.items()]
        left, right, over, under = 0.4 + 0.07 * max(map(len, "\n".join(labels).split("\n"))), 0.9, 0.65, 0.55
        across, down = left + right + (side + 0.1) * columns, over + under + tall * len(labels) + apart * (len(labels) - 1)
        figure = Figure(figsize=(across, down), dpi=130)  # laid out by hand: matplotlib's solver is slow with a hundred panels
        place = {"left": left / across, "right": 1 - right / across, "top": 1 - over / down, "bottom": under / down}
        axes = figure.subplots(len(labels), columns, squeeze=False, gridspec_kw={**place, "wspace": 0.1 / side, "hspace": apart / tall})
        above: list[str] = []
        for row, found, bins, label in zip(axes, aggregates.values(), names, labels, strict=True):
            top = _top(found.scale, found.maps)
            for ax in row[len(found.bins) :]:
                ax.set_axis_off()
            for ax, name, values, members in zip(row, bins, found.maps, found.bins, strict=False):
                _draw_map(ax, values, top, n, cell)
                ax.set_xlabel(f"{float(found.scores[members].mean()):.2f}", fontsize=8, color=MUTED, labelpad=2)
                if bins != above:
                    ax.set_title(name, fontsize=9, loc="center", pad=4)
            above = bins
            row[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8)
        beside = figure.add_axes(
            (1 - (right - 0.2) / across, 0.5 - min(1.5, down / 3) / down, 0.14 / across, 2 * min(1.5, down / 3) / down)
        )
        bar = figure.colorbar(ScalarMappable(cmap=POSITIVE), cax=beside, ticks=[0, 1])
        bar.ax.set_yticklabels(["0", "row's\nscale"], fontsize=8)
        bar.outline.set_linewidth(0.5)
        note = f"Below each map: mean localisation of the bin (chance {chance(n):.2f})."
        figure.text(0.1 / across, 0.08 / down, note, fontsize=8, color=MUTED)
        _suptitle(figure, title)
    return as_written(figure)


def plot_examples(
    aggregate: Aggregate,
    maps: Tensor,
    images: Tensor | Callable[[int], Tensor],
    n: int,
    cell: int,
    count: int = 3,
    title: str = "",
) -> Figure:
    """Examples around the median of each AggAtt bin: the grid of images and its positive map, with the localisation.

    Each map is scaled by its own value that 0.5 % of its pixels exceed, so that weak maps are seen as well.

    Args:
        aggregate: of ``aggregate``.
        maps: float [N, h, w], the maps that were aggregated.
        images: the grids [N, 3, H, W], uint8, or float in [0, 1]; or a function from an index to one of them [3, H, W].
        n: cells along each side of the grid.
        cell: the head's cell, row by row from the top left.
        count: examples of each bin; smaller bins show all that they have.

    Raises:
        UserError: another number of maps or images than were aggregated, an image of another kind, a cell that is not on the grid.
    """
    total = len(aggregate.order)
    for name, given in (("maps", maps), ("images", images)):
        if isinstance(given, Tensor) and len(given) != total:
            raise UserError(f"{len(given)} {name} for an aggregate of {total}: give those that were aggregated, in the same order")
    chosen, names = examples(aggregate, count), bin_names(aggregate.fractions)
    columns = max(len(indices) for indices in chosen)
    height, width = (int(side) for side in aggregate.maps.shape[1:])
    side = 1.35
    size = (1.4 + columns * (2 * side + 0.35), 0.9 + len(chosen) * (side * height / width + 0.3))
    with figure_style():
        figure = Figure(figsize=size, layout="constrained", dpi=130)
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)  # type: ignore[union-attr,call-arg]
        layout = figure.add_gridspec(len(chosen), 3 * columns - 1, width_ratios=([1, 1, 0.12] * columns)[:-1])
        for row, (indices, name) in enumerate(zip(chosen, names, strict=True)):
            for column, index in enumerate(indices.tolist()):
                photo, ax = (figure.add_subplot(layout[row, 3 * column + part]) for part in (0, 1))
                _draw_photo(photo, images[index] if isinstance(images, Tensor) else images(index), (height, width), n, cell)
                values = positive_maps(maps[index][None], (height, width))[0].cpu()
                _draw_map(ax, values, _top(saturation(values), values), n, cell)
                photo.set_xlabel(f"grid {index}", fontsize=8, color=MUTED, labelpad=2)
                ax.set_xlabel(f"{float(aggregate.scores[index]):.2f}", fontsize=8, labelpad=2)
                if column == 0:
                    maps_of = f"{len(aggregate.bins[row])} grid{'s' if len(aggregate.bins[row]) > 1 else ''}"
                    photo.set_ylabel(f"{name}\n{maps_of}", rotation=0, ha="right", va="center", labelpad=8)
        _note(figure, f"Below each map: its localisation (chance {chance(n):.2f}). Each map has its own scale.")
        _suptitle(figure, title)
    return as_written(figure)


def plot_sweep(
    scores: Mapping[str, tuple[Sequence[int], np.ndarray, np.ndarray, np.ndarray]],
    n: int,
    title: str = "",
) -> Figure:
    """Mean localisation after smoothing, against the size of the kernel (logarithmic), with intervals and the chance level.

    Args:
        scores: method -> (kernel sizes, mean, low, high), each of the same length; a kernel of 1 is no smoothing.
        n: cells along each side of the grid.

    Raises:
        UserError: no methods, none of the kernel sizes positive, or lengths that differ.
    """
    curves = {method: _checked_curve(method, values) for method, values in scores.items()}
    if not curves:
        raise UserError("no scores to plot: give at least one method")
    with figure_style():
        figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=110)
        ax = figure.subplots()
        ends = []
        for index, (method, (kernels, mean, low, high)) in enumerate(curves.items()):
            colour = _SWEEP_COLOURS[index % len(_SWEEP_COLOURS)]
            marker = _MARKERS[(index + index // len(_SWEEP_COLOURS)) % len(_MARKERS)]
            ax.fill_between(kernels, low, high, color=colour, alpha=0.13, linewidth=0)
            ax.plot(
                kernels, mean, color=colour, marker=marker, markersize=5.5, markeredgecolor=PAPER, linewidth=1.7, label=one_line(method)
            )
            ends.append(float(mean[-1]))
        sizes = sorted({int(kernel) for curve in curves.values() for kernel in curve[0]})
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        ax.axhline(chance(n), color=INK, linewidth=1, linestyle=(0, (4, 2)))
        beside = ax.get_yaxis_transform()
        ax.annotate(f"chance 1/{n * n}", (1, chance(n)), (-2, 3), xycoords=beside, textcoords="offset points", ha="right", fontsize=8)
        ax.set_ylim(0, 1)
        ax.set_xlabel("side of the Gaussian kernel in pixels (1: not smoothed)")
        ax.set_ylabel("mean localisation")
        handles, labels = ax.get_legend_handles_labels()
        order = np.argsort([-end for end in ends], kind="stable")
        figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside right upper")
        _suptitle(figure, title)
    return as_written(figure)


def bin_names(fractions: Sequence[float]) -> list[str]:
    """Names of the bins between these edges, from "best 2 %" over "2-5 %" to "worst 2 %"."""
    if len(fractions) == 2:
        return ["all"]
    percent = [f"{100 * edge:.3g}" for edge in fractions]
    names = [f"{low}-{high} %" for low, high in pairwise(percent)]
    names[0] = f"best {percent[1]} %"
    names[-1] = f"worst {100 * (1 - fractions[-2]):.3g} %"
    return names


def _ranked(panels: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Methods by their mean in the first panel, best first; then those that are only in later panels, by their mean there."""
    found: dict[str, None] = {}
    for by_method in panels.values():
        found.update(dict.fromkeys(sorted(by_method, key=lambda method: -by_method[method].mean())))
    return list(found)


def _checked_scores(values: Any, method: str, panel: str) -> np.ndarray:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not len(scores):
        raise UserError(f"the scores of {method} ({panel}) are {describe(scores)}: expected [M], at least one; leave out what was not run")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise UserError(f"the scores of {method} ({panel}) are not all in [0, 1]: expected shares of the positive attribution")
    return scores


def _checked_curve(method: str, values: Any) -> tuple[np.ndarray, ...]:
    curve = tuple(np.asarray(part, dtype=np.float64) for part in values)
    if len(curve) != 4 or any(part.ndim != 1 or len(part) != len(curve[0]) for part in curve) or not len(curve[0]):
        shapes = [list(part.shape) for part in curve]
        raise UserError(f"the curve of {method} has shapes {shapes}: expected (kernel sizes, mean, low, high), equally long")
    if not (curve[0] > 0).all():
        raise UserError(f"the kernel sizes of {method} are {curve[0].tolist()}: expected positive numbers of pixels")
    order = np.argsort(curve[0], kind="stable")
    return tuple(part[order] for part in curve)


def _draw_box(ax: Axes, row: int, scores: np.ndarray | None, colour: str) -> None:
    if scores is None:
        ax.text(0.5, row, "no values", ha="center", va="center", fontsize=8, color=MUTED)
        return
    box = boxplot_stats(scores)[0]
    line: dict[str, Any] = {"color": colour, "solid_capstyle": "butt", "clip_on": False}
    for near, far in ((box["q1"], box["whislo"]), (box["q3"], box["whishi"])):
        ax.plot([near, far], [row, row], linewidth=1, zorder=2, **line)
        ax.plot([far, far], [row - 0.18, row + 0.18], linewidth=1, zorder=2, **line)
    ax.barh(
        row, box["iqr"], left=box["q1"], height=0.64, facecolor=_tint(colour), edgecolor=colour, linewidth=0.9, zorder=2.2, clip_on=False
    )
    ax.plot([box["med"]] * 2, [row - 0.32, row + 0.32], linewidth=2, zorder=3, **line)
    ax.plot(box["mean"], row, "D", color=INK, markeredgecolor=PAPER, markersize=5, zorder=4, clip_on=False)
    ax.annotate(f"{box['mean']:.2f}", (1, row), (8, 0), textcoords="offset points", va="center", fontsize=7.5, color=MUTED)


def _draw_map(ax: Axes, values: Tensor, top: float, n: int, cell: int) -> None:
    ax.imshow((values / top).clamp(0, 1).numpy(), cmap=POSITIVE, vmin=0, vmax=1, interpolation="nearest")
    _outline(ax, tuple(values.shape), n, cell, MUTED)


def _draw_photo(ax: Axes, image: Any, size: tuple[int, int], n: int, cell: int) -> None:
    right = isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3
    if not right or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise UserError(f"the image is {describe(image)}: expected uint8 [3, H, W], or float [3, H, W] in [0, 1]")
    pixels = image.detach().cpu().permute(1, 2, 0)
    shown = pixels.numpy() if image.dtype == torch.uint8 else pixels.float().clamp(0, 1).numpy()
    ax.imshow(shown, extent=(-0.5, size[1] - 0.5, size[0] - 0.5, -0.5))
    _outline(ax, size, n, cell, PAPER)


def _outline(ax: Axes, size: tuple[int, ...], n: int, cell: int, border: str) -> None:
    """The target cell in blue, thin lines between the other cells, no axes."""
    height, width = size
    rows, columns = cell_slices(cell, n, height, width)
    for line in range(1, n):
        ax.axvline(line * width / n - 0.5, color=border, linewidth=0.5)
        ax.axhline(line * height / n - 0.5, color=border, linewidth=0.5)
    corner = (columns.start - 0.5, rows.start - 0.5)
    ax.add_patch(Rectangle(corner, width // n, height // n, fill=False, edgecolor=TARGET, linewidth=1.8, clip_on=False, zorder=3))
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    ax.spines[:].set_visible(True)
    ax.spines[:].set_linewidth(0.5)


def _top(scale: float, values: Tensor) -> float:
    """Where the colours end: the scale, the maximum where hardly any pixel is positive, 1 where none is."""
    return scale if scale > 0 else float(values.max()) or 1.0


def _suptitle(figure: Figure, title: str) -> None:
    if title:
        above = {} if figure.get_layout_engine() is not None else {"y": 1 - 0.1 / figure.get_figheight()}
        figure.suptitle(one_line(title), fontsize=11, fontweight="bold", x=0.01, ha="left", va="top", **above)


def _note(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=8, color=MUTED, x=0.01, ha="left")


def _tint(colour: str) -> tuple[float, float, float]:
    """The colour at a fifth of its strength on white: boxes hide the grid lines behind them."""
    red, green, blue = to_rgb(colour)
    return 0.8 + 0.2 * red, 0.8 + 0.2 * green, 0.8 + 0.2 * blue
