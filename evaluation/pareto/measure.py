"""Quality against evaluations, image by image: every explanation is a record of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor

from attribution.baselines.attribute import attribute
from attribution.errors import UserError
from attribution.explain import explain
from attribution.explanation import Explanation
from attribution.fills import classifier_fill
from attribution.masking import MaskedInputs
from attribution.model.classifier import Classifier
from attribution.objective import BALANCED, ScoreWeights, SubmodularObjective
from attribution.provenance import pixels_digest
from attribution.regions import Regions, make_regions, several
from attribution.search.budget import anytime_from, search_orders
from evaluation.data.dataset import ImageDataset
from evaluation.metrics.curves import perturbation_curves
from evaluation.metrics.judged import Judged
from evaluation.metrics.protocol import Protocol
from evaluation.pareto.settings import (
    BALANCED_SUFFIX,
    POLISHED,
    REFERENCE,
    SAMPLED,
    WHITE_BOX,
    ParetoResults,
    ParetoSettings,
    Point,
    partition,
)
from evaluation.study.identity import identity_of, record_key, sample_seed
from evaluation.study.records import Record
from evaluation.study.run import Run, Unit, problems
from evaluation.study.settings import named_data, named_model

_NO_LIMIT = 10**9  # images: the search is left as soon as a round goes beyond the last budget
_OCCLUSION_STRIDES = (1, 2, 4, 8, 16, 32, 64)


def measure_pareto(run: Run[ParetoSettings]) -> ParetoResults:
    """Every method within every budget, on the same images, for each model and each partition.

    Raises:
        UserError: no image that a model gets right with enough confidence, or no order at all; when only reading, no record for these
            settings.
    """
    settings = run.settings
    points: dict[tuple[str, str], dict[str, tuple[Point, ...]]] = {}
    run.expect(len(settings.models) * len(settings.partitions) * settings.samples * len(settings.methods))
    for model in settings.models:
        classifier = named_model(settings, model)
        dataset = named_data(settings, classifier.class_names)
        chosen = _chosen(settings, classifier, dataset)
        for name in settings.partitions:
            points[classifier.name, name.replace(":", " ")] = _Images(run, classifier, dataset, name).points(chosen)
    failures = tuple(problems(run, lambda item: item[0]))
    if not any(any(by_sample.values()) for by_sample in points.values()):
        if run.reading:
            raise UserError(
                f"{run.log.path} holds no record for these settings: expected the model, regions, methods and seed of an earlier run"
            )
        reason = f"{failures[0][0]}: {failures[0][1]}" if failures else "every budget is too small for its method"
        raise UserError(f"no image has an order by {', '.join(settings.methods)}: {reason}")
    return ParetoResults(settings, points, failures)


def _chosen(settings: ParetoSettings, classifier: Classifier, dataset: ImageDataset) -> list[int]:
    """Images that the model gets right with enough confidence, in the order of the permutation."""
    found: list[int] = []
    for index in dataset.choose(None, settings.seed, labels_only=True):
        probabilities = classifier.probabilities(classifier.inputs(dataset[index].image))[0]
        if dataset.labels[index] in classifier.predicted(probabilities) and float(probabilities.max()) >= settings.confidence:
            found.append(index)
        if len(found) == settings.samples:
            break
    if not found:
        raise UserError(f"{dataset.name} has no image that {classifier.name} gets right with p >= {settings.confidence:g}")
    return found


class _Images:
    """Images under one model, cut in one way."""

    def __init__(self, run: Run[ParetoSettings], classifier: Classifier, dataset: ImageDataset, name: str) -> None:
        self.run, self.settings, self.classifier, self.dataset = run, run.settings, classifier, dataset
        self.partition = partition(name)
        self.protocol = Protocol(fill=run.settings.fill)
        self.identity = identity_of(classifier)
        self.ways = [self.protocol.settings(), self.partition[0], *self.partition[1].values(), run.settings.seed]
        self.case = lru_cache(maxsize=1)(self._case)

    def points(self, chosen: Sequence[int]) -> dict[str, tuple[Point, ...]]:
        ids = {self.dataset.ids[index]: index for index in chosen}
        items = [(sample, method) for sample in ids for method in self.settings.methods]
        with self.classifier.folding():
            found = self.run.stage(items, lambda item: self._unit(ids[item[0]], *item), lambda item: f"{item[0]} {item[1]}")
        held = {
            sample: [record["point"] for method in self.settings.methods for record in found[sample, method].values()] for sample in ids
        }
        return {sample: tuple(Point(**point) for point in points if point is not None) for sample, points in held.items() if points}

    def _unit(self, index: int, sample: str, method: str) -> Unit:
        case = self.case(index)
        keys = {
            budget: record_key(self.identity, case.pixels, sample, case.target, *self.ways, method, budget)
            for budget in self.settings.budgets_of(method)
        }

        def measure(missing: Sequence[int]) -> Iterator[tuple[int, Record]]:
            for budget, point in case.points(method, missing):
                yield budget, {"sample": sample, "point": None if point is None else asdict(point)}

        return Unit(keys, measure)

    def _case(self, index: int) -> _Case:
        return _Case(self, index)


class _Case:
    """One image with its regions: any method of the study explains it, one function measures them all."""

    def __init__(self, images: _Images, index: int) -> None:
        self.settings, self.classifier, self.protocol, self.cut = images.settings, images.classifier, images.protocol, images.partition
        image, label = images.dataset[index].image, images.dataset.labels[index]
        assert label is not None
        self.image, self.target, self.pixels = image, int(label), pixels_digest(image)
        self.seed = sample_seed(self.settings.seed, images.dataset.ids[index])
        self._areas: dict[tuple[int, ...], tuple[float, float]] = {}

    @cached_property
    def regions(self) -> Regions:
        return several(make_regions(self.image, self.cut[0], **self.cut[1]))

    @cached_property
    def masked(self) -> MaskedInputs:
        fill = classifier_fill(self.image, self.settings.fill, self.classifier)
        return MaskedInputs(self.classifier, self.image, self.regions.labels, fill)

    def points(self, method: str, budgets: Sequence[int]) -> Iterator[tuple[int, Point | None]]:
        """The method within each budget, or once if its cost cannot be chosen; None where the budget is too small."""
        if not budgets:
            return
        if method in ("budget", WHITE_BOX):
            objective = SubmodularObjective(self.classifier, self.masked, self.target, BALANCED)
            shared = [budget for budget in budgets if budget >= anytime_from(objective)]
            for budget in [each for each in budgets if each not in shared]:
                yield from self._at_budgets(method, [budget], None, 0, budget)
            yield from self._at_budgets(method, shared, None, 0, _NO_LIMIT)
        elif method == POLISHED:
            start = self._explained(REFERENCE)
            assert start.order is not None
            yield from self._at_budgets(method, budgets, start.order, start.evaluations, _NO_LIMIT)
        elif method in SAMPLED:
            for budget in budgets:
                made = self._sampled(method, budget)
                yield budget, None if made is None else self._point(method, budget, made.evaluations, made)
        else:
            name = method.removesuffix(BALANCED_SUFFIX)
            found = self._explained(name, None if method == name else BALANCED)
            yield 0, self._point(method, 0, found.evaluations, found)

    def _explained(self, search: str, weights: ScoreWeights | None = None) -> Explanation:
        options: dict[str, Any] = {"search": search, "weights": weights, "fill": self.settings.fill, "seed": self.seed}
        return explain(self.image, self.classifier, self.target, regions=self.regions, **options)

    def _at_budgets(
        self, method: str, budgets: Sequence[int], start: Tensor | None, spent: int, limit: int
    ) -> Iterator[tuple[int, Point | None]]:
        """One run of the search by budget: for each budget, the order after the last complete round within it."""
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
        """A method of ``METHODS``, set to forward at most ``budget`` images; None if it cannot."""
        options: dict[str, Any] = {"n_samples" if method == "kernel_shap" else "samples": budget}
        if method == "occlusion":
            size = min(self.classifier.preprocessing.size)
            window = max(1, size // 4)
            strides = [stride for stride in _OCCLUSION_STRIDES if stride <= window and (-(-(size - window) // stride) + 1) ** 2 <= budget]
            if not strides:
                return None
            options = {"sliding_window_shapes": window, "strides": strides[0]}
        if method == "kernel_shap":
            options["regions"] = self.regions
        if method == "hsic":
            options["grid"] = 8 if math.prod(self.cut[1].values()) > 36 else 6
        made = attribute(
            self.image, self.classifier, method, self.target, fill=self.settings.fill, seed=self.seed, max_side=None, **options
        )
        return made if made.evaluations <= budget else None

    def _ordered(self, method: str, budget: int, spent: int, found: tuple[int, Tensor] | None) -> Point | None:
        if found is None or spent > budget:
            return None
        evaluations, order = found[0] + spent, found[1]
        key = tuple(order.tolist())
        if key not in self._areas:  # a search that has come to its end keeps its order for the budgets that are left
            point = self._point(method, budget, evaluations, order)
            self._areas[key] = point.insertion, point.deletion
        return Point(method, budget, evaluations, *self._areas[key])

    def _point(self, method: str, budget: int, evaluations: int, explanation: Judged) -> Point:
        curves = perturbation_curves(self.image, self.classifier, explanation, self.target, self.protocol, regions=self.regions)
        return Point(method, budget, evaluations, curves.insertion_auc, curves.deletion_auc)
