"""Why a classifier is wrong about an image: what causes the wrong class, and what would restore the right one."""

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
from attribution.fills import Fill, is_drop, picture_of_fill, several_fills
from attribution.image import ImageSource, load_image
from attribution.masking import RegionInputs, prefix_rows
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.search.contract import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AREAS = (0.25, 0.5, 0.75, 1.0)
_PRUNED = 4  # smallest sets found that are looked into for regions too many
_NEAR_PEAK = 0.005  # prefixes whose probability is that close to the highest count as the highest


@dataclass(frozen=True, eq=False)
class Along:
    """Both classes along the prefixes of an order, float32 [R+1] each, k = 0...R.

    Attributes:
        true, predicted: probability of the true and of the wrongly predicted class.
        right: bool [R+1], whether the true class is the first.
    """

    true: Tensor
    predicted: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class Repair:
    """A set of regions that makes the model right.

    Attributes:
        regions: int64, their ids, in the order in which they matter.
        area: their share of the image's pixels.
        true, predicted: probability of both classes then.
    """

    regions: Tensor
    area: float
    true: float
    predicted: float

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {"regions": self.regions.tolist(), "area": self.area, "true": self.true, "predicted": self.predicted}


@dataclass(frozen=True, eq=False)
class FailureExplanation:
    """A misclassified image, explained towards the class that it shows and towards the class that the model saw.

    Attributes:
        truth: explanation of the true class: its first regions support the truth, its last ones the mistake.
        mistake: explanation of the predicted class, on the same regions.
        shown, hidden: both classes with the first k regions of ``truth`` shown, or hidden.
        mistake_shown, mistake_hidden: likewise along ``mistake``.
        sufficient: the smallest set found that makes the model right when nothing else is shown; None where none was found.
        cause: the smallest set found whose removal makes the model right; None where none was found.
        fill: float32 [3, H, W], what hidden regions showed; the model's mean colour where their tokens were dropped.
        evaluations: images forwarded by both searches, the curves and the search for the smallest sets.
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
        """The figure of ``attribution.failure_plotting.plot_failure``."""
        from attribution.figures.failure import plot_failure

        return plot_failure(self)

    def plain(self) -> dict[str, Any]:
        """Orders, curves, repairs and text as JSON can hold them; the image and the regions are those of ``truth``."""
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
        """Highest probability of the true class among the first regions that cover at most a share of the image; NaN where none does."""
        covered = self.truth.area
        found = {}
        for limit in areas:
            inside = (covered <= limit + 1e-6) & (torch.arange(len(covered)) > 0)
            found[limit] = float(self.shown.true[inside].max()) if inside.any() else float("nan")
        return found

    @property
    def peak(self) -> int:
        """The last k >= 1 at which the true class is within 0.005 of its highest probability."""
        scores = self.shown.true[1:]
        return int((scores >= scores.max() - _NEAR_PEAK).nonzero()[-1]) + 1

    @property
    def causes(self) -> Tensor:
        """float32 [R], by region id: from 1, the first support of the truth, over 0 at the peak to -1, the deepest cause of the mistake."""
        order, peak = self.truth.order, self.peak
        assert order is not None
        size = len(order)
        before = 1 - torch.arange(peak, dtype=torch.float32) / peak
        after = -(torch.arange(size - peak, dtype=torch.float32) + 1) / max(1, size - peak)
        values = torch.empty(size)
        values[order] = torch.cat([before, after])
        return values

    @property
    def text(self) -> str:
        """What happened, in plain words with the numbers."""
        probabilities = self.truth.probabilities
        wrong, right = float(probabilities[self.mistake.target]), float(probabilities[self.truth.target])
        sentences = [f"The model says {self.predicted_name} ({wrong:.2f}), the image shows {self.true_name} ({right:.2f})."]
        if bool(self.shown.right[0]):
            sentences.append(f"To the model the fill alone is {self.true_name}, so that little is enough.")
        if self.cause is not None:
            sentences.append(
                f"Hiding {_share(self.cause.area)} of the image, {_these(self.cause)}, turns {self.predicted_name} {wrong:.2f} into "
                f"{self.true_name} {self.cause.true:.2f}."
            )
        else:
            sentences.append("No set of regions was found whose removal makes the model right.")
        if self.sufficient is not None:
            alone = f"{_share(self.sufficient.area)} of the image alone, {_these(self.sufficient)}"
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
    fill: Fill = "black",
    progress: Progress | None = None,
    **options: Any,
) -> FailureExplanation:
    """Explain a misclassified image towards its true class and towards the predicted one.

    Both searches work on the same regions. The smallest sets are sought greedily: prefixes of both orders, and for the removal also
    the regions one by one that help the true class most, pruned of what they do not need.

    Args:
        image: whatever ``load_image`` takes.
        classifier: a ``Classifier``, or a name that ``load_classifier`` takes.
        true_class: index or name.
        fill: what hidden regions show.
        progress: called with (regions placed, 2 R).
        options: further arguments of ``explain``: regions, search, weights, pending, seed, preset, ...

    Raises:
        NotMisclassified: the model is right about the image.
        UserError: any input that does not fit.
    """
    if "target" in options:
        raise UserError("explain_failure takes no target: it explains the true class and the predicted one")
    if len(several_fills(fill)) > 1:
        raise UserError(f"fill {fill!r} names several: a failure is explained under one, since what makes the model right depends on it")
    classifier = load_classifier(classifier)
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
    with classifier.forwarding(options.get("batch_size")):
        hiding, masked = masked_inputs(classifier, truth.image, truth.regions.labels, same_fill)
        return _judged(_Judge(hiding, masked, true, predicted, truth.regions.area), truth, mistake, hidden)


def _judged(judge: _Judge, truth: Explanation, mistake: Explanation, hidden: Tensor) -> FailureExplanation:
    """Both orders with their curves and the smallest sets that make the model right."""
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
    """Whether the model is right about subsets of regions, and how sure."""

    def __init__(self, classifier: Classifier, masked: RegionInputs, true: int, predicted: int, area: Tensor) -> None:
        self.classifier, self.masked, self.true, self.predicted, self.area = classifier, masked, true, predicted, area
        self.evaluations = 0

    def probabilities(self, shown: Tensor) -> Tensor:
        """float32 [n, C] of subsets bool [n, R]."""
        self.evaluations += len(shown)
        return torch.cat([self.classifier.probabilities(inputs).cpu() for inputs in self.masked.parts(shown)])

    def along(self, shown: Tensor) -> Along:
        found = self.probabilities(shown)
        return Along(found[:, self.true], found[:, self.predicted], found.argmax(dim=1) == self.true)

    def right_rows(self, shown: Tensor, along: Along, last: bool = False) -> list[Tensor]:
        """The first (or last) prefix that shows some but not all, and about which the model is right: a list of one or none."""
        partial = shown.any(dim=1) & ~shown.all(dim=1)
        found = (along.right & partial).nonzero()[:, 0]
        return [shown[found[-1 if last else 0]]] if len(found) else []

    def climbed(self, size: int) -> list[Tensor]:
        """Regions to hide, each the one that helps the true class against the predicted one most, until the model is right."""
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
        """The candidate of the least area after pruning: what is not needed leaves it, largest regions first."""
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
