"""Open the images that a user has as an ``ImageDataset``: a recipe's data set, a folder, or a list of files.

A recipe (``datasets/NAME.toml`` in the checkout, ``evaluation/recipes`` in an installed package) says what the data set is,
under which licence it comes, how to get it, and in which layouts it is commonly stored. Nothing is downloaded and nothing in the
data is executed. An image is opened when its sample is read, not before.
"""

from __future__ import annotations

import re
import tarfile
import tomllib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.checks import did_you_mean
from attribution.errors import UserError
from attribution.files import read_file
from attribution.image import IMAGE_SUFFIXES, image_files, load_image
from evaluation.data.dataset import ImageDataset, class_index, index_of_name, some_names
from evaluation.data.lists import open_list

DEFAULT_SPLIT = "test"
PHOTOS = "photos"
_HIDDEN = re.compile(r"(^|/)\.+[^./]")  # a name that begins with a dot; ".." is the folder above
_PHOTO_FILES = (
    *(("skimage.data", name) for name in ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")),
    *(("sklearn.datasets.images", name) for name in ("china.jpg", "flower.jpg")),
)


@dataclass(frozen=True)
class Recipe:
    """What a data set is, and the layouts in which users store it. The fields are those of the TOML file.

    ``model`` names a classifier of its classes, which studies of it take where they are given none; "" if there is none.
    ``image_size`` is (width, height) in pixels where all images have the same.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    splits: dict[str, int]
    layouts: tuple[dict[str, str], ...]
    obtain: str
    citation: str
    licence: str
    image_size: tuple[int, int] | None = None
    model: str = ""


def open_dataset(
    source: str | Path, *, root: str | Path | None = None, split: str = DEFAULT_SPLIT, class_names: Sequence[str] | None = None
) -> ImageDataset:
    """Open images that a user has: a recipe's data set, a folder or a list of files.

    Args:
        source: one of

            - "photos": a few photos that are part of scikit-image and scikit-learn, without labels;
            - the name of a recipe, together with root (see ``load_dataset``);
            - a folder with one subfolder for each class, images at any depth below it (subfolders without images do not count),
              or a flat folder of images, which have no labels. Links are followed. Names that begin with a dot are ignored (see
              ``image_files``). With class_names, a folder whose name is a number and no class's name is the class of this index;
            - a list: a .csv, .tsv or .txt file (UTF-8) whose header names its columns. The column "path" is required; optional
              are label, or labels (several names separated by "|"; empty: none); mask (an image file; pixels that are not black are
              inside); x0 y0 x1 y1 (a box in pixels, see ``box_mask``); and group. A .txt list may omit the header: each line is then
              "path label" or "path". Relative paths start at the list's folder, an empty field means "unknown", a label is a class
              name or an index.
        root: folder of a recipe's data.
        split: of a recipe.
        class_names: C names that labels are indices into, such as those of the classifier. Names are matched exactly, then
            regardless of case. By default: the recipe's names; the sorted folder names; the sorted names in the list, or
            "class 0", "class 1" and so on up to the list's largest index.

    Returns:
        The samples. Those of a folder are sorted by class and file name, those of a list are in the list's order.

    Raises:
        UserError: an unknown name, no images, classes that class_names lacks, or a list that cannot be understood (the message
            names the line). Missing and damaged images are reported when their sample is read.
    """
    names = _checked_names(class_names)
    if root is not None:
        return _in_terms_of(load_dataset(str(source), root, split), names)
    if split != DEFAULT_SPLIT and str(source) not in _recipes():
        raise UserError(f"split is {split!r}, but {source} has no splits: leave it out, or name a recipe ({', '.join(sorted(_recipes()))})")
    if str(source) == PHOTOS:
        return _photos(names)
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, names)
    if path.is_file():
        return open_list(path, names)
    if str(source) in _recipes():
        raise UserError(f"the data set {str(source)!r} needs root: the folder that holds its images")
    raise UserError(f"{source}: no such folder or list, and no data set of that name (known: {', '.join(sorted(_recipes()))})")


def _photos(class_names: tuple[str, ...] | None) -> ImageDataset:
    """Photos inside installed packages, to try a benchmark without any data."""
    found = [Path(str(files(package) / name)) for package, name in _PHOTO_FILES]
    there = [path for path in found if path.is_file()]
    if not there:
        raise UserError("the photos of scikit-image and scikit-learn are missing: reinstall these packages, or name your own images")
    ids = tuple(path.name for path in there)
    return ImageDataset(PHOTOS, class_names or (), ids, tuple(None for _ in ids), lambda index: there[index])


def load_recipe(name: str) -> Recipe:
    """Read a recipe by name.

    Raises:
        UserError: no such recipe.
    """
    recipes = _recipes()
    if name not in recipes:
        raise UserError(f"unknown data set {name!r}: expected one of {', '.join(sorted(recipes))}{did_you_mean(name, recipes)}")
    fields = tomllib.loads(recipes[name].read_text(encoding="utf-8"))
    sequences: dict[str, Any] = {key: tuple(fields[key]) for key in ("classes", "layouts", "image_size") if key in fields}
    return Recipe(**{**fields, **sequences})


def recipe_names() -> list[str]:
    """The names of all recipes."""
    return sorted(_recipes())


def load_dataset(name: str, root: str | Path, split: str = DEFAULT_SPLIT) -> ImageDataset:
    """Open a split of a data set that the user has on disk.

    Args:
        name: name of a recipe, such as "cifar10".
        root: folder with the data in one of the recipe's layouts.
        split: a split of the recipe.

    Returns:
        The samples, sorted by class and file name; in torchvision's layout, in the order of its files.

    Raises:
        UserError: an unknown recipe or split, no known layout below root, or a folder that is no class of the recipe.
    """
    recipe = load_recipe(name)
    root = Path(root)
    if split not in recipe.splits:
        raise UserError(
            f"{recipe.title} has no split {split!r}: expected one of {', '.join(recipe.splits)}{did_you_mean(split, recipe.splits)}"
        )
    for layout in recipe.layouts:
        path = root / layout["path"].format(split=split)
        if path.exists():
            return LAYOUTS[layout["kind"]](recipe, layout, path, split)
    tried = ", ".join(layout["path"].format(split=split) for layout in recipe.layouts)
    raise UserError(f"no {recipe.title} {split} images below {root}: looked for {tried}; get them with: {recipe.obtain}")


def _recipes() -> dict[str, Any]:
    installed = files("evaluation") / "recipes"
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "datasets"
    return {path.name.removesuffix(".toml"): path for path in folder.iterdir() if path.name.endswith(".toml")}


def _from_folder(recipe: Recipe, layout: dict[str, str], path: Path, split: str) -> ImageDataset:
    return _from_recipe(recipe, split, path, _image_files(path), lambda file: file)


def _from_tar(recipe: Recipe, layout: dict[str, str], path: Path, split: str) -> ImageDataset:
    try:
        with tarfile.open(path, "r:") as archive:  # uncompressed: members are read in place and never extracted
            entries = [entry for entry in archive if entry.isfile() and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is not a readable uncompressed tar file ({error}): unpack it, or create it again") from None
    named = {
        entry.name.removeprefix("./").removeprefix(f"{split}/"): entry for entry in entries
    }  # of several members with one name the last counts, as in tar
    members = [(name, named[name]) for name in sorted(named) if not _HIDDEN.search(name)]

    def read(entry: tarfile.TarInfo) -> bytes:
        with path.open("rb") as file:
            file.seek(entry.offset_data)
            return file.read(entry.size)

    return _from_recipe(recipe, split, path, members, read)


def _from_recipe(recipe: Recipe, split: str, path: Path, members: list[tuple[str, Any]], read: Callable[[Any], Any]) -> ImageDataset:
    if not members:
        raise UserError(f"{path} holds no images: expected one folder for each class ({', '.join(recipe.classes)})")
    dataset = _by_class_folder(recipe.name, recipe.classes, recipe.title, path, members, read)
    return replace(dataset, ids=tuple(f"{split}/{name}" for name in dataset.ids))


def _open_folder(path: Path, class_names: tuple[str, ...] | None) -> ImageDataset:
    members, name = _image_files(path), path.resolve().name
    loose = [member for member, _ in members if "/" not in member]
    if not members:
        raise UserError(f"{path} holds no images: expected one folder for each class, or images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if len(loose) == len(members):
        return ImageDataset(name, class_names or (), tuple(loose), (None,) * len(loose), lambda index: members[index][1])
    if loose:
        raise UserError(
            f"{path} has images ({', '.join(loose[:3])}) beside folders of images: expected one folder for each class, or only images"
        )
    classes = class_names or tuple(sorted({member.split("/")[0] for member, _ in members}))
    return _by_class_folder(name, classes, "class_names", path, members, lambda file: file)


def _image_files(path: Path) -> list[tuple[str, Path]]:
    """The images below a folder, sorted: (path relative to the folder, file)."""
    return [(file.relative_to(path).as_posix(), file) for file in image_files(path)]


def _by_class_folder(
    name: str, classes: tuple[str, ...], title: str, path: Path, members: list[tuple[str, Any]], read: Callable[[Any], Any]
) -> ImageDataset:
    folders = sorted({member.split("/")[0] for member, _ in members})
    indices = {folder: class_index(folder, classes) for folder in folders}
    unknown = [folder for folder, index in indices.items() if index is None]
    if unknown:
        raise UserError(f"{path} has folders that are no class of {title}: {', '.join(unknown[:5])} (expected {some_names(classes)})")
    if any(index not in (place, index_of_name(folder, classes)) for place, (folder, index) in enumerate(indices.items())):
        warnings.warn(
            f"{path} has numbers as names of folders, which are read as class indices. torchvision's ImageFolder counts them as text (10 "
            "before 2): if the model was trained so, give the folder names in that order as class names (--classes)",
            stacklevel=2,
        )
    return ImageDataset(
        name=name,
        class_names=classes,
        ids=tuple(member for member, _ in members),
        labels=tuple(indices[member.split("/")[0]] for member, _ in members),
        read=lambda index: read(members[index][1]),
    )


def _from_torchvision(recipe: Recipe, layout: dict[str, str], path: Path, split: str) -> ImageDataset:
    """Open CIFAR files through torchvision, which unpickles a file only if its MD5 sum is the published one."""
    import torchvision

    try:
        loaded = getattr(torchvision.datasets, layout["dataset"])(path.parent, train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(f"{path} is not what torchvision wrote ({error}): remove it and get it again with: {recipe.obtain}") from None
    data: np.ndarray = loaded.data
    ids = tuple(f"{split}/{index:05d}" for index in range(len(data)))
    return ImageDataset(recipe.name, recipe.classes, ids, tuple(int(label) for label in loaded.targets), lambda index: data[index])


def _from_pets(recipe: Recipe, layout: dict[str, str], path: Path, split: str) -> ImageDataset:
    """Open what torchvision's ``OxfordIIITPet`` writes. Animal and border of a trimap are inside the mask."""
    root, lines = path.parents[1], read_file(path).decode("utf-8", errors="replace").splitlines()
    ids, labels = [], []
    for number, line in enumerate(lines, 1):
        name, label, *_ = [*line.split(), "", ""]
        if not label.isdecimal() or not 1 <= int(label) <= len(recipe.classes) or name != Path(name).name:
            raise UserError(
                f"{path} line {number}: {line[:60]!r}: expected NAME LABEL SPECIES BREED, a label from 1 to {len(recipe.classes)}"
            )
        ids.append(name)
        labels.append(int(label) - 1)

    def read_mask(index: int) -> Tensor | None:
        trimap = path.parent / "trimaps" / f"{ids[index]}.png"
        return None if not trimap.is_file() else _trimap(trimap)

    return ImageDataset(
        recipe.name, recipe.classes, tuple(ids), tuple(labels), lambda index: root / "images" / f"{ids[index]}.jpg", read_mask=read_mask
    )


def _trimap(path: Path) -> Tensor:
    """The pixels of a trimap that are no background: bool [H, W]."""
    values = (load_image(path)[0] * 255).round()
    if not torch.isin(values, torch.tensor([1.0, 2.0, 3.0])).all():
        raise UserError(f"the mask {path} is no trimap: expected pixels of 1 (animal), 2 (background) and 3 (border)")
    return values != 2


def _in_terms_of(dataset: ImageDataset, class_names: tuple[str, ...] | None) -> ImageDataset:
    """The same samples, their labels turned into indices into other class names."""
    if class_names is None or class_names == dataset.class_names:
        return dataset
    indices = [index_of_name(name, class_names) for name in dataset.class_names]
    used = {label for label in dataset.labels if label is not None}
    unknown = [dataset.class_names[label] for label in sorted(used) if indices[label] is None]
    if unknown:
        raise UserError(f"{dataset.name} has classes that class_names lack: {', '.join(unknown[:5])} (expected {some_names(class_names)})")
    labels = tuple(None if label is None else indices[label] for label in dataset.labels)
    return replace(dataset, class_names=class_names, labels=labels)


def _checked_names(class_names: Sequence[str] | None) -> tuple[str, ...] | None:
    if class_names is None:
        return None
    names = () if isinstance(class_names, str) else tuple(class_names)
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"class_names is {class_names!r}: expected a sequence of names")
    return names


LAYOUTS: dict[str, Callable[[Recipe, dict[str, str], Path, str], ImageDataset]] = {
    "tar": _from_tar,
    "folder": _from_folder,
    "torchvision": _from_torchvision,
    "pets": _from_pets,
}
