"""Subsets of regions become model inputs by one matrix product on the device.

Preprocessing begins with an affine P. With an image x, a fill f, the indicator m_r of region r, and the linear part L of P, a subset s
gives P(f) + sum_r s_r L(m_r (x - f)). The R contributions L(m_r (x - f)) are computed once. Of the preprocessing only what follows the
first clip of a bicubic resize is then left to do for each subset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from attribution.model.classifier import Classifier
from attribution.model.forwarding import even_chunks
from attribution.regions import Regions


def prefix_probabilities(classifier: Classifier, masked: RegionInputs, order: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Probability of the target with the first k regions shown, and with them hidden, k = 0 to R: float32 [R+1] each."""
    return prefix_scores(classifier.probabilities, masked, order, target)


def prefix_scores(score: Callable[[Tensor], Tensor], masked: RegionInputs, order: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Score of the target with the first k regions shown, and with them hidden, k = 0 to R: float32 [R+1] each.

    Args:
        score: inputs [n, 3, h, w] -> [n, C], such as ``classifier.probabilities`` or ``classifier.logits``.
        masked: R regions.
        order: int64 [R], region ids, most important first.
        target: class index.

    Returns:
        Insertion and deletion scores.
    """
    shown = prefix_rows(order)
    both = torch.cat([score(inputs)[:, target] for inputs in masked.parts(torch.cat([shown, ~shown]))])
    insertion, deletion = both.cpu().split(len(shown))
    return insertion, deletion


_CHUNK_VALUES = 2**24  # floats of masked full-size images held at once while the contributions are made
_INPUT_VALUES = 2**25  # floats of model inputs held at once, 128 MiB


def prefix_rows(order: Tensor) -> Tensor:
    """The subsets of the first k regions of an order int64 [R], k = 0 to R: bool [R+1, R]."""
    size = len(order)
    rows = torch.zeros(size + 1, size, dtype=torch.bool)
    rows[:, order] = torch.ones(size + 1, size).tril(-1).bool()
    return rows


def as_seen(regions: Regions, classifier: Classifier) -> Regions:
    """The same regions, their areas counted over the pixels that the classifier's crop leaves."""
    height, width = regions.labels.shape
    seen = classifier.preprocessing.seen(height, width)
    return replace(regions, seen=None if seen == (0, 0, height, width) else seen)


class RegionInputs:
    """Model inputs of any subsets of an image's regions.

    Args:
        labels: int64 [H, W], region ids 0 to R-1, none empty.
        classifier: of which the crop decides which pixels are seen.
        values: how many floats one input has.

    Attributes:
        size: R, the number of regions.
        area: float64 [R], share of the pixels that the classifier sees in each, on the CPU.
        centres: float64 [R, 2], mean row and column of each, pixels, on the CPU.
    """

    def __init__(self, labels: Tensor, classifier: Classifier, values: int) -> None:
        self._values = values
        self.size = int(labels.max()) + 1
        top, left, bottom, right = classifier.preprocessing.seen(*labels.shape)
        seen = labels[top:bottom, left:right].flatten().cpu()
        self.area = seen.bincount(minlength=self.size).double() / seen.numel()
        pixels = labels.flatten().cpu()
        count = pixels.bincount(minlength=self.size).double()
        places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in labels.shape))
        self.centres = torch.stack([pixels.bincount(place, self.size) / count for place in places.T], dim=1)

    def __call__(self, subsets: Tensor) -> Tensor:
        """Inputs with the given regions shown: bool [n, R] -> float32 [n, C, h, w]."""
        raise NotImplementedError

    def parts(self, subsets: Tensor) -> Iterator[Tensor]:
        """The same inputs in several parts, so that a bounded number of values is in memory at once."""
        rows = max(64, _INPUT_VALUES // self._values)
        return (self(part) for part in even_chunks(subsets, rows) if len(part))


class MaskedInputs(RegionInputs):
    """Hidden regions show a fill.

    Args:
        classifier: gives preprocessing and device.
        image: float32 [3, H, W] in [0, 1] (any map with the classifier's number of channels).
        labels: int64 [H, W], region ids 0 to R-1, none empty.
        fill: float32 [3, H, W], shown where regions are hidden.
    """

    def __init__(self, classifier: Classifier, image: Tensor, labels: Tensor, fill: Tensor) -> None:
        device, preprocess = classifier.device, classifier.preprocessing
        super().__init__(labels, classifier, math.prod(preprocess.shape))
        image, labels, fill = image.to(device), labels.to(device), fill.to(device)
        hidden = preprocess.begun(fill[None])
        self._shape, self._hidden = hidden.shape[1:], hidden.flatten()
        self._preprocess, self._sides = preprocess, (image.shape[-2], image.shape[-1])
        self._contributions = self._hidden.new_empty(self.size, self._hidden.numel())
        difference = image - fill
        step = max(1, _CHUNK_VALUES // difference.numel())
        for start in range(0, self.size, step):
            regions = torch.arange(start, min(start + step, self.size), device=device)
            masked = (labels == regions[:, None, None])[:, None] * difference
            self._contributions[start : start + step] = preprocess.begun_difference(masked).flatten(1)

    def __call__(self, subsets: Tensor) -> Tensor:
        """Inputs with the given regions shown on the fill: bool [n, R] -> float32 [n, 3, h, w]."""
        shown = subsets.to(self._contributions)
        begun = torch.addmm(self._hidden, shown, self._contributions).unflatten(1, self._shape)
        return self._preprocess.finished(begun, *self._sides)
