"""ROAD (Rong et al., ICML 2022): removal with noisy linear imputation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.checks import check_choice, check_seed
from attribution.deprecation import image_first
from attribution.errors import UserError
from attribution.image import ImageSource
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.task import Output
from evaluation.metrics.curves import composed_scores, pixel_steps
from evaluation.metrics.imputation import impute
from evaluation.metrics.judged import Judged, Partition, judged_on


@dataclass(frozen=True, eq=False)
class Road:
    """ROAD of one explanation: scores of the target after the most or the least relevant pixels were imputed.

    Attributes:
        percentages: [P] of the pixels that were imputed.
        morf: float32 [P], scores with the most relevant removed first; a good explanation makes them fall.
        lerf: float32 [P], scores with the least relevant removed first; a good explanation keeps them high.
    """

    percentages: tuple[float, ...]
    morf: Tensor
    lerf: Tensor

    @property
    def score(self) -> float:
        """Mean of (lerf - morf) / 2 over the percentages, the combination of pytorch-grad-cam; higher is better."""
        return float((self.lerf.double() - self.morf.double()).mean() / 2)

    @property
    def area(self) -> float:
        """Area between the two curves over the share of pixels (trapezoid), from the first to the last percentage."""
        shares = torch.tensor(self.percentages, dtype=torch.float64) / 100
        return float(torch.trapezoid(self.lerf.double() - self.morf.double(), shares))


@image_first
def road(
    image: ImageSource,
    classifier: Classifier | str,
    explanation: Judged,
    target: int | str,
    *,
    regions: Partition | None = None,
    percentages: Sequence[float] = (10, 20, 30, 40, 50, 60, 70, 80, 90),
    noise: float = 0.01,
    output: Output = "probability",
    seed: int = 0,
) -> Road:
    """Remove and debias (Rong et al., ICML 2022): score the target after pixels were replaced by noisy linear imputation.

    Pixels are ranked as in pixel steps; the least relevant are the last of that ranking. With P percentages, 2 P images are forwarded.
    An image larger than the model sees it is first shrunk to the size at which the model sees it, and its map with it: the model would
    not see the pixels between. Pixels that a crop leaves out are neither counted nor removed.

    Args:
        image, classifier, explanation, target: see ``perturbation_curves``.
        regions: of an order; not read otherwise.
        percentages: of the pixels imputed, ascending in (0, 99]; the number of pixels is rounded down.
        noise: standard deviation of the noise, in units of the normalised input.
        output: "probability" or "logit".
        seed: of the noise; all images share one field of noise.

    Raises:
        UserError: see ``perturbation_curves``; percentages out of range or order.
    """
    check_seed(seed)
    check_choice("output", output, ("probability", "logit"))
    percentages = tuple(percentages)
    ascending = all(a < b for a, b in zip((0, *percentages), percentages, strict=False))
    if not percentages or not ascending or percentages[-1] > 99:
        raise UserError(f"percentages are {list(percentages)}: expected ascending numbers in (0, 99] (nothing is left to impute 100 from)")
    classifier = load_classifier(classifier)
    loaded, claim = judged_on(image, explanation, regions)
    small, values, index = loaded, claim.values, classifier.target_index(target)
    sides = [
        max(1, round(side * min(1.0, scale)))
        for side, (scale, _) in zip(values.shape, classifier.preprocessing.placement(*values.shape), strict=True)
    ]
    if sides != list(values.shape):
        both = torch.cat([loaded, values[None]])[None]
        small, values = F.interpolate(both, size=sides, mode="bilinear", antialias=True)[0].split([3, 1])
        small, values = small.clamp(0, 1), values[0]
    top, left, bottom, right = classifier.preprocessing.seen(*small.shape[1:])
    ranking = pixel_steps(values[top:bottom, left:right], (bottom - top) * (right - left))[0]
    removed = [math.floor(p * ranking.numel() / 100 + 1e-9) for p in percentages]  # 57 / 100 * 100 is below 57 in floats
    most, least = torch.tensor(removed), ranking.numel() - torch.tensor(removed)
    beyond = (left, small.shape[2] - right, top, small.shape[1] - bottom)
    std = classifier.preprocessing.std_colour

    def imputed(shown: Tensor) -> Tensor:
        return impute(small.to(classifier.device), F.pad(shown, beyond, value=True), noise=noise, std=std, seed=seed)

    morf = composed_scores(classifier, imputed, lambda k: ranking >= k, most, index, output)
    lerf = composed_scores(classifier, imputed, lambda k: ranking < k, least, index, output)
    return Road(percentages, morf, lerf)
