"""Failures with a known cause: a patch of another image, pasted where it flips the prediction; do explanations find it?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.baselines.attribute import attribute
from attribution.errors import NotApplicable, UserError
from attribution.failure import FailureExplanation, explain_failure
from attribution.model.classifier import Classifier
from evaluation.data.dataset import ImageDataset
from evaluation.metrics.localization import energy_pointing_game, pointing_game

OURS = ("causing regions", "first region of the mistake", "map towards the mistake")
GRADIENT_METHODS = ("saliency", "input_x_gradient", "integrated_gradients", "smooth_grad", "guided_backprop", "grad_cam", "layer_cam")


@dataclass(frozen=True, eq=False)
class Planted:
    """An image that a patch makes a failure of.

    Attributes:
        sample: id of the image.
        image: float32 [3, H, W] with the patch.
        label, predicted: class of the image, and what the model makes of it with the patch.
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
    """Images that the model gets right and a pasted patch makes it get wrong, as the class of the patch's image.

    Args:
        classifier: of the images.
        dataset: labelled images of one size.
        count: how many; fewer where the data do not give them.
        side: of the patch, as a share of the image's short side.
        tries: patches and places tried for one image.
        seed: of the images, patches and places.
    """
    if count < 1 or not 0 < side < 1 or tries < 1:
        raise UserError(f"count={count}, side={side}, tries={tries}: expected at least 1, a share below 1, at least 1")
    generator = np.random.default_rng(seed)
    order = dataset.choose(None, seed, labels_only=True)
    donors = list(order[::-1])
    made = 0
    for index in order:
        if made == count:
            return
        sample = dataset[index]
        assert sample.label is not None
        if int(classifier.probabilities(classifier.inputs(sample.image))[0].argmax()) != sample.label:
            continue
        height, width = sample.image.shape[1:]
        size = max(1, round(side * min(height, width)))
        patched, places, given = [], [], []
        for _ in range(tries):
            donor = dataset[donors[int(generator.integers(len(donors)))]]
            if donor.label == sample.label or donor.image.shape != sample.image.shape:
                continue
            y, x, v, u = (int(generator.integers(limit - size + 1)) for limit in (height, width, height, width))
            image = sample.image.clone()
            image[:, y : y + size, x : x + size] = donor.image[:, v : v + size, u : u + size]
            patched.append(image)
            places.append((y, x))
            given.append(donor)
        if not patched:
            continue
        found = classifier.probabilities(torch.cat([classifier.inputs(image) for image in patched])).argmax(dim=1).tolist()
        flipped = [n for n, predicted in enumerate(found) if predicted == given[n].label]
        if flipped:
            first = flipped[0]
            y, x = places[first]
            mask = torch.zeros(height, width, dtype=torch.bool)
            mask[y : y + size, x : x + size] = True
            made += 1
            yield Planted(sample.id, patched[first], sample.label, found[first], mask, given[first].id)


def judge_planted(
    classifier: Classifier,
    planted: Planted,
    methods: Sequence[str] = GRADIENT_METHODS,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **failure_options: Any,
) -> dict[str, tuple[float, float]]:
    """(share of the positive energy inside the patch, whether the highest value lies in it) of our maps and of baselines.

    Every map is judged by ``energy_pointing_game`` and ``pointing_game`` against the patch. Ours: the regions whose removal makes the
    model right (1 there, 0 elsewhere, the first of them 2), the first region of the order towards the mistake, and the heatmap of
    that order. Baselines explain the predicted, wrong class.

    Args:
        classifier: of the images.
        planted: a failure.
        methods: keys of ``METHODS``.
        options: of each method, by its name.
        failure_options: of ``explain_failure``.

    Returns:
        by name; a method that the model does not allow is left out.
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
    """Share of the image that the patch covers: what a map that knows nothing has of its energy inside."""
    return float(planted.mask.float().mean())
