"""Missing instead of painted: the tokens of hidden patches are taken out of a vision transformer's sequence.

A painted patch is still a patch, and to the model a black one may speak for a class (missingness bias: Jain et al., ICLR 2022).
Here an input carries a fourth channel, 1 where it is hidden; the patches where it is 1 never reach the first block. Rows with as
many tokens are forwarded together, so that the cost falls with what is hidden.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution.errors import NotApplicable, UserError, describe
from attribution.fills import Fill, classifier_fill, is_drop
from attribution.hooks import edited_inputs
from attribution.masking import MaskedInputs, RegionInputs
from attribution.model.classifier import Classifier, Wrapping
from attribution.model.forwarding import even_chunks
from attribution.model.loading import load_classifier
from attribution.model.preprocessing import Preprocessing
from attribution.regions import Regions, make_regions


def masked_inputs(
    classifier: Classifier, image: Tensor, labels: Tensor, fill: Fill, photo_size: tuple[int, int] | None = None
) -> tuple[Classifier, RegionInputs]:
    """Inputs of any subsets of an image's regions under a fill, and the classifier that takes them: another one for "drop".

    Raises:
        UserError: see ``make_fill``; "drop" with regions that cut patches.
        NotApplicable: "drop" with a model that is no vision transformer.
    """
    if is_drop(fill):
        return dropping(classifier, image, labels)
    return classifier, MaskedInputs(classifier, image, labels, classifier_fill(image, fill, classifier, photo_size))


_SLACK = 0.25  # share of a patch that may belong to other regions, as at borders that fall between pixels


def dropping(classifier: Classifier, image: Tensor, labels: Tensor) -> tuple[Classifier, RegionInputs]:
    """The same classifier on inputs of four channels, red green blue and hidden, and these inputs for any subsets of regions.

    What is left of an image is shown as it is: nothing is painted that a resize could blur into it.

    Args:
        classifier: with a ``VisionTransformer`` of timm or torchvision that reads a class token.
        image: float32 [3, H, W] in [0, 1].
        labels: int64 [H, W], its regions, which follow the patches.

    Raises:
        NotApplicable: another model, with the reason.
        UserError: regions that cut patches.
    """
    patch = _known(classifier)[2]
    patches = _Patches(classifier.preprocessing, patch, labels)
    if (least := patches.least_share) < 1 - _SLACK:
        raise UserError(
            f"fill 'drop' hides whole patches of {patch[0]}x{patch[1]} pixels, but no region has more than {least:.0%} of one of "
            f"{classifier.name}: give regions that follow them, at.follow_patches(classifier, regions)"
        )
    return _Dropping(classifier), _DroppedInputs(classifier, image, labels, patches.owners, patch)


def follow_patches(classifier: Classifier | str, regions: Regions | Tensor | np.ndarray) -> Regions:
    """Regions along the borders of patches: each patch, as it lies in the image, goes to the region that has most of its pixels.

    What the model does not see of the image, beyond the crop, goes with the nearest patch.

    Args:
        classifier: see ``dropping``; or a name that ``load_classifier`` takes.
        regions: of an image of H x W pixels; also a label map int [H, W], or bool masks [R, H, W].

    Returns:
        A partition of the same image, and the given one where it follows the patches already. Regions that have most of no patch
        are gone.

    Raises:
        NotApplicable: a model without patches, with the reason.
        UserError: regions that are none.
    """
    classifier = load_classifier(classifier)
    if not isinstance(regions, Regions):
        if not isinstance(regions, Tensor | np.ndarray) or regions.ndim not in (2, 3):
            raise UserError(
                f"regions are {describe(regions)}: expected Regions (see at.make_regions), an int label map [H, W] or bool masks [R, H, W]"
            )
        height, width = regions.shape[-2:]
        regions = make_regions(torch.zeros(3, height, width), regions)
    patches = _Patches(classifier.preprocessing, _known(classifier)[2], regions.labels)
    labels = patches.owners[patches.of_pixels]
    if torch.equal(labels, regions.labels):
        return regions
    _, numbers = labels.unique(return_inverse=True)
    return Regions(numbers, regions.method, regions.requested)


class _Patches:
    """Where the patches of a model's input lie in an image, and whose they are.

    Attributes:
        of_pixels: int64 [H, W], the patch that each pixel's centre lies in, or next to where it is cropped.
        owners: int64 [patches], the region that has most of a patch's pixels, of equal ones the first; of a patch between pixels that
            of the nearest one. -1 for padding, which is never hidden.
        least_share: the smallest share of its pixels that the owner of any patch has.
    """

    def __init__(self, way: Preprocessing, patch: tuple[int, int], labels: Tensor) -> None:
        labels = labels.cpu()
        rows, columns = (
            _Axis(count, scale, start, side, length)
            for count, (scale, start), side, length in zip(labels.shape, way.placement(*labels.shape), way.size, patch, strict=True)
        )
        self.of_pixels = rows.patches[:, None] * columns.count + columns.patches
        weights = (rows.seen[:, None] & columns.seen).double() + 1e-9  # pixels beyond the crop decide where no others do
        regions = int(labels.max()) + 1
        votes = torch.bincount((self.of_pixels * regions + labels).flatten(), weights.flatten(), rows.count * columns.count * regions).view(
            -1, regions
        )
        most = torch.from_numpy(votes.numpy().argmax(axis=1))
        between = torch.where(rows.shown[:, None] & columns.shown, labels[rows.nearest[:, None], columns.nearest], -1).flatten()
        self.owners = torch.where(votes.sum(dim=1) > 0, most, between)
        self.least_share = float((votes.max(dim=1).values / votes.sum(dim=1)).nan_to_num(1.0).min())


class _Axis:
    """One axis of an image and of the input that it becomes.

    Attributes:
        patches: int64 [pixels], the patch that each pixel's centre lies in or next to.
        seen: bool [pixels], whether it lies in the input.
        count: patches.
        nearest: int64 [count], the pixel that holds the middle of each patch, or is next to it.
        shown: bool [count], whether that middle lies in the image, not in what is padded.
    """

    def __init__(self, pixels: int, scale: float, start: float, side: int, length: int) -> None:
        self.count = side // length
        centres = (torch.arange(pixels, dtype=torch.float64) + 0.5) * scale + start
        self.patches = (centres / length).floor().long().clamp(0, self.count - 1)
        self.seen = (centres >= 0) & (centres < self.count * length)
        middles = ((torch.arange(self.count, dtype=torch.float64) + 0.5) * length - start) / scale
        self.nearest = middles.floor().long().clamp(0, pixels - 1)
        self.shown = (middles >= 0) & (middles < pixels)


class _DroppedInputs(RegionInputs):
    """Inputs [n, 4, h, w]: the image as it is, and 1 where a patch is hidden."""

    def __init__(self, classifier: Classifier, image: Tensor, labels: Tensor, owners: Tensor, patch: tuple[int, int]) -> None:
        whole = classifier.preprocessing(image[None].to(classifier.device))
        super().__init__(labels, 4 * whole[0, 0].numel())
        self._whole, self._patch = whole, patch
        self._owners, self._is_owned = owners.clamp(min=0).to(whole.device), (owners >= 0).to(whole)

    def __call__(self, subsets: Tensor) -> Tensor:
        hidden = (1 - subsets.to(self._whole))[:, self._owners] * self._is_owned
        rows, columns = (side // length for side, length in zip(self._whole.shape[2:], self._patch, strict=True))
        channel = hidden.view(-1, 1, rows, columns).repeat_interleave(self._patch[0], 2).repeat_interleave(self._patch[1], 3)
        channel = F.pad(channel, (0, self._whole.shape[3] - channel.shape[3], 0, self._whole.shape[2] - channel.shape[2]))
        return torch.cat([self._whole.expand(len(channel), -1, -1, -1), channel], dim=1)


class _Dropping(Wrapping):
    """See ``dropping``."""

    def __init__(self, base: Classifier) -> None:
        self._first_block, self._prefix, self._patch = _known(base)
        self.__dict__.update({name: value for name, value in base.__dict__.items() if name not in self.__dict__})
        way = base.preprocessing
        self.preprocessing = Preprocessing(way.size, (*way.mean, 0.0), (*way.std, 1.0), way.resize, way.resized, way.interpolation)
        self._base = base

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
        rows, columns = (length * (side // length) for side, length in zip(inputs.shape[2:], self._patch, strict=True))
        shown = inputs[:, 3, : rows : self._patch[0], : columns : self._patch[1]].flatten(1) < 0.5  # a patch is hidden as a whole
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
        if getattr(embed, "dynamic_img_pad", False):
            raise _refused(classifier, "it pads its input to whole patches")
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
