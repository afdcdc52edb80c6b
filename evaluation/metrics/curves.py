"""Insertion, deletion and highest confidence: the score of the target while an image appears or vanishes in an explanation's order.

Every explanation is measured by the same functions. They take its order or its map, never the scores that it may carry, and forward
the images again. All curves run over the exact share of the pixels that the model sees. Insertion shows the most important first,
deletion hides it first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.checks import check_seed, check_whole, is_number
from attribution.deprecation import image_first
from attribution.dropping import masked_inputs
from attribution.errors import UserError
from attribution.fills import DROP, LINEAR, classifier_fill, is_drop, is_named
from attribution.image import ImageSource
from attribution.masking import MaskedInputs, prefix_scores
from attribution.model.classifier import Classifier
from attribution.model.forwarding import even_chunks
from attribution.model.loading import load_classifier
from attribution.task import Output
from evaluation.metrics.imputation import impute
from evaluation.metrics.judged import Judged, Partition, as_regions, image_of_size, judged
from evaluation.metrics.protocol import Protocol, as_protocol

HIGHEST_CONFIDENCE_SHARES = (0.25, 0.5, 0.75, 1.0)
_IMAGE_VALUES = 2**24  # floats of composed full-size images held at once
_CONTRIBUTION_VALUES = 2**27  # floats that the contributions of all steps may take, 512 MiB; above, images are composed one by one


@dataclass(frozen=True, eq=False)
class Curves:
    """Insertion and deletion of one explanation, after k = 0 to K steps, most important first.

    Attributes:
        insertion_area: float32 [K+1], share of the pixels seen by the model that the first k steps have revealed.
        insertion: float32 [K+1], score of the target with only these shown.
        deletion_area: float32 [K+1], share of these pixels that the first k steps have removed.
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
        """Area under the insertion curve (trapezoid rule); higher is better."""
        return float(torch.trapezoid(self.insertion.double(), self.insertion_area.double()))

    @property
    def deletion_auc(self) -> float:
        """Area under the deletion curve (trapezoid rule); lower is better."""
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
        """The highest score among the prefixes that reveal at most a share of the pixels (SMDL; LiMA).

        Args:
            share: most pixels revealed, in (0, 1]; the published ones are ``HIGHEST_CONFIDENCE_SHARES``.

        Returns:
            That score and the revealed area where it is first reached; (nan, nan) where the first step alone is larger.
            Published means skip such images: count them.
        """
        if not is_number(share) or not 0 < share <= 1:
            raise UserError(f"share is {share}: expected a share of the pixels in (0, 1]")
        fitting = int((self.insertion_area[1:] <= share + 1e-6).sum())
        if not fitting:
            return math.nan, math.nan
        best = 1 + int(self.insertion[1 : fitting + 1].argmax())
        return float(self.insertion[best]), float(self.insertion_area[best])


def perturbation_steps(explanation: Judged, protocol: Protocol, regions: Partition | None = None) -> tuple[Tensor, Tensor]:
    """Find what each step reveals or removes.

    Args:
        explanation: an ``Explanation``, a map [H, W], or an order of ``regions`` (see ``judged``).
        protocol: region steps keep the order of an explanation whose regions are those that are asked for; otherwise they rank the
            regions by the mean of the map. Pixel steps rank all pixels by the map (of an order, by the ranks of its regions), ties by
            the lowest flat index, and have revealed floor(k N / K) of the N pixels after step k.
        regions: of the region steps, a partition or its label map; the explanation's own by default. Pixel steps use them only to
            read an order.

    Returns:
        Label map int64 [H, W] with ids 0 to K-1, and order int64 [K], most important first.

    Raises:
        UserError: see ``judged``; region steps of a map without regions, or regions of another size.
    """
    claim = judged(explanation, regions)
    return pixel_steps(claim.values, protocol.count) if protocol.steps == "pixels" else claim.order_over(regions)


@image_first
def perturbation_curves(
    image: ImageSource,
    classifier: Classifier | str,
    explanation: Judged,
    target: int | str,
    protocol: Protocol | str = "lima",
    *,
    regions: Partition | None = None,
    seed: int = 0,
) -> Curves:
    """Measure insertion and deletion of an explanation (Petsiuk et al., BMVC 2018) under a protocol.

    With K steps, 2 (K + 1) images are forwarded.

    Args:
        image: whatever ``load_image`` takes, at the resolution of the explanation (its ``image``).
        classifier: the model that is asked, or a name that ``load_classifier`` takes.
        explanation: an ``Explanation``, a map [H, W], or an order of ``regions``; gives the steps (see ``perturbation_steps``).
        target: class whose score is followed, index or name.
        protocol: a key of ``PROTOCOLS``, or a ``Protocol`` of your own; by default one region a step, hidden pixels black, probability.
        regions: of the region steps; the explanation's own by default.
        seed: of the noise of fill "linear"; all steps share one field of noise.

    Raises:
        UserError: see ``perturbation_steps``; an image of another size, no such class or protocol.
    """
    check_seed(seed)
    classifier, protocol = load_classifier(classifier), as_protocol(protocol)
    labels, order = perturbation_steps(explanation, protocol, regions)
    loaded, index = image_of_size(image, labels), classifier.target_index(target)
    scorer = _prefix_scorer(classifier, loaded, labels, index, protocol, seed)
    return _curves(classifier, loaded, labels, order, protocol, scorer)


@image_first
def random_order_curves(
    image: ImageSource,
    classifier: Classifier | str,
    regions: Partition,
    target: int | str,
    protocol: Protocol | str,
    count: int = 100,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Measure the chance level: AUCs of random orders of the same regions, as ``perturbation_curves`` measures them.

    Args:
        regions: what is ordered at random, a partition or its label map. Pixel steps take all pixels of one region, then all of the
            next.
        count: number of orders.
        seed: of the orders, and of the noise of fill "linear".
        image, classifier, target, protocol: see ``perturbation_curves``.

    Returns:
        Insertion AUCs and deletion AUCs, float64 [count] each.
    """
    check_whole("count", count, 1)
    check_seed(seed)
    classifier, protocol, regions = load_classifier(classifier), as_protocol(protocol), as_regions(regions)
    labels = regions.labels.cpu()
    loaded, index = image_of_size(image, labels), classifier.target_index(target)
    generator = torch.Generator().manual_seed(seed)
    region_steps = protocol.steps == "regions"
    scorer = _prefix_scorer(classifier, loaded, labels, index, protocol, seed) if region_steps else None
    found = []
    for _ in range(count):
        order = torch.randperm(regions.count, generator=generator)
        steps = (labels, order) if region_steps else pixel_steps(-order.argsort()[labels], protocol.count)
        own = scorer or _prefix_scorer(classifier, loaded, steps[0], index, protocol, seed)
        found.append(_curves(classifier, loaded, *steps, protocol, own))
    insertion, deletion = [c.insertion_auc for c in found], [c.deletion_auc for c in found]
    return torch.tensor(insertion, dtype=torch.float64), torch.tensor(deletion, dtype=torch.float64)


_Scorer = Callable[[Tensor], tuple[Tensor, Tensor]]


def _prefix_scorer(classifier: Classifier, image: Tensor, labels: Tensor, target: int, protocol: Protocol, seed: int) -> _Scorer:
    """A function from an order of the labels to the scores with each prefix shown, and with it hidden: float32 [K+1] each."""
    here = image.to(classifier.device)
    if is_drop(protocol.fill):
        hiding, masked = masked_inputs(classifier, image, labels, DROP)
        return lambda order: prefix_scores(_score(hiding, protocol.output), masked, order, target)
    if is_named(protocol.fill, (LINEAR,)):
        std = classifier.preprocessing.std_colour

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
        insertion = composed_scores(classifier, composed, lambda k: position < k, prefixes, target, protocol.output)
        deletion = composed_scores(classifier, composed, lambda k: position >= k, prefixes, target, protocol.output)
        return insertion, deletion

    return scorer


def composed_scores(
    classifier: Classifier,
    composed: Callable[[Tensor], Tensor],
    shown: Callable[[Tensor], Tensor],
    thresholds: Tensor,
    target: int,
    output: Output,
) -> Tensor:
    """Score images that are composed one for each threshold, a few at a time: float32 [n].

    Args:
        composed: from masks bool [n, H, W], True where the image is shown, to images [n, 3, H, W].
        shown: from thresholds [n, 1, 1] to these masks.
    """
    score, scores = _score(classifier, output), []
    pixels = shown(thresholds[0]).numel()
    for part in even_chunks(thresholds, max(1, _IMAGE_VALUES // (3 * pixels))):
        images = composed(shown(part[:, None, None]).to(classifier.device))
        scores.append(score(classifier.preprocessing(images))[:, target].cpu())
    return torch.cat(scores)


def _score(classifier: Classifier, output: Output) -> Callable[[Tensor], Tensor]:
    return classifier.logits if output == "logit" else classifier.probabilities


def _curves(classifier: Classifier, image: Tensor, labels: Tensor, order: Tensor, protocol: Protocol, scorer: _Scorer) -> Curves:
    insertion, deletion = scorer(order)
    if protocol.axis == "area":
        counted = torch.zeros_like(labels)
        top, left, bottom, right = classifier.preprocessing.seen(*labels.shape)
        counted[top:bottom, left:right] = 1  # pixels that the model crops away change nothing, and would only stretch a curve
        total = int(counted.sum())
    else:
        counted, total = (image.sum(dim=0) != 0).long(), labels.numel()
    sizes = torch.zeros_like(order).scatter_add_(0, labels.flatten(), counted.flatten())
    revealed = torch.cat([sizes.new_zeros(1), sizes[order].cumsum(0)])
    revealed_share, uncounted_share = revealed.double() / total, 1 - counted.sum().double() / total
    return Curves(revealed_share.float(), insertion, (revealed_share + uncounted_share).float(), deletion, protocol)


def pixel_steps(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Steps of floor(k N / K) pixels by value: labels are step numbers, so that the order is 0 to K-1."""
    pixels = values.numel()
    count = min(count, pixels)
    revealed = torch.arange(count + 1) * pixels // count
    labels = torch.empty(pixels, dtype=torch.int64)
    labels[values.flatten().argsort(descending=True, stable=True)] = torch.arange(count).repeat_interleave(revealed.diff())
    return labels.view(values.shape), torch.arange(count)
