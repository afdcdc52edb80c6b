"""The page of a data set's neuron paths, its tables as CSV and JSON, its figures as PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.text import Text

from attribution.figures.style import Figure
from attribution.files import slug
from attribution.neurons.decode import Exemplar, exemplars
from attribution.neurons.figures import shown_exemplar
from evaluation.neurons.figures import EDIT_NAMES, plot_agreement, plot_changes, plot_class_paths, plot_pruning, plot_similarity
from evaluation.neurons.results import EDITED
from evaluation.neurons.settings import PATHS
from evaluation.neurons.summary import QUANTITIES, SIGNIFICANT, NeuronSummary, Whose, changes_csv, plain_summary, pruning_csv, speaks_for
from evaluation.statistics.intervals import Interval
from evaluation.study.page import image_of, page, picture, shrunk, write_text
from evaluation.study.report import Planned, ReportFiles, draw_figures, json_text, write_tables
from evaluation.study.run import batches
from evaluation.study.tables import counted, estimated, terminal_table

_MOST_GALLERY = 20  # classes whose paths the page shows with images
_SIDE = 64  # of an exemplar on the page, pixels
_READ = 32  # images whose inputs are held at once


def write_neuron_report(summary: NeuronSummary, out: str | Path) -> ReportFiles:
    """Write changes.csv, pruning.csv, neurons.json, figures/*.png and report.html; the same summary gives the same bytes.

    Raises:
        CannotWrite: the folder cannot be written to, or the disk is full; each file is whole or not there.
    """
    out, plain = Path(out), plain_summary(summary)
    write_tables(out, {"changes.csv": changes_csv(summary), "pruning.csv": pruning_csv(summary), "neurons.json": json_text(plain)})
    files, shown = draw_figures(_planned(summary), out / "figures")
    title = f"Neuron paths of {summary.results.classifier.name} on {plain['settings']['data']}"
    drawn = {section: figure for section, (figure,) in shown.items()}
    write_text(out / "report.html", page("neurons.html.j2", title=title, **_page(summary, drawn)))
    return ReportFiles(out / "report.html", out / "changes.csv", out / "neurons.json", files)


def conclusion(summary: NeuronSummary) -> list[str]:
    """What the numbers say, in sentences."""
    results = summary.results
    first, *others = results.measured
    change = summary.change(first, "own", "remove", "probability")
    text = [
        f"Removing one neuron of each of {len(results.layers)} layers, found by the search ({_words(first)}), changes the probability "
        f"of {_explained(summary)} by {_points(change.interval)} points on average."
    ]
    verbs: dict[str, list[str]] = {"lowers it less": [], "lowers it more": [], "is not told apart from it": []}
    for kind in others:
        other = summary.change(kind, "own", "remove", "probability")
        assert other.difference is not None and other.p is not None
        verb = "lowers it less" if other.difference.estimate > 0 else "lowers it more"
        verbs[verb if other.p < SIGNIFICANT else "is not told apart from it"].append(_words(kind))
    for verb, names in verbs.items():
        if names:
            text.append(f"Paths by which removal {verb}: {', '.join(names)} (paired sign-flip test, Holm, 5 %).")
    return text


def print_neuron_summary(summary: NeuronSummary, console: Console) -> None:
    """Print what every edit does to the target's probability and to the accuracy, for own paths and for those of classes."""
    results = summary.results
    titles = {
        "own": f"own path of each of {counted(len(results.chosen), 'image')}",
        "class": f"path of the class, on {counted(int((~results.selection).sum()), 'other image')}",
    }
    for whose in get_args(Whose):
        headings = ["path", *(f"p, {EDIT_NAMES[edit]}" for edit in EDITED), "accuracy, removed", "joint score"]
        rows = [
            [
                *(_words(kind), *(_cell(summary, kind, whose, edit, "probability") for edit in EDITED)),
                *(_cell(summary, kind, whose, "remove", "accuracy"), f"{summary.joint[kind].estimate:.3f}"),
            ]
            for kind in results.measured
        ]
        if whose == "class":
            headings, rows = headings[:-1], [row[:-1] for row in rows]
        console.print(terminal_table(f"{results.classifier.name}: {titles[whose]}", headings, rows, ("path",), ("path",)))
    for sentence in conclusion(summary):
        console.print(Text(sentence))
    note = "mean change in points, with the 95 % bootstrap interval over images; * differs from the first path (sign-flip, Holm)"
    console.print(Text(note, "dim"))


def _planned(summary: NeuronSummary) -> Iterator[Planned]:
    """The figures; each is a section of its own in the page."""
    planned: dict[str, tuple[str, Callable[..., Figure]]] = {
        "own-paths": ("Change of the probability when the path of each image is edited", partial(plot_changes, whose="own")),
        "class-paths-edited": ("Change of the probability when the path of the class is edited", partial(plot_changes, whose="class")),
        "similarity": ("Similarity of the classes in their neurons", plot_similarity),
        "class-paths": ("Neurons that the images of a class choose, layer by layer", plot_class_paths),
        "pruning": ("Accuracy when classes keep few neurons", plot_pruning),
        "agreement": ("Agreement of decoded and measured effects by layer", plot_agreement),
    }
    absent = {"pruning": not summary.results.pruned, "agreement": not summary.agreement}
    for name, (alt, draw) in planned.items():
        if not absent.get(name):
            yield Planned(name, f"{slug(summary.results.classifier.name)}-{name}", alt, partial(draw, summary))


def _page(summary: NeuronSummary, drawn: Mapping[str, Any]) -> dict[str, Any]:
    results = summary.results
    return {
        "conclusions": [(results.classifier.name, conclusion(summary))],
        "protocol": _protocol(summary),
        "paths": PATHS,
        "whose": get_args(Whose),
        "edits": EDIT_NAMES,
        "quantities": list(QUANTITIES),
        "cell": partial(_cell, summary),
        "figures": drawn,
        "summary": summary,
        "names": results.classifier.class_names,
        "known": summary.known_classes.tolist(),
        "speaks_for": {label: [", ".join(speaks_for(neuron)) for neuron in decoded] for label, decoded in summary.decoded.items()},
        "gallery": _gallery(summary),
        "layers": [f"layer {layer + 1}" for layer in range(len(results.layers))],
    }


def _protocol(summary: NeuronSummary) -> list[tuple[str, list[str]]]:
    """How the numbers were measured, as terms with their texts."""
    results, settings, layers = summary.results, summary.results.settings, summary.results.layers
    chosen = f"{len(results.chosen)} of {results.dataset.name} ({settings.split}), seed {settings.seed}"
    edits = (
        f"all neurons of a path in one pass: removed (0), enhanced (times {settings.enhance:g}), or at their mean over the other half "
        "of the images"
    )
    halves = (
        "own path: the path of each image, on that image; class path: the most frequent neuron of each layer among "
        f"{int(results.selection.sum())} images, judged on the other {int((~results.selection).sum())}"
    )
    return [
        ("Model", [f"{results.classifier.name}, {len(layers)} layers of {layers.width} neurons at the {layers.place}"]),
        ("Images", [f"{chosen}; class explained: {_explained(summary)}"]),
        ("Score", [f"joint attribution score of the {settings.output}, {settings.steps} steps from zero, left Riemann sum"]),
        ("Edits", [edits, halves]),
        ("Intervals", ["95 % bootstrap over images; paths are compared on the same images by the sign-flip test with Holm's correction"]),
    ]


def _explained(summary: NeuronSummary) -> str:
    return "the label" if summary.results.settings.target == "label" else "the predicted class"


def _gallery(summary: NeuronSummary) -> list[dict[str, Any]]:
    """For each neuron of class paths the images in which it is most active."""
    results, count = summary.results, summary.results.settings.exemplars
    labels = summary.known_classes[:_MOST_GALLERY]
    paths = {int(label): [(layer, int(unit)) for layer, unit in enumerate(summary.class_paths[label])] for label in labels}
    distinct = list(dict.fromkeys(neuron for path in paths.values() for neuron in path))
    if not count or not distinct:
        return []
    inputs = (results.inputs(positions).float() for positions in batches(range(len(results.chosen)), _READ))
    found = exemplars(results.classifier, inputs, distinct, count, layers=results.layers)
    shown = {neuron: [_thumbnail(summary, each) for each in those] for neuron, those in zip(distinct, found, strict=True)}
    return [
        {
            "name": results.classifier.class_names[label],
            "cells": [{"unit": unit, "pictures": shown[layer, unit]} for layer, unit in path],
        }
        for label, path in paths.items()
    ]


def _thumbnail(summary: NeuronSummary, exemplar: Exemplar) -> dict[str, Any]:
    results = summary.results
    index = results.chosen[exemplar.index]
    pixels = shown_exemplar(results.dataset[index].image, exemplar)
    label = results.classifier.class_names[results.labels[exemplar.index]]
    return {
        **picture(shrunk(image_of(pixels), _SIDE)),
        "alt": f"{results.dataset.ids[index]} ({label}), activation {exemplar.activation:.2f}",
    }


def _cell(summary: NeuronSummary, kind: str, whose: Whose, edit: str, quantity: str) -> str:
    """The mean in points, a star where it differs from the first kind of path, and the interval."""
    change = summary.change(kind, whose, edit, quantity)
    mean, _, interval = _points(change.interval).partition(" ")
    return f"{mean}{'*' if change.p is not None and change.p < SIGNIFICANT else ''} {interval}".rstrip()


def _points(interval: Interval) -> str:
    return estimated(interval, lambda value: f"{100 * value:+.1f}")


def _words(kind: str) -> str:
    return kind.replace("_", " ")
