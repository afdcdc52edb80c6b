"""Figures of a benchmark (matplotlib); each plot returns a Figure and never shows or keeps it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from attribution.figures.style import Figure, as_written, one_line
from evaluation.benchmark.labels import place_labels
from evaluation.benchmark.methods import MethodSpec
from evaluation.benchmark.summary import AXIS, Entry, MeanCurve, Summary, score_matrix
from evaluation.metrics.registry import METRICS, Measure, metric_title
from evaluation.statistics.intervals import Interval
from evaluation.study.style import (
    DASHES,
    FAMILY_COLOURS,
    FAMILY_MARKERS,
    INK,
    MUTED,
    PAPER,
    draw_matrix,
    figure_style,
    has_interval,
    name_rows,
)
from evaluation.study.tables import grouped

MOST_CURVES = 8  # methods in colour; more lines cannot be told apart
MOST_DOTS = 150  # images drawn for one method


def plot_curves(summary: Summary, model: str, protocol: str) -> Figure:
    """Mean insertion and deletion curves over the images, with pointwise 95 % bootstrap bands.

    The best ``MOST_CURVES`` methods by the first measure are drawn, in the colours of their families. Region searches are always drawn,
    as thicker lines, and controls are gray. The title says how many methods are shown.

    Args:
        model: a model of the benchmark.
        protocol: label of one of its protocols.
    """
    specs = _specs(summary)
    curves = {c.method: c for c in summary.curves if (c.model, c.protocol) == (model, protocol)}
    ordered = [method for method in summary.methods(model) if method in curves]
    shown = _shown_curves(ordered, specs)
    output = next(p.output for p in summary.results.settings.protocols if p.label() == protocol)
    with figure_style():
        figure = Figure(figsize=(12, 4.1), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        dashes = _dashes(shown, specs)
        for method in reversed(shown):  # the best on top
            _draw_curves(axes, curves[method], specs[method], dashes[method])
        for ax, name, verb, hint in ((axes[0], "insertion", "shown", "higher"), (axes[1], "deletion", "hidden", "lower")):
            ax.set_xlim(0, 1)
            ax.set_xlabel(f"share of the image {verb}")
            ax.set_title(f"{name}: {hint} is better")
        figure.suptitle(one_line(f"{model}: {protocol}"), fontsize=10, fontweight="bold", x=0.01, ha="left")
        axes[0].set_ylabel("logit of the target" if output == "logit" else "p(target)")
        if output == "probability":
            axes[0].set_ylim(-0.02, 1.02)
        left_out = len(ordered) - len(shown)
        handles = [
            Line2D([], [], color=FAMILY_COLOURS[specs[m].family], linestyle=dashes[m], linewidth=2.8 if specs[m].is_search else 1.6)
            for m in shown
        ]
        if handles:
            title = f"{len(shown)} of {len(ordered)} methods" if left_out else None
            figure.legend(handles, [one_line(m) for m in shown], loc="outside right upper", handlelength=3.4, title=title)
    return as_written(figure)


def _draw_curves(axes: Sequence[Axes], curve: MeanCurve, spec: MethodSpec, dashes: Any) -> None:
    colour = FAMILY_COLOURS[spec.family]
    width, zorder = (2.8, 4) if spec.is_search else (1.2, 2) if spec.family == "control" else (1.6, 3)
    for ax, mean, band in ((axes[0], curve.insertion, curve.insertion_band), (axes[1], curve.deletion, curve.deletion_band)):
        ax.fill_between(AXIS, *band, color=colour, alpha=0.18 if spec.is_search else 0.07, linewidth=0, zorder=zorder - 2)
        ax.plot(AXIS, mean, color=colour, linestyle=dashes, linewidth=width, zorder=zorder, gid=spec.label)


def plot_cost(summary: Summary, model: str, measures: Sequence[Measure] | None = None) -> Figure:
    """Quality against the images that one explanation forwards (logarithmic from 1 on), with the intervals of the means.

    Methods of equal cost are drawn side by side. Methods whose mean has no interval are left out.

    Args:
        model: a model of the benchmark.
        measures: a panel each; the first measure and insertion - deletion of the same protocol by default.
    """
    measures = cost_measures(summary, model) if measures is None else measures
    costs = {c.method: c.evaluations for c in summary.costs if c.model == model}
    with figure_style():
        figure = Figure(figsize=(12, 3.9 * len(measures) + 0.2), layout="constrained")
        axes = figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0]
        placed = []
        for ax, measure in zip(axes, measures, strict=True):
            placed.append((ax, _draw_costs(figure, ax, summary, model, measure, costs)))
            _cost_axis(ax, max([10.0, *costs.values()]))
            ax.set_title(_heading(model, measure), fontweight="bold")
        axes[-1].set_xlabel("images forwarded for one explanation")
        as_written(figure).draw_without_rendering()  # fixes the positions of the panels
        for ax, points in placed:
            place_labels(figure, ax, points)
    return as_written(figure)


def _draw_costs(
    figure: Figure, ax: Axes, summary: Summary, model: str, measure: Measure, costs: Mapping[str, float]
) -> list[tuple[str, float, Interval, float, str]]:
    """Draw a point for each method; its name, cost, interval, shift and colour are returned for the labels."""
    specs = _specs(summary)
    entries = {e.method: e for e in summary.column(model, measure) if has_interval(e.interval)}
    points = []
    for method, dodge in _dodged(list(entries.values()), costs):
        transform = ax.transData + ScaledTranslation(dodge / 72, 0, figure.dpi_scale_trans)
        spec, interval, cost = specs[method], entries[method].interval, costs[method]
        colour = FAMILY_COLOURS[spec.family]
        ends = [interval.low, interval.high]
        ax.plot([cost] * 2, ends, color=colour, linewidth=1.3, transform=transform, solid_capstyle="butt")
        ax.plot(
            cost, interval.estimate, FAMILY_MARKERS[spec.family], color=colour, markeredgecolor=PAPER,
            markersize=9 if spec.is_search else 7, transform=transform, zorder=3, gid=method,
        )  # fmt: skip
        points.append((method, cost, interval, dodge, colour))
    if entries:  # shifted artists do not move the limits by themselves
        low, high = min(e.interval.low for e in entries.values()), max(e.interval.high for e in entries.values())
        room = 0.08 * (high - low) or 0.05
        ax.set_ylim(low - room, high + room)
    return points


def _cost_axis(ax: Axes, top: float) -> None:
    """Logarithmic from 1 on, with a place for 0."""
    ax.set_xscale("symlog", linthresh=1, linscale=1)
    ax.minorticks_off()
    ax.set_xlim(-0.35, top * 3)
    powers = range(math.floor(math.log10(top)) + 1)
    ax.set_xticks([0, *[10**p for p in powers]], ["0", *[f"{10**p:,}" for p in powers]])


def plot_scores(summary: Summary, model: str, measure: Measure) -> Figure:
    """The scores of the single images by method, best mean first: median and quartiles as a box, all scores as a line, images as
    dots, the mean with its interval as a diamond.

    An image has the same height in every row; of more than ``MOST_DOTS`` images only this many are drawn, evenly spaced over the
    ranking.
    """
    specs = _specs(summary)
    scores, entries = score_matrix(summary.results, model, measure), summary.column(model, measure)
    with figure_style():
        figure = Figure(figsize=(12, 0.9 + 0.31 * max(len(entries), 3)), layout="constrained")
        ax = figure.subplots()
        for row, entry in enumerate(entries):
            values, colour = scores[entry.method], FAMILY_COLOURS[specs[entry.method].family]
            known = np.flatnonzero(np.isfinite(values))
            if not len(known):
                ax.text(0.5, row, "no values", transform=ax.get_yaxis_transform(), ha="center", va="center", color=MUTED)
                continue
            ax.plot([values[known].min(), values[known].max()], [row, row], color=colour, linewidth=0.8, alpha=0.7, zorder=1)
            if len(known) > 3:
                low, middle, high = np.quantile(values[known], [0.25, 0.5, 0.75])
                ax.barh(row, high - low, left=low, height=0.62, facecolor=colour, alpha=0.2, edgecolor=colour, zorder=1)
                ax.plot([middle] * 2, [row - 0.31, row + 0.31], color=colour, linewidth=1.8, zorder=2)
            drawn = _spread_dots(known, values)
            heights = row + 0.5 * (drawn * 0.6180339887 % 1 - 0.5)
            size = 5 if len(drawn) <= 30 else 3
            ax.plot(values[drawn], heights, "o", color=colour, markersize=size, alpha=0.5, markeredgewidth=0, zorder=2, gid=entry.method)
            if has_interval(entry.interval):
                ax.plot([entry.interval.low, entry.interval.high], [row, row], color=INK, linewidth=1.6, zorder=3)
                ax.plot(entry.interval.estimate, row, "D", color=INK, markeredgecolor=PAPER, markersize=6, zorder=4)
        _method_rows(ax, [e.method for e in entries], specs)
        ax.set_title(_heading(model, measure), fontweight="bold")
        ax.grid(visible=False, axis="y")
    return as_written(figure)


def plot_agreement(summary: Summary, model: str) -> Figure:
    """Draw Kendall's tau between the rankings of the methods under two protocols, a matrix for each metric.

    Where tau is low, the ranking depends on the protocol.
    """
    found = [a for a in summary.agreements if a.model == model]
    metrics = list(dict.fromkeys(a.metric for a in found))
    labels = [p.label() for p in summary.results.settings.protocols]
    columns = min(4, max(len(metrics), 1))
    rows = math.ceil(len(metrics) / columns)
    size = len(labels)
    names = [chr(ord("A") + i) if size <= 26 else str(i + 1) for i in range(size)]
    with figure_style():
        figure = Figure(figsize=(12, max(rows, 1) * (0.7 + 0.27 * size) + 0.6), layout="constrained")
        for index, metric in enumerate(metrics):
            ax = figure.add_subplot(rows, columns, index + 1)
            taus = np.eye(size)
            for a in found:
                if a.metric == metric:
                    first, second = labels.index(a.first), labels.index(a.second)
                    taus[first, second] = taus[second, first] = a.tau
            draw_matrix(ax, taus, "RdBu", -1, 1, "{:.2f}")
            ax.set_xticks(range(size), names)
            ax.set_yticks(range(size), names)
            ax.set_title(metric_title(metric))
        figure.suptitle(one_line(f"{model}: Kendall's tau between rankings"), fontsize=10, fontweight="bold", x=0.01, ha="left")
        legend = ";  ".join(f"{name}: {label}" for name, label in zip(names, labels, strict=True))
        figure.supxlabel(one_line(legend), fontsize=9, x=0.01, ha="left")
    return as_written(figure)


def plot_ranks(summary: Summary, model: str) -> Figure:
    """Mean rank of each method under each protocol, over the metrics that read curves; best over all protocols first."""
    labels = [p.label() for p in summary.results.settings.protocols]
    found = mean_ranks(summary, model)
    methods = sorted(found, key=lambda method: float(np.nanmean(found[method])))
    specs = _specs(summary)
    with figure_style():
        figure = Figure(figsize=(12, 1.2 + 0.3 * max(len(methods), 3)), layout="constrained")
        ax = figure.subplots()
        if methods:
            draw_matrix(ax, np.stack([found[method] for method in methods]), "Blues_r", 1, max(len(methods), 2), "{:.1f}")
        ax.set_xticks(range(len(labels)), [one_line(label) for label in labels])
        ax.xaxis.tick_top()
        ax.set_title(one_line(f"{model}: mean rank over the metrics with curves, 1 is best"), fontweight="bold")
        _method_rows(ax, methods, specs)
    return as_written(figure)


def cost_measures(summary: Summary, model: str) -> tuple[Measure, ...]:
    """The measures in the figure of quality against cost: the model's first measure, and insertion - deletion of the same (or the
    first) protocol."""
    first = summary.measures_of(model)[0]
    wanted = first.protocol if METRICS[first.metric].curve else summary.first_protocol(model)
    also = [m for m in summary.measures if m.metric == "insertion_deletion" and m.protocol == wanted and m != first]
    return (first, *also)


def mean_ranks(summary: Summary, model: str) -> dict[str, np.ndarray]:
    """Mean rank over the metrics that read curves, float64 [P] by protocol; NaN where a method has none."""
    labels = [p.label() for p in summary.results.settings.protocols]
    found: dict[str, list[list[float]]] = {}
    for e in summary.entries:
        if e.model == model and METRICS[e.measure.metric].curve:
            found.setdefault(e.method, [[] for _ in labels])[labels.index(e.measure.protocol)].append(e.rank)
    return {method: np.array([np.mean(r) if r else np.nan for r in by_protocol]) for method, by_protocol in found.items()}


def _specs(summary: Summary) -> dict[str, MethodSpec]:
    return {spec.label: spec for spec in summary.results.settings.methods}


def _shown_curves(ordered: Sequence[str], specs: dict[str, MethodSpec]) -> list[str]:
    coloured = [m for m in ordered if specs[m].family != "control"]
    kept = {*coloured[:MOST_CURVES], *(m for m in ordered if specs[m].is_search or specs[m].family == "control")}
    return [m for m in ordered if m in kept]


def _dashes(methods: Sequence[str], specs: dict[str, MethodSpec]) -> dict[str, Any]:
    """The dashes of each method; methods of a family have its colour and differ in the dashes."""
    families = grouped(methods, lambda method: specs[method].family)
    return {method: DASHES[at % len(DASHES)] for members in families.values() for at, method in enumerate(members)}


def _dodged(entries: Sequence[Entry], costs: Mapping[str, float], step: float = 8) -> Iterator[tuple[str, float]]:
    """Methods with a shift in points of 1/72 inch, so that those of about the same cost stand side by side, best left."""
    methods = [entry.method for entry in entries]
    for members in grouped(methods, lambda method: round(8 * math.log10(costs[method])) if costs[method] >= 1 else -1).values():
        yield from ((method, step * (at - (len(members) - 1) / 2)) for at, method in enumerate(members))


def _spread_dots(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    if len(known) <= MOST_DOTS:
        return known
    ranking = known[np.argsort(values[known], kind="stable")]
    return np.sort(ranking[np.linspace(0, len(ranking) - 1, MOST_DOTS).round().astype(int)])


def _method_rows(ax: Axes, methods: Sequence[str], specs: dict[str, MethodSpec]) -> None:
    name_rows(ax, {method: FAMILY_COLOURS[specs[method].family] for method in methods}, [m for m in methods if specs[m].is_search])


def _heading(model: str, measure: Measure) -> str:
    return one_line(
        f"{model}: {metric_title(measure.metric)}{f' ({measure.protocol})' if measure.protocol else ''}, {measure.direction} is better"
    )
