"""Attribution methods on grids of images: the maps of each method at each layer, judged under every setting of grids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.baselines import METHOD_PRESETS
from attribution.baselines.smoothing import Smoothing
from attribution.errors import NotApplicable, UserError
from attribution.files import slug
from attribution.model.classifier import Classifier
from attribution.provenance import digest_of, pixels_digest
from evaluation.benchmark.methods import MethodSpec
from evaluation.benchmark.results import Asked, GridMap, Refusals, Score, grid_id
from evaluation.benchmark.settings import BenchmarkSettings
from evaluation.data.dataset import ImageDataset
from evaluation.grids.confidences import label_confidences
from evaluation.grids.draw import make_grids
from evaluation.grids.localize import GridMethod, head_map
from evaluation.grids.model import GridModel, heads_of
from evaluation.grids.scores import localization_scores
from evaluation.grids.sets import GridSet
from evaluation.grids.view import GridView
from evaluation.metrics.registry import Measure
from evaluation.study.attempts import Broken, attempted
from evaluation.study.identity import identity_of, record_key
from evaluation.study.records import Record, store_arrays, stored_arrays
from evaluation.study.run import Run, Unit, batches
from evaluation.study.settings import named_data, named_model


def draw_grids(run: Run[BenchmarkSettings]) -> GridSet:
    """Draw the grids from images that every model classifies correctly and with high confidence.

    Raises:
        UserError: models with other classes than the first, or too few images for the grids.
    """
    settings = run.settings
    confidences: list[np.ndarray] = []
    failures: list[tuple[str, str]] = []
    models: list[dict[str, Any]] = []
    for model, name in zip(settings.models, settings.model_names, strict=True):
        classifier = named_model(settings, model)
        if not models:
            names = classifier.class_names
            dataset = named_data(settings, names)
            indices = sorted(dataset.choose(None, settings.seed, labels_only=True))
            run.expect(len(settings.models) * len(batches(indices, classifier.batch_size)))
        elif classifier.class_names != names:
            raise UserError(f"{classifier.name} has other classes than {models[0]['name']}: models share grids of the same classes")
        before = len(run.failures)
        confidences.append(_confidences(run, classifier, name, dataset, indices))
        for failed in run.failures[before:]:
            failures += [(dataset.ids[index], failed.reason) for index in (failed.item if failed.part is None else [failed.part])]
        models.append({"name": classifier.name, "weights_digest": classifier.weights_digest})
    return make_grids(
        dataset,
        confidences,
        indices,
        count=settings.grids,
        n=settings.cells,
        threshold=settings.confidence,
        seed=settings.seed,
        repeat_corners=settings.repeat_corners,
        models=models,
        split=settings.split,
        failures=failures,
    )


def _confidences(
    run: Run[BenchmarkSettings], classifier: Classifier, name: str, dataset: ImageDataset, indices: Sequence[int]
) -> np.ndarray:
    """The confidence of a model in the label of each image, float64 [len(indices)], NaN where it is not known; a record for each image."""
    identity = identity_of(classifier, name)

    def unit_of(batch: tuple[int, ...]) -> Unit:
        return Unit({index: record_key(identity, _pixels(dataset, index), dataset.labels[index], "confidence") for index in batch}, measure)

    def measure(missing: Sequence[int]) -> Iterator[tuple[int, Record | Exception]]:
        found = label_confidences(classifier, dataset, missing)
        reasons = dict(found.failures)
        for index, value in zip(missing, found.values.tolist(), strict=True):
            sample = dataset.ids[index]
            record = {"model": name, "sample": sample, "confidence": value}
            yield index, Broken(reasons[sample]) if sample in reasons else record

    stage = run.stage(batches(indices, classifier.batch_size), unit_of, lambda _batch: f"{name} confidence of images", share="all")
    known = {index: record["confidence"] for records in stage.values() for index, record in records.items()}
    return np.array([known.get(index, np.nan) for index in indices], dtype=np.float64)


def _pixels(dataset: ImageDataset, index: int) -> str:
    """Digest of an image's pixels. For an image that cannot be read, the reason, which is the key of no record."""
    try:
        return pixels_digest(dataset.image(index))
    except UserError as error:
        return str(error)


class OnGrids:
    """Judges all methods on all grids under one model.

    Attributes:
        facts: the facts that tables state about the model: the module of each layer, and whether position embeddings are interpolated.
    """

    def __init__(
        self, run: Run[BenchmarkSettings], classifier: Classifier, dataset: ImageDataset, grid_set: GridSet, refusals: Refusals
    ) -> None:
        self.run, self.settings, self.refusals, self.model = run, run.settings, refusals, refusals.model
        self.classifier, self.dataset, self.grid_set = classifier, dataset, grid_set
        self.identity = identity_of(classifier, self.model)
        self.left_out: set[tuple[str, Measure]] = set()
        self.layers = self._layers()
        self.image = lru_cache(maxsize=1)(self._image)
        self.prepared = lru_cache(maxsize=1)(self._prepared)
        whole = [model for model, defined in self.layers.values() if set(defined) - {"difull"}]
        modules = {layer: "the model input" if model.layer is None else model.layer.name for layer, (model, _) in self.layers.items()}
        self.facts = {"layers": modules, "interpolated": bool(whole) and whole[0].interpolated}

    def judge(self) -> tuple[list[Score], list[GridMap]]:
        """Explain and judge every grid at every layer with every method."""
        items = {
            Asked(self.model, grid_id(index), spec.label, seed, layer): (index, spec)
            for index in range(len(self.grid_set))
            for layer in self.settings.layers
            for spec in self.settings.methods
            for seed in self.settings.seeds_of(spec)
        }
        found = self.run.stage(list(items), lambda item: self._unit(item, *items[item]))
        scores: list[Score] = []
        maps: list[GridMap] = []
        for item, records in found.items():
            for measure, record in records.items():
                scores.append(Score(**item.names(), measure=measure, value=record["value"], area=None, heads=tuple(record["heads"])))
                found_map = (measure, self._file(record["key"], item), record["evaluations"], record["constant"])
                maps.append(GridMap(item.model, item.sample, item.method, item.seed, *found_map))
        return scores, maps

    def _layers(self) -> dict[str, tuple[GridModel, tuple[str, ...]]]:
        """The layers that can be explained, each with the settings that are defined there."""
        found: dict[str, tuple[GridModel, tuple[str, ...]]] = {}
        for layer in self.settings.layers:
            try:
                model = GridModel(self.classifier, self.settings.cells, layer)
            except NotApplicable as error:
                self.refusals.keep(f"layer {layer}", error)
                continue
            defined = []
            for setting in self.settings.grid_settings:
                try:
                    model.require(setting)
                    defined.append(setting)
                except NotApplicable as error:
                    self.refusals.keep(f"all methods under {setting}", error)
            found[layer] = (model, tuple(defined))
        return found

    def _image(self, index: int) -> Tensor:
        return self.grid_set.image(self.dataset, index, self.classifier)

    def _prepared(self, index: int, layer: str) -> _Grid:
        model, defined = self.layers[layer]
        return _Grid(model, self.image(index), [int(label) for label in self.grid_set.labels[index]], defined)

    def _unit(self, item: Asked, index: int, spec: MethodSpec) -> Unit | None:
        """The maps and scores of a method under every setting that is defined; None at a layer that cannot be explained."""
        if item.layer not in self.layers:
            return None
        prepared, settings = self.prepared(index, item.layer), self.settings
        drawn = int(digest_of([item.seed, index, item.layer]), 16) % 2**31 if spec.stochastic else 0
        cut = [settings.regions, dict(settings.region_options)] if spec.cuts else None
        own = [*prepared.plain(), spec.method, spec.preset, spec.plain_options(), cut, drawn]
        parts = {
            measure: record_key(self.identity, prepared.pixels, *own, measure.metric)
            for measure, layer in settings.measured_on_grids()
            if layer == item.layer and measure.metric in prepared.defined and (spec.label, measure) not in self.left_out
        }
        files = {measure: self._file(key, item) for measure, key in parts.items()}
        return Unit(parts, partial(self._measure, prepared, item, spec, drawn, files), files)

    def _measure(
        self, prepared: _Grid, item: Asked, spec: MethodSpec, drawn: int, files: Mapping[Measure, Path], missing: Sequence[Measure]
    ) -> Iterator[tuple[Measure, Record | Exception]]:
        method = grid_method(spec, self.settings)
        for measure in missing:
            try:
                record, first = prepared.judge(measure.metric, method, drawn)
            except NotApplicable as error:
                self.left_out.add((spec.label, measure))
                self.refusals.keep(spec.label, error)
            except Broken as error:
                yield measure, Broken(f"{measure.label}: {error}")
            else:
                _save_map(first, files[measure])
                yield measure, {**item.names(), "metric": measure.metric, "protocol": measure.protocol, **record}

    def _file(self, key: str, item: Asked) -> Path:
        return self.run.file("grids", key, slug(self.model), slug(item.method))


def grid_method(spec: MethodSpec, settings: BenchmarkSettings) -> GridMethod:
    """A method as the grid settings run it: with the options of Rao et al., those of its preset, and its own."""
    options = dict(spec.options)
    smoothing = Smoothing.parse(options.pop("smoothing", None))
    preset = METHOD_PRESETS[spec.preset].get(spec.method, {}) if spec.preset and not spec.is_search else {}
    own = {**preset, **options}
    return GridMethod(spec.method, own, not preset, smoothing, settings.regions, settings.region_options)


@dataclass(frozen=True)
class _Grid:
    """One grid at one layer of one model."""

    model: GridModel
    image: Tensor
    classes: list[int]
    defined: tuple[str, ...]

    @cached_property
    def view(self) -> GridView:
        return GridView(self.model, self.image, self.defined)

    @cached_property
    def pixels(self) -> str:
        return pixels_digest(self.image)

    def plain(self) -> list[Any]:
        """What the maps depend on beside the model, the pixels and the method."""
        return [self.classes, self.model.n, "" if self.model.layer is None else self.model.layer.name]

    def judge(self, setting: str, method: GridMethod, seed: int) -> tuple[Record, Tensor]:
        """Explain the heads of a setting and score their maps: the record, and the map of the first head, float32 [h', w'].

        Raises:
            Broken: a map failed, or is not finite.
            NotApplicable: the method is not defined for the model.
        """
        heads = heads_of(setting, self.model.n)
        found = attempted(lambda: [head_map(self.view, setting, cell, self.classes, method, seed) for cell in heads])
        maps = torch.stack([each.values for each in found])
        if not bool(maps.isfinite().all()):
            raise Broken(f"{int((~maps.isfinite()).sum())} values of the maps are not finite")
        scores = localization_scores(maps, heads, self.model.n, self.model.size)
        record = {
            "value": float(scores.double().mean()),
            "heads": [round(float(score), 7) for score in scores],
            "evaluations": sum(each.evaluations for each in found) / len(found),
            "constant": bool((maps.amax(dim=(1, 2)) == maps.amin(dim=(1, 2))).any()),
        }
        return record, maps[0]


def _save_map(values: Tensor, path: Path) -> None:
    """Save a map, divided by its scale, in half precision. It serves figures only: the score is computed before."""
    scale = float(values.abs().max()) or 1.0
    store_arrays(path, values=(values / scale).half().numpy(), scale=np.float64(scale))


def load_map(path: Path) -> Tensor:
    """The stored map of the first head, float32 [h', w'].

    Raises:
        UserError: the file is gone, as after moving a report alone, or damaged.
    """
    arrays = stored_arrays(path)
    return torch.from_numpy(arrays["values"].astype(np.float32)) * float(arrays["scale"])
