"""Missing instead of painted: the tokens of hidden patches are taken out of a vision transformer's sequence.

A painted patch is still a patch, and to the model a black one may speak for a class (missingness bias: Jain et al., ICLR 2022).
Here an image carries a fourth channel, 1 where it is hidden; the patches where it is 1 never reach the first block. Rows with as
many tokens are forwarded together, so that the cost falls with what is hidden.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution.classifier import Classifier, Preprocessing, Wrapping, even_chunks
from attribution.errors import NotApplicable, UserError
from attribution.hooks import edited_inputs
from attribution.regions import Regions

DROP = "drop"
_SLACK = 0.25  # share of a patch that may belong to other regions, as at borders that fall between pixels
_LEAST_COVERED = 0.02  # share of a patch that must be of the image, not padding, for the patch to be hidden with it


def is_drop(fill: Any) -> bool:
    """Whether a fill takes tokens away instead of painting."""
    return isinstance(fill, str) and fill == DROP


def dropping(classifier: Classifier, labels: Tensor) -> Classifier:
    """The same classifier on images of four channels, red green blue and hidden.

    Args:
        classifier: with a ``VisionTransformer`` of timm or torchvision that reads a class token.
        labels: int64 [H, W], the regions that will be hidden, in the image; they follow the patches.

    Raises:
        NotApplicable: another model, with the reason.
        UserError: regions that cut patches.
    """
    return _Dropping(classifier, labels)


def follow_patches(classifier: Classifier, regions: Regions) -> Regions:
    """Regions along the borders of patches: each patch, as it lies in the image, goes to the region that has most of it.

    What the model does not see of the image, beyond the crop, goes with the nearest patch.

    Args:
        classifier: see ``dropping``.
        regions: of an image, [H, W] pixels.

    Returns:
        A partition of the same image, and the given one where it follows the patches already. Regions that have most of no patch
        are gone.

    Raises:
        NotApplicable: a model without patches, with the reason.
    """
    patches, votes = _votes(classifier.preprocessing, _known(classifier)[2], regions.labels)
    labels = torch.from_numpy(votes.argmax(axis=1))[patches]  # of equal ones the first
    if torch.equal(labels, regions.labels):
        return regions
    _, numbers = labels.unique(return_inverse=True)
    return Regions(numbers, regions.method, regions.requested)


def _votes(way: Preprocessing, patch: tuple[int, int], labels: Tensor) -> tuple[Tensor, np.ndarray]:
    """The patch that each pixel of the image lies in or next to, int64 [H, W], and how many pixels of each region, float64 [patches, R].

    Pixels beyond the crop count for next to nothing: they decide where no others do.
    """
    labels = labels.cpu()
    down, across = (side // length for side, length in zip(way.size, patch, strict=True))
    rows, columns = way.positions(*labels.shape)
    inside = ((rows >= 0) & (rows < way.size[0]))[:, None] & (columns >= 0) & (columns < way.size[1])
    vertical, horizontal = (
        (at / length).floor().long().clamp(0, count - 1) for at, length, count in ((rows, patch[0], down), (columns, patch[1], across))
    )
    patches = vertical[:, None] * across + horizontal
    count = int(labels.max()) + 1
    weights = inside.double() + 1e-9
    found = torch.bincount((patches * count + labels).flatten(), weights.flatten(), minlength=down * across * count)
    return patches, found.view(-1, count).numpy()


def with_hidden(image: Tensor, hidden: float) -> Tensor:
    """An image [3, H, W] with its fourth channel, the same everywhere: [4, H, W]."""
    return torch.cat([image, torch.full_like(image[:1], hidden)])


class _Dropping(Wrapping):
    """See ``dropping``."""

    def __init__(self, base: Classifier, labels: Tensor) -> None:
        self._first_block, self._prefix, self._patch = _known(base)
        _check_regions(base, self._patch, labels)
        self.__dict__.update({name: value for name, value in base.__dict__.items() if name not in self.__dict__})
        way = base.preprocessing
        self.preprocessing = Preprocessing(way.size, (*way.mean, 0.0), (*way.std, 1.0), way.resize, way.resized, way.interpolation)
        self._base = base
        covered = F.avg_pool2d(replace(way, mean=(0.0,), std=(1.0,))(torch.ones(1, 1, *labels.shape)), self._patch).flatten()
        self._enough = torch.where(covered < _LEAST_COVERED, math.inf, covered / 2)  # what a resize pads around the image stays

    @property
    def num_classes(self) -> int:
        return self._base.num_classes

    @property
    def weights_digest(self) -> str | None:
        return self._base.weights_digest

    def _forward(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        self._check_inputs(inputs)
        if inputs.requires_grad and torch.is_grad_enabled():
            raise NotApplicable("fill 'drop' shows a patch or not, so that no gradients flow to how much of it is shown")
        self._base.find_out(want_features)
        inputs = inputs.to(self.device)
        shown = ~self._hidden_patches(inputs[:, 3:])
        return self._fitting(lambda: self._by_count(inputs[:, :3], shown, want_features), len(inputs))

    def _by_count(self, pixels: Tensor, shown: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        """Rows that keep as many tokens together: scores and features in the order of the rows."""
        counts = shown.sum(dim=1).cpu()
        places, rows, features = [], [], []
        for count in counts.unique().tolist():
            same = (counts == count).nonzero()[:, 0]
            for part in even_chunks(same, self.batch_size):
                at = part.to(pixels.device)
                # stable, so that tokens keep their order
                kept = shown[at].int().argsort(dim=1, descending=True, stable=True)[:, :count]
                found = self._with_tokens(pixels[at], kept, want_features)
                places.append(at)
                rows.append(found[0])
                features.append(found[1])
        if not places:
            return self._base._forward(pixels, want_features)
        back = torch.cat(places).argsort()
        return torch.cat(rows)[back], torch.cat(features)[back]

    def _with_tokens(self, pixels: Tensor, kept: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        """One batch, every row with the tokens before those of patches and the patches kept: int [n, count]."""
        start = 0

        def without_the_rest(tokens: Tensor) -> Tensor:
            nonlocal start
            own = kept[start : start + len(tokens)] + self._prefix
            start += len(tokens)
            chosen = tokens.gather(1, own[:, :, None].expand(-1, -1, tokens.shape[2]))
            return torch.cat([tokens[:, : self._prefix], chosen], dim=1)

        with self._base.forwarding(self.batch_size), edited_inputs({self._first_block: without_the_rest}):
            return self._base._forward(pixels, want_features)

    def find_out(self, want_features: bool) -> None:
        self._base.find_out(want_features)

    def _hidden_patches(self, hidden: Tensor) -> Tensor:
        """bool [n, patches] of the fourth channel [n, 1, h, w]: patches of which most is hidden."""
        return F.avg_pool2d(hidden, self._patch).flatten(1) > self._enough.to(hidden)


def _check_regions(classifier: Classifier, patch: tuple[int, int], labels: Tensor) -> None:
    _, votes = _votes(classifier.preprocessing, patch, labels)
    shares = votes.max(axis=1)[votes.any(axis=1)] / votes.sum(axis=1)[votes.any(axis=1)]
    if (least := shares.min()) < 1 - _SLACK:
        raise UserError(
            f"fill 'drop' hides whole patches of {patch[0]}x{patch[1]} pixels, but no region has more than {least:.0%} of one of "
            f"{classifier.name}: give regions by name, such as regions='grid', or at.follow_patches(classifier, regions)"
        )


def _known(classifier: Classifier) -> tuple[nn.Module, int, tuple[int, int]]:
    """First block, number of tokens before those of patches, and (height, width) of a patch."""
    from timm.layers import PatchEmbed
    from timm.models import vision_transformer
    from torchvision.models import VisionTransformer

    module: Any = classifier.module
    if isinstance(module, vision_transformer.VisionTransformer):
        if module.global_pool != "token" or not module.num_prefix_tokens:
            raise _refused(
                classifier, f"its head pools by {module.global_pool or 'all tokens'!s}, and without patches nothing is left to pool"
            )
        embed = module.patch_embed
        if not isinstance(embed, PatchEmbed):
            raise _refused(classifier, f"its tokens are made by a {type(embed).__name__}, not from patches of pixels")
        patch = embed.patch_size
        return module.blocks[0], module.num_prefix_tokens, (int(patch[0]), int(patch[1]))
    if isinstance(module, VisionTransformer):
        if not isinstance(module.conv_proj, nn.Conv2d):
            raise _refused(classifier, "its tokens are made by several convolutions, not from patches of pixels")
        return module.encoder.layers[0], 1, (module.patch_size, module.patch_size)
    kind = "a black box" if not isinstance(module, nn.Module) else f"a {type(module).__name__}"
    raise _refused(classifier, f"it is {kind}")


def _refused(classifier: Classifier, reason: str) -> NotApplicable:
    return NotApplicable(
        f"fill 'drop' does not apply to {classifier.name}: {reason}; expected a VisionTransformer of timm or torchvision that reads a "
        "class token; use fill 'black', 'mean' or 'blur'"
    )
