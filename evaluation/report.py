"""What a reader of a benchmark looks at: tables, figures, one self-contained HTML page, and the tables of the terminal."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attribution.errors import UserError
from attribution.explain import versions
from attribution.explanation import Explanation
from attribution.files import whole_file
from attribution.plotting import Figure
from evaluation.benchmark import slug
from evaluation.figures import (
    DARK_COLOURS,
    FAMILY_COLOURS,
    GRID,
    INK,
    MOST_DOTS,
    MUTED,
    PAPER,
    figure_style,
    has_interval,
    metric_name,
    ordered_methods,
    photo_thumbnail,
    plot_agreement,
    plot_cost,
    plot_curves,
    plot_ranks,
    plot_scores,
    thumbnail,
)
from evaluation.metrics import METRICS, Measure
from evaluation.perturbation import Protocol
from evaluation.results import Explained
from evaluation.statistics import EXACT_COUNT, STABLE, Interval
from evaluation.summary import SIGNIFICANCE, Entry, Summary, score_matrix, summary_csv

GALLERY_IMAGES = 8
ARROWS = {"higher": "↑", "lower": "↓"}
LETTERS = f"letters: methods that share one are not told apart (paired sign-flip test, Holm over all pairs, {SIGNIFICANCE:.0%})"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    colour: family.replace(" ", "-") for family, colour in FAMILY_COLOURS.items()
}
_MOST_FAILURES = 60  # rows; the rest is in summary.json
_PER_TABLE = 6  # measures side by side in a terminal
_METHOD_WIDTH = 26


@dataclass(frozen=True)
class ReportFiles:
    """Where everything was written.

    Attributes:
        html: the page; it needs none of the others.
        csv: every cell of the leaderboards with its protocol.
        json: settings, versions, weights of the models, agreements, separations, refusals and failures.
        figures: PNG files.
    """

    html: Path
    csv: Path
    json: Path
    figures: tuple[Path, ...]


def write_report(summary: Summary, out: str | Path, title: str | None = None) -> ReportFiles:
    """Write summary.csv, summary.json, figures/*.png and report.html; the same summary gives the same bytes.

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
    _write(out / "summary.csv", summary_csv(summary))
    _write(out / "summary.json", json.dumps(_plain_summary(summary), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
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
    page = _environment().get_template("report.html.j2").render(title=title, **_page(summary, drawn))
    _write(out / "report.html", page)
    return ReportFiles(out / "report.html", out / "summary.csv", out / "summary.json", tuple(figures))


def print_summary(summary: Summary, console: Console) -> None:
    """Leaderboards with ranks, intervals and letters, in as many tables as the width of the console asks for."""
    settings = summary.results.settings
    arrows = ARROWS if console.encoding.startswith("utf") else {"higher": "(higher)", "lower": "(lower)"}
    for model in summary.results.models:
        for protocol, measures in _by_protocol(summary.measures):
            measured = [m for m in measures if summary.column(model, m)]
            heading = f"{model}, {protocol or 'no curve'}, {_count(len(summary.results.samples[model]), 'image')}"
            for table in _terminal_tables(summary, model, measured, heading, arrows, console):
                console.print(table)
        for statement in conclusions(summary, model):
            console.print(Text(f"{model}: {statement}"))
        for failure in _refusals(summary, model):
            console.print(Text(f"left out: {failure['reason']}", style="dim"))
        console.print()
    console.print(Text(f"rank. mean letters, below it the 95 % bootstrap interval over images; {LETTERS}", style="dim"))
    fill = f"methods worked with fill {settings.plain()['method_fill']}, seed {settings.seed}"
    console.print(Text(f"class: {_target(summary)}; {fill}; images: forwarded for one explanation; * control", style="dim"))


def conclusions(summary: Summary, model: str) -> list[str]:
    """One plain sentence for each leader under the first protocol, one on all columns, and one where the images are too few."""
    head = _head_measures(summary, model)
    if not head:
        return [f"{_count(len(summary.results.samples[model]), 'image')}: no mean has an interval, so nothing is concluded."]
    leaders: dict[str, list[tuple[Measure, str]]] = {}
    for measure in head:
        best, others = summary.separation(model, measure)
        leaders.setdefault(best, []).append((measure, _separated(others, len(summary.column(model, measure)) - 1)))
    found = []
    families = {spec.label: spec.family for spec in summary.results.settings.methods}
    under = f"Under protocol ({head[0].protocol}), " if head[0].protocol else ""
    for leader, led in leaders.items():
        name = f"{leader} (a control)" if families[leader] == "control" else leader
        clauses = {clause for _, clause in led}
        if len(clauses) == 1:
            sentence = f"{name} leads {_listed(metric_name(m.metric) for m, _ in led)}, {clauses.pop()}."
        else:
            sentence = f"{name} leads {_listed(f'{metric_name(m.metric)} ({clause})' for m, clause in led)}."
        found.append(under + sentence)
    firsts = _firsts(summary, model)
    if sum(firsts.values()) > len(head):
        found.append(f"Of all {sum(firsts.values())} columns, " + _listed(f"{name} leads {count}" for name, count in firsts.items()) + ".")
    least = _least_p(summary, model, head[0])
    if least >= SIGNIFICANCE:
        images, methods = len(summary.results.samples[model]), len(summary.column(model, head[0]))
        found.append(
            f"{_count(images, 'image')} cannot separate any two of {methods} methods: the least p that the test can give "
            f"after Holm's correction is {least:.2g}. Use more images."
        )
    return found


def inline_svg(figure: Figure, prefix: str = "") -> Markup:
    """The figure as an ``svg`` element for a page that sets its colours as variables: light and dark from one drawing.

    Args:
        prefix: of its ids, so that those of several figures on a page differ.
    """
    buffer = io.StringIO()
    with figure_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'(?<= [dxy]=)"[^"]*"|transform="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), svg)
    svg = re.sub(r"\s*\n\s*([ML]) ", r"\1", svg)
    svg = re.sub(r'(?<= id=")|(?<= href="#)|(?<=url\(#)', prefix, svg)
    run = re.compile(r'(?:<use ([^>]*?) style="([^"]*)"/>\s*)(?:<use [^>]*? style="\2"/>\s*)+')
    svg = run.sub(lambda m: f'<g style="{m[2]}">' + re.sub(r' style="[^"]*"|\s+(?=<use)', "", m[0]).rstrip() + "</g>", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(re.sub(r"\n\s*", "\n", svg).strip())


@dataclass(frozen=True)
class _Planned:
    section: str
    model: str
    name: str
    alt: str
    caption: str
    draw: Callable[[], Figure]
    on_page: bool = True


def _planned_figures(summary: Summary) -> Iterator[_Planned]:
    """All figures; the page has the boxes of the first protocol only, the files have them all."""
    settings = summary.results.settings
    labels = [protocol.label() for protocol in settings.protocols]
    for number, model in enumerate(summary.results.models, start=1):
        name = f"{number}-{slug(model)}"
        for at, label in enumerate(labels, start=1):
            if any((c.model, c.protocol) == (model, label) for c in summary.curves):
                alt = f"Mean insertion and deletion curves on {model}, {label}"
                yield _Planned(
                    "curves", model, f"{name}-curves-{at}-{slug(label)}", alt, label, partial(plot_curves, summary, model, label)
                )
        if not any(e.model == model for e in summary.entries):
            continue
        alt = f"Quality against images forwarded on {model}"
        yield _Planned("cost", model, f"{name}-cost", alt, "", partial(plot_cost, summary, model))
        for at, measure in enumerate(summary.measures, start=1):
            if summary.column(model, measure):
                caption = metric_name(measure.metric)
                alt = f"Scores of single images on {model}: {caption}{f' ({measure.protocol})' if measure.protocol else ''}"
                file = f"{name}-scores-{at}-{slug(measure.label)}"
                shown = measure.protocol in ("", labels[0])
                yield _Planned("scores", model, file, alt, caption, partial(plot_scores, summary, model, measure), shown)
        if any(a.model == model for a in summary.agreements):
            caption = "Kendall's tau between the rankings of all methods under two protocols, for each metric"
            yield _Planned(
                "sensitivity", model, f"{name}-agreement", f"{caption}, {model}", caption, partial(plot_agreement, summary, model)
            )
            caption = "Mean rank of each method under each protocol"
            yield _Planned("sensitivity", model, f"{name}-ranks", f"{caption}, {model}", caption, partial(plot_ranks, summary, model))


def _page(summary: Summary, drawn: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Everything that the template shows but the title."""
    settings = summary.results.settings
    return {
        "variables": [(name, colour, DARK_COLOURS[colour]) for colour, name in _VARIABLES.items()],
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
        "dependence": {model: _dependence(summary, model) for model in summary.results.models},
        "galleries": [_Gallery(summary, model).context() for model in summary.results.models if ordered_methods(summary, model)],
        "stable": STABLE,
        "spreads": [_spreads(summary, model) for model in summary.results.models],
        "failures": _failure_rows(summary)[:_MOST_FAILURES],
        "failures_left_out": max(0, len(_failure_rows(summary)) - _MOST_FAILURES),
        "refusals": [row for model in summary.results.models for row in _refusals(summary, model)],
    }


def _protocol_rows(summary: Summary) -> list[tuple[str, list[str]]]:
    """What was measured how, as terms with their texts."""
    results, settings = summary.results, summary.results.settings
    plain = settings.plain()
    cut = ", ".join(f"{key} {value}" for key, value in plain["region_options"].items())
    chosen = {"all": "", "correct": ", only those that the model gets right", "wrong": ", only those that the model gets wrong"}
    models = [
        f"{name}: input {info['size'][0]} x {info['size'][1]}, {len(info['class_names'])} classes, weights {info['weights_digest']}"
        for name, info in results.models.items()
    ]
    seeds = f"; stochastic methods ran with {settings.seeds} seeds, tables show the first" if settings.seeds > 1 else ""
    return [
        ("Data", [f"{plain['data']}, split {settings.split}" if settings.root is not None else plain["data"]]),
        (
            "Images",
            [f"{_count(len(samples), 'image')} for {model}{chosen[settings.only]}" for model, samples in results.samples.items()],
        ),
        ("Class explained", [_target(summary)]),
        ("Curves", [_protocol_text(protocol) for protocol in settings.protocols]),
        (
            "Regions",
            [f"{settings.regions}{f' ({cut})' if cut else ''}, shared by region steps, searches and methods that cut the image"],
        ),
        ("Methods worked with", [f"fill {plain['method_fill']}"]),
        ("Seeds", [f"{settings.seed}{seeds}"]),
        ("Models", models),
        ("Versions", [", ".join(f"{name} {number}" for name, number in _versions().items())]),
    ]


def _protocol_text(protocol: Protocol) -> str:
    steps = "a region a step" if protocol.steps == "regions" else f"{protocol.count} steps of equally many pixels"
    axis = "exact share of pixels" if protocol.axis == "area" else "share of pixels that are not black"
    fill = protocol.settings()["fill"]
    return f"{protocol.label()}: {steps}; hidden pixels show {fill}; {protocol.output} of the class; over the {axis}"


def _leaderboard(summary: Summary, model: str, number: int) -> dict[str, Any]:
    """A table of a model: methods by measures, grouped by protocol."""
    groups = [(protocol, [m for m in ms if summary.column(model, m)]) for protocol, ms in _by_protocol(summary.measures)]
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
    write = _writer(column)
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
            "interval": _written(e.interval, write),
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
        return f"no value on any of {_count(entry.validity.total, 'image')}"
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


def _writer(column: Sequence[Entry]) -> Callable[[float], str]:
    """Three decimals where they suit the column, three digits elsewhere."""
    largest = max((abs(e.interval.estimate) for e in column if math.isfinite(e.interval.estimate)), default=0)
    return (lambda value: f"{value:z.3f}") if largest == 0 or 0.02 <= largest < 1000 else (lambda value: f"{value:.3g}")


def _written(interval: Interval, write: Callable[[float], str]) -> str:
    return f"[{write(interval.low)}, {write(interval.high)}]"


def _dependence(summary: Summary, model: str) -> list[str]:
    """How much the ranking depends on the fill and on the steps: least and median tau where only that was changed."""
    protocols = {p.label(): p.settings() for p in summary.results.settings.protocols}
    by_change: dict[str, list[Any]] = {}
    for agreement in summary.agreements:
        if agreement.model == model and math.isfinite(agreement.tau):
            a, b = protocols[agreement.first], protocols[agreement.second]
            changed = {"steps" if key == "count" else key for key in a if a[key] != b[key]}
            by_change.setdefault(" and ".join(sorted(changed)), []).append(agreement)
    found = []
    for change, agreements in by_change.items():
        taus = [a.tau for a in agreements]
        median, worst = float(np.median(taus)), min(agreements, key=lambda a: a.tau)
        how = "hardly" if median >= 0.8 else "somewhat" if median >= 0.5 else "strongly"
        that = "these are" if " and " in change else "that is"
        found.append(
            f"The ranking depends {how} on the {change}: where only {that} changed, Kendall's tau has median {median:.2f} and "
            f"least {worst.tau:.2f} ({metric_name(worst.metric)}; {worst.first} against {worst.second})."
        )
    return found


class _Gallery:
    """Thumbnails of a model: the same images under all methods, and the best, median and worst image of each method."""

    def __init__(self, summary: Summary, model: str) -> None:
        results = summary.results
        self.model, self.methods, self.results = model, ordered_methods(summary, model), results
        self.explained = {(e.method, e.sample): e for e in results.explained if e.model == model and e.seed == results.settings.seed}
        self.measure = summary.measures[0]
        self.scores = score_matrix(results, model, self.measure)
        wanted = self.measure.protocol or results.settings.protocols[0].label()
        both = [m for m in summary.measures if m.metric in ("insertion", "deletion") and m.protocol == wanted]
        self.captioned = [(m, score_matrix(results, model, m)) for m in (both or [self.measure])]
        self._made: dict[tuple[str, str], dict[str, Any]] = {}

    def context(self) -> dict[str, Any]:
        samples = self.results.samples[self.model]
        return {
            "model": self.model,
            "leader": self.methods[0],
            "measure": metric_name(self.measure.metric) + (f" ({self.measure.protocol})" if self.measure.protocol else ""),
            "captions": " / ".join(f"{metric_name(m.metric)} {ARROWS[m.direction]}" for m, _ in self.captioned),
            "methods": self.methods,
            "rows": [self._row(samples[index]) for index in chosen_images(self.scores, self.methods[0], self.measure.direction)],
            "cards": [card for card in map(self._card, self.methods) if card["places"]],
        }

    def _row(self, sample: str) -> dict[str, Any]:
        known = next(self.explained[method, sample] for method in self.methods if (method, sample) in self.explained)
        names = self.results.models[self.model]["class_names"]
        loaded = _loaded(known)
        return {
            "sample": sample,
            "photo": None if loaded is None else _picture(photo_thumbnail(loaded)),
            "target": names[known.target],
            "label": None if known.label is None or known.label == known.target else names[known.label],
            "confidence": f"{known.confidence:.2f}",
            "cells": [{**self._thumbnail(method, sample), "caption": self._caption(method, sample)} for method in self.methods],
        }

    def _card(self, method: str) -> dict[str, Any]:
        samples = self.results.samples[self.model]
        ranking = _ranking(self.scores.get(method, np.empty(0)), self.measure.direction)
        places = [("best", 0), ("median", len(ranking) // 2), ("worst", len(ranking) - 1)] if len(ranking) > 2 else []
        return {
            "method": method,
            "places": [
                {
                    **self._thumbnail(method, samples[ranking[at]]),
                    "place": place,
                    "sample": samples[ranking[at]],
                    "score": f"{self.scores[method][ranking[at]]:.3f}",
                }
                for place, at in places
            ],
        }

    def _thumbnail(self, method: str, sample: str) -> dict[str, Any]:
        if (method, sample) not in self._made:
            explained = self.explained.get((method, sample))
            loaded = None if explained is None else _loaded(explained)
            picture = None if loaded is None else _picture(thumbnail(loaded))
            self._made[method, sample] = {"picture": picture, "alt": f"{method} on {sample}"}
        return self._made[method, sample]

    def _caption(self, method: str, sample: str) -> str:
        index = self.results.samples[self.model].index(sample)
        found = [matrix[method][index] if method in matrix else math.nan for _, matrix in self.captioned]
        return " / ".join(f"{value:.2f}" if math.isfinite(value) else "–" for value in found)  # noqa: RUF001


def chosen_images(scores: Mapping[str, np.ndarray], leader: str, direction: str, count: int = GALLERY_IMAGES) -> list[int]:
    """Which images the gallery shows: the leader's best, median and worst, then evenly spaced ones by the mean over all methods.

    Args:
        scores: float [N] by method, NaN where there is none.
        leader: method whose ranking of the images gives the first three and the order of all.
        direction: "higher" or "lower" is better.
        count: so many at most.

    Returns:
        Distinct indices of the N images, the leader's best first.
    """
    if not scores:
        return []
    stacked = np.stack(list(scores.values()))
    known = np.isfinite(stacked)
    means = np.where(known.any(axis=0), np.where(known, stacked, 0).sum(axis=0) / known.sum(axis=0).clip(1), np.nan)
    own = _ranking(scores.get(leader, means), direction)
    overall = _ranking(means, direction)
    first = [own[0], own[len(own) // 2], own[-1]] if len(own) else []
    spread = [overall[at] for at in np.linspace(0, len(overall) - 1, min(count, len(overall))).round().astype(int)]
    # where an evenly spaced image is taken already, others of the ranking fill the row up
    kept = list(dict.fromkeys([*first, *spread, *overall]))[:count]
    place = {index: at for at, index in enumerate([*own, *overall]) if index in kept}
    place.update({index: at for at, index in enumerate(own)})
    return sorted(kept, key=lambda index: place[index])


def _ranking(values: np.ndarray, direction: str) -> list[int]:
    """Indices of the finite values, best first, ties by index."""
    known = np.flatnonzero(np.isfinite(values))
    keys = values[known] if direction == "lower" else -values[known]
    return [int(index) for index in known[np.argsort(keys, kind="stable")]]


def _loaded(explained: Explained) -> Explanation | None:
    """The stored explanation; None where its file is gone, as after moving the report alone."""
    try:
        return Explanation.load(explained.path)
    except UserError:
        return None


def _picture(image: Image.Image) -> dict[str, Any]:
    """A PNG as a data URI, of 96 colours where that is smaller than all of them."""
    buffer = io.BytesIO()
    few = image.quantize(96, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) if max(image.size) > 40 else image
    few.save(buffer, format="png", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"uri": uri, "width": image.width, "height": image.height, "tiny": max(image.size) < 80}


def _spreads(summary: Summary, model: str) -> dict[str, Any]:
    """Seeds of the stochastic methods beside the images, for the measures of the first protocol and those without one."""
    first = summary.results.settings.protocols[0].label()
    measures = [m for m in summary.measures if m.protocol in ("", first)]
    rows = []
    for method in ordered_methods(summary, model):
        found = {e.measure: e.spread for e in summary.entries if (e.model, e.method) == (model, method) and e.spread is not None}
        if not found:
            continue
        one = next(iter(found.values()))
        cells = [(f"{found[m].seed_sd:.3g}", _sd(found[m].image_sd)) if m in found else None for m in measures]
        correlation = f"{one.rank_correlation:.2f}" if math.isfinite(one.rank_correlation) else None
        rows.append({"method": method, "seeds": one.seeds, "correlation": correlation, "stable": one.stable, "cells": cells})
    return {"model": model, "protocol": first, "measures": [metric_name(m.metric) for m in measures], "rows": rows}


def _sd(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"  # noqa: RUF001


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


def _refusals(summary: Summary, model: str) -> list[dict[str, str]]:
    found = {(f.model, f.method): f.reason for f in summary.refused if f.model == model}
    return [{"model": model, "method": method, "reason": reason} for (_, method), reason in found.items()]


def _plain_summary(summary: Summary) -> dict[str, Any]:
    """summary.json: what the CSV does not hold; numbers that do not exist are null."""
    results, settings = summary.results, summary.results.settings
    separations = []
    for model in summary.results.models:
        for measure in summary.measures:
            if _decided(summary, model, measure):
                best, others = summary.separation(model, measure)
                names = {"model": model, "metric": measure.metric, "protocol": measure.protocol, "direction": measure.direction}
                separations.append({**names, "best": best, "not_separated": list(others)})
    return {
        "settings": settings.plain(),
        "protocols": {protocol.label(): protocol.settings() for protocol in settings.protocols},
        "versions": _versions(),
        "models": {name: {key: info[key] for key in ("weights_digest", "size")} for name, info in results.models.items()},
        "samples": {model: list(samples) for model, samples in results.samples.items()},
        "conclusions": {model: conclusions(summary, model) for model in summary.results.models},
        "separations": separations,
        "agreements": [{**vars(a), "tau": a.tau if math.isfinite(a.tau) else None} for a in summary.agreements],
        "refused": [row for model in summary.results.models for row in _refusals(summary, model)],
        "failures": [{key: value for key, value in vars(f).items() if key != "refused"} for f in results.failed],
    }


def _terminal_table(summary: Summary, model: str, measures: Sequence[Measure], heading: str, arrows: Mapping[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=Text(heading, style="bold"), title_justify="left", pad_edge=False, padding=(0, 1))
    costs = {cost.method: cost for cost in summary.costs if cost.model == model}
    names = {method: method + (" *" if cost.family == "control" else "") for method, cost in costs.items()}
    table.add_column("method", overflow="fold", width=min(_METHOD_WIDTH, max(map(len, names.values()))))
    table.add_column("images", justify="right", width=max(6, *(len(f"{cost.evaluations:,.0f}") for cost in costs.values())))
    cells = [_terminal_cells(summary, model, measure) for measure in measures]
    for measure, column in zip(measures, cells, strict=True):
        heading = f"{metric_name(measure.metric)} {arrows[measure.direction]}"
        lines = [line for text in column.values() for line in text.plain.split("\n")]
        table.add_column(heading, width=max(map(len, [*lines, *heading.split()])))
    for method in ordered_methods(summary, model):
        family = costs[method].family
        style = "bold" if family == "region search" else "dim" if family == "control" else ""
        forwarded = f"{costs[method].evaluations:,.0f}"
        table.add_row(Text(names[method], style=style), forwarded, *(column.get(method, Text("-")) for column in cells))
    return table


def _terminal_cells(summary: Summary, model: str, measure: Measure) -> dict[str, Text]:
    column = summary.column(model, measure)
    write = _writer(column)
    found = {}
    for e in column:
        text = Text("-")
        if has_interval(e.interval):
            text = Text(f"{e.rank:g}. ", style="dim").append(write(e.interval.estimate), style="bold" if e.rank < 2 else "not dim")
            text.append(f" {''.join(e.group) if all(len(g) == 1 for g in e.group) else ' '.join(e.group)}")
            text.append(f"\n{_written(e.interval, write)}", style="dim")
        found[e.method] = text
    return found


def _terminal_tables(
    summary: Summary, model: str, measures: Sequence[Measure], heading: str, arrows: Mapping[str, str], console: Console
) -> Iterator[Table]:
    """As few tables as the width of the console allows, at most ``_PER_TABLE`` measures in each."""
    wide = console.options.update(width=10_000)
    while measures:
        for count in range(min(_PER_TABLE, len(measures)), 0, -1):
            table = _terminal_table(summary, model, measures[:count], heading, arrows)
            if console.measure(table, options=wide).minimum <= console.width:
                break
        yield table
        measures = measures[count:]


def _by_protocol(measures: Sequence[Measure]) -> list[tuple[str, list[Measure]]]:
    """Measures grouped by protocol, those without a curve last."""
    found: dict[str, list[Measure]] = {}
    for measure in measures:
        found.setdefault(measure.protocol, []).append(measure)
    return sorted(found.items(), key=lambda group: group[0] == "")


def _decided(summary: Summary, model: str, measure: Measure) -> bool:
    """Whether the best mean of a column has an interval."""
    column = summary.column(model, measure)
    return bool(column) and has_interval(column[0].interval)


def _head_measures(summary: Summary, model: str) -> list[Measure]:
    """Insertion and deletion under the first protocol; the first measure that has a mean where these were not measured."""
    decided = [m for m in summary.measures if _decided(summary, model, m)]
    first = summary.results.settings.protocols[0].label()
    return [m for m in decided if m.metric in ("insertion", "deletion") and m.protocol == first] or decided[:1]


def _firsts(summary: Summary, model: str) -> dict[str, int]:
    """How many columns each method leads, most first."""
    found: dict[str, int] = {}
    for measure in summary.measures:
        if _decided(summary, model, measure):
            best = summary.separation(model, measure)[0]
            found[best] = found.get(best, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _separated(others: Sequence[str], all_others: int) -> str:
    if all_others == 0:
        return "the only method"
    if not others:
        return "separated from every other method"
    if len(others) == all_others:
        return "not separated from any other method"
    if len(others) <= 4:
        return f"separated from every other method except {_listed(others)}"
    return f"separated from {all_others - len(others)} of {all_others} other methods"


def _least_p(summary: Summary, model: str, measure: Measure) -> float:
    """The least p after correction that the sign-flip test could give with so many images and methods."""
    comparisons = summary.comparisons[model, measure].values()
    count = max((c.count for c in comparisons), default=0)
    single = 2 / 2**count if count <= EXACT_COUNT else 1e-4
    return min(1.0, single * len(comparisons)) if count else 0.0


def _listed(names: Iterable[str]) -> str:
    *firsts, last = names
    return f"{', '.join(firsts)} and {last}" if firsts else last


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _target(summary: Summary) -> str:
    return "the class that the model predicts" if summary.results.settings.target == "predicted" else "the label of the image"


def _versions() -> dict[str, str]:
    return {**versions(), "captum": version("captum")}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("evaluation", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = lambda path: Markup(escape(path).replace("/", Markup("/<wbr>")))
    environment.filters["whole"] = lambda value: f"{value:,.0f}"
    return environment


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))  # file names that are not UTF-8 still name something
