"""The part of a benchmark that judges attribution methods on grids: same records, same resume, same failures as for single images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.baselines import METHOD_PRESETS
from attribution.baselines.smoothing import Smoothing
from attribution.errors import NotApplicable, UserError
from attribution.files import slug, whole_file
from attribution.model.classifier import Classifier
from attribution.provenance import digest_of
from evaluation.benchmark.methods import MethodSpec
from evaluation.benchmark.results import Failure, GridMap, Score, grid_id
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
from evaluation.study.opening import named_data
from evaluation.study.records import RecordLog, open_log


@dataclass
class GridRunner:
    """Judges all methods on all grids, one model after another.

    Args:
        settings: what is measured.
        out: folder of the benchmark.
        log: its records.
        fail: keeps a failure.
        step: called before each (model, grid, layer, method) with what it is.

    Attributes:
        grid_set: the grids, once chosen.
        scores, maps: what was found.
        models: what was found out about each model.
    """

    settings: BenchmarkSettings
    out: Path
    log: RecordLog
    fail: Callable[[Failure], None]
    step: Callable[[str], None]
    grid_set: GridSet | None = None
    scores: list[Score] = field(default_factory=list)
    maps: list[GridMap] = field(default_factory=list)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    _refused: set[tuple[str, str]] = field(default_factory=set)

    def choose(self, classifiers: Iterable[Classifier], progress: Callable[[int, int], None] | None = None) -> None:
        """Draw the grids: every image is right and confident under every model.

        Raises:
            UserError: models with other classes than the first, or too few images for a single grid.
        """
        settings = self.settings
        confidences: list[np.ndarray] = []
        failures: list[tuple[str, str]] = []
        models: list[dict[str, Any]] = []
        dataset: ImageDataset | None = None
        names: tuple[str, ...] = ()
        indices: list[int] = []
        with open_log(self.out / "confidences.jsonl") as log:
            for classifier in classifiers:
                if dataset is None:
                    names = classifier.class_names
                    dataset = self._dataset(names)
                    indices = sorted(dataset.choose(None, settings.seed, labels_only=True))
                elif classifier.class_names != names:
                    raise UserError(f"{classifier.name} has other classes than {models[0]['name']}: models share grids of the same classes")
                found = label_confidences(classifier, dataset, indices, log=log, progress=progress)
                confidences.append(found.values)
                failures += found.failures
                models.append({"name": classifier.name, "weights_digest": classifier.weights_digest})
        assert dataset is not None
        self.grid_set = make_grids(
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
        self.grid_set.save(self.out / "grids.json")

    def judge(self, classifier: Classifier, identity: str, name: str, every: int = 1, first: int = 0) -> None:
        """All grids (or every so manieth, from a first one) under one model; what fails or is refused is kept, and the others go on."""
        grid_set, settings = self.grid_set, self.settings
        assert grid_set is not None
        dataset = self._dataset(classifier.class_names)
        models = self._grid_models(classifier, name)
        for index in range(first, len(grid_set), every):
            grid: Tensor | None = None
            reason = ""
            try:
                grid = attempted(partial(grid_set.image, dataset, index, classifier))
            except Broken as error:
                reason = str(error)
            for layer in settings.layers:
                case: _Grid | None = None
                if grid is not None and layer in models:
                    model, defined = models[layer]
                    case = _Grid(self, name, identity, index, grid, layer, model, defined)
                for spec in settings.methods:
                    for seed in settings.seeds_of(spec):
                        self.step(f"{name} {grid_id(index)} {layer} {spec.label}")
                        if grid is None:
                            self.fail(Failure(name, grid_id(index), spec.label, seed, reason))
                        elif case is not None:
                            case.judge(spec, seed)

    def refuse(self, model: str, what: str, reason: str) -> None:
        """Keep the reason why something is not defined for a model, once."""
        if (what, reason) not in self._refused:
            self._refused.add((what, reason))
            self.fail(Failure(model, "", what, self.settings.seed, reason, refused=True))

    def _dataset(self, class_names: tuple[str, ...]) -> ImageDataset:
        return named_data(self.settings, class_names)

    def _grid_models(self, classifier: Classifier, name: str) -> dict[str, tuple[GridModel, tuple[str, ...]]]:
        """The layers that can be explained, each with the settings that are defined there."""
        found: dict[str, tuple[GridModel, tuple[str, ...]]] = {}
        layers: dict[str, str] = {}
        for layer in self.settings.layers:
            try:
                model = GridModel(classifier, self.settings.cells, layer)
            except NotApplicable as error:
                self.refuse(name, f"layer {layer}", str(error))
                continue
            defined = []
            for setting in self.settings.grid_settings:
                try:
                    model.require(setting)
                    defined.append(setting)
                except NotApplicable as error:
                    self.refuse(name, f"all methods under {setting}", str(error))
            found[layer] = (model, tuple(defined))
            layers[layer] = "the model input" if model.layer is None else model.layer.name
        whole = [model for model, defined in found.values() if set(defined) - {"difull"}]
        self.models[name] = {"layers": layers, "interpolated": bool(whole) and whole[0].interpolated}
        return found


def grid_method(spec: MethodSpec, settings: BenchmarkSettings) -> GridMethod:
    """A method as the grid settings run it: with the options of Rao et al., those of its preset, and its own."""
    options = dict(spec.options)
    smoothing = Smoothing.parse(options.pop("smoothing", None))
    preset = METHOD_PRESETS[spec.preset].get(spec.method, {}) if spec.preset and not spec.is_search else {}
    own = {**preset, **options}
    return GridMethod(spec.method, own, not preset, smoothing, settings.regions, settings.region_options)


class _Grid:
    """One grid at one layer of one model."""

    def __init__(
        self, run: GridRunner, name: str, identity: str, index: int, grid: Tensor, layer: str, model: GridModel, defined: tuple[str, ...]
    ) -> None:
        assert run.grid_set is not None
        self.run, self.name, self.index, self.layer, self.model, self.defined = run, name, index, layer, model, defined
        self.classes = [int(label) for label in run.grid_set.labels[index]]
        self.view = GridView(model, grid, defined)
        cut = "" if model.layer is None else model.layer.name
        self.key = digest_of([identity, hashlib.sha256(grid.numpy().tobytes()).hexdigest(), self.classes, model.n, cut])

    def judge(self, spec: MethodSpec, seed: int) -> None:
        """One method under every setting that is defined."""
        run, settings = self.run, self.run.settings
        key = digest_of([self.key, spec.method, spec.preset, spec.plain_options(), self._cut(spec), self._drawn(spec, seed)])
        path = run.out / "grids" / slug(self.name) / slug(spec.label) / f"{key}.npz"
        known = _load_maps(path)
        for measure, layer in settings.measured_on_grids():
            setting = measure.metric
            if layer != self.layer or setting not in self.defined:
                continue
            score_key = digest_of([key, setting])
            if score_key not in run.log or setting not in known:
                try:
                    record, known[setting] = self._measure(spec, seed, setting)
                except NotApplicable as error:
                    run.refuse(self.name, spec.label, str(error))
                    continue
                except Broken as error:
                    reason = f"{measure.label}: {error}"
                    run.fail(Failure(self.name, grid_id(self.index), spec.label, seed, reason))
                    continue
                _save_maps(known, path)
                names = {"model": self.name, "sample": grid_id(self.index), "method": spec.label, "seed": seed}
                run.log.append(score_key, {**names, "metric": setting, "protocol": measure.protocol, **record})
            self._keep(run.log.records[score_key], spec, seed, measure, path)

    def _measure(self, spec: MethodSpec, seed: int, setting: str) -> tuple[dict[str, Any], Tensor]:
        """The record of a setting, and the map of its first head."""
        method, heads, n = grid_method(spec, self.run.settings), heads_of(setting, self.model.n), self.model.n
        drawn = self._drawn(spec, seed)
        found = attempted(lambda: [head_map(self.view, setting, cell, self.classes, method, drawn) for cell in heads])
        maps = torch.stack([each.values for each in found])
        if not bool(maps.isfinite().all()):
            raise Broken(f"{int((~maps.isfinite()).sum())} values of the maps are not finite")
        scores = localization_scores(maps, heads, n, self.model.size)
        constant = bool((maps.amax(dim=(1, 2)) == maps.amin(dim=(1, 2))).any())
        record = {
            "value": float(scores.double().mean()),
            "heads": [round(float(score), 7) for score in scores],
            "evaluations": sum(each.evaluations for each in found) / len(found),
            "constant": constant,
        }
        return record, maps[0]

    def _keep(self, record: dict[str, Any], spec: MethodSpec, seed: int, measure: Measure, path: Path) -> None:
        names = (self.name, grid_id(self.index), spec.label, seed)
        self.run.scores.append(Score(*names, measure, float(record["value"]), None, tuple(record["heads"])))
        self.run.maps.append(GridMap(*names, measure, path, record["evaluations"], record["constant"]))

    def _drawn(self, spec: MethodSpec, seed: int) -> int:
        return int(digest_of([seed, self.index, self.layer]), 16) % 2**31 if spec.stochastic else 0

    def _cut(self, spec: MethodSpec) -> Any:
        settings = self.run.settings
        return [settings.regions, dict(settings.region_options)] if spec.cuts else None


def _save_maps(maps: dict[str, Tensor], path: Path) -> None:
    """Half precision at the scale of each map: they are kept to be looked at, after their scores."""
    arrays: dict[str, np.ndarray] = {}
    for setting, values in maps.items():
        scale = float(values.abs().max()) or 1.0
        arrays[setting], arrays[f"{setting}_scale"] = (values / scale).half().numpy(), np.float64(scale)  # type: ignore[assignment]
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _load_maps(path: Path) -> dict[str, Tensor]:
    """The maps of a file by setting; none where it is missing."""
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        return {name: _scaled_map(arrays, name) for name in arrays.files if not name.endswith("_scale")}


def load_map(path: Path, setting: str) -> Tensor:
    """The stored map of the first head, float32 [h', w'].

    Raises:
        UserError: the file is gone, as after moving a report alone.
    """
    if path.exists():
        with np.load(path, allow_pickle=False) as arrays:
            if setting in arrays.files:
                return _scaled_map(arrays, setting)
    raise UserError(f"{path} holds no map of {setting}: run the benchmark again in its folder")


def _scaled_map(arrays: Any, setting: str) -> Tensor:
    return torch.from_numpy(arrays[setting].astype(np.float32)) * float(arrays[f"{setting}_scale"])
