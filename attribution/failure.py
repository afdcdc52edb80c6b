"""Explain a misclassified image: which regions cause the wrong class, and which restore the right one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attribution.dropping import masked_inputs
from attribution.errors import NotMisclassified, UserError
from attribution.explain import explain
from attribution.explanation import Explanation
from attribution.fills import DEFAULT_FILL, Fill, is_drop, picture_of_fill, several_fills
from attribution.image import ImageSource, load_image
from attribution.masking import RegionInputs, prefix_rows
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.search.contract import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AREAS = (0.25, 0.5, 0.75, 1.0)
_PRUNED = 4  # of the sets found, only this many of the smallest are pruned
_NEAR_PEAK = 0.005  # a probability this close to the highest counts as the highest


@dataclass(frozen=True, eq=False)
class Along:
    """The probabilities of the true and the predicted class along the prefixes of an order, k = 0 to R regions.

    Attributes:
        true, predicted: float32 [R+1], probability of the true and of the wrongly predicted class.
        right: bool [R+1], whether the true class is the prediction.
    """

    true: Tensor
    predicted: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class Repair:
    """A set of regions that corrects the prediction, by being removed or by being shown alone.

    Attributes:
        regions: int64, their ids, most important first.
        area: their share of the pixels that the model sees.
        true, predicted: probabilities of the true and of the wrongly predicted class after the correction.
    """

    regions: Tensor
    area: float
    true: float
    predicted: float

    def plain(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {"regions": self.regions.tolist(), "area": self.area, "true": self.true, "predicted": self.predicted}


@dataclass(frozen=True, eq=False)
class FailureExplanation:
    """A misclassified image, explained for its true class and for the predicted class.

    Attributes:
        truth: explanation of the true class. Its first regions support the true class, its last ones the mistake.
        mistake: explanation of the predicted class, on the same regions.
        shown, hidden: both probabilities with the first k regions of ``truth`` shown alone, or hidden.
        mistake_shown, mistake_hidden: the same with the regions of ``mistake``.
        sufficient: the smallest set found that, shown alone, gives the right prediction; None if none was found.
        cause: the smallest set found whose removal gives the right prediction; None if none was found.
        fill: float32 [3, H, W], the content of hidden regions; the model's mean colour if their tokens were dropped.
        evaluations: number of images forwarded by both searches, for the curves and for the smallest sets.
    """

    truth: Explanation
    mistake: Explanation
    shown: Along
    hidden: Along
    mistake_shown: Along
    mistake_hidden: Along
    sufficient: Repair | None
    cause: Repair | None
    fill: Tensor
    evaluations: int

    @property
    def true_name(self) -> str:
        """Name of the true class."""
        return self.truth.target_name

    @property
    def predicted_name(self) -> str:
        """Name of the class that the model predicts."""
        return self.mistake.target_name

    def plot(self) -> Figure:
        """Draw the failure (``attribution.figures.failure.plot_failure``)."""
        from attribution.figures.failure import plot_failure

        return plot_failure(self)

    def plain(self) -> dict[str, Any]:
        """Orders, curves, repairs and text as JSON types, without the image and the regions, which ``truth`` holds."""
        curves = {name: getattr(self, name) for name in ("shown", "hidden", "mistake_shown", "mistake_hidden")}
        return {
            "true": self.truth.target,
            "predicted": self.mistake.target,
            "probability_true": self.truth.confidence,
            "probability_predicted": self.mistake.confidence,
            "truth_order": self.truth.order.tolist(),  # type: ignore[union-attr]
            "mistake_order": self.mistake.order.tolist(),  # type: ignore[union-attr]
            "truth_area": self.truth.area.tolist(),
            "mistake_area": self.mistake.area.tolist(),
            "curves": {
                name: {"true": each.true.tolist(), "predicted": each.predicted.tolist(), "right": each.right.tolist()}
                for name, each in curves.items()
            },
            "causes": self.causes.tolist(),
            "sufficient": None if self.sufficient is None else self.sufficient.plain(),
            "cause": None if self.cause is None else self.cause.plain(),
            "highest_confidence": {f"{limit:g}": _finite(value) for limit, value in self.highest_confidence().items()},
            "text": self.text,
            "evaluations": self.evaluations,
        }

    def highest_confidence(self, areas: tuple[float, ...] = AREAS) -> dict[float, float]:
        """Highest probability of the true class over prefixes of ``truth`` that cover at most each area; NaN if no prefix does."""
        covered = self.truth.area
        found = {}
        for limit in areas:
            inside = (covered <= limit + 1e-6) & (torch.arange(len(covered)) > 0)
            found[limit] = float(self.shown.true[inside].max()) if inside.any() else float("nan")
        return found

    @property
    def peak(self) -> int:
        """The largest k at which the probability of the true class is within 0.005 of its highest; at least 1."""
        scores = self.shown.true[1:]
        return int((scores >= scores.max() - _NEAR_PEAK).nonzero()[-1]) + 1

    @property
    def causes(self) -> Tensor:
        """float32 [R], by region id: from 1 (first region of ``truth``) down to 0 at the peak and to -1 (last region, the cause)."""
        order, peak = self.truth.order, self.peak
        assert order is not None
        size = len(order)
        before = 1 - torch.arange(peak, dtype=torch.float32) / peak
        after = -(torch.arange(size - peak, dtype=torch.float32) + 1) / max(1, size - peak)
        values = torch.empty(size)
        values[order] = torch.cat([before, after])
        return values

    def __repr__(self) -> str:
        return f"FailureExplanation({self.text})"

    @property
    def text(self) -> str:
        """The failure in a few sentences with numbers."""
        probabilities = self.truth.probabilities
        wrong, right = float(probabilities[self.mistake.target]), float(probabilities[self.truth.target])
        regions = self.truth.regions
        whole = "the image" if regions is None or regions.seen is None else "what it sees"
        sentences = [f"The model says {self.predicted_name} ({wrong:.2f}), the image shows {self.true_name} ({right:.2f})."]
        if bool(self.shown.right[0]):
            sentences.append(f"The fill alone is predicted as {self.true_name}, so few regions suffice.")
        if self.cause is not None:
            sentences.append(
                f"Hiding {_share(self.cause.area)} of {whole}, {_these(self.cause)}, turns {self.predicted_name} {wrong:.2f} into "
                f"{self.true_name} {self.cause.true:.2f}."
            )
        else:
            sentences.append("No set of regions was found whose removal makes the model right.")
        if self.sufficient is not None:
            alone = f"{_share(self.sufficient.area)} of {whole} alone, {_these(self.sufficient)}"
            sentences.append(f"{alone}, gives {self.true_name} {self.sufficient.true:.2f}.")
        else:
            best = self.highest_confidence()[1.0]
            sentences.append(f"No set of regions alone makes the model right; the highest probability of {self.true_name} is {best:.2f}.")
        return " ".join(sentences)


def explain_failure(
    image: ImageSource,
    classifier: Classifier | str,
    true_class: int | str,
    *,
    fill: Fill = DEFAULT_FILL,
    progress: Progress | None = None,
    **options: Any,
) -> FailureExplanation:
    """Explain a misclassified image for its true class and for the predicted class.

    Both searches work on the same regions. Candidates for the smallest sets are prefixes of both orders. For the removal there is
    one more: a greedy search that hides, one by one, the region that helps the true class most against the predicted one. Regions
    that a candidate does not need are pruned from it.

    Args:
        image: anything ``load_image`` accepts.
        classifier: a ``Classifier``, or a name that ``load_classifier`` accepts.
        true_class: index or name.
        fill: content of hidden regions; one only.
        progress: called with (regions ordered, 2 R).
        options: other arguments of ``explain``, such as regions, search, weights, pending, seed and preset.

    Raises:
        NotMisclassified: the model classifies the image correctly.
        UserError: any wrong argument.
    """
    if "target" in options:
        raise UserError("explain_failure takes no target: it explains the true class and the predicted one")
    if len(several_fills(fill)) > 1:
        raise UserError(f"fill {fill!r} names several fills: give one, since what corrects the prediction depends on the fill")
    classifier = load_classifier(classifier)
    if classifier.outputs.independent:
        raise UserError(
            f"{classifier.name} has independent labels, of which each is right or wrong by itself: give classifier.of_label(LABEL), with "
            "true_class LABEL or 'no LABEL'"
        )
    true = classifier.target_index(true_class)

    def half(start: int) -> Progress | None:
        return None if progress is None else lambda done, total: progress(start * total + done, 2 * total)

    truth = explain(image, classifier, true, fill=fill, progress=half(0), **options)
    predicted = int(truth.probabilities.argmax())
    if predicted == true:
        found = f"{classifier.class_names[true]}, p = {truth.confidence:.2f}"
        raise NotMisclassified(f"{classifier.name} is right about this image ({found}): there is no failure to explain; use explain")
    original = load_image(image)
    hidden = picture_of_fill(truth.image, fill, classifier, (original.shape[1], original.shape[2]))
    same_fill = fill if is_drop(fill) else hidden
    again = {name: value for name, value in options.items() if name not in ("regions", "region_options")}
    mistake = explain(truth.image, classifier, predicted, fill=same_fill, regions=truth.regions, progress=half(1), **again)
    assert truth.regions is not None and truth.order is not None and mistake.order is not None
    with classifier.forwarding(options.get("batch_size")), classifier.folding():
        hiding, masked = masked_inputs(classifier, truth.image, truth.regions.labels, same_fill)
        return _judged(_Judge(hiding, masked, true, predicted, truth.regions.area), truth, mistake, hidden)


def _judged(judge: _Judge, truth: Explanation, mistake: Explanation, hidden: Tensor) -> FailureExplanation:
    """Compute the curves of both orders and the smallest sets that correct the prediction."""
    assert truth.regions is not None and truth.order is not None and mistake.order is not None
    prefixes = {name: prefix_rows(order) for name, order in (("truth", truth.order), ("mistake", mistake.order))}
    along = {(name, kept): judge.along(rows if kept else ~rows) for name, rows in prefixes.items() for kept in (True, False)}
    sufficient = judge.smallest([rows for name in prefixes for rows in judge.right_rows(prefixes[name], along[name, True])], shown=True)
    starts = [
        *(~row for row in judge.right_rows(~prefixes["truth"], along["truth", False])),
        *(~row for row in judge.right_rows(prefixes["truth"], along["truth", True], last=True)),
        *(~row for row in judge.right_rows(~prefixes["mistake"], along["mistake", False])),
    ]
    cause = judge.smallest([*starts, *judge.climbed(truth.regions.count)], shown=False)
    return FailureExplanation(
        truth,
        mistake,
        along["truth", True],
        along["truth", False],
        along["mistake", True],
        along["mistake", False],
        judge.repair(sufficient, True, truth.order),
        judge.repair(cause, False, mistake.order),
        hidden,
        truth.evaluations + mistake.evaluations + judge.evaluations,
    )


class _Judge:
    """Forwards subsets of regions, counts them, and finds subsets with the right prediction."""

    def __init__(self, classifier: Classifier, masked: RegionInputs, true: int, predicted: int, area: Tensor) -> None:
        self.classifier, self.masked, self.true, self.predicted, self.area = classifier, masked, true, predicted, area
        self.evaluations = 0

    def probabilities(self, shown: Tensor) -> Tensor:
        """Probabilities float32 [n, C] of subsets bool [n, R]."""
        self.evaluations += len(shown)
        return torch.cat([self.classifier.probabilities(inputs).cpu() for inputs in self.masked.parts(shown)])

    def along(self, shown: Tensor) -> Along:
        found = self.probabilities(shown)
        return Along(found[:, self.true], found[:, self.predicted], found.argmax(dim=1) == self.true)

    def right_rows(self, shown: Tensor, along: Along, last: bool = False) -> list[Tensor]:
        """The first (or last) row with the right prediction that shows some regions but not all: a list of one row or none."""
        partial = shown.any(dim=1) & ~shown.all(dim=1)
        found = (along.right & partial).nonzero()[:, 0]
        return [shown[found[-1 if last else 0]]] if len(found) else []

    def climbed(self, size: int) -> list[Tensor]:
        """Hide, one by one, the region that helps the true class most against the predicted one, until the prediction is right."""
        hidden = torch.zeros(size, dtype=torch.bool)
        for _ in range(size - 1):
            left = (~hidden).nonzero()[:, 0]
            tried = hidden.repeat(len(left), 1)
            tried[torch.arange(len(left)), left] = True
            found = self.probabilities(~tried)
            right = found.argmax(dim=1) == self.true
            if right.any():
                return list(tried[right])
            hidden = tried[int((found[:, self.true] - found[:, self.predicted]).argmax())]
        return []

    def smallest(self, candidates: list[Tensor], shown: bool) -> Tensor | None:
        """The candidate with the least area after pruning: regions it does not need are removed, the largest first."""
        by_area = sorted(candidates, key=lambda rows: float(self.area[rows].sum()))[:_PRUNED]
        pruned = [self._pruned(candidate.clone(), shown) for candidate in by_area]
        return min(pruned, key=lambda rows: float(self.area[rows].sum()), default=None)

    def repair(self, chosen: Tensor | None, shown: bool, order: Tensor) -> Repair | None:
        if chosen is None:
            return None
        found = self.probabilities((chosen if shown else ~chosen)[None])[0]
        regions = order[chosen[order]]
        return Repair(regions, float(self.area[chosen].sum()), float(found[self.true]), float(found[self.predicted]))

    def _pruned(self, chosen: Tensor, shown: bool) -> Tensor:
        while chosen.sum() > 1:
            members = chosen.nonzero()[:, 0]
            tried = chosen.repeat(len(members), 1)
            tried[torch.arange(len(members)), members] = False
            found = self.probabilities(tried if shown else ~tried)
            right = found.argmax(dim=1) == self.true
            if not right.any():
                break
            gain = torch.where(right, self.area[members] + 1e-6 * found[:, self.true], -1.0)
            chosen = tried[int(gain.argmax())]
        return chosen


def _share(area: float) -> str:
    return f"{100 * area:.2g} %" if area < 0.1 else f"{100 * area:.0f} %"


def _these(repair: Repair) -> str:
    count = len(repair.regions)
    return "this one region" if count == 1 else f"these {count} regions"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
