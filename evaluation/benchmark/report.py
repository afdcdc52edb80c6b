"""What a reader of a benchmark looks at: tables, figures, and one self-contained HTML page."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from attribution.files import slug, whole_file
from attribution.fills import is_drop
from attribution.provenance import versions
from evaluation.benchmark.figures import (
    MOST_DOTS,
    metric_name,
    ordered_methods,
    plot_agreement,
    plot_cost,
    plot_curves,
    plot_ranks,
    plot_scores,
)
from evaluation.benchmark.gallery import Gallery
from evaluation.benchmark.grid_report import grid_figures, grid_rows
from evaluation.benchmark.summary import Entry, Summary, comparisons_csv, summary_csv
from evaluation.benchmark.wording import ARROWS, LETTERS, by_protocol, conclusions, dependence, explained_class, judged, refusals, writer
from evaluation.metrics.protocol import Protocol
from evaluation.metrics.registry import METRICS, Measure
from evaluation.statistics.validity import STABLE
from evaluation.study.page import inline_svg, page, write_text
from evaluation.study.report import Planned, ReportFiles
from evaluation.study.style import FAMILY_COLOURS, figure_style, has_interval
from evaluation.study.tables import counted, written

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
    write_text(out / "summary.csv", summary_csv(summary))
    write_text(out / "comparisons.csv", comparisons_csv(summary))
    write_text(out / "summary.json", json.dumps(_plain_summary(summary), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    figures: list[Path] = []
    drawn: dict[str, list[dict[str, Any]]] = {}
    for planned in _planned_figures(summary):
        with figure_style(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # such names are whole in the page
            figure = planned.draw()
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out once for both files
            figures.append(out / "figures" / f"{planned.name}.png")
            with whole_file(figures[-1]) as temporary:
                figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
            if planned.on_page:
                found = {"svg": inline_svg(figure, f"f{len(figures)}-"), "alt": planned.alt, "name": planned.caption}
                drawn.setdefault(f"{planned.section} {planned.model}", []).append(found)
    text = page("report.html.j2", title=title, **_page(summary, drawn))
    write_text(out / "report.html", text)
    for old in set((out / "figures").glob("*.png")) - set(figures):  # of earlier settings
        old.unlink(missing_ok=True)
    return ReportFiles(out / "report.html", out / "summary.csv", out / "summary.json", tuple(figures))


def _planned_figures(summary: Summary) -> Iterator[Planned]:
    """All figures; the page has the boxes of the first protocol only, the files have them all."""
    settings = summary.results.settings
    labels = [protocol.label() for protocol in settings.protocols]
    for number, model in enumerate(summary.results.models, start=1):
        name = f"{number}-{slug(model)}"
        for at, label in enumerate(labels, start=1):
            if any((c.model, c.protocol) == (model, label) for c in summary.curves):
                alt = f"Mean insertion and deletion curves on {model}, {label}"
                yield Planned("curves", model, f"{name}-curves-{at}-{slug(label)}", alt, label, partial(plot_curves, summary, model, label))
        if not any(e.model == model for e in summary.entries):
            continue
        alt = f"Quality against images forwarded on {model}"
        yield Planned("cost", model, f"{name}-cost", alt, "", partial(plot_cost, summary, model))
        for at, measure in enumerate(summary.measures, start=1):
            if summary.column(model, measure) and not METRICS[measure.metric].grid:
                caption = metric_name(measure.metric)
                alt = f"Scores of single images on {model}: {caption}{f' ({measure.protocol})' if measure.protocol else ''}"
                file = f"{name}-scores-{at}-{slug(measure.label)}"
                shown = measure.protocol in ("", summary.first_protocol(model))
                yield Planned("scores", model, file, alt, caption, partial(plot_scores, summary, model, measure), shown)
        yield from grid_figures(summary, model, name)
        if any(a.model == model for a in summary.agreements):
            caption = "Kendall's tau between the rankings of all methods under two protocols, for each metric"
            yield Planned(
                "sensitivity", model, f"{name}-agreement", f"{caption}, {model}", caption, partial(plot_agreement, summary, model)
            )
            caption = "Mean rank of each method under each protocol"
            yield Planned("sensitivity", model, f"{name}-ranks", f"{caption}, {model}", caption, partial(plot_ranks, summary, model))


def _page(summary: Summary, drawn: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Everything that the template shows but the title."""
    settings = summary.results.settings
    failures = _failure_rows(summary)
    return {
        "families": [family for family in FAMILY_COLOURS if any(spec.family == family for spec in settings.methods)],
        "conclusions": [(model, conclusions(summary, model)) for model in summary.results.models],
        "protocol": _protocol_rows(summary),
        "metrics": [(metric_name(m), ARROWS[METRICS[m].direction], METRICS[m].direction, METRICS[m].summary) for m in settings.metrics],
        "methods": settings.plain()["methods"],
        "letters": LETTERS[0].upper() + LETTERS[1:],
        "boards": [_leaderboard(summary, model, number) for number, model in enumerate(summary.results.models, start=1)],
        "figures": drawn,
        "models": list(summary.results.models),
        "most_dots": MOST_DOTS,
        "protocols": len(settings.protocols),
        "dependence": {model: dependence(summary, model) for model in summary.results.models},
        "galleries": [Gallery(summary, model).context() for model in summary.results.models if summary.first_of_images(model)],
        "nouns": " or ".join(f"{noun}s" for noun in dict.fromkeys(map(summary.results.noun, summary.measures))),
        "on_images": bool(settings.measured()),
        "cells": settings.cells if settings.grid_settings else None,
        "stable": STABLE,
        "spreads": [_spreads(summary, model) for model in summary.results.models],
        "failures": failures[:_MOST_FAILURES],
        "failures_left_out": max(0, len(failures) - _MOST_FAILURES),
        "refusals": [
            {"model": model, "methods": "; ".join(methods), "reason": reason}
            for model in summary.results.models
            for reason, methods in refusals(summary, model).items()
        ],
    }


def _protocol_rows(summary: Summary) -> list[tuple[str, list[str]]]:
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


def _leaderboard(summary: Summary, model: str, number: int) -> dict[str, Any]:
    """A table of a model: methods by measures, grouped by protocol."""
    groups = [(protocol, [m for m in ms if summary.column(model, m)]) for protocol, ms in by_protocol(summary.measures)]
    groups = [(protocol, measures) for protocol, measures in groups if measures]
    columns = [_cells(summary, model, measure) for _, measures in groups for measure in measures]
    costs = {cost.method: cost for cost in summary.costs if cost.model == model}
    rows = []
    entries = [e for e in summary.entries if e.model == model]
    saturated = {e.validity.saturated for e in entries}
    shared = saturated.pop() if len(saturated) == 1 else 0  # a property of the images where all methods explained the same ones
    for method in ordered_methods(summary, model):
        entry = next((e for e in entries if e.method == method), None)
        rows.append(
            {
                "method": method,
                "family": costs[method].family,
                "evaluations": costs[method].evaluations,
                "cells": [column.get(method, _empty("not measured")) for column in columns],
                "doubts": [] if entry is None else _doubts(entry, with_saturated=not shared),
            }
        )
    return {
        "id": f"board-{number}",
        "model": model,
        "units": judged(summary, model),
        "images": len(summary.results.samples[model]),
        "groups": groups,
        "measures": [
            (metric_name(m.metric), ARROWS[m.direction], m.direction, METRICS[m.metric].summary, m.label) for _, ms in groups for m in ms
        ],
        "rows": rows,
        "saturated": shared,
        "doubted": any(row["doubts"] for row in rows),
    }


def _cells(summary: Summary, model: str, measure: Measure) -> dict[str, dict[str, Any]]:
    column = summary.column(model, measure)
    write = writer(column)
    firsts = min((e.rank for e in column if has_interval(e.interval)), default=math.nan)
    cells = {}
    for e in column:
        if not has_interval(e.interval):
            cells[e.method] = _empty(_why_empty(e))
            continue
        missing = e.validity.total - e.validity.finite
        cells[e.method] = {
            "value": f"{e.interval.estimate:.9g}",
            "mean": write(e.interval.estimate),
            "interval": written(e.interval, write),
            "rank": f"{e.rank:g}",
            "letters": " ".join(e.group),
            "best": e.rank == firsts,
            "missing": f"{missing} of {e.validity.total} missing" if missing else "",
            "title": "" if e.area is None else f"reached at {e.area:.0%} of the image, on average",
        }
    return cells


def _empty(reason: str) -> dict[str, Any]:
    return {"value": "", "mean": None, "title": reason}


def _why_empty(entry: Entry) -> str:
    if entry.interval.count == 0:
        return f"no value on any of {counted(entry.validity.total, 'image')}"
    if entry.interval.count == 1:
        return "a single image has no interval, so its score is not shown"
    return "its interval is not defined, so the score is not shown"


def _doubts(entry: Entry, with_saturated: bool) -> list[tuple[str, str]]:
    v = entry.validity
    found = [
        (v.failed, "failed", "images without an explanation"),
        (v.constant_maps, "constant", "maps with the same value everywhere: their order is arbitrary"),
        (v.saturated if with_saturated else 0, "saturated", "images with a confidence above 0.999, where gradients vanish"),
    ]
    return [(f"{count} {name}", title) for count, name, title in found if count]


def _spreads(summary: Summary, model: str) -> dict[str, Any]:
    """Seeds of the stochastic methods beside the images, for the measures of the first protocol and those without one."""
    first = summary.first_protocol(model)
    measures = [m for m in summary.measures if m.protocol in ("", first)]
    rows = []
    for method in ordered_methods(summary, model):
        found = {e.measure: e.spread for e in summary.entries if (e.model, e.method) == (model, method) and e.spread is not None}
        if not found:
            continue
        one = next(iter(found.values()))
        cells = [(_sd(found[m].seed_sd), _sd(found[m].image_sd)) if m in found else None for m in measures]
        correlation = f"{one.rank_correlation:.2f}" if math.isfinite(one.rank_correlation) else None
        rows.append({"method": method, "seeds": one.seeds, "correlation": correlation, "stable": one.stable, "cells": cells})
    return {"model": model, "protocol": first, "measures": [metric_name(m.metric) for m in measures], "rows": rows}


def _sd(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "–"  # noqa: RUF001


def _failure_rows(summary: Summary) -> list[dict[str, Any]]:
    """Failures that share model and reason in one row, most frequent first."""
    found: dict[tuple[str, str], list[Any]] = {}
    for failure in summary.results.failed:
        found.setdefault((failure.model, failure.reason), []).append(failure)
    rows = [
        {
            "model": model,
            "reason": reason,
            "count": len(failures),
            "methods": list(dict.fromkeys(f.method for f in failures)),
            "samples": list(dict.fromkeys(f.sample for f in failures)),
        }
        for (model, reason), failures in found.items()
    ]
    return sorted(rows, key=lambda row: -row["count"])


def _plain_summary(summary: Summary) -> dict[str, Any]:
    """summary.json: what the CSV does not hold; numbers that do not exist are null."""
    results, settings = summary.results, summary.results.settings
    separations = []
    for model in summary.results.models:
        for measure in summary.measures:
            decided = summary.separation(model, measure)
            if decided is not None:
                names = {"model": model, "metric": measure.metric, "protocol": measure.protocol, "direction": measure.direction}
                separations.append({**names, "best": decided[0], "not_separated": list(decided[1])})
    return {
        "settings": settings.plain(),
        "protocols": {protocol.label(): protocol.settings() for protocol in settings.protocols},
        "versions": versions(),
        "models": {name: {key: info[key] for key in ("weights_digest", "size", "precision")} for name, info in results.models.items()},
        "samples": {model: list(samples) for model, samples in results.samples.items()},
        "grids": None
        if results.grid_set is None
        else {"count": len(results.grid_set), "chance": 1 / settings.cells**2, "file": "grids.json"},
        "grid_models": results.grid_models,
        "conclusions": {model: conclusions(summary, model) for model in summary.results.models},
        "separations": separations,
        "agreements": [{**vars(a), "tau": a.tau if math.isfinite(a.tau) else None} for a in summary.agreements],
        "refused": [
            {"model": model, "method": method, "reason": reason}
            for model in summary.results.models
            for reason, methods in refusals(summary, model).items()
            for method in methods
        ],
        "failures": [{key: value for key, value in vars(f).items() if key != "refused"} for f in results.failed],
    }
