"""A data set as the evaluators see it: images with what is known of them, read one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attribution.errors import UserError, describe
from attribution.image import load_image
from evaluation.metrics.localization import box_mask


@dataclass(frozen=True)
class Sample:
    """One image and what is known of it.

    Attributes:
        id: name of the image inside its data set, stable across machines ("test/cat/0007.jpg").
        image: float32 [3, H, W], RGB in [0, 1].
        label: index into the data set's class names; None where it is not known.
        mask: bool [H, W], True on the object; None where there is none.
        group: what belongs together for resampling, such as the video or patient that the image is from; None where not given.
    """

    id: str
    image: Tensor
    label: int | None
    mask: Tensor | None = None
    group: str | None = None


@dataclass(frozen=True)
class ImageDataset:
    """Images read one at a time.

    Attributes:
        name: name of the recipe, folder or list.
        class_names: names by label; empty where nothing is labelled and no names were given.
        ids, labels: per sample; ids are unique, a label is None where it is not known.
        read: the image of sample i in a form that ``load_image`` takes.
        read_mask: the mask of sample i as a bool [H, W] tensor or array, as an image file whose pixels other than black are inside,
            as boxes that ``box_mask`` takes, or None.
        groups: per sample, or None.
        places: where each sample is written down ("list.csv line 7"), named when it cannot be read.
    """

    name: str
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    labels: tuple[int | None, ...]
    read: Callable[[int], Any]
    read_mask: Callable[[int], Any] | None = None
    groups: tuple[str | None, ...] | None = None
    places: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for field in ("labels", "groups", "places"):
            values = getattr(self, field)
            if values is not None and len(values) != len(self.ids):
                raise UserError(f"{self.name} has {len(self.ids)} ids and {len(values)} {field}: give one for each")
        if len(set(self.ids)) < len(self.ids):
            twice = Counter(self.ids).most_common(1)[0][0]
            raise UserError(f"{self.name} has the id {twice!r} more than once: give each sample its own")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            image = load_image(self.read(index))
            mask = None if self.read_mask is None else _mask_of(image, self.read_mask(index))
        except UserError as error:
            raise error if self.places is None else UserError(f"{self.places[index]}: {error}") from None
        return Sample(self.ids[index], image, self.labels[index], mask, None if self.groups is None else self.groups[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def choose(self, count: int | None, seed: int = 0, labels_only: bool = False) -> tuple[int, ...]:
        """Indices of a reproducible random sample without replacement.

        Args:
            count: how many; None or more than there are gives all. The sample is the start of one permutation of the data set, so
                a larger count extends a smaller one, and the order is that of the permutation.
            seed: of the permutation.
            labels_only: pass over samples without a label; the others keep their order.

        Raises:
            UserError: count below 1, a seed out of range, or no labelled sample where labels are needed.
        """
        if count is not None and (isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1):
            raise UserError(f"{count!r} samples requested: expected a whole number of at least 1, or None for all")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed is {seed}: expected 0 to 2**63 - 1")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        if labels_only:
            order = [index for index in order if self.labels[index] is not None]
            if not order:
                raise UserError(f"{self.name} has no labels: expected one folder a class, or a list with a column 'label'")
        return tuple(order[:count])


def index_of_name(name: str, class_names: tuple[str, ...]) -> int | None:
    """The class of that name, exact or else regardless of case; None where there is none."""
    exact = [index for index, other in enumerate(class_names) if other == name]
    found = exact or [index for index, other in enumerate(class_names) if other.lower() == name.lower()]
    if len(found) > 1:
        raise UserError(f"the class name {name!r} stands for classes {found}: give the index, or names that differ")
    return found[0] if found else None


def some_names(names: Sequence[str], limit: int = 10) -> str:
    """The first names, joined, and how many there are where that is not all."""
    return ", ".join(names[:limit]) + ("" if len(names) <= limit else f" ... ({len(names)} classes)")


def _mask_of(image: Tensor, source: Any) -> Tensor | None:
    """The mask that ``ImageDataset.read_mask`` gave for this image: bool [H, W] or None."""
    height, width = image.shape[1:]
    if source is None:
        return None
    if isinstance(source, str | Path):
        mask, name = load_image(source).amax(dim=0) > 0, f"the mask {source}"
        with Image.open(source) as picture:
            if picture.has_transparency_data:
                raise UserError(f"{name} has transparency, which is neither inside nor outside: save it without an alpha channel")
    elif getattr(source, "dtype", None) in (torch.bool, np.dtype(bool)):
        mask, name = source if isinstance(source, Tensor) else torch.from_numpy(source.copy()), "the mask"
    else:
        return box_mask(source, height, width)
    if mask.shape != (height, width):
        raise UserError(f"{name} is {describe(mask)}, the image {width}x{height}: expected bool [{height}, {width}], the image's own size")
    return mask
