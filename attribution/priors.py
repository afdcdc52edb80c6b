"""Priors: guesses of how important each region is, with which a search begins."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.baselines.attribute import attribute, find_method
from attribution.errors import NotApplicable, UserError, describe
from attribution.explanation import Explanation
from attribution.image import ImageSource
from attribution.model.classifier import Classifier
from attribution.objective import IMAGES_PER_GRADIENT, MeanObjective, SubmodularObjective
from attribution.regions import Regions

AUTO = "auto"
PRIORS = ("grad_cam", "transformer_attribution", "integrated_gradients")  # what "auto" tries, one after the other
_JUDGED_AT = (0.25, 0.5, 0.75)  # shares of the image at which several priors are compared


@dataclass(frozen=True, eq=False)
class PriorMap:
    """A map with which a search may begin.

    Attributes:
        values: float [h, w], higher where the image matters more; any size.
        name: of the method, "map" or "explanation".
        images: what making it counts as, in forwarded images.
    """

    values: Tensor
    name: str
    images: int = 0

    def over(self, regions: Regions) -> Tensor:
        """The mean over the pixels of each region that the model sees: float64 [R]; 0 where it sees none."""
        labels, values = regions.labels, self.values.double()
        if values.shape != labels.shape:
            values = F.interpolate(values[None, None], size=tuple(labels.shape), mode="bilinear", antialias=True)[0, 0]
        seen = regions.seen_labels.flatten()
        sums = torch.zeros(regions.count, dtype=torch.float64).scatter_add_(0, seen, regions.seen_part(values).flatten())
        return sums / seen.bincount(minlength=regions.count).clamp(min=1)


Prior = str | Tensor | np.ndarray | Explanation | PriorMap


def prior_maps(
    prior: Prior | Sequence[Prior], image: ImageSource, classifier: Classifier, target: int | str | None, seed: int
) -> list[PriorMap]:
    """Read or make priors.

    Args:
        prior: one or several of: "auto", a key of ``METHODS``, a map of floats [h, w], or an ``Explanation``.
        image: whatever ``load_image`` takes; methods work at its own size.
        classifier: the model.
        target: class, index or name; the predicted class by default.
        seed: of stochastic methods.

    Returns:
        One for each prior. "auto" gives one or, for a black box or a model to which none of ``PRIORS`` applies, none.

    Raises:
        UserError: something else.
        NotApplicable: a method, given by name, that is not defined for the model.
    """
    if not isinstance(prior, str | Tensor | np.ndarray | Explanation | PriorMap | Sequence):
        raise UserError(f"a prior is {describe(prior)}: expected auto, a method, a map [h, w], an Explanation, or several of them")
    given = [prior] if isinstance(prior, str | Tensor | np.ndarray | Explanation | PriorMap) else list(prior)
    found = list[PriorMap]()
    for each in given:
        if isinstance(each, PriorMap):
            found.append(each)
        elif isinstance(each, str) and each == AUTO:
            found += _automatic(image, classifier, target, seed)
        elif isinstance(each, str):
            found.append(_by_method(each, image, classifier, target, seed))
        else:
            found.append(PriorMap(_map_of(each), "explanation" if isinstance(each, Explanation) else "map"))
    return found


def best_prior(found: Sequence[PriorMap], regions: Regions, objective: SubmodularObjective | MeanObjective) -> PriorMap:
    """The map with the highest sum of F over its first regions that cover 1/4, 1/2 and 3/4 of the image. One alone is not judged.

    Returns:
        It, with the images of all. Those that comparing them forwards are counted by the objective.
    """
    if len(found) == 1:
        return found[0]
    scores = []
    for each in found:
        order = each.over(regions).argsort(descending=True, stable=True)
        places = regions.area[order].cumsum(0)
        rows = torch.zeros(len(_JUDGED_AT), len(order), dtype=torch.bool)
        for row, share in zip(rows, _JUDGED_AT, strict=True):
            row[order[: int((places < share).sum()) + 1]] = True
        scores.append(float(objective(rows).sum()))
    return replace(found[int(np.argmax(scores))], images=sum(each.images for each in found))


def _automatic(image: ImageSource, classifier: Classifier, target: int | str | None, seed: int) -> list[PriorMap]:
    if not isinstance(classifier.module, torch.nn.Module):
        return []
    spent = 0
    for method in PRIORS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a constant map is not taken
                made = _by_method(method, image, classifier, target, seed)
        except NotApplicable:
            continue
        spent += made.images
        if made.values.max() > made.values.min():
            return [replace(made, images=spent)]
    return []


def _by_method(method: str, image: ImageSource, classifier: Classifier, target: int | str | None, seed: int) -> PriorMap:
    made = attribute(image, classifier, method, target, seed=seed, max_side=None)
    cost = 1 if find_method(method).black_box else IMAGES_PER_GRADIENT
    return PriorMap(made.values, method, cost * made.evaluations)


def _map_of(prior: Tensor | np.ndarray | Explanation) -> Tensor:
    values = prior.values if isinstance(prior, Explanation) else prior
    values = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if not isinstance(values, Tensor) or values.ndim != 2 or not values.is_floating_point() or not values.numel():
        raise UserError(
            f"a prior is {describe(prior)}: expected 'auto', the name of an attribution method, a map of floats [H, W] or an Explanation"
        )
    if not values.isfinite().all():
        raise UserError(f"a prior has {int((~values.isfinite()).sum())} values that are not finite: expected numbers")
    return values.detach().cpu()
