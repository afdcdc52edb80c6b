"""The neuron paths of a data set, batch by batch, and then what edits of whole classes do: every result is a record of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.errors import UserError
from attribution.neurons.classes import class_paths, halves
from attribution.neurons.edits import edited_probabilities, mean_activations, pruned_probabilities
from attribution.neurons.finder import PathFinder
from attribution.neurons.layers import NeuronLayers, find_neurons
from attribution.neurons.path import NeuronPath
from attribution.provenance import pixels_digest
from evaluation.neurons.results import EDITED, Measured, NeuronResults, Pruned
from evaluation.neurons.settings import NeuronSettings
from evaluation.study.attempts import Broken, attempted, together
from evaluation.study.identity import identity_of, record_key, sample_seed
from evaluation.study.records import Record
from evaluation.study.run import Found, Run, Unit, batches, problems
from evaluation.study.settings import named_data, named_model

TOGETHER = 8  # images whose paths are searched in one batch
_LEAST_IMAGES = 4
_WAYS: dict[str, Callable[[PathFinder], list[NeuronPath]]] = {
    "neuron_path": lambda finder: finder.search(),
    "neuron_path_exact": lambda finder: finder.search("exact"),
    "neuron_path_removal": lambda finder: finder.search("removal"),
    "influence_pattern": lambda finder: finder.influence_pattern(),
    "layer_integrated_gradients": lambda finder: finder.layer_integrated_gradients(),
    "activation": lambda finder: finder.activation(),
}


def measure_neurons(run: Run[NeuronSettings]) -> NeuronResults:
    """The paths of every image, the paths of classes from one half of the images, and what their edits do to the other half.

    Raises:
        NotApplicable: the model has no neurons that can be followed.
        UserError: depths that the model does not have, no labels, fewer than 4 images that could be followed, or no two of a class.
    """
    settings = run.settings
    with torch.inference_mode(False), torch.enable_grad():
        paths = _Paths(run)
        first, tops = settings.paths[0], [f"top {count}" for count in settings.kept if count > 1]
        depths = _depths(settings, paths.layers)
        count = len(batches(list(paths.pixels), TOGETHER))
        run.expect(count * len(settings.paths) + math.ceil(count / 2) * len(tops) + len(settings.paths) + len(settings.kept) * len(depths))
        paths.follow([kind for kind in settings.paths if kind != "random"], list(paths.pixels))
        if "random" in settings.paths:
            paths.follow(["random"], list(paths.records[first]))
        split = _Halves(paths, paths.complete())
        paths.follow(tops, [index for index, selected in zip(split.chosen, split.selection, strict=True) if selected])
        measured, pruned = split.measured(), tuple(split.pruned(depths))
        run.report("", run.total)
    failures: dict[str, str] = {}
    for sample, reason in problems(run):
        failures.setdefault(sample, reason)
    for index in paths.pixels:
        if index not in split.chosen:  # without a failure only where a folder is read before its run has ended
            failures.setdefault(paths.dataset.ids[index], "not measured yet")
    return NeuronResults(
        settings=settings,
        classifier=paths.classifier,
        layers=paths.layers,
        dataset=paths.dataset,
        chosen=split.chosen,
        labels=split.labels,
        selection=split.selection,
        measured=measured,
        pruned=pruned,
        failures=tuple(failures.items()),
        targets=split.values(first, "target"),
        predicted=split.values(first, "predicted"),
        clean=split.values(first, "clean"),
    )


class _Paths:
    """The images of the settings under the model, and the records of their paths by kind of path."""

    def __init__(self, run: Run[NeuronSettings]) -> None:
        self.run, self.settings = run, run.settings
        self.classifier = named_model(self.settings, self.settings.model)
        self.layers = find_neurons(self.classifier)
        self.dataset = named_data(self.settings, self.classifier.class_names)
        self.identity = identity_of(self.classifier)
        self.records: dict[str, dict[int, Record]] = {}
        self.pixels = dict(self._readable())
        self.inputs = lru_cache(maxsize=1)(self._inputs)
        self._check_enough()

    def _readable(self) -> Iterator[tuple[int, str]]:
        """The chosen images that can be read, with the digests of their pixels."""
        for index in self.dataset.choose(self.settings.samples, self.settings.seed, labels_only=True):
            sample = self.dataset.ids[index]
            self.run.report(f"reading {sample}")
            try:
                yield index, pixels_digest(attempted(partial(self.dataset.__getitem__, index)).image)
            except Broken as error:
                self.run.fail(sample, None, str(error))

    def _check_enough(self) -> None:
        """Refuse, before hours of work, what could not be judged at the end."""
        count, classes = len(self.pixels), {self.label(index) for index in self.pixels}
        if self.run.reading:
            return
        if count < _LEAST_IMAGES:
            reasons = [f", such as not {sample}: {reason}" for sample, reason in problems(self.run)]
            raise UserError(
                f"{self.dataset.name} gives {count} images: neurons on a data set needs {_LEAST_IMAGES}, two of them of one class"
                f"{''.join(reasons[:1])}; for single images leave out --data"
            )
        if len(classes) == count:
            raise UserError(f"each of {count} images has a class of its own: expected a class with two, to split; take more images")

    def _inputs(self, indices: Sequence[int]) -> Tensor:
        return torch.cat([self.classifier.inputs(self.dataset[index].image) for index in indices])

    def label(self, index: int) -> int:
        label = self.dataset.labels[index]
        assert label is not None  # only labelled images are chosen
        return label

    def follow(self, kinds: Sequence[str], indices: Sequence[int]) -> None:
        """A stage: paths of some kinds on some images. Their records are added to ``records``."""
        places = {self.dataset.ids[index]: index for index in indices}
        jobs = {
            f"batch {number}, {kind}": (kind, batch) for number, batch in enumerate(batches(indices, TOGETHER), start=1) for kind in kinds
        }
        found = self.run.stage(list(jobs), lambda name: self._unit(*jobs[name]), share="end")
        for kind in kinds:
            self.records[kind] = {}
        for name, (kind, _) in jobs.items():
            self.records[kind].update({places[sample]: record for sample, record in found[name].items()})

    def complete(self) -> tuple[int, ...]:
        """The images with paths of every kind.

        Raises:
            UserError: too few of them.
        """
        kept = tuple(index for index in self.pixels if all(index in self.records[kind] for kind in self.settings.paths))
        if len(kept) < _LEAST_IMAGES:
            if self.run.reading:
                raise UserError(f"{self.run.log.path} holds {len(kept)} images under these settings: expected at least {_LEAST_IMAGES}")
            reasons = [f", such as not {sample}: {reason}" for sample, reason in problems(self.run)]
            raise UserError(f"{len(kept)} images could be followed: expected at least {_LEAST_IMAGES}{''.join(reasons[:1])}")
        return kept

    def key(self, index: int, kind: str) -> str:
        """The key of a path of an image."""
        settings = self.settings
        ways: list[Any] = [list(self.layers.names), list(self.layers.positions), settings.steps, settings.output]
        if kind in settings.paths:
            ways.append(settings.enhance)
        if kind == "random":
            ways += [settings.seed, settings.paths[0]]
        target = self.label(index) if settings.target == "label" else settings.target
        return record_key(self.identity, self.pixels[index], self.dataset.ids[index], target, kind, *ways)

    def _unit(self, kind: str, batch: tuple[int, ...]) -> Unit:
        """The paths of a batch. It is measured whole, since rounding depends on the batch: a run that was killed ends with the same."""

        def measure(_missing: Sequence[str]) -> Found:
            for index, record in together(batch, partial(self._found, kind)):
                yield self.dataset.ids[index], record

        return Unit({self.dataset.ids[index]: self.key(index, kind) for index in batch}, measure)

    def _found(self, kind: str, batch: Sequence[int]) -> list[Record]:
        """Search the paths of a batch, score them, and edit their neurons."""
        settings, inputs = self.settings, self.inputs(tuple(batch))
        probabilities = self.classifier.probabilities(inputs).cpu()
        predicted = probabilities.argmax(dim=1).tolist()
        targets = [self.label(index) for index in batch] if settings.target == "label" else predicted
        finder = PathFinder(self.classifier, inputs, targets, steps=settings.steps, output=settings.output, layers=self.layers)
        paths = self._searched(kind, finder, batch)
        records: list[Record] = [
            {
                "sample": self.dataset.ids[index],
                "kind": kind,
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
                for record, cells in zip(records, _cells(edited, targets), strict=True):
                    record[edit] = cells
        return records

    def _searched(self, kind: str, finder: PathFinder, batch: Sequence[int]) -> list[NeuronPath]:
        if kind == "random":
            like = torch.tensor([self.records[self.settings.paths[0]][index]["neurons"] for index in batch])
            return finder.random(like, [sample_seed(self.settings.seed, self.dataset.ids[index]) for index in batch])
        if kind.startswith("top "):
            return finder.search(top=min(int(kind.removeprefix("top ")), self.layers.width))
        return _WAYS[kind](finder)


class _Halves:
    """The images that could be followed, in two halves: the paths of classes come from one and are judged on the other.

    Edits by a mean and edits of class paths need the images of a half at once: they are records of the whole, one for each kind of
    path. Pruning is a record for each K, depth and share.

    Raises:
        UserError: no class has two images.
    """

    def __init__(self, paths: _Paths, chosen: tuple[int, ...]) -> None:
        self.paths, self.settings, self.chosen = paths, paths.settings, chosen
        self.labels = np.array([paths.label(index) for index in chosen])
        self.selection = halves(self.labels, seed=self.settings.seed)
        self.judged = np.flatnonzero(~self.selection)
        if not len(self.judged):
            raise UserError(f"each of {len(chosen)} images has a class of its own: expected a class with two, to split; take more images")

    def records(self, kind: str) -> list[Record]:
        return [self.paths.records[kind][index] for index in self.chosen]

    def values(self, kind: str, name: str) -> np.ndarray:
        """A value of the records of all images."""
        return np.array([record[name] for record in self.records(kind)])

    @cached_property
    def inputs(self) -> Tensor:
        return torch.cat([self.paths.inputs((index,)) for index in self.chosen])

    @cached_property
    def means(self) -> dict[bool, Tensor]:
        """Mean activations of each half, float32 [L, F]: True is the selection half."""
        model = self.paths.classifier
        return {side: mean_activations(model, self.inputs[self.selection == side], layers=self.paths.layers) for side in (False, True)}

    def measured(self) -> dict[str, Measured]:
        """A stage: own paths edited by the mean, class paths edited in every way.

        Raises:
            UserError: some of it could not be measured, or is not there to be read.
        """
        run = self.paths.run
        found = run.stage(self.settings.paths, self._edits, lambda kind: f"edits of {kind}", share="all")
        if missing := [kind for kind in self.settings.paths if not found[kind]]:
            reason = f"{run.log.path} does not hold them" if run.reading else run.failures[-1].reason
            raise UserError(f"the edits of {', '.join(missing)} are not known: {reason}")
        return {kind: self._measured(kind, found[kind]["edits"]) for kind in self.settings.paths}

    def _edits(self, kind: str) -> Unit:
        def measure(_missing: Sequence[str]) -> Found:
            neurons, targets = self.values(kind, "neurons"), self.values(kind, "target")
            by_class = class_paths(neurons[self.selection], self.labels[self.selection], self.paths.classifier.num_classes)[:, :, 0]

            def edited(rows: np.ndarray, units: np.ndarray, edit: Any, means: Tensor) -> list[list[float]]:
                model, inputs, factor = self.paths.classifier, self.inputs[rows], self.settings.enhance
                found = edited_probabilities(
                    model, inputs, torch.from_numpy(units), edit, factor=factor, means=means, layers=self.paths.layers
                )
                return _cells(found, targets[rows])

            by_mean: list[list[float]] = [[]] * len(self.chosen)
            for side in (False, True):  # the mean of the other half, so that an image is no part of what replaces it
                rows = np.flatnonzero(self.selection == side)
                for row, cells in zip(rows, edited(rows, neurons[rows], "mean", self.means[not side]), strict=True):
                    by_mean[row] = cells
            judged = self.judged
            of_class = {edit: edited(judged, by_class[self.labels[judged]], edit, self.means[True]) for edit in EDITED}
            yield "edits", {"kind": kind, "mean": by_mean, "class": of_class}

        return Unit({"edits": self._key(kind, self.chosen, self.settings.enhance)}, measure)

    def _measured(self, kind: str, edits: Record) -> Measured:
        records = self.records(kind)
        own = {"remove": [r["remove"] for r in records], "enhance": [r["enhance"] for r in records], "mean": edits["mean"]}
        return Measured(
            self.values(kind, "neurons"),
            self.values(kind, "score"),
            *_known(own, self.labels),
            *_known(edits["class"], self.labels[self.judged]),
            float(self.values(kind, "forwards").mean()),
            float(self.values(kind, "backwards").mean()),
        )

    def pruned(self, depths: Sequence[int]) -> Iterator[Pruned]:
        """A stage: the evaluation half when classes keep K neurons of the first layers."""
        jobs = {f"pruning, {count} kept in {depth} layers": (count, depth) for count in self.settings.kept for depth in depths}
        found = self.paths.run.stage(list(jobs), lambda name: self._pruning(*jobs[name]))
        for name, (count, depth) in jobs.items():
            for share, record in found[name].items():
                probabilities, correct = _known({"pruned": record["pruned"]}, self.labels[self.judged])
                yield Pruned(min(count, self.paths.layers.width), depth, share, probabilities["pruned"], correct["pruned"])

    def _pruning(self, count: int, depth: int) -> Unit:
        kind = f"top {count}" if count > 1 else self.settings.paths[0]
        records = self.paths.records[kind]
        selected = [index for index, wanted in zip(self.chosen, self.selection, strict=True) if wanted and index in records]
        labels = self.labels[self.judged]

        def measure(missing: Sequence[float]) -> Found:
            own = np.array([records[index]["neurons"] for index in selected])
            own_labels = np.array([self.paths.label(index) for index in selected])
            by_class = class_paths(own, own_labels, self.paths.classifier.num_classes)
            model, inputs, units = self.paths.classifier, self.inputs[self.judged], torch.from_numpy(by_class[labels])
            for share in missing:
                found = pruned_probabilities(model, inputs, units, share, depth=depth, seed=self.settings.seed, layers=self.paths.layers)
                yield share, {"kept": count, "depth": depth, "share": share, "pruned": _cells(found, labels)}

        return Unit({share: self._key(kind, selected, count, depth, share) for share in self.settings.shares}, measure)

    def _key(self, kind: str, indices: Sequence[int], *settings: Any) -> str:
        """The key of a record of the halves: their pixels and labels, the paths that it was made from, and how."""
        pixels = [self.paths.pixels[index] for index in self.chosen]
        paths = [self.paths.key(index, kind) for index in indices]
        return record_key(self.paths.identity, pixels, self.labels.tolist(), self.settings.seed, paths, *settings)


def _cells(probabilities: Tensor, targets: Any) -> list[list[float]]:
    """For each image the probability of its target, and the class that is predicted."""
    return [[float(row[target]), int(row.argmax())] for row, target in zip(probabilities, targets, strict=True)]


def _known(cells: Mapping[str, Sequence[Any]], labels: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The probabilities by edit, and by edit whether the label is predicted."""
    found = {edit: np.array(rows, dtype=float).reshape(-1, 2) for edit, rows in cells.items()}
    return {edit: rows[:, 0] for edit, rows in found.items()}, {edit: rows[:, 1] == labels for edit, rows in found.items()}


def _depths(settings: NeuronSettings, layers: NeuronLayers) -> list[int]:
    count = len(layers)
    depths = settings.depths or tuple(math.ceil(count * part / 4) for part in (1, 2, 3, 4))
    if max(depths) > count:
        raise UserError(f"depths are {list(depths)}: expected 1 to {count} layers")
    return sorted(set(depths))
