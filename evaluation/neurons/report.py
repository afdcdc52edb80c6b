"""The page of a data set's neuron paths, its tables as CSV and JSON, its figures as PNG."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attribution.figures.style import Figure
from attribution.files import slug, whole_file
from attribution.neurons.decode import Exemplar, exemplars
from attribution.neurons.figures import shown_exemplar
from evaluation.neurons.figures import EDIT_NAMES, plot_agreement, plot_changes, plot_class_paths, plot_pruning, plot_similarity
from evaluation.neurons.measure import EDITED
from evaluation.neurons.settings import PATHS
from evaluation.neurons.summary import QUANTITIES, NeuronSummary, Whose, changes_csv, exemplar_inputs, plain_summary, pruning_csv
from evaluation.statistics.intervals import Interval
from evaluation.study.page import inline_svg, page, picture, write_text
from evaluation.study.report import ReportFiles
from evaluation.study.style import figure_style, has_interval

_SIGNIFICANT = 0.05
_MOST_GALLERY = 20  # classes whose paths the page shows with images
_SIDE = 64  # of an exemplar on the page, pixels


def write_neuron_report(summary: NeuronSummary, out: str | Path, title: str | None = None) -> ReportFiles:
    """Write changes.csv, pruning.csv, neurons.json, figures/*.png and report.html; the same summary gives the same bytes.

    Raises:
        UserError: the folder cannot be written to, or the disk is full; each file is whole or not there.
    """
    out, results = Path(out), summary.results
    title = title or f"Neuron paths of {results.classifier.name} on {results.settings.plain()['data']}"
    write_text(out / "changes.csv", changes_csv(summary))
    write_text(out / "pruning.csv", pruning_csv(summary))
    write_text(out / "neurons.json", json.dumps(plain_summary(summary), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    figures: list[Path] = []
    drawn: dict[str, dict[str, Any]] = {}
    for name, alt, draw in _planned(summary):
        with figure_style():
            figure = draw()
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            figures.append(out / "figures" / f"{slug(results.classifier.name)}-{name}.png")
            with whole_file(figures[-1]) as temporary:
                figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
            drawn[name] = {"svg": inline_svg(figure, f"f{len(figures)}-"), "alt": alt, "width": round(105 * figure.get_figwidth())}
    write_text(out / "report.html", page("neurons.html.j2", title=title, **_page(summary, drawn)))
    return ReportFiles(out / "report.html", out / "changes.csv", out / "neurons.json", tuple(figures))


def conclusion(summary: NeuronSummary) -> list[str]:
    """What the numbers say, in sentences."""
    results = summary.results
    first, *others = results.measured
    change = summary.change(first, "own", "remove", "probability")
    explained = "the label" if results.settings.target == "label" else "the predicted class"
    text = [
        f"Removing one neuron of each of {len(results.layers)} layers, found by the search ({_words(first)}), changes the probability "
        f"of {explained} by {_points(change.interval)} points on average."
    ]
    weaker: list[str] = []
    undecided: list[str] = []
    stronger: list[str] = []
    for kind in others:
        other = summary.change(kind, "own", "remove", "probability")
        assert other.difference is not None and other.p is not None
        if other.p >= _SIGNIFICANT:
            undecided.append(_words(kind))
        else:
            (weaker if other.difference.estimate > 0 else stronger).append(_words(kind))
    for names, verb in ((weaker, "lowers it less"), (stronger, "lowers it more"), (undecided, "is not told apart from it")):
        if names:
            text.append(f"Paths by which removal {verb}: {', '.join(names)} (paired sign-flip test, Holm, 5 %).")
    return text


def print_neuron_summary(summary: NeuronSummary, console: Console) -> None:
    """Own paths: what every edit does to the target's probability and to the accuracy."""
    results = summary.results
    images = f"{len(results.chosen)} images"
    for whose, title in (
        ("own", f"own path of each of {images}"),
        ("class", f"path of the class, on {int((~results.selection).sum())} other images"),
    ):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=f"{results.classifier.name}: {title}", title_justify="left")
        table.add_column("path", no_wrap=True)
        for edit in EDITED:
            table.add_column(f"p, {EDIT_NAMES[edit]}", justify="right")
        table.add_column("accuracy, removed", justify="right")
        if whose == "own":
            table.add_column("joint score", justify="right")
        for kind in results.measured:
            cells = [Text(_cell(summary, kind, whose, edit, "probability")) for edit in EDITED]  # type: ignore[arg-type]
            cells.append(Text(_cell(summary, kind, whose, "remove", "accuracy")))  # type: ignore[arg-type]
            if whose == "own":
                cells.append(Text(f"{summary.joint[kind].estimate:.3f}"))
            table.add_row(_words(kind), *cells)
        console.print(table)
    for sentence in conclusion(summary):
        console.print(Text(sentence))
    console.print(
        Text("mean change in points, with the 95 % bootstrap interval over images; * differs from the first path (sign-flip, Holm)", "dim")
    )


def _planned(summary: NeuronSummary) -> list[tuple[str, str, Callable[[], Figure]]]:
    planned: list[tuple[str, str, Callable[[], Figure]]] = [
        ("own-paths", "Change of the probability when the path of each image is edited", lambda: plot_changes(summary, "own")),
        ("class-paths-edited", "Change of the probability when the path of the class is edited", lambda: plot_changes(summary, "class")),
        ("similarity", "Similarity of the classes in their neurons", lambda: plot_similarity(summary)),
        ("class-paths", "Neurons that the images of a class choose, layer by layer", lambda: plot_class_paths(summary)),
        ("pruning", "Accuracy when classes keep few neurons", lambda: plot_pruning(summary)),
    ]
    if summary.agreement:
        planned.append(("agreement", "Agreement of decoded and measured effects by layer", lambda: plot_agreement(summary)))
    return planned


def _page(summary: NeuronSummary, drawn: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    results = summary.results
    names = results.classifier.class_names
    settings = results.settings
    target = "the label" if settings.target == "label" else "the predicted class"
    protocol = [
        (
            "Model",
            [f"{results.classifier.name}, {len(results.layers)} layers of {results.layers.width} neurons at the {results.layers.place}"],
        ),
        (
            "Images",
            [f"{len(results.chosen)} of {results.dataset.name} ({settings.split}), seed {settings.seed}; class explained: {target}"],
        ),
        ("Score", [f"joint attribution score of the {settings.output}, {settings.steps} steps from zero, left Riemann sum"]),
        (
            "Edits",
            [
                "all neurons of a path in one pass: removed (0), "
                f"enhanced (times {settings.enhance:g}), or at their mean over the other half of the images",
                "own path: the path of each image, on that image; class path: the most frequent neuron of each layer among "
                f"{int(results.selection.sum())} images, judged on the other {int((~results.selection).sum())}",
            ],
        ),
        ("Intervals", ["95 % bootstrap over images; paths are compared on the same images by the sign-flip test with Holm's correction"]),
    ]
    return {
        "conclusions": [(results.classifier.name, conclusion(summary))],
        "protocol": protocol,
        "paths": [(_words(kind), PATHS[kind]) for kind in results.measured],
        "tables": [_table(summary, "own"), _table(summary, "class")],
        "figures": drawn,
        "classes": _class_rows(summary),
        "gallery": _gallery(summary),
        "layers": [f"layer {layer + 1}" for layer in range(len(results.layers))],
        "similar": [
            (
                names[label],
                ", ".join(names[c] for c in summary.similarity.most(int(label), 3)),
                ", ".join(names[c] for c in summary.similarity.least(int(label), 3)),
            )
            for label in summary.known_classes
        ],
        "undecoded": summary.undecoded,
        "failures": results.failures,
    }


def _table(summary: NeuronSummary, whose: Whose) -> dict[str, Any]:
    results = summary.results
    rows = []
    for kind, found in results.measured.items():
        cells = [_cell(summary, kind, whose, edit, quantity).partition(" ") for edit in EDITED for quantity in QUANTITIES]
        joint = f"{summary.joint[kind].estimate:.3f}"
        rows.append({"kind": _words(kind), "cells": cells, "joint": joint, "rows": f"{found.forwards:.0f} / {found.backwards:.0f}"})
    left_out = max(c.left_out for c in summary.changes)
    return {"whose": whose, "rows": rows, "edits": [EDIT_NAMES[edit] for edit in EDITED], "left_out": left_out}


def _class_rows(summary: NeuronSummary) -> list[dict[str, Any]]:
    """The path of every class, with how many of its images choose each neuron and what the neuron speaks for."""
    results = summary.results
    made = []
    for label in summary.known_classes:
        images = int((results.labels == label).sum())
        cells = []
        for layer, unit in enumerate(summary.class_paths[label]):
            decoded = summary.decoded.get(int(label), [])
            speaks = [effect.name for effect in decoded[layer].top if effect.p < _SIGNIFICANT] if decoded else []
            share = summary.frequency[label, layer, unit] / max(1, images)
            cells.append({"unit": int(unit), "share": f"{share:.0%}", "speaks": ", ".join(speaks)})
        made.append({"name": results.classifier.class_names[label], "images": images, "cells": cells})
    return made


def _gallery(summary: NeuronSummary) -> list[dict[str, Any]]:
    """Images that excite the neurons of class paths most."""
    results = summary.results
    labels = summary.known_classes[:_MOST_GALLERY]
    count = results.settings.exemplars
    units = [(layer, int(unit)) for label in labels for layer, unit in enumerate(summary.class_paths[label])]
    if not count or not units:
        return []
    distinct = list(dict.fromkeys(units))
    known = dict(
        zip(distinct, exemplars(results.classifier, exemplar_inputs(results), distinct, count, layers=results.layers), strict=True)
    )
    rows = []
    for label in labels:
        cells = [
            {"unit": int(unit), "pictures": [_thumbnail(summary, e) for e in known[layer, int(unit)]]}
            for layer, unit in enumerate(summary.class_paths[label])
        ]
        rows.append({"name": results.classifier.class_names[label], "cells": cells})
    return rows


def _thumbnail(summary: NeuronSummary, exemplar: Exemplar) -> dict[str, Any]:
    from PIL import Image

    results = summary.results
    index = results.chosen[exemplar.index]
    pixels = shown_exemplar(results.dataset[index].image, exemplar)
    image = Image.fromarray((pixels * 255).round().clip(0, 255).astype("uint8"))
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    label = results.classifier.class_names[results.labels[exemplar.index]]
    return {**picture(image), "alt": f"{results.dataset.ids[index]} ({label}), activation {exemplar.activation:.2f}"}


def _cell(summary: NeuronSummary, kind: str, whose: Whose, edit: str, quantity: str) -> str:
    change = summary.change(kind, whose, edit, quantity)
    mean, _, interval = _points(change.interval).partition(" ")
    return f"{mean}{'*' if change.p is not None and change.p < _SIGNIFICANT else ''} {interval}".rstrip()


def _points(interval: Interval) -> str:
    if not has_interval(interval):
        return f"{100 * interval.estimate:+.1f}"
    return f"{100 * interval.estimate:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _words(kind: str) -> str:
    return kind.replace("_", " ")
