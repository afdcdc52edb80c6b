"""Labelled images from a recipe: files a user has -> Sample(id, image, label).

A recipe (``datasets/NAME.toml`` in the checkout, ``evaluation/recipes`` in an installed package) says what the data set is,
under which licence, how to get it and in which layouts it is commonly stored. Nothing is downloaded and nothing is executed.
"""

from __future__ import annotations

import tarfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from attribution.errors import UserError
from attribution.image import IMAGE_SUFFIXES, load_image


@dataclass(frozen=True)
class Sample:
    """One labelled image.

    Attributes:
        id: name of the image inside its data set, stable across machines ("test/cat/0007.jpg").
        image: float32 [3, H, W], RGB in [0, 1].
        label: index into the data set's class names.
    """

    id: str
    image: Tensor
    label: int


@dataclass(frozen=True)
class Recipe:
    """What a data set is and in which layouts users have it; the fields are those of the TOML file."""

    name: str
    title: str
    classes: tuple[str, ...]
    splits: dict[str, int]
    layouts: tuple[dict[str, str], ...]
    image_size: tuple[int, int]
    obtain: str
    citation: str
    licence: str


@dataclass(frozen=True)
class ImageDataset:
    """Labelled images, read one at a time.

    Attributes:
        name: name of the recipe.
        class_names: names by label.
        ids, labels: per sample.
        read: the image of sample i in a form that ``load_image`` takes.
    """

    name: str
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    labels: tuple[int, ...]
    read: Callable[[int], Any]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Sample(self.ids[index], load_image(self.read(index)), self.labels[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def load_recipe(name: str) -> Recipe:
    """Read a recipe by name.

    Raises:
        UserError: no such recipe.
    """
    recipes = {path.name.removesuffix(".toml"): path for path in _recipe_folder().iterdir() if path.name.endswith(".toml")}
    if name not in recipes:
        raise UserError(f"unknown data set {name!r}: expected one of {', '.join(sorted(recipes))}")
    fields = tomllib.loads(recipes[name].read_text(encoding="utf-8"))
    sequences = {key: tuple(fields[key]) for key in ("classes", "layouts", "image_size")}
    return Recipe(**{**fields, **sequences})


def load_dataset(name: str, root: str | Path, split: str = "test") -> ImageDataset:
    """Open a split of a data set that the user has on disk.

    Args:
        name: name of a recipe, such as "cifar10".
        root: folder with the data in one of the recipe's layouts.
        split: a split of the recipe.

    Returns:
        the samples, ordered by class and file name (torchvision's layout: in its own order).

    Raises:
        UserError: unknown recipe or split, no known layout below root, or a class folder that the recipe does not know.
    """
    recipe = load_recipe(name)
    root = Path(root)
    if split not in recipe.splits:
        raise UserError(f"{recipe.title} has no split {split!r}: expected one of {', '.join(recipe.splits)}")
    for layout in recipe.layouts:
        path = root / layout["path"].format(split=split)
        if path.exists():
            return LAYOUTS[layout["kind"]](recipe, layout, path, split)
    tried = ", ".join(layout["path"].format(split=split) for layout in recipe.layouts)
    raise UserError(f"no {recipe.title} {split} images below {root}: looked for {tried}; obtain them with: {recipe.obtain}")


def _recipe_folder() -> Any:
    installed = files("evaluation") / "recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "datasets"


def _from_folder(recipe: Recipe, layout: dict[str, str], path: Path, split: str) -> ImageDataset:
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    members = [(file.relative_to(path).as_posix(), file) for file in found]
    return _by_class_folder(recipe, split, path, members, lambda file: file)


def _from_tar(recipe: Recipe, layout: dict[str, str], path: Path, split: str) -> ImageDataset:
    try:
        with tarfile.open(path, "r:") as archive:  # uncompressed: members are read in place, nothing is ever extracted
            entries = [entry for entry in archive if entry.isfile() and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is not a readable uncompressed tar file ({error}): unpack it, or make it anew") from None
    named = {entry.name.removeprefix("./").removeprefix(f"{split}/"): entry for entry in entries}  # the last of a name counts, as in tar
    members = [(name, named[name]) for name in sorted(named)]

    def read(entry: tarfile.TarInfo) -> bytes:
        with path.open("rb") as file:
            file.seek(entry.offset_data)
            return file.read(entry.size)

    return _by_class_folder(recipe, split, path, members, read)


def _by_class_folder(recipe: Recipe, split: str, path: Path, members: list[tuple[str, Any]], read: Callable[[Any], Any]) -> ImageDataset:
    indices = {class_name: index for index, class_name in enumerate(recipe.classes)}
    unknown = sorted({name.split("/")[0] for name, _ in members} - indices.keys())
    if unknown:
        raise UserError(f"{path} has folders that are no class of {recipe.title}: {', '.join(unknown[:5])}")
    if not members:
        raise UserError(f"{path} holds no images: expected one folder a class ({', '.join(recipe.classes)})")
    return ImageDataset(
        name=recipe.name,
        class_names=recipe.classes,
        ids=tuple(f"{split}/{name}" for name, _ in members),
        labels=tuple(indices[name.split("/")[0]] for name, _ in members),
        read=lambda index: read(members[index][1]),
    )


def _from_torchvision(recipe: Recipe, layout: dict[str, str], path: Path, split: str) -> ImageDataset:
    """torchvision compares its files with published MD5 sums before it unpickles them, so no foreign pickle is ever opened."""
    import torchvision

    try:
        loaded = getattr(torchvision.datasets, layout["dataset"])(path.parent, train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(f"{path} is not what torchvision wrote ({error}): remove it and obtain it anew: {recipe.obtain}") from None
    data: np.ndarray = loaded.data
    ids = tuple(f"{split}/{index:05d}" for index in range(len(data)))
    return ImageDataset(recipe.name, recipe.classes, ids, tuple(int(label) for label in loaded.targets), lambda index: data[index])


LAYOUTS: dict[str, Callable[[Recipe, dict[str, str], Path, str], ImageDataset]] = {
    "tar": _from_tar,
    "folder": _from_folder,
    "torchvision": _from_torchvision,
}
