"""The neuron paths of a data set: every path is kept the moment it is known, so that a run that was killed continues."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.errors import UserError
from attribution.model.classifier import Classifier
from attribution.neurons.classes import class_paths, halves
from attribution.neurons.edits import edited_probabilities, mean_activations, pruned_probabilities
from attribution.neurons.finder import PathFinder
from attribution.neurons.layers import NeuronLayers, find_neurons
from attribution.neurons.path import NeuronPath
from attribution.provenance import digest_of
from evaluation.data.dataset import ImageDataset
from evaluation.neurons.settings import NeuronSettings
from evaluation.study.attempts import Broken, attempted
from evaluation.study.identity import sample_seed
from evaluation.study.opening import named_data, named_model
from evaluation.study.records import Record, RecordLog, open_log

Progress = Callable[[int, int, str], None]
EDITED = ("remove", "enhance", "mean")
TOGETHER = 8  # images whose paths are searched in one batch
_LEAST_PROBABILITY = 1e-12  # below it a ratio says nothing


@dataclass(frozen=True, eq=False)
class Measured:
    """One kind of path on all images, and what its edits do.

    Attributes:
        neurons: int64 [N, L], own paths.
        scores: float64 [N], joint scores.
        probabilities: by edit, float64 [N], of the target when the image's own path is edited.
        correct: by edit, bool [N], whether the edited prediction is the label.
        class_probabilities, class_correct: by edit, [E]: likewise on the evaluation half, with the path of the image's class, which
            was taken from the other half.
        forwards, backwards: rows for one image, mean.
    """

    neurons: np.ndarray
    scores: np.ndarray
    probabilities: Mapping[str, np.ndarray]
    correct: Mapping[str, np.ndarray]
    class_probabilities: Mapping[str, np.ndarray]
    class_correct: Mapping[str, np.ndarray]
    forwards: float
    backwards: float


@dataclass(frozen=True, eq=False)
class Pruned:
    """The model on the evaluation half when each class keeps K neurons of the first layers and others are removed.

    Attributes:
        kept, depth, share: K, layers, q.
        probabilities: float64 [E], of the label.
        correct: bool [E].
    """

    kept: int
    depth: int
    share: float
    probabilities: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True, eq=False)
class NeuronResults:
    """What ``run_neurons`` found.

    Attributes:
        settings: as given.
        classifier: the model.
        layers: where its neurons are.
        dataset: the samples' data set.
        chosen: indices into the data set, of the images that could be read.
        labels, targets, predicted: int64 [N].
        clean: float64 [N], probability of the target.
        selection: bool [N], the images that classes are summed up from; the others evaluate them.
        measured: by kind of path.
        pruned: K x depth x share.
        failures: (sample, reason).
        out: folder.
    """

    settings: NeuronSettings
    classifier: Classifier
    layers: NeuronLayers
    dataset: ImageDataset
    chosen: tuple[int, ...]
    labels: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray
    clean: np.ndarray
    selection: np.ndarray
    measured: Mapping[str, Measured]
    pruned: tuple[Pruned, ...]
    failures: tuple[tuple[str, str], ...]
    out: Path

    @property
    def classes(self) -> int:
        """C."""
        return self.classifier.num_classes

    def paths_of_classes(self, kind: str) -> np.ndarray:
        """The path of each class, from the selection half: int64 [C, L]; -1 without images."""
        return class_paths(self.measured[kind].neurons[self.selection], self.labels[self.selection], self.classes)[:, :, 0]

    def inputs(self, positions: Sequence[int]) -> Tensor:
        """Model inputs of some of the chosen images."""
        return torch.cat([self.classifier.inputs(self.dataset[self.chosen[p]].image) for p in positions])


def run_neurons(settings: NeuronSettings, out: str | Path, progress: Progress | None = None) -> NeuronResults:
    """Measure what the folder does not hold yet, and return everything.

    Args:
        settings: what is measured.
        out: folder of ``records.jsonl``; one process at a time.
        progress: called with (paths done, all of them, what is done now).

    Raises:
        NotApplicable: the model has no neurons that can be followed.
        UserError: settings that cannot be run, no labels, or a full disk. Images that fail are recorded and returned instead.
    """
    with torch.inference_mode(False), torch.enable_grad(), open_log(Path(out) / "records.jsonl") as log:
        return _Run(settings, Path(out), log, progress).run()


@dataclass(eq=False)
class _Run:
    settings: NeuronSettings
    out: Path
    log: RecordLog
    progress: Progress | None
    done: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    def run(self) -> NeuronResults:
        settings = self.settings
        chosen = self.dataset.choose(settings.samples, settings.seed, labels_only=True)
        kinds = [*settings.paths, *[f"top {k}" for k in settings.kept if k > 1]]
        self.total = len(chosen) * len(kinds)
        for batch in _batches(chosen, TOGETHER):
            self._search(batch, settings.paths)
            self._report(len(batch) * len(settings.paths), "paths")
        kept = tuple(index for index in chosen if self.dataset.ids[index] not in self.failures)
        if len(kept) < 4:
            raise UserError(f"{len(kept)} of {len(chosen)} images could be followed, such as not {next(iter(self.failures.items()), '')}")
        every = {kind: [self._known(index, kind) for index in kept] for kind in settings.paths}
        leading = every[settings.paths[0]]
        labels, targets, predicted = (np.array([r[name] for r in leading]) for name in ("label", "target", "predicted"))
        clean = np.array([r["clean"] for r in leading])
        selection = halves(labels, seed=settings.seed)
        inputs = self._inputs(kept)
        means = {side: mean_activations(self.classifier, inputs[selection == side], layers=self.layers) for side in (False, True)}
        measured = {}
        for kind in settings.paths:
            measured[kind] = self._measured(every[kind], inputs, labels, targets, selection, means)
        for batch in _batches([index for index, wanted in zip(kept, selection, strict=True) if wanted], TOGETHER):
            self._search(batch, kinds[len(settings.paths) :])
            self._report(len(batch) * (len(kinds) - len(settings.paths)), "top neurons")
        pruned = self._pruned(kept, inputs, labels, selection)
        self._report(max(0, self.total - self.done), "done")
        return NeuronResults(
            settings,
            self.classifier,
            self.layers,
            self.dataset,
            kept,
            labels,
            targets,
            predicted,
            clean,
            selection,
            measured,
            tuple(pruned),
            tuple(self.failures.items()),
            self.out,
        )

    @cached_property
    def classifier(self) -> Classifier:
        return named_model(self.settings)

    @cached_property
    def layers(self) -> NeuronLayers:
        return find_neurons(self.classifier)

    @cached_property
    def dataset(self) -> ImageDataset:
        return named_data(self.settings, self.classifier.class_names)

    @cached_property
    def identity(self) -> list[Any]:
        """What every number depends on beside the image and the kind of path."""
        settings = self.settings
        own = self.classifier.identity
        model = [own.name, own.weights, own.preprocessing, list(self.layers.names), self.layers.start, self.layers.stop, *own.precision]
        return [*model, settings.data, settings.split, settings.target, settings.steps, settings.output, settings.enhance, settings.seed]

    def _key(self, index: int, kind: str) -> str:
        imitated = self.settings.paths[0] if kind == "random" else None
        return digest_of([*self.identity, self.dataset.ids[index], kind, imitated])

    def _record(self, index: int, kind: str) -> Record | None:
        return self.log.records.get(self._key(index, kind))

    def _known(self, index: int, kind: str) -> Record:
        record = self._record(index, kind)
        assert record is not None
        return record

    def _search(self, batch: Sequence[int], kinds: Sequence[str]) -> None:
        """Find, score and edit the paths that the log lacks."""
        for kind in kinds:
            missing = [index for index in batch if self._record(index, kind) is None and self.dataset.ids[index] not in self.failures]
            if not missing:
                continue
            inputs, read = self._read(missing)
            if not read:
                continue
            try:
                for index, record in zip(read, attempted(partial(self._found, kind, inputs, read)), strict=True):
                    self.log.append(self._key(index, kind), record)
            except Broken as error:
                if len(read) > 1:  # one image may spoil its batch
                    for index in read:
                        self._search([index], [kind])
                else:
                    self.failures[self.dataset.ids[read[0]]] = str(error)

    def _read(self, batch: Sequence[int]) -> tuple[Tensor, list[int]]:
        found, read = [], []
        for index in batch:
            try:
                found.append(attempted(partial(self._input, index)))
                read.append(index)
            except Broken as error:
                self.failures[self.dataset.ids[index]] = str(error)
        return (torch.cat(found) if found else torch.empty(0)), read

    def _input(self, index: int) -> Tensor:
        return self.classifier.inputs(self.dataset[index].image)

    def _found(self, kind: str, inputs: Tensor, batch: Sequence[int]) -> list[Record]:
        settings = self.settings
        labels = [int(self.dataset.labels[index]) for index in batch]  # type: ignore[arg-type]
        probabilities = self.classifier.probabilities(inputs).cpu()
        predicted = probabilities.argmax(dim=1).tolist()
        targets = labels if settings.target == "label" else predicted
        finder = PathFinder(self.classifier, inputs, targets, steps=settings.steps, output=settings.output, layers=self.layers)
        paths = self._paths(kind, finder, batch)
        records = [
            {
                "sample": self.dataset.ids[index],
                "kind": kind,
                "label": labels[row],
                "target": targets[row],
                "predicted": predicted[row],
                "clean": float(probabilities[row, targets[row]]),
                "neurons": paths[row].neurons.tolist(),
                "score": paths[row].score,
                "forwards": paths[row].forwards,
                "backwards": paths[row].backwards,
            }
            for row, index in enumerate(batch)
        ]
        if kind in settings.paths:
            neurons = torch.stack([path.neurons for path in paths])
            for edit in ("remove", "enhance"):
                edited = edited_probabilities(self.classifier, inputs, neurons, edit, factor=settings.enhance, layers=self.layers)
                for row, record in enumerate(records):
                    record[edit] = [float(edited[row, targets[row]]), int(edited[row].argmax())]
        return records

    def _paths(self, kind: str, finder: PathFinder, batch: Sequence[int]) -> list[NeuronPath]:
        if kind == "random":
            like = torch.tensor([self._known(index, self.settings.paths[0])["neurons"] for index in batch])
            return finder.random(like, [sample_seed(self.settings.seed, self.dataset.ids[index]) for index in batch])
        if kind.startswith("top "):
            return finder.search(top=min(int(kind[4:]), self.layers.width))
        ways: dict[str, Callable[[], list[NeuronPath]]] = {
            "neuron_path": finder.search,
            "neuron_path_exact": lambda: finder.search("exact"),
            "neuron_path_removal": lambda: finder.search("removal"),
            "influence_pattern": finder.influence_pattern,
            "layer_integrated_gradients": finder.layer_integrated_gradients,
            "activation": finder.activation,
        }
        return ways[kind]()

    def _inputs(self, kept: Sequence[int]) -> Tensor:
        return torch.cat([self._input(index) for index in kept])

    def _measured(
        self,
        records: Sequence[Record],
        inputs: Tensor,
        labels: np.ndarray,
        targets: np.ndarray,
        selection: np.ndarray,
        means: Mapping[bool, Tensor],
    ) -> Measured:
        """Own paths from the records; the edit by the mean, and all edits of class paths, need all images and are computed here."""
        neurons = np.array([record["neurons"] for record in records])
        probabilities = {edit: np.array([record[edit][0] for record in records]) for edit in ("remove", "enhance")}
        correct = {edit: np.array([record[edit][1] for record in records]) == labels for edit in ("remove", "enhance")}
        probabilities["mean"], correct["mean"] = np.empty(len(records)), np.empty(len(records), dtype=bool)
        for side in (False, True):  # the mean of the other half, so that an image is no part of what replaces it
            rows = np.flatnonzero(selection == side)
            found = self._edited(inputs[rows], neurons[rows], "mean", means[not side])
            probabilities["mean"][rows] = found[np.arange(len(rows)), targets[rows]]
            correct["mean"][rows] = found.argmax(axis=1) == labels[rows]
        judged = np.flatnonzero(~selection)
        by_class = class_paths(neurons[selection], labels[selection], self.classifier.num_classes)[:, :, 0]
        class_probabilities, class_correct = {}, {}
        for edit in EDITED:
            found = self._edited(inputs[judged], by_class[labels[judged]], edit, means[True])
            class_probabilities[edit] = found[np.arange(len(judged)), targets[judged]]
            class_correct[edit] = found.argmax(axis=1) == labels[judged]
        passed = [float(np.mean([record[name] for record in records])) for name in ("forwards", "backwards")]
        scores = np.array([record["score"] for record in records])
        return Measured(neurons, scores, probabilities, correct, class_probabilities, class_correct, *passed)

    def _edited(self, inputs: Tensor, neurons: np.ndarray, edit: Any, means: Tensor) -> np.ndarray:
        units, factor = torch.from_numpy(neurons), self.settings.enhance
        return edited_probabilities(self.classifier, inputs, units, edit, factor=factor, means=means, layers=self.layers).double().numpy()

    def _pruned(self, kept: Sequence[int], inputs: Tensor, labels: np.ndarray, selection: np.ndarray) -> Iterator[Pruned]:
        settings, width = self.settings, self.layers.width
        judged = np.flatnonzero(~selection)
        for count in settings.kept:
            kind = f"top {count}" if count > 1 else settings.paths[0]
            known = [
                (self._known(index, kind)["neurons"], label)
                for index, label, wanted in zip(kept, labels, selection, strict=True)
                if wanted and self._record(index, kind) is not None
            ]
            own = np.array([neurons for neurons, _ in known])
            by_class = class_paths(own, np.array([label for _, label in known]), self.classifier.num_classes)
            units = torch.from_numpy(by_class[labels[judged]])
            for depth in self._depths():
                for share in settings.shares:
                    found = pruned_probabilities(
                        self.classifier, inputs[judged], units, share, depth=depth, seed=settings.seed, layers=self.layers
                    ).numpy()
                    right = found.argmax(axis=1) == labels[judged]
                    yield Pruned(min(count, width), depth, share, found[np.arange(len(judged)), labels[judged]].astype(float), right)

    def _depths(self) -> list[int]:
        count = len(self.layers)
        depths = self.settings.depths or tuple(math.ceil(count * part / 4) for part in (1, 2, 3, 4))
        if any(not 1 <= depth <= count for depth in depths):
            raise UserError(f"depths are {list(depths)}: expected 1 to {count} layers")
        return sorted(set(depths))

    def _report(self, more: int, what: str) -> None:
        self.done += more
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total, what)


def relative(edited: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Probability deviation P_edited / P_clean - 1 of each image; NaN where the clean probability is too small to divide by."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(clean < _LEAST_PROBABILITY, np.nan, edited / clean - 1)


def _batches(values: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
