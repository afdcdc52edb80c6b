"""The tables of a benchmark's page: leaderboards, seeds, and how everything was measured."""

from __future__ import annotations

import math
from typing import Any

from attribution.fills import is_drop
from attribution.provenance import versions
from evaluation.benchmark.grid_report import grid_rows
from evaluation.benchmark.summary import Entry, Summary
from evaluation.benchmark.wording import by_protocol, explained_class, judged, writer
from evaluation.metrics.protocol import Protocol
from evaluation.metrics.registry import METRICS, Measure, metric_title
from evaluation.study.style import has_interval
from evaluation.study.tables import counted


def protocol_rows(summary: Summary) -> list[tuple[str, list[str]]]:
    """What was measured how, as terms with their texts."""
    results, settings = summary.results, summary.results.settings
    plain = settings.plain()
    cut = ", ".join(f"{key} {value}" for key, value in plain["region_options"].items())
    chosen = {"all": "", "correct": ", only those that the model gets right", "wrong": ", only those that the model gets wrong"}
    models = [
        f"{name}: input {info['size'][0]} x {info['size'][1]}, {len(info['class_names'])} classes, weights {info['weights_digest']}, "
        f"computed in {info['precision']}"
        for name, info in results.models.items()
    ]
    along = " along the patches of models that have some, since tokens of hidden ones are dropped" if settings.drops else ""
    seeds = f"; stochastic methods ran with {settings.seeds} seeds, tables show the first" if settings.seeds > 1 else ""
    on_images = [
        (
            "Images",
            [f"{counted(len(samples), 'image')} for {model}{chosen[settings.only]}" for model, samples in results.samples.items()],
        ),
        ("Class explained", [explained_class(summary)]),
        ("Curves", [_protocol_text(protocol) for protocol in settings.protocols]),
        (
            "Regions",
            [f"{settings.regions}{f' ({cut})' if cut else ''}{along}, shared by region steps, searches and methods that cut the image"],
        ),
        ("Methods worked with", [f"fill {plain['method_fill']}"]),
    ]
    return [
        ("Data", [f"{plain['data']}, split {settings.split}" if settings.root is not None else plain["data"]]),
        *grid_rows(summary),
        *(on_images if settings.measured() else []),
        ("Seeds", [f"{settings.seed}{seeds}"]),
        ("Models", models),
        ("Versions", [", ".join(f"{name} {number}" for name, number in versions().items())]),
    ]


def _protocol_text(protocol: Protocol) -> str:
    steps = "a region a step" if protocol.steps == "regions" else f"{protocol.count} steps of equally many pixels"
    axis = "exact share of pixels" if protocol.axis == "area" else "share of pixels that are not black"
    hidden = "tokens of hidden patches are dropped" if is_drop(protocol.fill) else f"hidden pixels show {protocol.settings()['fill']}"
    return f"{protocol.label()}: {steps}; {hidden}; {protocol.output} of the class; over the {axis}"


def leaderboard(summary: Summary, model: str, number: int) -> dict[str, Any]:
    """A table of a model: methods by measures, grouped by protocol."""
    groups = [(protocol, [m for m in ms if summary.column(model, m)]) for protocol, ms in by_protocol(summary.measures)]
    groups = [(protocol, measures) for protocol, measures in groups if measures]
    entries = [e for e in summary.entries if e.model == model]
    saturated = {e.validity.saturated for e in entries}
    shared = saturated.pop() if len(saturated) == 1 else 0  # a property of the images if all methods explained the same images
    first = {e.method: e for e in reversed(entries)}
    return {
        "id": f"board-{number}",
        "model": model,
        "units": judged(summary, model),
        "images": len(summary.results.samples[model]),
        "groups": groups,
        "columns": [_column(summary, model, measure) for _, measures in groups for measure in measures],
        "methods": summary.methods(model),
        "costs": {cost.method: cost for cost in summary.costs if cost.model == model},
        "doubts": {method: _doubts(entry, with_saturated=not shared) for method, entry in first.items()},
        "saturated": shared,
    }


def _column(summary: Summary, model: str, measure: Measure) -> dict[str, Any]:
    column = summary.column(model, measure)
    return {
        "measure": measure,
        "entries": {e.method: e for e in column},
        "write": writer(column),
        "best": min((e.rank for e in column if has_interval(e.interval)), default=math.nan),
    }


def _doubts(entry: Entry, with_saturated: bool) -> list[tuple[str, str]]:
    v = entry.validity
    found = [
        (v.failed, "failed", "images without an explanation"),
        (v.constant_maps, "constant", "maps with the same value everywhere: their order is arbitrary"),
        (v.saturated if with_saturated else 0, "saturated", "images with a confidence above 0.999, where gradients vanish"),
    ]
    return [(f"{count} {name}", title) for count, name, title in found if count]


def spreads(summary: Summary, model: str) -> dict[str, Any]:
    """Seeds of the stochastic methods beside the images, for the measures of the first protocol and those without one."""
    first = summary.first_protocol(model)
    measures = [m for m in summary.measures if m.protocol == first or not (METRICS[m.metric].curve or METRICS[m.metric].grid)]
    rows = []
    for method in summary.methods(model):
        found = {e.measure: e.spread for e in summary.entries if (e.model, e.method) == (model, method) and e.spread is not None}
        if not found:
            continue
        one = next(iter(found.values()))
        cells = [(_sd(found[m].seed_sd), _sd(found[m].image_sd)) if m in found else None for m in measures]
        correlation = f"{one.rank_correlation:.2f}" if math.isfinite(one.rank_correlation) else None
        rows.append({"method": method, "seeds": one.seeds, "correlation": correlation, "stable": one.stable, "cells": cells})
    return {"model": model, "protocol": first, "measures": [metric_title(m.metric) for m in measures], "rows": rows}


def _sd(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "–"  # noqa: RUF001
