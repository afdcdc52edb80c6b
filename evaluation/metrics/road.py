"""ROAD (Rong et al., ICML 2022): removal with noisy linear imputation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.errors import UserError
from attribution.explanation import Explanation
from attribution.image import ImageSource, limit_size
from attribution.model.classifier import Classifier
from evaluation.metrics.curves import composed_scores, loaded_image, perturbation_steps, pixel_steps, pixel_values
from evaluation.metrics.imputation import impute
from evaluation.metrics.protocol import Output, Protocol


@dataclass(frozen=True, eq=False)
class Road:
    """ROAD of one explanation: scores of the target after the most or the least relevant pixels were imputed.

    Attributes:
        percentages: [P] of the pixels that were imputed.
        morf: float32 [P], most relevant first; an explanation is good where it falls.
        lerf: float32 [P], least relevant first; an explanation is good where it stays.
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


def road(
    classifier: Classifier,
    image: ImageSource,
    explanation: Explanation,
    target: int | str,
    *,
    percentages: Sequence[float] = (10, 20, 30, 40, 50, 60, 70, 80, 90),
    noise: float = 0.01,
    output: Output = "probability",
    seed: int = 0,
) -> Road:
    """Remove and debias (Rong et al., ICML 2022): the target's score after pixels were replaced by noisy linear imputation.

    Pixels are ranked as in pixel steps; the least relevant are the last of that ranking. 2 P images are forwarded. Image and map
    are shrunk to the long side of the model's input first, where they are larger: the model would not see the pixels between.

    Args:
        classifier, image, explanation, target: see ``perturbation_curves``.
        percentages: of the pixels imputed, ascending in (0, 99]; the number of pixels is rounded down.
        noise: standard deviation of the noise in units of the normalised input.
        output: "probability" or "logit".
        seed: of the noise; one field of noise for all images.

    Raises:
        UserError: see ``perturbation_curves``; percentages out of range or order.
    """
    percentages = tuple(percentages)
    ascending = all(a < b for a, b in zip((0, *percentages), percentages, strict=False))
    if not percentages or not ascending or percentages[-1] > 99:
        raise UserError(f"percentages are {list(percentages)}: expected ascending numbers in (0, 99] (nothing is left to impute 100 from)")
    protocol = Protocol(steps="pixels", count=2**62, fill="linear", output=output)
    perturbation_steps(explanation, protocol)  # checks the map
    values = pixel_values(explanation)
    image, target = limit_size(loaded_image(image, values), max(classifier.preprocessing.size)), classifier.target_index(target)
    if values.shape != image.shape[1:]:
        values = F.interpolate(values[None, None], size=tuple(image.shape[1:]), mode="bilinear", antialias=True)[0, 0]
    ranking = pixel_steps(values, protocol.count)[0]
    removed = [math.floor(p * ranking.numel() / 100 + 1e-9) for p in percentages]  # 57 / 100 * 100 is below 57 in floats
    most, least = torch.tensor(removed), ranking.numel() - torch.tensor(removed)
    std = classifier.preprocessing.std

    def imputed(shown: Tensor) -> Tensor:
        return impute(image.to(classifier.device), shown, noise=noise, std=std, seed=seed)

    morf = composed_scores(classifier, imputed, lambda k: ranking >= k, most, target, output)
    lerf = composed_scores(classifier, imputed, lambda k: ranking < k, least, target, output)
    return Road(percentages, morf, lerf)
