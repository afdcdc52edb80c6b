"""The data set that evaluators work on: images with their labels, masks and groups, read one at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attribution.checks import check_seed, check_whole
from attribution.errors import UserError, describe
from attribution.image import load_image
from attribution.provenance import pixels_digest
from evaluation.metrics.localization import box_mask

CLASS_INDEX = re.compile(r"[0-9]{1,5}")  # a larger index is a typing error, and class names up to it would fill the memory


@dataclass(frozen=True)
class Sample:
    """One image with its label, mask and group.

    Attributes:
        id: name of the image inside its data set, the same on every machine ("test/cat/0007.jpg").
        image: float32 [3, H, W], RGB in [0, 1].
        label: index into the data set's class names; None if unknown.
        mask: bool [H, W], True on the object; None if there is none.
        group: name of the cluster that the image belongs to when samples are resampled, such as its video or patient; None if
            not given.
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
        class_names: names by label; empty if no sample has a label and no names were given.
        ids, labels: one for each sample. Ids are unique. A label is None if unknown.
        read: returns the image of sample i in a form that ``load_image`` takes.
        read_mask: returns the mask of sample i: a bool [H, W] tensor or array, the path of an image file (pixels that are not
            black are inside), boxes that ``box_mask`` takes, or None.
        groups: one for each sample, or None.
        places: where each sample is listed ("list.csv line 7"). Errors about a sample begin with it.
        label_sets: the labels of each sample, where several or none may be right; ``labels`` are then None.
    """

    name: str
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    labels: tuple[int | None, ...]
    read: Callable[[int], Any]
    read_mask: Callable[[int], Any] | None = None
    groups: tuple[str | None, ...] | None = None
    places: tuple[str, ...] | None = None
    label_sets: tuple[frozenset[int], ...] | None = None

    def __post_init__(self) -> None:
        for field in ("labels", "groups", "places", "label_sets"):
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
        with self._placed(index):
            image = load_image(self.read(index))
            mask = None if self.read_mask is None else _mask_of(image, self.read_mask(index))
        return Sample(self.ids[index], image, self.labels[index], mask, None if self.groups is None else self.groups[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def image(self, index: int) -> Tensor:
        """The image of a sample, float32 [3, H, W] in [0, 1], without reading its mask.

        Raises:
            UserError: the image cannot be read.
        """
        with self._placed(index):
            return load_image(self.read(index))

    def digest(self, index: int) -> str:
        """The digest of a sample's pixels (``pixels_digest`` of its image): 16 hexadecimal digits.

        Records of measurements hold it, so that an image whose file was replaced under the same name is measured again.

        Raises:
            UserError: the image cannot be read.
        """
        return pixels_digest(self.image(index))

    def label_set(self, index: int) -> frozenset[int] | None:
        """All labels of a sample; None if they are unknown."""
        if self.label_sets is not None:
            return self.label_sets[index]
        label = self.labels[index]
        return None if label is None else frozenset({label})

    def choose(self, count: int | None, seed: int = 0, labels_only: bool = False) -> tuple[int, ...]:
        """Indices of a reproducible random sample without replacement.

        The sample is the first ``count`` entries of one random permutation of the data set, in their order. A larger count
        therefore extends a smaller one.

        Args:
            count: size of the sample. None, or more than the data set has, selects all.
            seed: of the permutation, 0 to 2**63 - 1.
            labels_only: leave out samples without a label. The others keep their order.

        Raises:
            UserError: count below 1, a seed out of range, or labels_only and no sample has a label.
        """
        if count is not None:
            check_whole("count", count, 1)
        check_seed(seed)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        if labels_only:
            order = [index for index in order if self.labels[index] is not None]
            if not order and self.label_sets is not None:
                raise UserError(f"{self.name} has several labels for an image: expected a column 'label' with one class for each")
            if not order:
                raise UserError(f"{self.name} has no labels: expected one folder for each class, or a list with a column 'label'")
        return tuple(order[:count])

    @contextmanager
    def _placed(self, index: int) -> Iterator[None]:
        """Begin the message of an error about a sample with the place where the sample is listed."""
        try:
            yield
        except UserError as error:
            raise error if self.places is None else UserError(f"{self.places[index]}: {error}") from None


def index_of_name(name: str, class_names: tuple[str, ...]) -> int | None:
    """The index of a class name: an exact match, or else a match regardless of case; None without either.

    Raises:
        UserError: several classes match.
    """
    exact = [index for index, other in enumerate(class_names) if other == name]
    found = exact or [index for index, other in enumerate(class_names) if other.lower() == name.lower()]
    if len(found) > 1:
        raise UserError(f"the class name {name!r} stands for classes {found}: give the index, or names that differ")
    return found[0] if found else None


def class_index(label: str, class_names: tuple[str, ...]) -> int | None:
    """The class with this name or, if no class has it, with this index; None without either.

    Raises:
        UserError: several classes have the name.
    """
    index = index_of_name(label, class_names)
    return int(label) if index is None and CLASS_INDEX.fullmatch(label) and int(label) < len(class_names) else index


def some_names(names: Sequence[str], limit: int = 10) -> str:
    """The names, joined by commas; of more than ``limit`` the first ones and the number of the others."""
    return ", ".join(names[:limit]) + ("" if len(names) <= limit else f" and {len(names) - limit} more")


def _mask_of(image: Tensor, source: Any) -> Tensor | None:
    """What ``ImageDataset.read_mask`` returned for this image, as bool [H, W] or None."""
    height, width = image.shape[1:]
    if source is None:
        return None
    if isinstance(source, str | Path):
        mask, name = load_image(source).amax(dim=0) > 0, f"the mask {source}"
        with Image.open(source) as picture:
            if picture.has_transparency_data:
                raise UserError(
                    f"{name} has transparency, and a transparent pixel is neither inside nor outside: save it without an alpha channel"
                )
    elif getattr(source, "dtype", None) in (torch.bool, np.dtype(bool)):
        mask, name = source if isinstance(source, Tensor) else torch.from_numpy(source.copy()), "the mask"
    else:
        return box_mask(source, height, width)
    if mask.shape != (height, width):
        raise UserError(
            f"{name} is {describe(mask)}, the image is {width}x{height}: expected bool [{height}, {width}], the size of the image"
        )
    return mask
