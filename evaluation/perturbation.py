"""Insertion, deletion, highest confidence and ROAD: what the model says while pixels appear or vanish in an explanation's order.

Every explanation is measured by the same functions. They take its order or its map, never the scores it may carry, and forward
the images again. All curves run over the exact share of pixels, the most important first in insertion and in deletion.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from attribution.classifier import Classifier, even_chunks
from attribution.dropping import DROP, is_drop
from attribution.errors import UserError, describe
from attribution.explain import classifier_fill, masked_inputs, prefix_scores
from attribution.explanation import Explanation
from attribution.image import FILLS, Fill, ImageSource, limit_size, load_image, make_fill
from attribution.masking import MaskedInputs
from attribution.regions import Regions
from evaluation.imputation import impute

HIGHEST_CONFIDENCE_SHARES = (0.25, 0.5, 0.75, 1.0)
_NAMED_FILLS = (*FILLS, "model_mean", "linear", DROP)
_IMAGE_VALUES = 2**24  # floats of composed full-size images held at once
_CONTRIBUTION_VALUES = 2**27  # floats that the contributions of all steps may take, 512 MiB; above, images are composed one by one

Output = Literal["probability", "logit"]


@dataclass(frozen=True)
class Protocol:
    """How a curve is measured.

    Attributes:
        steps: "regions", one region a step; or "pixels", an equal share of the pixels a step.
        count: number of pixel steps, at most one for each pixel; region steps have no use for it.
        fill: what hidden pixels show: whatever ``make_fill`` takes, "model_mean" (zero after the classifier's normalisation), or
            "linear" (imputed from what is shown, noise 0.01; see ``evaluation.imputation``), or "drop" (the tokens of hidden patches
            leave a vision transformer's sequence; region steps whose regions follow its patches).
        output: "probability" or "logit" of the target.
        axis: "area", the exact share of pixels; or "black_unrevealed", LiMA's, on which black pixels of the image never count:
            insertion runs over 0...b and deletion over 1-b...1, b being the share of pixels that are not black.

    Raises:
        UserError: a value other than these, or "black_unrevealed" with a fill that is not black.
    """

    steps: Literal["regions", "pixels"] = "regions"
    count: int = 50
    fill: Fill = "black"
    output: Output = "probability"
    axis: Literal["area", "black_unrevealed"] = "area"

    def __post_init__(self) -> None:
        _check_choice("steps", self.steps, ("regions", "pixels"))
        _check_choice("output", self.output, ("probability", "logit"))
        _check_choice("axis", self.axis, ("area", "black_unrevealed"))
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise UserError(f"count is {self.count}: expected a whole number of steps, at least 1")
        object.__setattr__(self, "fill", _checked_fill(self.fill))
        if is_drop(self.fill) and self.steps == "pixels":
            raise UserError("fill 'drop' with pixel steps: it hides whole patches; expected steps='regions'")
        if self.axis == "black_unrevealed" and not (isinstance(self.fill, str) and self.fill == "black"):
            raise UserError(f"axis 'black_unrevealed' with fill {describe(self.fill)}: expected fill 'black', or axis 'area'")

    def label(self) -> str:
        """A short text for tables, such as "regions, black, p" or "50 pixel steps, model_mean, logit"."""
        steps = "regions" if self.steps == "regions" else f"{self.count} pixel steps"
        plain = _plain_fill(self.fill)
        fill = "image" if str(plain).startswith("image ") else plain
        output = "p" if self.output == "probability" else "logit"
        return f"{steps}, {fill}, {output}" + (", black unrevealed" if self.axis == "black_unrevealed" else "")

    def settings(self) -> dict[str, Any]:
        """All that changes a number, as plain JSON types; an image that fills by the digest of its pixels."""
        count = self.count if self.steps == "pixels" else None
        return {"steps": self.steps, "count": count, "fill": _plain_fill(self.fill), "output": self.output, "axis": self.axis}


@dataclass(frozen=True, eq=False)
class Curves:
    """Insertion and deletion of one explanation, after k = 0...K steps, most important first.

    Attributes:
        insertion_area: float32 [K+1], share of pixels that the first k steps have revealed.
        insertion: float32 [K+1], score of the target with only these shown.
        deletion_area: float32 [K+1], share of pixels that the first k steps have removed.
        deletion: float32 [K+1], score of the target with these hidden.
        protocol: how it was measured.
    """

    insertion_area: Tensor
    insertion: Tensor
    deletion_area: Tensor
    deletion: Tensor
    protocol: Protocol

    @property
    def insertion_auc(self) -> float:
        """Area under the insertion curve (trapezoid); higher is better."""
        return float(torch.trapezoid(self.insertion.double(), self.insertion_area.double()))

    @property
    def deletion_auc(self) -> float:
        """Area under the deletion curve (trapezoid); lower is better."""
        return float(torch.trapezoid(self.deletion.double(), self.deletion_area.double()))

    @property
    def difference(self) -> float:
        """Insertion AUC - deletion AUC; higher is better."""
        return self.insertion_auc - self.deletion_auc

    @property
    def confidence(self) -> float:
        """Score of the target for the whole image."""
        return float(self.insertion[-1])

    def highest_confidence(self, share: float) -> tuple[float, float]:
        """The highest score that a prefix of at most a share of the pixels reaches (SMDL; LiMA).

        Args:
            share: most pixels revealed, in (0, 1]; the published ones are ``HIGHEST_CONFIDENCE_SHARES``.

        Returns:
            That score and the revealed area where it is first reached; (nan, nan) where the first step alone is larger.
            Published means skip such images: count them.
        """
        if not 0 < share <= 1:
            raise UserError(f"share is {share}: expected a share of the pixels in (0, 1]")
        fitting = int((self.insertion_area[1:] <= share + 1e-6).sum())
        if not fitting:
            return math.nan, math.nan
        best = 1 + int(self.insertion[1 : fitting + 1].argmax())
        return float(self.insertion[best]), float(self.insertion_area[best])


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


def perturbation_steps(explanation: Explanation, protocol: Protocol, regions: Regions | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What is revealed or removed at each step.

    Args:
        explanation: with an order, a map of pixels, or both.
        protocol: region steps take the explanation's own order where ``regions`` are absent or its own, and ``ranked_over``
            them otherwise. Pixel steps rank all pixels by the map (the ranks of the regions where there is none), ties by the
            lowest flat index, and have revealed floor(k N / K) of the N pixels after step k.
        regions: of the region steps, a partition or its label map; pixel steps do not use them.

    Returns:
        Label map int64 [H, W] with ids 0...K-1, and order int64 [K], most important first.

    Raises:
        UserError: region steps of a map without regions, regions of another size, or a map that is not finite.
    """
    if explanation.pixel_map is not None and not explanation.pixel_map.isfinite().all():
        bad = int((~explanation.pixel_map.isfinite()).sum())
        raise UserError(f"the map has {bad} values that are not finite (NaN or infinite): expected numbers, so that pixels can be ranked")
    if protocol.steps == "pixels":
        return _pixel_steps(_pixel_values(explanation), protocol.count)
    own = explanation.regions
    if regions is None and own is None:
        raise UserError("region steps of a map of pixels without regions: give regions=, or a protocol with steps='pixels'")
    wanted = own if regions is None else regions if isinstance(regions, Regions) else Regions(regions)
    assert wanted is not None
    if explanation.order is not None and own is not None and torch.equal(own.labels.cpu(), wanted.labels.cpu()):
        return own.labels.cpu(), explanation.order.cpu()
    ranked = explanation.ranked_over(wanted)
    assert ranked.order is not None
    return wanted.labels.cpu(), ranked.order.cpu()


def perturbation_curves(
    classifier: Classifier,
    image: ImageSource,
    explanation: Explanation,
    target: int | str,
    protocol: Protocol,
    *,
    regions: Regions | Tensor | None = None,
    seed: int = 0,
) -> Curves:
    """Insertion and deletion of an explanation (Petsiuk et al., BMVC 2018), by a protocol.

    2 (K + 1) images are forwarded, K being the number of steps; none of the explanation's own scores is used.

    Args:
        classifier: the model that is asked.
        image: whatever ``load_image`` takes, at the resolution of the explanation (its ``image``).
        explanation: gives the order (see ``perturbation_steps``).
        target: class whose score is followed, index or name.
        protocol: one of ``PROTOCOLS`` or your own.
        regions: of the region steps; the explanation's own by default.
        seed: of the noise of fill "linear"; one field of noise for all steps.

    Raises:
        UserError: see ``perturbation_steps``; an image of another size, no such class.
    """
    labels, order = perturbation_steps(explanation, protocol, regions)
    image, target = _loaded(image, labels), classifier.target_index(target)
    return _curves(image, labels, order, protocol, _prefix_scorer(classifier, image, labels, target, protocol, seed))


def random_order_curves(
    classifier: Classifier,
    image: ImageSource,
    regions: Regions | Tensor,
    target: int | str,
    protocol: Protocol,
    count: int = 100,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The chance level: AUCs of random orders of the same regions, measured as ``perturbation_curves`` measures.

    Args:
        regions: what is ordered at random, also under pixel steps (all pixels of one region, then all of the next).
        count: number of orders.
        seed: of the orders, and of the noise of fill "linear".
        classifier, image, target, protocol: see ``perturbation_curves``.

    Returns:
        Insertion AUCs and deletion AUCs, float64 [count] each.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"count is {count}: expected a whole number of random orders, at least 1")
    regions = regions if isinstance(regions, Regions) else Regions(regions)
    labels = regions.labels.cpu()
    image, target = _loaded(image, labels), classifier.target_index(target)
    generator = torch.Generator().manual_seed(seed)
    region_steps = protocol.steps == "regions"
    scorer = _prefix_scorer(classifier, image, labels, target, protocol, seed) if region_steps else None
    found = []
    for _ in range(count):
        order = torch.randperm(regions.count, generator=generator)
        steps = (labels, order) if region_steps else _pixel_steps(-order.argsort()[labels], protocol.count)
        found.append(_curves(image, *steps, protocol, scorer or _prefix_scorer(classifier, image, steps[0], target, protocol, seed)))
    insertion, deletion = [c.insertion_auc for c in found], [c.deletion_auc for c in found]
    return torch.tensor(insertion, dtype=torch.float64), torch.tensor(deletion, dtype=torch.float64)


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
    values = _pixel_values(explanation)
    image, target = limit_size(_loaded(image, values), max(classifier.preprocessing.size)), classifier.target_index(target)
    if values.shape != image.shape[1:]:
        values = F.interpolate(values[None, None], size=tuple(image.shape[1:]), mode="bilinear", antialias=True)[0, 0]
    ranking = _pixel_steps(values, protocol.count)[0]
    removed = [math.floor(p * ranking.numel() / 100 + 1e-9) for p in percentages]  # 57 / 100 * 100 is below 57 in floats
    most, least = torch.tensor(removed), ranking.numel() - torch.tensor(removed)
    std = classifier.preprocessing.std

    def imputed(shown: Tensor) -> Tensor:
        return impute(image.to(classifier.device), shown, noise=noise, std=std, seed=seed)

    morf = _composed_scores(classifier, imputed, lambda k: ranking >= k, most, target, output)
    lerf = _composed_scores(classifier, imputed, lambda k: ranking < k, least, target, output)
    return Road(percentages, morf, lerf)


_Scorer = Callable[[Tensor], tuple[Tensor, Tensor]]


def _prefix_scorer(classifier: Classifier, image: Tensor, labels: Tensor, target: int, protocol: Protocol, seed: int) -> _Scorer:
    """A function from an order of the labels to the scores of its prefixes, shown and hidden: float32 [K+1] each."""
    here = image.to(classifier.device)
    if is_drop(protocol.fill):
        hiding, masked = masked_inputs(classifier, image, labels, DROP)
        return lambda order: prefix_scores(_score(hiding, protocol.output), masked, order, target)
    if isinstance(protocol.fill, str) and protocol.fill == "linear":
        std = classifier.preprocessing.std

        def composed(shown: Tensor) -> Tensor:
            return impute(here, shown, std=std, seed=seed)
    else:
        fill = classifier_fill(image, protocol.fill, classifier)
        if (int(labels.max()) + 1) * 3 * math.prod(classifier.preprocessing.size) <= _CONTRIBUTION_VALUES:
            masked = MaskedInputs(classifier, image, labels, fill)
            return lambda order: prefix_scores(_score(classifier, protocol.output), masked, order, target)
        fill = fill.to(here)

        def composed(shown: Tensor) -> Tensor:
            return torch.where(shown[:, None], here, fill)

    def scorer(order: Tensor) -> tuple[Tensor, Tensor]:
        position, prefixes = order.argsort()[labels], torch.arange(len(order) + 1)
        insertion = _composed_scores(classifier, composed, lambda k: position < k, prefixes, target, protocol.output)
        deletion = _composed_scores(classifier, composed, lambda k: position >= k, prefixes, target, protocol.output)
        return insertion, deletion

    return scorer


def _composed_scores(
    classifier: Classifier,
    composed: Callable[[Tensor], Tensor],
    shown: Callable[[Tensor], Tensor],
    thresholds: Tensor,
    target: int,
    output: Output,
) -> Tensor:
    """Scores of composed images, one for each threshold, few at a time: float32 [n]."""
    score, scores = _score(classifier, output), []
    pixels = shown(thresholds[0]).numel()
    for part in even_chunks(thresholds, max(1, _IMAGE_VALUES // (3 * pixels))):
        images = composed(shown(part[:, None, None]).to(classifier.device))
        scores.append(score(classifier.preprocessing(images))[:, target].cpu())
    return torch.cat(scores)


def _score(classifier: Classifier, output: Output) -> Callable[[Tensor], Tensor]:
    return classifier.logits if output == "logit" else classifier.probabilities


def _curves(image: Tensor, labels: Tensor, order: Tensor, protocol: Protocol, scorer: _Scorer) -> Curves:
    insertion, deletion = scorer(order)
    counted = torch.ones_like(labels) if protocol.axis == "area" else (image.sum(dim=0) != 0).long()
    sizes = torch.zeros_like(order).scatter_add_(0, labels.flatten(), counted.flatten())
    revealed = torch.cat([sizes.new_zeros(1), sizes[order].cumsum(0)])
    revealed_share, uncounted_share = revealed.double() / labels.numel(), 1 - counted.double().mean()
    return Curves(revealed_share.float(), insertion, (revealed_share + uncounted_share).float(), deletion, protocol)


def _pixel_values(explanation: Explanation) -> Tensor:
    return (explanation.pixel_map if explanation.pixel_map is not None else explanation.to_pixels("rank")).cpu()


def _pixel_steps(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Steps of floor(k N / K) pixels by value: labels are step numbers, so that the order is 0...K-1."""
    pixels = values.numel()
    count = min(count, pixels)
    revealed = torch.arange(count + 1) * pixels // count
    labels = torch.empty(pixels, dtype=torch.int64)
    labels[values.flatten().argsort(descending=True, stable=True)] = torch.arange(count).repeat_interleave(revealed.diff())
    return labels.view(values.shape), torch.arange(count)


def _loaded(image: ImageSource, labels: Tensor) -> Tensor:
    loaded = load_image(image).cpu()
    if loaded.shape[1:] != labels.shape:
        raise UserError(
            f"the image is {loaded.shape[2]}x{loaded.shape[1]}, the explanation or its regions {labels.shape[1]}x{labels.shape[0]}: "
            "give the image that was explained (explanation.image)"
        )
    return loaded


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name} is {value!r}: expected {' or '.join(map(repr, choices))}")


def _checked_fill(fill: Any) -> Fill:
    """The fill with colours as tuples; images are read and compared with the image's size when they are used."""
    if isinstance(fill, list) or (isinstance(fill, Tensor | np.ndarray) and fill.ndim == 1):
        fill = tuple(fill if isinstance(fill, list) else fill.tolist())
    if isinstance(fill, tuple) or (isinstance(fill, str) and fill.startswith("#")):
        make_fill(torch.zeros(3, 1, 1), fill)
    elif isinstance(fill, str):
        if fill not in _NAMED_FILLS and not os.path.isfile(fill):
            raise UserError(f"unknown fill {fill!r}: expected one of {', '.join(_NAMED_FILLS)}, a colour such as '#808080', or an image")
    elif not isinstance(fill, Tensor | np.ndarray | Image.Image | Path | bytes):
        raise UserError(f"fill is {describe(fill)}: expected one of {', '.join(_NAMED_FILLS)}, a colour such as '#808080', or an image")
    return fill


def _plain_fill(fill: Fill) -> str | list[float]:
    if isinstance(fill, tuple):
        return [float(value) for value in fill]
    if isinstance(fill, str) and (fill in _NAMED_FILLS or fill.startswith("#")):
        return fill
    pixels = load_image(fill).cpu().contiguous().numpy()
    return f"image {list(pixels.shape)} sha256:{hashlib.sha256(pixels.tobytes()).hexdigest()}"


PROTOCOLS: dict[str, Protocol] = {
    "lima": Protocol(),
    "smdl": Protocol(steps="pixels", count=10, fill="model_mean"),
    "smdl-baselines": Protocol(steps="pixels", count=50, fill="model_mean"),
    "lima-compat": Protocol(axis="black_unrevealed"),
}
