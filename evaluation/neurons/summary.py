"""The numbers of a data set's neuron paths: deviations with intervals, comparisons, classes, pruning."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from attribution.errors import NotApplicable
from attribution.neurons.classes import Similarity, class_similarity, path_frequency
from attribution.neurons.decode import Decoded, NeuronDecoder
from attribution.provenance import versions
from evaluation.neurons.measure import EDITED, Measured, NeuronResults, relative
from evaluation.statistics.comparisons import holm, sign_flip
from evaluation.statistics.intervals import Interval, bootstrap_interval

Whose = Literal["own", "class"]
QUANTITIES = {
    "probability": "mean change of the target's probability, in points",
    "deviation": "mean of P edited / P clean - 1",
    "accuracy": "change of the accuracy, in points",
}
_AGREEMENT_UNITS, _AGREEMENT_IMAGES = 16, 64
_CHANGE_COLUMNS = (
    *("model", "path", "whose", "edit", "quantity", "mean", "low", "high", "images", "left_out"),
    *("difference", "difference_low", "difference_high", "adjusted_p"),
)
_PRUNING_COLUMNS = (
    *("model", "kept", "depth", "share", "accuracy", "accuracy_low", "accuracy_high"),
    *("probability", "probability_low", "probability_high", "images"),
)


@dataclass(frozen=True)
class Change:
    """What one edit of one kind of path does, over the images.

    Attributes:
        kind: of path, key of ``PATHS``.
        whose: "own" path of each image, on all images; path of its "class", taken from the selection half, on the other half.
        edit: "remove", "enhance" or "mean".
        quantity: key of ``QUANTITIES``.
        interval: its mean with a 95 % bootstrap interval over the images.
        left_out: images whose clean probability is too small for a ratio.
        difference: mean of this kind less the first kind, paired; None for the first itself.
        p: of the paired sign-flip test of that difference, adjusted by Holm over the kinds; None likewise.
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
        decoded: by class, its path's neurons; empty where the model's neurons cannot be decoded.
        undecoded: why not, or "".
        agreement: by layer, Spearman's correlation between direct effects and measured ones, mean over random neurons; empty likewise.
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
        """The one with these names."""
        return next(c for c in self.changes if (c.kind, c.whose, c.edit, c.quantity) == (kind, whose, edit, quantity))

    @property
    def known_classes(self) -> np.ndarray:
        """Classes with images in the selection half."""
        return np.flatnonzero(self.class_paths[:, 0] >= 0)


def summarise_neurons(results: NeuronResults) -> NeuronSummary:
    """Tables from what ``run_neurons`` measured; bootstrap and tests draw with the seed of the settings."""
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
    """One value for each image: float64 [N], or [E] for class paths."""
    rows = np.arange(len(results.labels)) if whose == "own" else np.flatnonzero(~results.selection)
    probabilities = (found.probabilities if whose == "own" else found.class_probabilities)[edit]
    if quantity == "accuracy":
        correct = (found.correct if whose == "own" else found.class_correct)[edit]
        return correct.astype(float) - (results.predicted == results.labels)[rows]
    clean = results.clean[rows]
    return relative(probabilities, clean) if quantity == "deviation" else probabilities - clean


def _changes(results: NeuronResults) -> Sequence[Change]:
    seed, kinds = results.settings.seed, list(results.measured)
    made = []
    for whose in ("own", "class"):
        for edit in EDITED:
            for quantity in QUANTITIES:
                values = {kind: changed(results, results.measured[kind], whose, edit, quantity) for kind in kinds}
                base = values[kinds[0]]
                p: Sequence[float] | np.ndarray = (
                    holm([sign_flip(values[kind], base, seed=seed) for kind in kinds[1:]]) if len(kinds) > 1 else []
                )
                for kind, adjusted in zip(kinds, [None, *p], strict=True):
                    own = values[kind]
                    made.append(
                        Change(
                            kind,
                            whose,
                            edit,
                            quantity,
                            bootstrap_interval(own, seed=seed),
                            int(np.isnan(own).sum()),
                            None if adjusted is None else bootstrap_interval(own - base, seed=seed),
                            None if adjusted is None else float(adjusted),
                        )
                    )
    return made


def _meaning(results: NeuronResults, class_paths: np.ndarray) -> tuple[dict[int, list[Decoded]], str, tuple[float, ...]]:
    """Neurons of class paths in terms of classes; corrected over all of them together."""
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


def changes_csv(summary: NeuronSummary) -> str:
    """Every change with its interval, its difference to the first kind of path, and the protocol."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "model",
            "path",
            "whose",
            "edit",
            "quantity",
            "mean",
            "low",
            "high",
            "images",
            "left_out",
            "difference",
            "difference_low",
            "difference_high",
            "adjusted_p",
        ]
    )
    for c in summary.changes:
        difference = ["", "", ""] if c.difference is None else [_number(getattr(c.difference, n)) for n in ("estimate", "low", "high")]
        numbers = [_number(c.interval.estimate), _number(c.interval.low), _number(c.interval.high), c.interval.count, c.left_out]
        names = [summary.results.classifier.name, c.kind, c.whose, c.edit, c.quantity]
        writer.writerow([*names, *numbers, *difference, "" if c.p is None else _number(c.p)])
    return buffer.getvalue()


def pruning_csv(summary: NeuronSummary) -> str:
    """Accuracy and mean probability of the label for every K, depth and share, with intervals."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "model",
            "kept",
            "depth",
            "share",
            "accuracy",
            "accuracy_low",
            "accuracy_high",
            "probability",
            "probability_low",
            "probability_high",
            "images",
        ]
    )
    for row in summary.results.pruned:
        intervals = [
            bootstrap_interval(values, seed=summary.results.settings.seed) for values in (row.correct.astype(float), row.probabilities)
        ]
        numbers = [_number(getattr(i, name)) for i in intervals for name in ("estimate", "low", "high")]
        writer.writerow([summary.results.classifier.name, row.kept, row.depth, row.share, *numbers, len(row.correct)])
    return buffer.getvalue()


def plain_summary(summary: NeuronSummary) -> dict[str, Any]:
    """neurons.json: settings, versions, class paths, frequencies, similarity, meanings, failures."""
    results = summary.results
    names = results.classifier.class_names
    similarity = [[None if not math.isfinite(value) else round(value, 6) for value in row] for row in summary.similarity.matrix.tolist()]
    return {
        "settings": results.settings.plain(),
        "versions": versions(),
        "model": {
            "name": results.classifier.name,
            "weights_digest": results.classifier.weights_digest,
            "precision": results.classifier.precision,
            "layers": list(results.layers.names),
            "width": results.layers.width,
            "neurons_at": results.layers.place,
        },
        "images": len(results.chosen),
        "evaluated_on": int((~results.selection).sum()),
        "joint_scores": {kind: vars(interval) for kind, interval in summary.joint.items()},
        "rows": {kind: {"forwards": m.forwards, "backwards": m.backwards} for kind, m in results.measured.items()},
        "classes": [
            {
                "name": names[label],
                "images": int((results.labels == label).sum()),
                "path": summary.class_paths[label].tolist(),
                "share_of_images": [
                    round(float(summary.frequency[label, layer, unit] / max(1, (results.labels == label).sum())), 4)
                    for layer, unit in enumerate(summary.class_paths[label])
                ],
                "most_similar": [names[c] for c in summary.similarity.most(int(label), 50)],
                "least_similar": [names[c] for c in summary.similarity.least(int(label), 50)],
                "speaks_for": [[effect.name for effect in neuron.top if effect.p < 0.05] for neuron in summary.decoded.get(int(label), [])],
            }
            for label in summary.known_classes
        ],
        "similarity": similarity,
        "decoding": {"agreement_by_layer": [None if not math.isfinite(v) else v for v in summary.agreement], "left_out": summary.undecoded},
        "failures": [{"sample": sample, "reason": reason} for sample, reason in results.failures],
    }


def exemplar_inputs(results: NeuronResults, size: int = 32) -> Any:
    """Model inputs of all images, in batches."""
    for start in range(0, len(results.chosen), size):
        yield results.inputs(range(start, min(start + size, len(results.chosen)))).to(torch.float32)


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""
