"""The fill "drop": the tokens of hidden patches are taken out of a vision transformer's sequence.

A painted patch is still a patch, and the model may take a black one as evidence for a class (missingness bias: Jain et al., ICLR
2022). Here an input has a fourth channel, which is 1 where the image is hidden; patches where it is 1 never reach the first block.
Images that keep the same number of tokens are forwarded together, so that hiding more costs less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution.errors import NotApplicable, UserError, describe
from attribution.fills import Fill, classifier_fill, is_drop
from attribution.hooks import edited_inputs, frozen_parameters, removed_after
from attribution.masking import MaskedInputs, RegionInputs
from attribution.model.classifier import Classifier
from attribution.model.forwarding import Relay, even_chunks
from attribution.model.loading import load_classifier
from attribution.model.preprocessing import Preprocessing
from attribution.network.attention import AttentionRules, open_attention
from attribution.network.maps import probe_inputs, random_signs
from attribution.network.reading import Reading, read_tokens
from attribution.regions import Regions, make_regions
from attribution.task import Task


def masked_inputs(
    classifier: Classifier, image: Tensor, labels: Tensor, fill: Fill, photo_size: tuple[int, int] | None = None
) -> tuple[Classifier, RegionInputs]:
    """The classifier that scores subsets of an image's regions under a fill, and its inputs. "drop" needs another classifier.

    Raises:
        UserError: see ``make_fill``; "drop" with regions that cut patches.
        NotApplicable: "drop" with a model that is no vision transformer.
    """
    if is_drop(fill):
        return dropping(classifier, image, labels)
    return classifier, MaskedInputs(classifier, image, labels, classifier_fill(image, fill, classifier, photo_size))


_SLACK = 0.25  # share of a patch that may belong to other regions, as at borders that fall between pixels


def dropping(classifier: Classifier, image: Tensor, labels: Tensor) -> tuple[Classifier, RegionInputs]:
    """The same classifier on inputs with one more channel (1 where hidden), and such inputs for any subsets of regions.

    Shown pixels are not changed: no fill is painted, which a resize could blur into them.

    Args:
        classifier: of a vision transformer whose head reads a class token alone.
        image: float32 [3, H, W] in [0, 1].
        labels: int64 [H, W], its regions, which follow the patches.

    Raises:
        NotApplicable: another model, with the reason.
        UserError: regions that cut patches.
    """
    parts, way = _known(classifier), classifier.preprocessing
    patch, patches = parts.patch, _Patches(way, parts.patch, labels)
    if (least := patches.least_share) < 1 - _SLACK:
        raise UserError(
            f"fill 'drop' hides whole patches of {patch[0]}x{patch[1]} pixels, but no region has more than {least:.0%} of one of "
            f"{classifier.name}: give regions that follow them, at.follow_patches(classifier, regions)"
        )
    more = replace(way, mean=(*way.mean, 0.0), std=(*way.std, 1.0), channels=None)
    hiding = classifier.with_forward(DroppingForward(classifier.forward, parts), preprocessing=more)
    return hiding, _DroppedInputs(classifier, image, labels, patches.owners, patch)


def follow_patches(classifier: Classifier | str, regions: Regions | Tensor | np.ndarray) -> Regions:
    """Move the borders of regions to those of patches: each patch goes to the region that has most of its pixels in the image.

    Pixels that the crop cuts off go with the nearest patch.

    Args:
        classifier: see ``dropping``; or a name that ``load_classifier`` takes.
        regions: of an image of H x W pixels; also a label map int [H, W], or bool masks [R, H, W].

    Returns:
        A partition of the same image: the given one if it follows the patches already. A region that has most of no patch is left out.

    Raises:
        NotApplicable: a model without patches, with the reason.
        UserError: something other than regions.
    """
    classifier = load_classifier(classifier)
    if not isinstance(regions, Regions):
        if not isinstance(regions, Tensor | np.ndarray) or regions.ndim not in (2, 3):
            raise UserError(
                f"regions are {describe(regions)}: expected Regions (see at.make_regions), an int label map [H, W] or bool masks [R, H, W]"
            )
        height, width = regions.shape[-2:]
        regions = make_regions(torch.zeros(3, height, width), regions)
    patches = _Patches(classifier.preprocessing, _known(classifier).patch, regions.labels)
    labels = patches.owners[patches.of_pixels]
    if torch.equal(labels, regions.labels):
        return regions
    _, numbers = labels.unique(return_inverse=True)
    return replace(regions, labels=numbers)


class _Patches:
    """Where the patches of a model's input lie in an image, and which region owns each.

    Attributes:
        of_pixels: int64 [H, W], the patch that holds each pixel's centre; the nearest patch for pixels that the crop cuts off.
        owners: int64 [patches], the region that has most of a patch's pixels; ties go to the lowest region. A patch that holds the
            centre of no pixel belongs to the region of the nearest pixel. -1 for padding, which is never hidden.
        least_share: the smallest share of a patch's pixels that its owner has, over all patches.
    """

    def __init__(self, way: Preprocessing, patch: tuple[int, int], labels: Tensor) -> None:
        labels = labels.cpu()
        rows, columns = (
            _Axis(count, scale, start, side, length)
            for count, (scale, start), side, length in zip(labels.shape, way.placement(*labels.shape), way.size, patch, strict=True)
        )
        self.of_pixels = rows.patches[:, None] * columns.count + columns.patches
        weights = (rows.seen[:, None] & columns.seen).double() + 1e-9  # pixels that the crop cuts off decide only where no others vote
        regions = int(labels.max()) + 1
        votes = torch.bincount((self.of_pixels * regions + labels).flatten(), weights.flatten(), rows.count * columns.count * regions).view(
            -1, regions
        )
        most = torch.from_numpy(votes.numpy().argmax(axis=1))
        between = torch.where(rows.shown[:, None] & columns.shown, labels[rows.nearest[:, None], columns.nearest], -1).flatten()
        self.owners = torch.where(votes.sum(dim=1) > 0, most, between)
        self.least_share = float((votes.max(dim=1).values / votes.sum(dim=1)).nan_to_num(1.0).min())


class _Axis:
    """The rows, or the columns, of an image and of the input that it becomes.

    Attributes:
        patches: int64 [pixels], the patch that holds each pixel's centre, or the nearest.
        seen: bool [pixels], whether that centre lies in a patch.
        count: number of patches.
        nearest: int64 [count], the pixel that holds the middle of each patch, or the nearest.
        shown: bool [count], whether that middle lies in the image rather than in padding.
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
    """Inputs [n, C + 1, h, w]: the unchanged image, and 1 where a patch is hidden."""

    def __init__(self, classifier: Classifier, image: Tensor, labels: Tensor, owners: Tensor, patch: tuple[int, int]) -> None:
        whole = classifier.preprocessing(image[None].to(classifier.device))
        super().__init__(labels, classifier, (len(whole[0]) + 1) * whole[0, 0].numel())
        self._whole, self._patch = whole, patch
        self._owners, self._is_owned = owners.clamp(min=0).to(whole.device), (owners >= 0).to(whole)

    def __call__(self, subsets: Tensor) -> Tensor:
        hidden = (1 - subsets.to(self._whole))[:, self._owners] * self._is_owned
        rows, columns = (side // length for side, length in zip(self._whole.shape[2:], self._patch, strict=True))
        channel = hidden.view(-1, 1, rows, columns).repeat_interleave(self._patch[0], 2).repeat_interleave(self._patch[1], 3)
        channel = F.pad(channel, (0, self._whole.shape[3] - channel.shape[3], 0, self._whole.shape[2] - channel.shape[2]))
        return torch.cat([self._whole.expand(len(channel), -1, -1, -1), channel], dim=1)


@dataclass(frozen=True, eq=False)
class _Transformer:
    """Where a vision transformer keeps its patches.

    Attributes:
        first_block: the first module that takes the sequence of tokens.
        prefix: number of tokens before those of patches.
        patch: (height, width), pixels of the input.
    """

    first_block: nn.Module
    prefix: int
    patch: tuple[int, int]


@dataclass(frozen=True, eq=False)
class DroppingForward(Relay):
    """Takes inputs [n, C + 1, h, w], of which the last channel is 1 where hidden, and computes scores without the tokens of hidden patches.

    Attributes:
        parts: of the vision transformer that the base runs.
    """

    parts: _Transformer

    def __call__(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        if inputs.requires_grad and torch.is_grad_enabled():
            raise NotApplicable("fill 'drop' shows a patch or not, so that no gradients flow to how much of it is shown")
        self.find_out(want_features)  # now: later, tokens are taken away
        inputs = inputs.to(self.runner.device)
        (height, width), sides = self.parts.patch, inputs.shape[2:]
        rows, columns = (length * (side // length) for side, length in zip(sides, self.parts.patch, strict=True))
        shown = inputs[:, -1, :rows:height, :columns:width].flatten(1) < 0.5  # a patch is hidden as a whole
        return self.runner.fitting(lambda: self._by_count(inputs[:, :-1], shown, want_features), len(inputs))

    def _by_count(self, pixels: Tensor, shown: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        """Forward rows that keep the same number of tokens together; scores and features in the order of the rows."""
        counts = shown.sum(dim=1).cpu()
        places, scores, features = [], [], []
        for count in counts.unique().tolist():
            same = (counts == count).nonzero()[:, 0]
            for part in even_chunks(same, self.runner.batch_size):
                at = part.to(pixels.device)
                # stable, so that tokens keep their order
                kept = shown[at].int().argsort(dim=1, descending=True, stable=True)[:, :count]
                found = self._with_tokens(pixels[at], kept, want_features)
                places.append(at)
                scores.append(found[0])
                features.append(found[1])
        if not places:
            return self.base(pixels, want_features)
        back = torch.cat(places).argsort()
        return torch.cat(scores)[back], torch.cat(features)[back]

    def _with_tokens(self, pixels: Tensor, kept: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        """Forward one batch, every row with the tokens before those of patches and with the patches kept: int [n, count]."""
        start, prefix = 0, self.parts.prefix

        def without_the_rest(tokens: Tensor) -> Tensor:
            nonlocal start
            own = kept[start : start + len(tokens)] + prefix
            start += len(tokens)
            chosen = tokens.gather(1, own[:, :, None].expand(-1, -1, tokens.shape[2]))
            return torch.cat([tokens[:, :prefix], chosen], dim=1)

        with edited_inputs({self.parts.first_block: without_the_rest}):
            return self.base(pixels, want_features)


def _known(classifier: Classifier) -> _Transformer:
    """Where the patches of a vision transformer are, found out by running it.

    Raises:
        NotApplicable: a model whose tokens cannot be taken away, with the reason.
    """
    if not isinstance(classifier.module, nn.Module):
        raise _refused(classifier, "it is a black box")
    blank = torch.zeros(1, *classifier.preprocessing.shape, device=classifier.device)
    task = Task(classifier, blank[0], blank[0], 0, blank, blank)
    with torch.inference_mode(False), torch.enable_grad(), frozen_parameters(classifier.module), classifier.in_float32():
        reading = read_tokens(task, "fill 'drop'", as_product=False)
        if reading.reads_patches:
            raise _refused(classifier, "its head reads the patches, and without patches nothing is left to read")
        inputs = probe_inputs(task)
        entered = _before_attention(task, inputs, reading.tokens)
        patch = _patch_of(reading, inputs, entered[0][1]) if entered else None
        if patch is None:
            raise _refused(classifier, "its tokens are not made from one patch of pixels each")
        for module, _ in entered:
            parts = _Transformer(module, reading.prefix, patch)
            if _equals_masking(classifier, reading, parts):
                return parts
    raise _refused(classifier, "its blocks need every token in its place (their positions enter in each block)")


def _before_attention(task: Task, inputs: Tensor, tokens: int) -> list[tuple[nn.Module, Tensor]]:
    """The modules that take the sequence and contain the first attention, outermost first, with the tokens that entered."""
    entered: dict[nn.Module, Tensor] = {}
    found: set[nn.Module] = set()

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not calls and args and isinstance(args[0], Tensor) and args[0].ndim == 3 and args[0].shape[1] == tokens:
            entered.setdefault(module, args[0])

    def leave(module: nn.Module, _args: Any, _output: Any) -> None:
        if calls and module in entered:
            found.add(module)

    modules = list(task.module.modules())
    handles = [each.register_forward_pre_hook(enter) for each in modules] + [each.register_forward_hook(leave) for each in modules]
    with open_attention(task.module) as calls, removed_after(handles):
        task.classifier.logits(inputs)
    return [(module, values) for module, values in entered.items() if module in found]


def _patch_of(reading: Reading, inputs: Tensor, tokens: Tensor) -> tuple[int, int] | None:
    """(height, width) of the pixels that one token is made from; None if they are no patch of a regular grid."""
    row, column = (side // 2 for side in reading.grid)
    token = tokens[0, reading.prefix + row * reading.grid[1] + column]
    (gradient,) = torch.autograd.grad((token * random_signs(token)).sum(), inputs)
    used = gradient[0].abs().sum(dim=0) > 0
    sides = []
    for line, place in ((used.any(dim=1), row), (used.any(dim=0), column)):
        at = line.nonzero()[:, 0]
        if not len(at) or at[0] != place * len(at) or at[-1] - at[0] + 1 != len(at):
            return None
        sides.append(len(at))
    return sides[0], sides[1]


def _equals_masking(classifier: Classifier, reading: Reading, parts: _Transformer) -> bool:
    """Whether taking tokens away before a module gives the logits of a network in which no token attends to them."""
    shown = torch.rand(reading.grid, generator=torch.Generator().manual_seed(0)) < 0.5
    sides = classifier.preprocessing.size
    channel = (~shown).float().repeat_interleave(parts.patch[0], 0).repeat_interleave(parts.patch[1], 1)
    channel = F.pad(channel, (0, sides[1] - channel.shape[1], 0, sides[0] - channel.shape[0]))
    pixels = torch.randn(1, *classifier.preprocessing.shape, generator=torch.Generator().manual_seed(1))
    hidden = F.pad(~shown.flatten(), (reading.prefix, 0)).to(classifier.device)
    masked = AttentionRules(scores=lambda scores: scores.masked_fill(hidden, -torch.inf))
    assert isinstance(classifier.module, nn.Module)
    with torch.no_grad():
        with open_attention(classifier.module, masked):
            expected = classifier.logits(pixels.to(classifier.device))
        try:
            found, _ = DroppingForward(classifier.forward, parts)(torch.cat([pixels, channel[None, None]], dim=1), False)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
    found = classifier.outputs.logits(found, classifier.name)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def _refused(classifier: Classifier, reason: str) -> NotApplicable:
    return NotApplicable(
        f"fill 'drop' does not apply to {classifier.name}: {reason}; expected a vision transformer that reads a class token; use fill "
        "'black', 'mean' or 'blur'"
    )
