"""Writes the report of a benchmark: tables, figures, and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from attribution.files import slug
from evaluation.benchmark.boards import leaderboard, protocol_rows, spreads
from evaluation.benchmark.figures import MOST_DOTS, plot_agreement, plot_cost, plot_curves, plot_ranks, plot_scores
from evaluation.benchmark.gallery import Gallery
from evaluation.benchmark.grid_report import grid_figures
from evaluation.benchmark.summary import Summary, comparisons_csv, summary_csv
from evaluation.benchmark.wording import ARROWS, LETTERS, conclusions, dependence, refusals
from evaluation.metrics.registry import METRICS, metric_title
from evaluation.statistics.validity import STABLE
from evaluation.study.page import page, write_text
from evaluation.study.report import Planned, ReportFiles, draw_figures, json_text, plain_heading, write_tables
from evaluation.study.style import FAMILY_COLOURS
from evaluation.study.tables import grouped, plain_values

_MOST_FAILURES = 60  # rows; the rest is in summary.json


def write_report(summary: Summary, out: str | Path, title: str | None = None) -> ReportFiles:
    """Write summary.csv, comparisons.csv, summary.json, figures/*.png and report.html; the same summary gives the same bytes.

    Args:
        summary: of ``summarise``.
        out: folder; its explanations are read again for the gallery, from where the benchmark stored them.
        title: of the page.

    Raises:
        UserError: the folder cannot be written to, or the disk is full; each file is whole or not there.
    """
    out = Path(out)
    settings = summary.results.settings
    title = title or f"Attribution methods on {settings.plain()['data']}"
    tables = {"summary.csv": summary_csv(summary), "comparisons.csv": comparisons_csv(summary), "summary.json": _json(summary)}
    write_tables(out, tables)
    figures, shown = draw_figures(_planned_figures(summary), out / "figures")
    write_text(out / "report.html", page("report.html.j2", title=title, **_page(summary, shown)))
    return ReportFiles(out / "report.html", out / "summary.csv", out / "summary.json", figures)


def _planned_figures(summary: Summary) -> Iterator[Planned]:
    """All figures, model by model."""
    for number, model in enumerate(summary.results.models, start=1):
        name = f"{number}-{slug(model)}"
        yield from _curve_figures(summary, model, name)
        if any(e.model == model for e in summary.entries):
            alt = f"Quality against images forwarded on {model}"
            yield Planned(f"cost {model}", f"{name}-cost", alt, partial(plot_cost, summary, model))
            yield from _score_figures(summary, model, name)
            yield from grid_figures(summary, model, name)
            yield from _sensitivity_figures(summary, model, name)


def _curve_figures(summary: Summary, model: str, name: str) -> Iterator[Planned]:
    for at, label in enumerate([protocol.label() for protocol in summary.results.settings.protocols], start=1):
        if any((c.model, c.protocol) == (model, label) for c in summary.curves):
            alt = f"Mean insertion and deletion curves on {model}, {label}"
            draw = partial(plot_curves, summary, model, label)
            yield Planned(f"curves {model}", f"{name}-curves-{at}-{slug(label)}", alt, draw, label)


def _score_figures(summary: Summary, model: str, name: str) -> Iterator[Planned]:
    """Scores of single images under every measure; the page shows those of the first protocol."""
    for at, measure in enumerate(summary.measures, start=1):
        if summary.column(model, measure) and not METRICS[measure.metric].grid:
            caption = metric_title(measure.metric)
            alt = f"Scores of single images on {model}: {caption}{f' ({measure.protocol})' if measure.protocol else ''}"
            draw = partial(plot_scores, summary, model, measure)
            shown = not METRICS[measure.metric].curve or measure.protocol == summary.first_protocol(model)
            yield Planned(f"scores {model}", f"{name}-scores-{at}-{slug(measure.label)}", alt, draw, caption, shown)


def _sensitivity_figures(summary: Summary, model: str, name: str) -> Iterator[Planned]:
    if any(a.model == model for a in summary.agreements):
        for file, plot, caption in (
            ("agreement", plot_agreement, "Kendall's tau between the rankings of all methods under two protocols, for each metric"),
            ("ranks", plot_ranks, "Mean rank of each method under each protocol"),
        ):
            yield Planned(f"sensitivity {model}", f"{name}-{file}", f"{caption}, {model}", partial(plot, summary, model), caption)


def _page(summary: Summary, shown: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Everything that the template shows but the title."""
    settings = summary.results.settings
    failures = grouped(summary.results.failed, lambda each: (each.model, each.reason))
    return {
        "families": [family for family in FAMILY_COLOURS if any(spec.family == family for spec in settings.methods)],
        "conclusions": [(model, conclusions(summary, model)) for model in summary.results.models],
        "protocol": protocol_rows(summary),
        "metrics": METRICS,
        "measured": settings.metrics,
        "title_of": metric_title,
        "arrows": ARROWS,
        "methods": settings.plain()["methods"],
        "letters": LETTERS[0].upper() + LETTERS[1:],
        "boards": [leaderboard(summary, model, number) for number, model in enumerate(summary.results.models, start=1)],
        "figures": shown,
        "models": list(summary.results.models),
        "most_dots": MOST_DOTS,
        "protocols": len(settings.protocols),
        "dependence": {model: dependence(summary, model) for model in summary.results.models},
        "galleries": [Gallery(summary, model) for model in summary.results.models if summary.first_of_images(model)],
        "nouns": " or ".join(f"{noun}s" for noun in dict.fromkeys(map(summary.results.noun, summary.measures))),
        "on_images": bool(settings.measured()),
        "cells": settings.cells if settings.grid_settings else None,
        "stable": STABLE,
        "spreads": [spreads(summary, model) for model in summary.results.models],
        "failures": sorted(failures.items(), key=lambda row: -len(row[1])),  # most frequent first
        "most_failures": _MOST_FAILURES,
        "refusals": [(model, methods, reason) for model in summary.results.models for reason, methods in refusals(summary, model).items()],
    }


def _json(summary: Summary) -> str:
    """summary.json: what the CSV does not hold."""
    results, settings = summary.results, summary.results.settings
    grid_set, models = results.grid_set, results.models
    plain = {
        **plain_heading(settings),
        "protocols": {protocol.label(): protocol.settings() for protocol in settings.protocols},
        "models": {name: {key: facts[key] for key in ("weights_digest", "size", "precision")} for name, facts in models.items()},
        "samples": results.samples,
        "grids": None if grid_set is None else {"count": len(grid_set), "chance": 1 / settings.cells**2, "file": "grids.json"},
        "grid_models": results.grid_models,
        "conclusions": {model: conclusions(summary, model) for model in models},
        "separations": [
            {"model": model, **vars(measure), "best": decided[0], "not_separated": decided[1]}
            for model in models
            for measure in summary.measures
            if (decided := summary.separation(model, measure)) is not None
        ],
        "agreements": [vars(agreement) for agreement in summary.agreements],
        "refused": [
            {"model": model, "method": method, "reason": reason}
            for model in models
            for reason, methods in refusals(summary, model).items()
            for method in methods
        ],
        "failures": [{key: value for key, value in vars(failure).items() if key != "refused"} for failure in results.failed],
    }
    return json_text(plain_values(plain))
