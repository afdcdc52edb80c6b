"""The study image by image: each explanation is kept the moment it is measured, so that a run can continue."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attribution.baselines.attribute import attribute
from attribution.errors import UserError
from attribution.explain import explain
from attribution.explanation import Explanation
from attribution.fills import classifier_fill
from attribution.masking import MaskedInputs
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.objective import SubmodularObjective
from attribution.presets import BALANCED
from attribution.provenance import digest_of
from attribution.regions import Regions, make_regions
from attribution.search.budget import anytime_from, search_orders
from evaluation.data.dataset import ImageDataset
from evaluation.metrics.curves import perturbation_curves
from evaluation.metrics.protocol import Protocol
from evaluation.pareto.settings import BALANCED_SUFFIX, POLISHED, REFERENCE, SAMPLED, WHITE_BOX, ParetoResults, ParetoSettings, Point
from evaluation.study.identity import identity_of, sample_seed
from evaluation.study.opening import named_data
from evaluation.study.records import Record, open_log, read_log

Progress = Callable[[int, int, str], None]
_NO_LIMIT = 10**9  # images: the search is left as soon as a round goes beyond the last budget
_OCCLUSION_STRIDES = (1, 2, 4, 8, 16, 32, 64)


def run_pareto(settings: ParetoSettings, out: str | Path, progress: Progress | None = None) -> ParetoResults:
    """Measure what the folder does not hold yet, and return everything.

    Args:
        settings: what is measured.
        out: folder of ``records.jsonl``; several settings may share it, one process at a time.
        progress: called with (images done, all of them, sample).

    Raises:
        UserError: settings that cannot be run, no image that the model gets right, or a full disk.
    """
    study = _Study(settings)
    points: dict[str, tuple[Point, ...]] = {}
    with open_log(Path(out) / "records.jsonl") as log:
        for one in study.images():
            if progress is not None:
                progress(len(points), settings.samples, one.sample)
            if any(key not in log for key in one.keys.values()):
                case = _Case(settings, study.classifier, one.image, one.label, study.protocol, one.sample)
                for method in settings.methods:
                    missing = [budget for budget in settings.budgets_of(method) if one.keys[method, budget] not in log]
                    for budget, point in case.points(method, missing):
                        record = {"sample": one.sample, "point": None if point is None else asdict(point)}
                        log.append(one.keys[method, budget], record)
            points[one.sample] = one.held(log.records)
        if progress is not None:
            progress(len(points), len(points), "done")
    return ParetoResults(settings, study.classifier.name, points)


def read_pareto(settings: ParetoSettings, out: str | Path) -> ParetoResults:
    """What the folder holds of the settings, nothing measured: of a run that is finished, under way, or was killed.

    Raises:
        UserError: no records in the folder, or none of these settings.
    """
    study = _Study(settings)
    path = Path(out) / "records.jsonl"
    records = read_log(path)
    points = {one.sample: held for one in study.images() if (held := one.held(records))}
    if not points:
        raise UserError(f"{path} holds nothing of what is asked for: expected the model, regions, methods and seed of an earlier run")
    return ParetoResults(settings, study.classifier.name, points)


@dataclass(frozen=True)
class _Image:
    """An image with the keys of its records."""

    sample: str
    image: Tensor
    label: int
    keys: dict[tuple[str, int], str]

    def held(self, records: Mapping[str, Record]) -> tuple[Point, ...]:
        found = [records[key]["point"] for key in self.keys.values() if key in records]
        return tuple(Point(**point) for point in found if point is not None)


class _Study:
    """Model and images of settings."""

    def __init__(self, settings: ParetoSettings) -> None:
        self.settings = settings
        self.classifier = load_classifier(settings.model)
        self.dataset = named_data(settings, self.classifier.class_names)
        self.protocol = Protocol(fill=settings.fill)

    def images(self) -> Iterator[_Image]:
        settings, classifier = self.settings, self.classifier
        protocol = self.protocol.settings()
        shared = [identity_of(classifier, classifier.name), protocol, settings.regions, settings.count, settings.seed]
        for index, image in _chosen(settings, classifier, self.dataset):
            sample, label = self.dataset.ids[index], int(self.dataset.labels[index] or 0)
            content = [sample, hashlib.sha256(image.numpy().tobytes()).hexdigest(), label]
            keys = {
                (method, budget): digest_of([*shared, *content, method, budget])
                for method in settings.methods
                for budget in settings.budgets_of(method)
            }
            yield _Image(sample, image, label, keys)


def _chosen(settings: ParetoSettings, classifier: Classifier, dataset: ImageDataset) -> Iterator[tuple[int, Tensor]]:
    """Images that the model gets right with enough confidence, in the order of the permutation."""
    found = 0
    for index in dataset.choose(None, settings.seed, labels_only=True):
        image = dataset[index].image
        probabilities = classifier.probabilities(classifier.inputs(image))[0]
        if int(probabilities.argmax()) == dataset.labels[index] and float(probabilities.max()) >= settings.confidence:
            found += 1
            yield index, image
        if found == settings.samples:
            return
    if not found:
        raise UserError(f"{dataset.name} has no image that {classifier.name} gets right with p >= {settings.confidence:g}")


class _Case:
    """One image with its regions: any method of the study explains it, one function measures them all."""

    def __init__(
        self, settings: ParetoSettings, classifier: Classifier, image: Tensor, target: int, protocol: Protocol, sample: str
    ) -> None:
        self.settings, self.classifier, self.image, self.target, self.protocol = settings, classifier, image, target, protocol
        self.seed = sample_seed(settings.seed, sample)
        self.regions: Regions = make_regions(image, settings.regions, count=settings.count)
        fill = classifier_fill(image, settings.fill, classifier)
        self.masked = MaskedInputs(classifier, image, self.regions.labels, fill)
        self._areas: dict[tuple[int, ...], tuple[float, float]] = {}

    def points(self, method: str, budgets: Sequence[int]) -> Iterator[tuple[int, Point | None]]:
        """The method within each budget, or as it is where its cost cannot be chosen; None where the budget is not enough."""
        if not budgets:
            return
        if method in ("budget", WHITE_BOX):
            objective = SubmodularObjective(self.classifier, self.masked, self.target, BALANCED)
            shared = [budget for budget in budgets if budget >= anytime_from(objective)]
            for budget in [each for each in budgets if each not in shared]:
                yield from self._at_budgets(method, [budget], None, 0, budget)
            yield from self._at_budgets(method, shared, None, 0, _NO_LIMIT)
        elif method == POLISHED:
            start = explain(self.image, self.classifier, self.target, regions=self.regions, search=REFERENCE, fill=self.settings.fill)
            assert start.order is not None
            yield from self._at_budgets(method, budgets, start.order, start.evaluations, _NO_LIMIT)
        elif method in SAMPLED:
            for budget in budgets:
                made = self._sampled(method, budget)
                yield budget, None if made is None else self._point(method, budget, made.evaluations, made)
        else:
            name = method.removesuffix(BALANCED_SUFFIX)
            weights = BALANCED if method != name else None
            options: dict[str, Any] = {"seed": self.seed} if name == "stochastic_greedy" else {}
            found = explain(
                self.image,
                self.classifier,
                self.target,
                regions=self.regions,
                search=name,
                fill=self.settings.fill,
                weights=weights,
                **options,
            )
            yield 0, self._point(method, 0, found.evaluations, found)

    def _at_budgets(
        self, method: str, budgets: Sequence[int], start: Tensor | None, spent: int, limit: int
    ) -> Iterator[tuple[int, Point | None]]:
        """One run of the search by budget; what its last whole round within each budget had found."""
        before: tuple[int, Tensor] | None = None if start is None else (0, start)
        waiting = list(budgets)
        if waiting and waiting[-1] > spent:
            objective = SubmodularObjective(self.classifier, self.masked, self.target, BALANCED)
            first = None if start is None else start.tolist()
            for found in search_orders(objective, evaluations=limit, start=first, seed=self.seed, gradients=method == WHITE_BOX):
                while waiting and found.evaluations + spent > waiting[0]:
                    yield waiting[0], self._ordered(method, waiting[0], spent, before)
                    waiting.pop(0)
                if not waiting:
                    return
                before = (found.evaluations, found.order)
        for budget in waiting:
            yield budget, self._ordered(method, budget, spent, before)

    def _sampled(self, method: str, budget: int) -> Explanation | None:
        """A method of ``METHODS`` that forwards at most so many images; None where it cannot."""
        options: dict[str, Any] = {"samples": budget}
        if method == "occlusion":
            size = min(self.classifier.preprocessing.size)
            window = max(1, size // 4)
            strides = [stride for stride in _OCCLUSION_STRIDES if stride <= window and (-(-(size - window) // stride) + 1) ** 2 <= budget]
            if not strides:
                return None
            options = {"window": window, "stride": strides[0]}
        if method == "kernel_shap":
            options["regions"] = self.regions
        if method == "hsic":
            options["grid"] = 8 if self.settings.count > 36 else 6
        made = attribute(self.image, self.classifier, method, self.target, fill=self.settings.fill, seed=self.seed, **options)
        return made if made.evaluations <= budget else None

    def _ordered(self, method: str, budget: int, spent: int, found: tuple[int, Tensor] | None) -> Point | None:
        if found is None or spent > budget:
            return None
        evaluations, order = found[0] + spent, found[1]
        key = tuple(order.tolist())
        if key not in self._areas:  # a search that has come to its end keeps its order for the budgets that are left
            shell = Explanation(
                image=self.image,
                target=self.target,
                class_names=self.classifier.class_names,
                probabilities=torch.zeros(self.classifier.num_classes),
                regions=self.regions,
                order=order,
            )
            point = self._point(method, budget, evaluations, shell)
            self._areas[key] = point.insertion, point.deletion
        return Point(method, budget, evaluations, *self._areas[key])

    def _point(self, method: str, budget: int, evaluations: int, explanation: Explanation) -> Point:
        curves = perturbation_curves(self.classifier, self.image, explanation, self.target, self.protocol, regions=self.regions)
        return Point(method, budget, evaluations, curves.insertion_auc, curves.deletion_auc)
