"""The benchmark: samples x methods x metrics for some models, every number kept the moment it is known.

Explanations are stored once, so that new metrics judge them without explaining again. Records are appended one by one under a key
that holds everything a number depends on, so that a run that was killed continues where it stopped and ends with the same tables.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from attribution.baselines.attribute import attribute
from attribution.dropping import follow_patches
from attribution.errors import NotApplicable, UserError
from attribution.explain import explain
from attribution.explanation import Explanation
from attribution.files import slug, whole_file
from attribution.image import limit_size
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.provenance import digest_of
from attribution.regions import Regions, make_regions
from evaluation.benchmark.methods import MethodSpec
from evaluation.benchmark.on_grids import GridRunner
from evaluation.benchmark.results import Explained, Failure, Results, Score
from evaluation.benchmark.settings import BenchmarkSettings
from evaluation.benchmark.workers import judge_side_by_side
from evaluation.data.dataset import ImageDataset, Sample
from evaluation.metrics.curves import Curves
from evaluation.metrics.protocol import Protocol
from evaluation.metrics.registry import METRICS, Case, Measure
from evaluation.statistics.validity import is_saturated
from evaluation.study.attempts import Broken, attempted
from evaluation.study.identity import identity_of, sample_seed
from evaluation.study.opening import named_data
from evaluation.study.records import RecordLog, open_log

Progress = Callable[[int, int, str], None]


def run_benchmark(settings: BenchmarkSettings, out: str | Path, progress: Progress | None = None) -> Results:
    """Measure what the folder does not hold yet, and return everything.

    Args:
        settings: what is measured.
        out: folder of ``records.jsonl``, explanations and curves; one process at a time.
        progress: called with (explanations judged, all of them, what is judged now).

    Raises:
        UserError: settings that cannot be run at all, or a full disk. Failing samples are recorded and returned instead.
    """
    with open_log(Path(out) / "records.jsonl") as log:
        return _Run(settings, Path(out), log, progress).run()


class _Run:
    def __init__(self, settings: BenchmarkSettings, out: Path, log: RecordLog, progress: Progress | None) -> None:
        self.settings, self.out, self.log, self.progress = settings, out, log, progress
        self.scores: list[Score] = []
        self.explained: list[Explained] = []
        self.failures: list[Failure] = []
        self.refused: set[tuple[str, str]] = set()
        self.not_measured: set[tuple[str, Measure]] = set()
        self.done = self.total = 0

    def run(self) -> Results:
        settings = self.settings
        models: dict[str, dict[str, Any]] = {}
        samples: dict[str, tuple[str, ...]] = {}
        grids = GridRunner(settings, self.out, self.log, self._fail, self._step)
        if settings.grid_settings:
            grids.choose(map(self._classifier, settings.models), lambda done, total: self._report(done, total, "confidence of images"))
            assert grids.grid_set is not None
            self.total += settings.run_count() * len(grids.grid_set) * len(settings.layers) * len(settings.models)
            if settings.workers > 1:
                self._work_on_grids()
        for model, name in zip(settings.models, settings.model_names, strict=True):
            classifier = self._classifier(model)
            size, names, digest = classifier.preprocessing.size, classifier.class_names, classifier.weights_digest
            models[name] = {"weights_digest": digest, "size": list(size), "class_names": list(names), "precision": classifier.precision}
            dataset = named_data(settings, names)
            identity = identity_of(classifier, name)
            chosen = list(self._choose(classifier, dataset)) if settings.measured() else []
            samples[name] = tuple(dataset.ids[index] for index, _ in chosen)
            if len(samples) == 1:
                self.total += settings.run_count() * len(chosen) * len(settings.models)
            for index, sample in chosen:
                self._judge_sample(classifier, identity, name, dataset.ids[index], sample)
            if grids.grid_set is not None:
                grids.judge(classifier, identity, name)
            self._report(self.done, self.total, name)
        return Results(
            settings,
            models,
            samples,
            tuple(self.scores + grids.scores),
            tuple(self.explained),
            tuple(self.failures),
            self.out,
            grids.grid_set,
            tuple(grids.maps),
            grids.models,
        )

    def _work_on_grids(self) -> None:
        """Let several processes do what is missing on grids."""
        settings, before = self.settings, len(self.log.records)

        def report(records: int) -> None:
            done = (before + records) // max(1, len(settings.grid_settings))
            self._report(min(done, self.total), self.total, f"{settings.workers} workers on grids")

        judge_side_by_side(settings, self.out, self.log, report)

    def _classifier(self, model: str | Classifier) -> Classifier:
        settings = self.settings
        if isinstance(model, Classifier):
            return model
        return load_classifier(model, device=settings.device, checkpoint=settings.checkpoint, batch_size=settings.batch_size)

    def _choose(self, classifier: Classifier, dataset: ImageDataset) -> Iterator[tuple[int, Sample | UserError]]:
        """Indices with their samples, or with what is wrong with them."""
        settings, found = self.settings, 0
        for index in dataset.choose(None, settings.seed, labels_only=settings.target == "label" or settings.only != "all"):
            if found == settings.samples:
                return
            sample: Sample | UserError
            try:
                sample = dataset[index]
                if settings.only != "all":
                    right = int(classifier.logits(classifier.inputs(sample.image))[0].argmax()) == sample.label
                    if right != (settings.only == "correct"):
                        continue
            except UserError as error:
                sample = error
            found += 1
            yield index, sample
        if not found:
            raise UserError(f"{settings.data} has no image that {classifier.name} gets {settings.only}: use only = 'all'")

    def _judge_sample(self, classifier: Classifier, identity: str, model: str, name: str, sample: Sample | UserError) -> None:
        judged: _Judged | None = None
        reason = str(sample)
        if not isinstance(sample, UserError):
            try:
                judged = _Judged.prepare(classifier, identity, model, sample, self.settings)
            except UserError as error:
                reason = str(error)
        for spec in self.settings.methods:
            for seed in self.settings.seeds_of(spec):
                self._step(f"{model} {name} {spec.label}")
                if judged is None:
                    self._fail(Failure(model, name, spec.label, seed, reason))
                elif (model, spec.label) not in self.refused:
                    self._judge(judged, spec, seed)

    def _judge(self, judged: _Judged, spec: MethodSpec, seed: int) -> None:
        """One explanation under every measure; what fails is recorded and the others go on."""
        key = judged.key(spec, seed)
        folder = Path(slug(judged.model)) / slug(spec.label)
        path = self.out / "explanations" / folder / f"{key}.npz"
        try:
            record = self._explanation(judged, spec, seed, key, path)
        except NotApplicable as error:
            self.refused.add((judged.model, spec.label))
            self._fail(Failure(judged.model, "", spec.label, seed, str(error), refused=True))
            return
        except Broken as error:
            self._fail(Failure(judged.model, judged.sample.id, spec.label, seed, str(error)))
            return
        case: Case | None = None
        curves: dict[str, Path] = {}
        for measure, protocol in self.settings.measured():
            metric = METRICS[measure.metric]
            if (judged.model, measure) in self.not_measured:
                continue
            if metric.mask and judged.sample.mask is None:
                self._fail(judged.failure(spec, seed, f"{measure.metric} needs to know where the object is: add a mask or box to the data"))
                continue
            curve_path = self.out / "curves" / folder / f"{judged.curve_key(key, protocol)}.npz"
            score_key = judged.score_key(key, measure, protocol)
            if score_key not in self.log or (metric.curve and not curve_path.exists()):
                case = case or judged.case(Explanation.load(path), spec, seed)
                try:
                    self._measure(case, measure, protocol, judged.names(spec, seed), score_key, curve_path)
                except NotApplicable as error:
                    if metric.curve:  # it depends on the model and the fill alone
                        self.not_measured.add((judged.model, measure))
                    left_out = measure.label if metric.curve else f"{spec.label}: {measure.label}"
                    self._fail(Failure(judged.model, "", left_out, seed, str(error), refused=True))
                    continue
                except Broken as error:
                    self._fail(judged.failure(spec, seed, f"{measure.label}: {error}"))
                    continue
            if metric.curve:
                curves[measure.protocol] = curve_path
            kept = self.log.records[score_key]
            value = math.nan if kept["value"] is None else float(kept["value"])
            self.scores.append(Score(judged.model, judged.sample.id, spec.label, seed, measure, value, kept["area"]))
        found = {name: record[name] for name in ("evaluations", "confidence", "constant", "saturated")}
        names = judged.names(spec, seed)
        self.explained.append(Explained(**names, path=path, curves=curves, label=judged.sample.label, target=judged.target, **found))

    def _explanation(self, judged: _Judged, spec: MethodSpec, seed: int, key: str, path: Path) -> dict[str, Any]:
        """The record of an explanation, made and stored first where the folder has none."""
        if key in self.log and path.exists():
            return self.log.records[key]
        started = time.perf_counter()
        explanation = attempted(lambda: judged.explain(judged.image, spec, seed))
        seconds = time.perf_counter() - started
        values = explanation.values
        if not bool(values.isfinite().all()):
            raise Broken(f"{int((~values.isfinite()).sum())} values of the map are not finite")
        explanation.save(path)
        record = {
            **judged.names(spec, seed),
            "evaluations": explanation.evaluations,
            "confidence": explanation.confidence,
            "constant": bool(values.max() == values.min()),
            "saturated": bool(is_saturated(np.array([explanation.confidence]))[0]),
            "seconds": round(seconds, 3),
        }
        self.log.append(key, record)
        return record

    def _measure(self, case: Case, measure: Measure, protocol: Protocol, names: dict[str, Any], key: str, curve_path: Path) -> None:
        metric = METRICS[measure.metric]
        assert metric.function is not None
        found = attempted(partial(metric.function, case, protocol))
        if metric.curve and not curve_path.exists():
            _save_curves(case.curve(protocol), curve_path)
        values = {"value": _finite(found.value), "area": _finite(found.area)}
        self.log.append(key, {**names, "metric": measure.metric, "protocol": measure.protocol, **values})

    def _fail(self, failure: Failure) -> None:
        """Keep a failure; the same one again is not written twice."""
        record = dict(vars(failure))
        key = "failure-" + digest_of(list(record.values()))
        if key not in self.log:
            self.log.append(key, record)
        self.failures.append(failure)

    def _step(self, what: str) -> None:
        """One more explanation, or set of maps of a grid, begins."""
        self._report(self.done, self.total, what)
        self.done += 1

    def _report(self, done: int, total: int, what: str) -> None:
        if self.progress is not None:
            self.progress(done, total, what)


@dataclass(frozen=True)
class _Judged:
    """One sample under one model: what every method and metric is given."""

    classifier: Classifier
    settings: BenchmarkSettings
    identity: str
    model: str
    sample: Sample
    image: Tensor
    regions: Regions
    target: int

    @classmethod
    def prepare(cls, classifier: Classifier, identity: str, model: str, sample: Sample, settings: BenchmarkSettings) -> _Judged:
        image = limit_size(sample.image, settings.max_side)
        if sample.mask is not None and sample.mask.shape != image.shape[1:]:
            resized = F.interpolate(sample.mask[None, None].float(), size=tuple(image.shape[1:]), mode="nearest-exact")
            sample = replace(sample, mask=resized[0, 0] > 0.5)
        predicted = int(classifier.logits(classifier.inputs(image))[0].argmax())
        target = predicted if settings.target == "predicted" or sample.label is None else sample.label
        regions = make_regions(image, settings.regions, **settings.region_options)
        if settings.drops:
            with suppress(NotApplicable):  # what drops tokens says so itself, the rest is measured
                regions = follow_patches(classifier, regions)
        return cls(classifier, settings, identity, model, sample, image, regions, target)

    @cached_property
    def content(self) -> str:
        """Digest of the pixels."""
        return hashlib.sha256(self.image.numpy().tobytes()).hexdigest()

    @cached_property
    def partition(self) -> str:
        """Digest of the shared regions."""
        return hashlib.sha256(self.regions.labels.numpy().tobytes()).hexdigest()[:16]

    def key(self, spec: MethodSpec, seed: int) -> str:
        """Everything that the explanation depends on."""
        own = [spec.method, spec.preset, spec.plain_options(), self.settings.explained_fill_settings]
        return digest_of([self.identity, self.content, self.target, *own, self._drawn(spec, seed), self.partition if spec.cuts else ""])

    def _drawn(self, spec: MethodSpec, seed: int) -> int:
        return sample_seed(seed, self.sample.id) if spec.stochastic else 0

    def curve_key(self, key: str, protocol: Protocol) -> str:
        """Everything that a curve depends on."""
        shared = self.partition if protocol.steps == "regions" else ""
        return digest_of([key, protocol.settings(), shared, self.settings.seed])

    def score_key(self, key: str, measure: Measure, protocol: Protocol) -> str:
        """Everything that a number depends on."""
        if METRICS[measure.metric].curve:
            return digest_of([self.curve_key(key, protocol), measure.metric])
        mask = None if self.sample.mask is None else hashlib.sha256(self.sample.mask.numpy().tobytes()).hexdigest()
        return digest_of([key, measure.metric, protocol.output, self.settings.seed, mask if METRICS[measure.metric].mask else None])

    def names(self, spec: MethodSpec, seed: int) -> dict[str, Any]:
        return {"model": self.model, "sample": self.sample.id, "method": spec.label, "seed": seed}

    def failure(self, spec: MethodSpec, seed: int, reason: str) -> Failure:
        return Failure(self.model, self.sample.id, spec.label, seed, reason)

    def explain(self, image: Tensor, spec: MethodSpec, seed: int) -> Explanation:
        """By the search or the method, on the shared regions where it cuts the image and does not say how."""
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
        return attribute(image, self.classifier, spec.method, self.target, **options)

    def case(self, explanation: Explanation, spec: MethodSpec, seed: int) -> Case:
        def again(image: Tensor) -> Tensor:
            return self.explain(image, spec, seed).values

        return Case(self.classifier, explanation, self.target, self.regions, again, self.sample.mask, self.settings.seed)


def _save_curves(curves: Curves, path: Path) -> None:
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            insertion_area=curves.insertion_area.numpy(),
            insertion=curves.insertion.numpy(),
            deletion_area=curves.deletion_area.numpy(),
            deletion=curves.deletion.numpy(),
        )


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
