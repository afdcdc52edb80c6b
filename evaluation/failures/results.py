"""Results of the study of failures: the misclassified images of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attribution.explanation import Explanation
from attribution.model.classifier import Classifier
from evaluation.data.dataset import ImageDataset
from evaluation.failures.settings import FailureSettings


@dataclass(frozen=True, eq=False)
class Failed:
    """A misclassified image and its explanation.

    Attributes:
        sample, index: id (followed by ":LABEL" where labels are independent) and place in the data set.
        label, predicted: indices into ``FailureResults.names``.
        group: of the data list, or None.
        found: ``FailureExplanation.plain()``: orders, curves, smallest sets, highest probabilities, text.
        truth: file of the ``Explanation`` of the true class, with image and regions.
        on_mask: share of the causing regions' area that lies on the object; None without a mask or a cause.
        chance_on_mask: share of the image's area that lies on the object; None without a mask.
        object_share: for each region, the share of its pixels that lies on the object; None without a mask.
    """

    sample: str
    index: int
    label: int
    predicted: int
    group: str | None
    found: Mapping[str, Any]
    truth: Path
    on_mask: float | None = None
    chance_on_mask: float | None = None
    object_share: tuple[float, ...] | None = None

    def explanation(self) -> Explanation:
        """The stored explanation of the true class."""
        return Explanation.load(self.truth)

    @property
    def is_repaired(self) -> bool:
        """Whether hiding some regions, or showing only some, makes the model right."""
        return self.found["cause"] is not None or self.found["sufficient"] is not None


@dataclass(frozen=True, eq=False)
class FailureResults:
    """What ``run_failures`` found.

    Attributes:
        settings: as given.
        classifier, dataset: the model and the images.
        looked_at, right: number of images that the model predicted, and of those that it got right. Where labels are independent,
            each label of each image is counted: a missing and a false label are two failures.
        by_class: images looked at by label.
        by_group: (images looked at, wrong) by group, where the data have groups.
        failures: the misclassified images that were explained, in the order drawn.
        broken: (sample, reason) of what could not be read or explained.
        out: folder.
        confusions: number of images by (label, predicted) among all that were looked at, explained or not.
    """

    settings: FailureSettings
    classifier: Classifier
    dataset: ImageDataset
    looked_at: int
    right: int
    by_class: Mapping[int, int]
    by_group: Mapping[str, tuple[int, int]]
    failures: tuple[Failed, ...]
    broken: tuple[tuple[str, str], ...]
    out: Path
    confusions: Mapping[tuple[int, int], int] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what labels and predictions stand for: C classes; or C independent labels, then C names "no LABEL"."""
        names = self.classifier.class_names
        return (*names, *(f"no {name}" for name in names)) if self.classifier.outputs.independent else names

    @property
    def noun(self) -> str:
        """What the model is right or wrong about."""
        return "decision" if self.classifier.outputs.independent else "image"
