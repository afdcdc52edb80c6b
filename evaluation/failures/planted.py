"""Failures with a known cause: a patch of another image flips the prediction, and explanations are judged by whether they find it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.baselines.attribute import attribute
from attribution.checks import check_whole, is_number
from attribution.errors import NotApplicable, UserError
from attribution.failure import FailureExplanation, explain_failure
from attribution.model.classifier import Classifier
from evaluation.data.dataset import ImageDataset, Sample
from evaluation.metrics.localization import energy_pointing_game, pointing_game

OURS = ("causing regions", "first region of the mistake", "map towards the mistake")
GRADIENT_METHODS = ("saliency", "input_x_gradient", "integrated_gradients", "smooth_grad", "guided_backprop", "grad_cam", "layer_cam")


@dataclass(frozen=True, eq=False)
class Planted:
    """An image that a pasted patch makes the model get wrong.

    Attributes:
        sample: id of the image.
        image: float32 [3, H, W] with the patch.
        label, predicted: class of the image, and the class that the model predicts with the patch: that of the donor.
        mask: bool [H, W], the patch.
        donor: id of the image that the patch is from.
    """

    sample: str
    image: Tensor
    label: int
    predicted: int
    mask: Tensor
    donor: str


def plant_failures(
    classifier: Classifier, dataset: ImageDataset, count: int, *, side: float = 1 / 3, tries: int = 30, seed: int = 0
) -> Iterator[Planted]:
    """Find images that the model gets right, and patches that make it predict the class of the image that they are from.

    Args:
        classifier: of the images.
        dataset: labelled images of one size.
        count: number of failures to find; fewer are returned if the data do not allow more.
        side: of the patch, as a share of the image's short side.
        tries: patches and places tried for one image.
        seed: of the images, patches and places.

    Raises:
        UserError: a number out of range, or images without labels.
    """
    check_whole("count", count, 1)
    check_whole("tries", tries, 1)
    if not is_number(side) or not 0 < side < 1:
        raise UserError(f"side is {side!r}: expected a number between 0 and 1, both excluded")
    generator = np.random.default_rng(seed)
    order = dataset.choose(None, seed, labels_only=True)
    made = 0
    for index in order:
        if made == count:
            return
        sample = dataset[index]
        if int(classifier.probabilities(classifier.inputs(sample.image))[0].argmax()) != sample.label:
            continue
        donors = (dataset[order[-1 - int(generator.integers(len(order)))]] for _ in range(tries))
        patched = [
            _patched(sample, donor, side, generator)
            for donor in donors
            if donor.label != sample.label and donor.image.shape == sample.image.shape
        ]
        if not patched:
            continue
        found = classifier.probabilities(torch.cat([classifier.inputs(each.image) for each in patched])).argmax(dim=1).tolist()
        flipped = [each for each, predicted in zip(patched, found, strict=True) if predicted == each.predicted]
        if flipped:
            made += 1
            yield flipped[0]


def _patched(sample: Sample, donor: Sample, side: float, generator: np.random.Generator) -> Planted:
    """The image with a square of the donor, both at random places."""
    assert sample.label is not None and donor.label is not None
    height, width = sample.image.shape[1:]
    size = max(1, round(side * min(height, width)))
    y, x, v, u = (int(generator.integers(limit - size + 1)) for limit in (height, width, height, width))
    image, mask = sample.image.clone(), torch.zeros(height, width, dtype=torch.bool)
    image[:, y : y + size, x : x + size] = donor.image[:, v : v + size, u : u + size]
    mask[y : y + size, x : x + size] = True
    return Planted(sample.id, image, sample.label, donor.label, mask, donor.id)


def judge_planted(
    classifier: Classifier,
    planted: Planted,
    methods: Sequence[str] = GRADIENT_METHODS,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **failure_options: Any,
) -> dict[str, tuple[float, float]]:
    """Judge maps by whether they find the patch, with ``energy_pointing_game`` and ``pointing_game``.

    Our maps are three: the regions whose removal makes the model right (2 in the first of them, 1 in the others, 0 elsewhere), the
    first region of the order towards the mistake, and the heatmap of that order. Baselines explain the predicted, wrong class.

    Args:
        classifier: of the images.
        planted: a failure.
        methods: keys of ``METHODS``.
        options: of each method, by its name.
        failure_options: of ``explain_failure``.

    Returns:
        By name: the share of the map's positive energy inside the patch, and whether its highest value lies inside (1 or 0). A method
        that is not defined for the model is left out.
    """
    found: dict[str, tuple[float, float]] = {}
    failure = explain_failure(planted.image, classifier, planted.label, **failure_options)
    for name, values in zip(OURS, _maps(failure), strict=True):
        found[name] = _judged(values, planted.mask)
    for method in methods:
        try:
            made = attribute(planted.image, classifier, method, planted.predicted, **(options or {}).get(method, {}))
        except NotApplicable:
            continue
        found[method] = _judged(made.values, planted.mask)
    return found


def _maps(failure: FailureExplanation) -> tuple[Tensor, Tensor, Tensor]:
    regions, order = failure.truth.regions, failure.mistake.order
    assert regions is not None and order is not None
    causing = torch.zeros(regions.count)
    if failure.cause is not None:
        causing[failure.cause.regions] = 1
        causing[failure.cause.regions[0]] = 2
    first = torch.zeros(regions.count)
    first[order[0]] = 1
    return causing[regions.labels], first[regions.labels], failure.mistake.heatmap


def _judged(values: Tensor, mask: Tensor) -> tuple[float, float]:
    return energy_pointing_game(values, mask), pointing_game(values, mask)


def chance(planted: Planted) -> float:
    """The share of the image that the patch covers: the energy that a uniform map has inside."""
    return float(planted.mask.float().mean())
