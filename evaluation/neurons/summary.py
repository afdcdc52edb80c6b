"""The numbers of a data set's neuron paths: deviations with intervals, comparisons, classes, pruning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from attribution.errors import NotApplicable
from attribution.neurons.classes import Similarity, class_similarity, path_frequency
from attribution.neurons.decode import Decoded, NeuronDecoder
from evaluation.neurons.results import EDITED, Measured, NeuronResults, relative
from evaluation.statistics.comparisons import holm, sign_flip
from evaluation.statistics.intervals import Interval, bootstrap_interval
from evaluation.study.report import plain_heading
from evaluation.study.tables import csv_interval, csv_text, interval_columns, plain_values

Whose = Literal["own", "class"]
QUANTITIES = {
    "probability": "mean change of the target's probability, in points",
    "deviation": "mean of P edited / P clean - 1",
    "accuracy": "change of the accuracy, in points",
}
SIGNIFICANT = 0.05
_AGREEMENT_UNITS, _AGREEMENT_IMAGES = 16, 64


@dataclass(frozen=True)
class Change:
    """What one edit of one kind of path does, over the images.

    Attributes:
        kind: of path, key of ``PATHS``.
        whose: "own": each image's own path, on all images. "class": the path of its class, taken from the selection half, on the
            other half.
        edit: "remove", "enhance" or "mean".
        quantity: key of ``QUANTITIES``.
        interval: its mean with a 95 % bootstrap interval over the images.
        left_out: images whose clean probability is too small for a ratio.
        difference: mean of this kind less the first kind, paired; None for the first itself.
        p: of the paired sign-flip test of that difference, adjusted by Holm over the kinds; None for the first itself.
    """

    kind: str
    whose: Whose
    edit: str
    quantity: str
    interval: Interval
    left_out: int
    difference: Interval | None
    p: float | None


@dataclass(frozen=True, eq=False)
class NeuronSummary:
    """Everything that tables, figures and the page show.

    Attributes:
        results: what was measured.
        changes: every combination of kind, whose, edit and quantity.
        joint: joint score of each kind, with interval.
        similarity: of the classes, by the frequencies of the first kind of path.
        frequency: int64 [C, L, F], of all images.
        class_paths: int64 [C, L], of the selection half.
        decoded: by class, the neurons of its path; empty where the model's neurons cannot be decoded.
        undecoded: why they cannot, or "".
        agreement: by layer, Spearman's correlation between direct effects and measured ones, mean over random neurons; empty where
            nothing is decoded.
    """

    results: NeuronResults
    changes: tuple[Change, ...]
    joint: dict[str, Interval]
    similarity: Similarity
    frequency: np.ndarray
    class_paths: np.ndarray
    decoded: dict[int, list[Decoded]]
    undecoded: str
    agreement: tuple[float, ...]

    def change(self, kind: str, whose: Whose, edit: str, quantity: str) -> Change:
        """The ``Change`` with these names."""
        return next(c for c in self.changes if (c.kind, c.whose, c.edit, c.quantity) == (kind, whose, edit, quantity))

    def images(self, label: int) -> int:
        """How many images a class has."""
        return int((self.results.labels == label).sum())

    def shares(self, label: int) -> list[float]:
        """For each neuron of a class's path, the share of the class's images that have it in theirs."""
        counts = [self.frequency[label, layer, unit] for layer, unit in enumerate(self.class_paths[label])]
        return [float(count / max(1, self.images(label))) for count in counts]

    @property
    def known_classes(self) -> np.ndarray:
        """Classes with images in the selection half."""
        return np.flatnonzero(self.class_paths[:, 0] >= 0)


def summarise_neurons(results: NeuronResults) -> NeuronSummary:
    """Summarise what ``run_neurons`` measured; bootstrap and tests draw with the seed of the settings."""
    settings = results.settings
    first = settings.paths[0]
    frequency = path_frequency(results.measured[first].neurons, results.labels, results.classes, results.layers.width)
    class_paths = results.paths_of_classes(first)
    decoded, undecoded, agreement = _meaning(results, class_paths)
    return NeuronSummary(
        results,
        tuple(_changes(results)),
        {kind: bootstrap_interval(found.scores, seed=settings.seed) for kind, found in results.measured.items()},
        class_similarity(frequency),
        frequency,
        class_paths,
        decoded,
        undecoded,
        agreement,
    )


def changed(results: NeuronResults, found: Measured, whose: Whose, edit: str, quantity: str) -> np.ndarray:
    """The change of a quantity in each image: float64 [N], or [E] for class paths."""
    rows = np.arange(len(results.labels)) if whose == "own" else np.flatnonzero(~results.selection)
    probabilities = (found.probabilities if whose == "own" else found.class_probabilities)[edit]
    if quantity == "accuracy":
        correct = (found.correct if whose == "own" else found.class_correct)[edit]
        return correct.astype(float) - (results.predicted == results.labels)[rows]
    clean = results.clean[rows]
    return relative(probabilities, clean) if quantity == "deviation" else probabilities - clean


def _changes(results: NeuronResults) -> Iterator[Change]:
    seed, (first, *others) = results.settings.seed, results.measured
    for whose in get_args(Whose):
        for edit in EDITED:
            for quantity in QUANTITIES:
                values = {kind: changed(results, found, whose, edit, quantity) for kind, found in results.measured.items()}
                tests = [sign_flip(values[kind], values[first], seed=seed) for kind in others]
                p = dict(zip(others, map(float, holm(tests)), strict=True)) if others else {}
                for kind, own in values.items():
                    difference = bootstrap_interval(own - values[first], seed=seed) if kind in p else None
                    interval, left_out = bootstrap_interval(own, seed=seed), int(np.isnan(own).sum())
                    yield Change(kind, whose, edit, quantity, interval, left_out, difference, p.get(kind))


def _meaning(results: NeuronResults, class_paths: np.ndarray) -> tuple[dict[int, list[Decoded]], str, tuple[float, ...]]:
    """Decode the neurons of class paths (p-values are corrected over all of them), or say why not; and the agreement by layer."""
    try:
        decoder = NeuronDecoder(results.classifier, layers=results.layers)
    except NotApplicable as error:
        return {}, str(error), ()
    known = np.flatnonzero(class_paths[:, 0] >= 0)
    units = [(layer, int(unit)) for label in known for layer, unit in enumerate(class_paths[label])]
    found = iter(decoder.top_classes(units))
    decoded = {int(label): [next(found) for _ in class_paths[label]] for label in known}
    generator = np.random.default_rng(results.settings.seed)
    rows = generator.permutation(len(results.chosen))[:_AGREEMENT_IMAGES]
    inputs = results.inputs(rows.tolist())
    agreement = []
    for layer in range(len(results.layers)):
        some = generator.permutation(results.layers.width)[:_AGREEMENT_UNITS]
        values = decoder.agreement(inputs, layer, some.tolist())
        agreement.append(float(np.nanmean(values)) if np.isfinite(values).any() else math.nan)
    return decoded, "", tuple(agreement)


def speaks_for(decoded: Decoded) -> list[str]:
    """The classes that a neuron's direct effect favours beyond chance."""
    return [effect.name for effect in decoded.top if effect.p < SIGNIFICANT]


def changes_csv(summary: NeuronSummary) -> str:
    """Every change with its interval and its difference from the first kind of path."""
    columns = [
        *("model", "path", "whose", "edit", "quantity", "mean", "low", "high", "images", "left_out"),
        *interval_columns("difference"),
        "adjusted_p",
    ]
    name = summary.results.classifier.name
    rows = (
        [
            *(name, c.kind, c.whose, c.edit, c.quantity, c.interval, c.interval.count, c.left_out),
            *(*csv_interval(c.difference), c.p),
        ]
        for c in summary.changes
    )
    return csv_text(columns, rows)


def pruning_csv(summary: NeuronSummary) -> str:
    """Accuracy and mean probability of the label for every K, depth and share, with intervals."""
    results = summary.results
    columns = ["model", "kept", "depth", "share", *interval_columns("accuracy", "probability"), "images"]

    def mean(values: np.ndarray) -> Interval:
        return bootstrap_interval(values.astype(float), seed=results.settings.seed)

    name = results.classifier.name
    rows = ([name, r.kept, r.depth, str(r.share), mean(r.correct), mean(r.probabilities), len(r.correct)] for r in results.pruned)
    return csv_text(columns, rows)


def plain_summary(summary: NeuronSummary) -> dict[str, Any]:
    """What neurons.json holds: settings, versions, class paths, frequencies, similarity, meanings, failures."""
    results = summary.results
    heading = plain_heading(results.settings, results.classifier)
    heading["model"] |= {"layers": list(results.layers.names), "width": results.layers.width, "neurons_at": results.layers.place}
    plain = plain_values(
        {
            **heading,
            "images": len(results.chosen),
            "evaluated_on": int((~results.selection).sum()),
            "joint_scores": summary.joint,
            "rows": {kind: {"forwards": m.forwards, "backwards": m.backwards} for kind, m in results.measured.items()},
            "classes": [_plain_class(summary, int(label)) for label in summary.known_classes],
            "similarity": summary.similarity.matrix.round(6).tolist(),
            "decoding": {"agreement_by_layer": summary.agreement, "left_out": summary.undecoded},
            "failures": [{"sample": sample, "reason": reason} for sample, reason in results.failures],
        }
    )
    assert isinstance(plain, dict)
    return plain


def _plain_class(summary: NeuronSummary, label: int) -> dict[str, Any]:
    names = summary.results.classifier.class_names
    return {
        "name": names[label],
        "images": summary.images(label),
        "path": summary.class_paths[label].tolist(),
        "share_of_images": [round(share, 4) for share in summary.shares(label)],
        "most_similar": [names[c] for c in summary.similarity.most(label, 50)],
        "least_similar": [names[c] for c in summary.similarity.least(label, 50)],
        "speaks_for": [speaks_for(neuron) for neuron in summary.decoded.get(label, [])],
    }
