"""Attribution methods on single images: an explanation by each method and seed, judged under every measure."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from attribution.baselines.attribute import attribute
from attribution.dropping import follow_patches
from attribution.errors import ChanceWarning, NotApplicable, UserError
from attribution.explain import explain
from attribution.explanation import Explanation
from attribution.files import slug
from attribution.image import limit_size
from attribution.masking import as_seen
from attribution.model.classifier import Classifier
from attribution.provenance import pixels_digest
from attribution.regions import Regions, make_regions, several
from evaluation.benchmark.methods import MethodSpec
from evaluation.benchmark.results import Asked, Explained, Refusals, Score
from evaluation.benchmark.settings import BenchmarkSettings
from evaluation.data.dataset import ImageDataset, Sample
from evaluation.metrics.protocol import Protocol
from evaluation.metrics.registry import METRICS, Case, Measure
from evaluation.statistics.validity import is_saturated
from evaluation.study.attempts import Broken, attempted
from evaluation.study.identity import identity_of, record_key, sample_seed
from evaluation.study.records import Record, store_arrays
from evaluation.study.run import Run, Unit

_MAP = "explanation"


class OnImages:
    """Judges all methods on single images under one model."""

    def __init__(self, run: Run[BenchmarkSettings], classifier: Classifier, dataset: ImageDataset, refusals: Refusals) -> None:
        self.run, self.settings, self.classifier, self.dataset = run, run.settings, classifier, dataset
        self.refusals, self.model = refusals, refusals.model
        self.identity = identity_of(classifier, self.model)
        self.left_out: set[Any] = set()  # labels of methods, measures, and pairs of both
        self.prepared = lru_cache(maxsize=1)(self._prepared)

    def choose(self) -> list[int]:
        """Choose the images: the first of the seeded permutation that fit ``only``.

        Raises:
            UserError: no image fits, or the data has no labels where they are needed.
        """
        settings = self.settings
        order = self.dataset.choose(None, settings.seed, labels_only=settings.target == "label" or settings.only != "all")
        if settings.only == "all":
            return list(order[: settings.samples])
        found = list(islice(filter(self._fits, order), settings.samples))
        if not found:
            raise UserError(f"{settings.data} has no image that {self.classifier.name} gets {settings.only}: use only = 'all'")
        return found

    def judge(self, chosen: Sequence[int]) -> tuple[list[Score], list[Explained]]:
        """Explain and judge images, given by their indices, with every method."""
        items = {
            Asked(self.model, self.dataset.ids[index], spec.label, seed): (index, spec)
            for index in chosen
            for spec in self.settings.methods
            for seed in self.settings.seeds_of(spec)
        }
        with self.classifier.folding():
            found = self.run.stage(list(items), lambda item: self._unit(item, *items[item]))
        scores: list[Score] = []
        explained: list[Explained] = []
        for item, records in found.items():
            if _MAP in records:
                scores += _scores(item, records)
                explained.append(self._explained(item, records, self.dataset.labels[items[item][0]]))
        return scores, explained

    def _fits(self, index: int) -> bool:
        try:
            sample = self.dataset[index]
            right = sample.label in self.classifier.predicted(self.classifier.probabilities(self.classifier.inputs(sample.image))[0])
        except UserError:
            return True  # the image counts, and its failure is reported where it is explained
        return right == (self.settings.only == "correct")

    def _prepared(self, index: int) -> _Prepared:
        return _Prepared.make(self.classifier, self.identity, self.dataset[index], self.settings)

    def _unit(self, item: Asked, index: int, spec: MethodSpec) -> Unit | None:
        """The explanation and its numbers; None for a method that is not defined for the model."""
        prepared = self.prepared(index)  # first, so that an image that cannot be read fails for every method
        if spec.label in self.left_out:
            return None
        key = prepared.key(spec, item.seed)
        parts: dict[Any, str] = {_MAP: key}
        files: dict[Any, Path] = {_MAP: self._file("explanations", key, item)}
        for measure, protocol in self.settings.measured():
            if not {measure, (spec.label, measure)} & self.left_out:
                parts[measure] = prepared.score_key(key, measure, protocol)
                if METRICS[measure.metric].curve:
                    files[measure] = self._file("curves", prepared.curve_key(key, protocol), item)
        return Unit(parts, partial(self._measure, prepared, item, spec, files), files)

    def _measure(
        self, prepared: _Prepared, item: Asked, spec: MethodSpec, files: Mapping[Any, Path], missing: Sequence[Any]
    ) -> Iterator[tuple[Any, Record | Exception]]:
        """Explain where no explanation is stored, and judge it under the measures that are missing."""
        if _MAP in missing:
            try:
                record = _explain(prepared, spec, item.seed, files[_MAP])
            except NotApplicable as error:
                self.left_out.add(spec.label)
                self.refusals.keep(spec.label, error)
                return
            yield _MAP, {**item.names(), **record}
        case: Case | None = None
        for measure, protocol in self.settings.measured():
            if measure not in missing:
                continue
            metric = METRICS[measure.metric]
            if metric.mask and prepared.sample.mask is None:
                yield measure, Broken(f"{measure.metric} needs to know where the object is: add a mask or box to the data")
                continue
            case = case or prepared.case(Explanation.load(files[_MAP]), spec, item.seed)
            try:
                found = _judge(case, measure, protocol, files.get(measure))
            except NotApplicable as error:
                by_fill = metric.curve or metric.filled  # such a metric is undefined for the model and the fill, whatever the method
                self.left_out.add(measure if by_fill else (spec.label, measure))
                self.refusals.keep(measure.label if by_fill else f"{spec.label}: {measure.label}", error)
            except Broken as error:
                yield measure, Broken(f"{measure.label}: {error}")
            else:
                yield measure, {**item.names(), "metric": measure.metric, "protocol": measure.protocol, **found}

    def _explained(self, item: Asked, records: Mapping[Any, Record], label: int | None) -> Explained:
        record = records[_MAP]
        curves = {part.protocol: self._file("curves", each["curve"], item) for part, each in records.items() if each.get("curve")}
        found = {name: record[name] for name in ("evaluations", "confidence", "constant", "saturated", "target")}
        return Explained(**item.names(), path=self._file("explanations", record["key"], item), curves=curves, label=label, **found)

    def _file(self, folder: str, key: str, item: Asked) -> Path:
        return self.run.file(folder, key, slug(self.model), slug(item.method))


@dataclass(frozen=True)
class _Prepared:
    """One image under one model: what every method and metric is given."""

    classifier: Classifier
    settings: BenchmarkSettings
    identity: str
    sample: Sample
    image: Tensor
    regions: Regions
    target: int

    @classmethod
    def make(cls, classifier: Classifier, identity: str, sample: Sample, settings: BenchmarkSettings) -> _Prepared:
        image = limit_size(sample.image, settings.max_side)
        if sample.mask is not None and sample.mask.shape != image.shape[1:]:
            resized = F.interpolate(sample.mask[None, None].float(), size=tuple(image.shape[1:]), mode="nearest-exact")
            sample = replace(sample, mask=resized[0, 0] > 0.5)
        predicted = int(classifier.logits(classifier.inputs(image))[0].argmax())
        target = predicted if settings.target == "predicted" or sample.label is None else sample.label
        regions = as_seen(several(make_regions(image, settings.regions, **settings.region_options)), classifier)
        if settings.drops:
            with suppress(NotApplicable):  # methods and fills that drop tokens refuse such a model later
                regions = follow_patches(classifier, regions)
        return cls(classifier, settings, identity, sample, image, regions, target)

    @cached_property
    def pixels(self) -> str:
        return pixels_digest(self.image)

    @cached_property
    def partition(self) -> str:
        """Digest of the shared regions."""
        return pixels_digest(self.regions.labels)

    def key(self, spec: MethodSpec, seed: int) -> str:
        """The key of an explanation. It depends on the shared regions only where the method cuts the image, and on no metric."""
        own = [spec.method, spec.preset, spec.plain_options(), self.settings.explained_fill_settings]
        drawn = sample_seed(seed, self.sample.id) if spec.stochastic else 0
        return record_key(self.identity, self.pixels, self.target, *own, drawn, self.partition if spec.cuts else "")

    def curve_key(self, key: str, protocol: Protocol) -> str:
        """The key of a curve of an explanation."""
        shared = self.partition if protocol.steps == "regions" else ""
        return record_key(key, self.pixels, protocol.settings(), shared, self.settings.seed)

    def score_key(self, key: str, measure: Measure, protocol: Protocol) -> str:
        """The key of a number of an explanation."""
        metric = METRICS[measure.metric]
        if metric.curve:
            return record_key(self.curve_key(key, protocol), self.pixels, measure.metric)
        mask = pixels_digest(self.sample.mask) if metric.mask and self.sample.mask is not None else None
        fill = protocol.settings()["fill"] if metric.filled else None
        return record_key(key, self.pixels, measure.metric, protocol.output, self.settings.seed, mask, fill)

    def explain(self, image: Tensor, spec: MethodSpec, seed: int) -> Explanation:
        """Explain an image by the search or the method, on the shared regions where it cuts the image and does not say how."""
        options = {
            "fill": self.settings.explained_fill,
            "preset": spec.preset,
            "seed": sample_seed(seed, self.sample.id),
            "max_side": None,
            **spec.options,
        }
        if spec.cuts:
            options["regions"] = self.regions
        if spec.is_search:
            return explain(image, self.classifier, self.target, search=spec.method, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ChanceWarning)  # the seeds and intervals of the study show it
            return attribute(image, self.classifier, spec.method, self.target, **options)

    def case(self, explanation: Explanation, spec: MethodSpec, seed: int) -> Case:
        def again(image: Tensor) -> Explanation:
            return self.explain(image, spec, seed)

        return Case(self.classifier, explanation, self.target, self.regions, again, self.sample.mask, self.settings.seed)


def _explain(prepared: _Prepared, spec: MethodSpec, seed: int, path: Path) -> Record:
    """Make and store an explanation.

    Raises:
        Broken: it failed, or its map is not finite.
        NotApplicable: the method is not defined for the model.
    """
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the map of .* everywhere", UserWarning)  # the report counts constant maps
        explanation = attempted(partial(prepared.explain, prepared.image, spec, seed))
    seconds = time.perf_counter() - started
    values = explanation.values
    if not bool(values.isfinite().all()):
        raise Broken(f"{int((~values.isfinite()).sum())} values of the map are not finite")
    explanation.save(path)
    return {
        "target": prepared.target,
        "evaluations": explanation.evaluations,
        "confidence": explanation.confidence,
        "constant": bool(values.max() == values.min()),
        "saturated": bool(is_saturated(np.array([explanation.confidence]))[0]),
        "seconds": round(seconds, 3),
    }


def _judge(case: Case, measure: Measure, protocol: Protocol, curve: Path | None) -> Record:
    """Judge an explanation under a measure, and store the curve that the measure read."""
    function = METRICS[measure.metric].function
    assert function is not None
    found = attempted(partial(function, case, protocol))
    if curve is not None and not curve.is_file():
        curves = case.curve(protocol)
        names = ("insertion_area", "insertion", "deletion_area", "deletion")
        store_arrays(curve, **{name: getattr(curves, name).numpy() for name in names})
    return {"value": _finite(found.value), "area": _finite(found.area), "curve": None if curve is None else curve.stem}


def _scores(item: Asked, records: Mapping[Any, Record]) -> Iterable[Score]:
    for measure, record in records.items():
        if measure != _MAP:
            value = math.nan if record["value"] is None else float(record["value"])
            yield Score(**item.names(), measure=measure, value=value, area=record["area"])


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
