"""The study image by image: each explanation is kept the moment it is measured, so that a run can continue."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attribution.baselines import attribute
from attribution.budget import anytime_from, search_orders
from attribution.classifier import Classifier
from attribution.errors import UserError
from attribution.explain import classifier_fill, explain
from attribution.explanation import Explanation
from attribution.loading import load_classifier
from attribution.masking import MaskedInputs
from attribution.objective import SubmodularObjective
from attribution.presets import BALANCED
from attribution.regions import Regions, make_regions
from evaluation.benchmark import sample_seed
from evaluation.dataset import ImageDataset
from evaluation.grids.runner import identity_of
from evaluation.opening import named_data
from evaluation.pareto.settings import BALANCED_SUFFIX, POLISHED, REFERENCE, SAMPLED, ParetoResults, ParetoSettings, Point
from evaluation.perturbation import Protocol, perturbation_curves
from evaluation.records import digest_of, open_log

Progress = Callable[[int, int, str], None]
_OCCLUSION_STRIDES = (1, 2, 4, 8, 16, 32, 64)


def run_pareto(settings: ParetoSettings, out: str | Path, progress: Progress | None = None, *, measure: bool = True) -> ParetoResults:
    """Measure what the folder does not hold yet, and return everything.

    Args:
        settings: what is measured.
        out: folder of ``records.jsonl``; several settings may share it, one process at a time.
        measure: False returns only what the folder holds.
        progress: called with (images done, all of them, sample).

    Raises:
        UserError: settings that cannot be run, no image that the model gets right, or a full disk.
    """
    model = settings.model
    classifier = model if isinstance(model, Classifier) else load_classifier(model)
    dataset = named_data(settings, classifier)
    protocol = Protocol(fill=settings.fill)
    shared = [identity_of(classifier, classifier.name), protocol.settings(), settings.regions, settings.count, settings.seed]
    points: dict[str, tuple[Point, ...]] = {}
    with open_log(Path(out) / "records.jsonl") as log:
        for index in _chosen(settings, classifier, dataset):
            sample = dataset.ids[index]
            if progress is not None:
                progress(len(points), settings.samples, sample)
            image, label = dataset[index].image, int(dataset.labels[index] or 0)
            content = [sample, hashlib.sha256(image.numpy().tobytes()).hexdigest(), label]
            keys = {
                (method, budget): digest_of([*shared, *content, method, budget])
                for method in settings.methods
                for budget in settings.budgets_of(method)
            }
            if measure and any(key not in log for key in keys.values()):
                case = _Case(settings, classifier, image, label, protocol, sample)
                for method in settings.methods:
                    missing = [budget for budget in settings.budgets_of(method) if keys[method, budget] not in log]
                    for budget, point in case.points(method, missing):
                        log.append(keys[method, budget], {"sample": sample, "point": None if point is None else asdict(point)})
            held = [log.records[key]["point"] for key in keys.values() if key in log]
            points[sample] = tuple(Point(**point) for point in held if point is not None)
        if progress is not None:
            progress(len(points), len(points), "done")
    return ParetoResults(settings, classifier.name, points)


def _chosen(settings: ParetoSettings, classifier: Classifier, dataset: ImageDataset) -> Iterator[int]:
    """Images that the model gets right with enough confidence, in the order of the permutation."""
    found = 0
    for index in dataset.choose(None, settings.seed, labels_only=True):
        probabilities = classifier.probabilities(classifier.inputs(dataset[index].image))[0]
        if int(probabilities.argmax()) == dataset.labels[index] and float(probabilities.max()) >= settings.confidence:
            found += 1
            yield index
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

    def points(self, method: str, budgets: Sequence[int]) -> Iterator[tuple[int, Point | None]]:
        """The method within each budget, or as it is where its cost cannot be chosen; None where the budget is not enough."""
        if not budgets:
            return
        if method == "budget":
            objective = SubmodularObjective(self.classifier, self.masked, self.target, BALANCED)
            shared = [budget for budget in budgets if budget >= anytime_from(objective)]
            for run in [*([budget] for budget in budgets if budget not in shared), shared]:
                yield from self._at_budgets(method, run, None, 0)
        elif method == POLISHED:
            start = explain(self.image, self.classifier, self.target, regions=self.regions, search=REFERENCE, fill=self.settings.fill)
            assert start.order is not None
            yield from self._at_budgets(method, budgets, start.order, start.evaluations)
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

    def _at_budgets(self, method: str, budgets: Sequence[int], start: Tensor | None, spent: int) -> Iterator[tuple[int, Point | None]]:
        """One run of the search by budget; what it had found when each budget was used up."""
        before: tuple[int, Tensor] | None = None if start is None else (0, start)
        waiting = list(budgets)
        if waiting and waiting[-1] > spent:
            objective = SubmodularObjective(self.classifier, self.masked, self.target, BALANCED)
            first = None if start is None else start.tolist()
            for found in search_orders(objective, evaluations=waiting[-1] - spent, start=first, seed=self.seed):
                while waiting and found.evaluations + spent > waiting[0]:
                    yield waiting[0], self._ordered(method, waiting[0], spent, before)
                    waiting.pop(0)
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
        shell = Explanation(
            image=self.image,
            target=self.target,
            class_names=self.classifier.class_names,
            probabilities=torch.zeros(self.classifier.num_classes),
            regions=self.regions,
            order=order,
        )
        return self._point(method, budget, evaluations, shell)

    def _point(self, method: str, budget: int, evaluations: int, explanation: Explanation) -> Point:
        curves = perturbation_curves(self.classifier, self.image, explanation, self.target, self.protocol, regions=self.regions)
        return Point(method, budget, evaluations, curves.insertion_auc, curves.deletion_auc)
