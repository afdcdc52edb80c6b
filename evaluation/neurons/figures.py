"""The figures of neuron paths on a data set; each function returns a Figure and never shows or keeps it."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from attribution.figures.style import Figure, as_written, class_text
from evaluation.neurons.results import EDITED
from evaluation.neurons.summary import NeuronSummary, Whose, changed
from evaluation.statistics.intervals import Interval, bootstrap_interval
from evaluation.study.style import FAMILY_COLOURS, INK, MUTED, PAPER, draw_matrix, figure_style, has_interval, name_rows

EDIT_NAMES = {"remove": "removed", "enhance": "enhanced", "mean": "at their mean"}
_MOST_CLASSES = 12  # in small multiples
_MOST_NAMES = 40  # names along the similarity matrix
_FIRST, _OTHER, _CONTROL = FAMILY_COLOURS["region search"], FAMILY_COLOURS["gradient"], FAMILY_COLOURS["control"]


def plot_changes(summary: NeuronSummary, whose: Whose = "own") -> Figure:
    """Draw the mean change of the target's probability under every edit, with its interval. Small marks are the means of single classes."""
    results = summary.results
    kinds = list(results.measured)
    with figure_style():
        figure = Figure(figsize=(10.6, 1.35 + 0.42 * len(kinds)), layout="constrained", dpi=130)
        figure.get_layout_engine().set(w_pad=0.09)  # type: ignore[union-attr,call-arg]
        axes = figure.subplots(1, len(EDITED), sharey=True)
        rows = np.arange(len(results.labels)) if whose == "own" else np.flatnonzero(~results.selection)
        labels = results.labels[rows]
        for ax, edit in zip(axes, EDITED, strict=True):
            for row, kind in enumerate(kinds):
                colour = kind_colour(kind, kinds)
                values = changed(results, results.measured[kind], whose, edit, "probability") * 100
                means = [values[labels == label].mean() for label in np.unique(labels)]
                ax.plot(means, np.full(len(means), row), "|", color=colour, alpha=0.45, markersize=9, markeredgewidth=1)
                interval = summary.change(kind, whose, edit, "probability").interval
                if has_interval(interval):
                    ax.plot([100 * interval.low, 100 * interval.high], [row, row], color=colour, linewidth=2.6, solid_capstyle="butt")
                ax.plot(100 * interval.estimate, row, "D", color=colour, markeredgecolor=PAPER, markersize=7, zorder=4)
            ax.axvline(0, color=INK, linewidth=0.8)
            ax.set_title(f"neurons {EDIT_NAMES[edit]}" + (f" (x {results.settings.enhance:g})" if edit == "enhance" else ""))
            ax.set_xlabel("change of p(target), points")
            ax.grid(visible=False, axis="y")
        name_rows(axes[0], {kind.replace("_", " "): kind_colour(kind, kinds) for kind in kinds})
        axes[0].set_ylim(len(kinds) - 0.4, -0.6)
    return as_written(figure)


def plot_similarity(summary: NeuronSummary) -> Figure:
    """Draw the cosine similarity of the classes as a matrix in which similar classes are neighbours."""
    names, order = summary.results.classifier.class_names, summary.similarity.order
    values = summary.similarity.matrix[np.ix_(order, order)]
    side = min(9.0, 2.2 + 0.36 * len(order))
    with figure_style():
        figure = Figure(figsize=(side + 0.8, side), layout="constrained", dpi=130)
        ax = figure.subplots()
        away = values[~np.eye(len(values), dtype=bool)]
        top = max(float(np.nanmax(away)) if away.size else 1.0, 1e-6)
        draw_matrix(ax, values, "Blues", 0, top, "{:.2f}" if len(order) <= 16 else "")
        if len(order) <= _MOST_NAMES:
            texts = [class_text(names[c], c) for c in order]
            ax.set_xticks(range(len(order)), texts, rotation=60, ha="right", rotation_mode="anchor")
            ax.set_yticks(range(len(order)), texts)
        else:
            ax.set_xticks([])
            ax.set_yticks([])
    return as_written(figure)


def plot_class_paths(summary: NeuronSummary) -> Figure:
    """Draw, for each of the first twelve classes, how often its images choose a unit of each layer, and the path of the class."""
    results, width = summary.results, summary.results.layers.width
    shown = summary.known_classes[:_MOST_CLASSES]
    columns = min(5, max(1, len(shown)))
    rows = math.ceil(len(shown) / columns)
    depth = len(results.layers)
    with figure_style():
        figure = Figure(figsize=(0.6 + 2.15 * columns, 0.7 + 1.75 * rows), layout="constrained", dpi=130)
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for ax in axes.flat[len(shown) :]:
            ax.set_axis_off()
        for ax, label in zip(axes.flat, shown, strict=False):
            counts = summary.frequency[label] / max(1, (results.labels == label).sum())
            layers, units = np.nonzero(counts)
            ax.scatter(layers, units, s=4 + 130 * counts[layers, units], color=_OTHER, alpha=0.55, linewidths=0)
            ax.plot(range(depth), summary.class_paths[label], color=_FIRST, linewidth=1.5)
            ax.set_title(class_text(results.classifier.class_names[label], label))
            ax.set_xlim(-0.5, depth - 0.5)
            ax.set_ylim(-0.04 * width, 1.04 * width)
            step = max(1, math.ceil(depth / 6))
            ax.set_xticks(range(0, depth, step), [str(layer + 1) for layer in range(0, depth, step)])
        for ax in axes[-1]:
            ax.set_xlabel("layer")
        for ax in axes[:, 0]:
            ax.set_ylabel("unit")
    return as_written(figure)


def plot_pruning(summary: NeuronSummary) -> Figure:
    """Draw the accuracy on the evaluation half over the number of layers pruned: a panel for each K, a line for each share."""
    results = summary.results
    kept = sorted({row.kept for row in results.pruned})
    shares = sorted({row.share for row in results.pruned})
    judged = ~results.selection
    clean = float((results.predicted == results.labels)[judged].mean())
    colours = [FAMILY_COLOURS[name] for name in ("cam", "gradient", "perturbation", "region search", "transformer")]
    with figure_style():
        figure = Figure(figsize=(0.9 + 3.4 * len(kept), 3.6), layout="constrained", dpi=130)
        axes = figure.subplots(1, len(kept), sharey=True, squeeze=False)[0]
        for ax, count in zip(axes, kept, strict=True):
            for number, share in enumerate(shares):
                found = sorted((r for r in results.pruned if (r.kept, r.share) == (count, share)), key=lambda r: r.depth)
                intervals = [bootstrap_interval(r.correct.astype(float), seed=results.settings.seed) for r in found]
                places = np.array([r.depth for r in found]) + 0.14 * (number - (len(shares) - 1) / 2)  # side by side, not on one another
                _bars(ax, places, intervals, colours[number % len(colours)], number)
            ax.axhline(clean, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
            ax.set_title(f"each class keeps {count} a layer")
            ax.set_xticks(sorted({r.depth for r in results.pruned}))
            ax.set_xlabel("layers pruned")
        axes[0].set_ylabel("accuracy")
        handles = [
            Line2D([], [], color=colours[n % len(colours)], marker=_MARKERS[n % len(_MARKERS)], label=f"{share:.0%} of the others removed")
            for n, share in enumerate(shares)
        ]
        handles.append(Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (4, 2)), label="not pruned"))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
    return as_written(figure)


def plot_agreement(summary: NeuronSummary) -> Figure:
    """Draw, layer by layer, how well the direct effects of neurons agree with what removing them does."""
    values = np.array(summary.agreement)
    with figure_style():
        figure = Figure(figsize=(1.4 + 0.55 * len(values), 2.2), layout="constrained", dpi=130)
        ax = figure.subplots()
        ax.bar(range(len(values)), np.nan_to_num(values), width=0.6, color=_OTHER)
        for layer, value in enumerate(values):
            text = f"{value:.2f}" if np.isfinite(value) else "none"
            ax.text(layer, max(0, np.nan_to_num(value)) + 0.02, text, ha="center", fontsize=7.5, color=MUTED)
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set_ylim(min(-0.05, float(np.nanmin(values)) - 0.05 if np.isfinite(values).any() else 0), 1.12)
        ax.set_xticks(range(len(values)), [str(layer + 1) for layer in range(len(values))])
        ax.set_xlabel("layer")
        ax.set_ylabel("rank correlation")
        ax.grid(visible=False, axis="x")
    return as_written(figure)


def kind_colour(kind: str, kinds: list[str]) -> str:
    """The colour of a kind of path: the first stands out, random ones are gray."""
    return _FIRST if kind == kinds[0] else _CONTROL if kind == "random" else _OTHER


_MARKERS = ("o", "s", "^", "D", "v")


def _bars(ax: Axes, places: np.ndarray, intervals: list[Interval], colour: str, number: int) -> None:
    """Draw means, joined by a line, with their intervals."""
    for place, interval in zip(places, intervals, strict=True):
        if has_interval(interval):
            ax.plot([place, place], [interval.low, interval.high], color=colour, linewidth=1.2, alpha=0.7)
    mean = [interval.estimate for interval in intervals]
    marker = _MARKERS[number % len(_MARKERS)]
    ax.plot(places, mean, color=colour, marker=marker, markersize=6, markeredgecolor=PAPER, linewidth=1.3)
    ax.grid(visible=False, axis="x")
