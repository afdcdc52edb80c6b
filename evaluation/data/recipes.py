"""Labelled images: a recipe, a folder or a list of the files a user has -> Sample(id, image, label, mask, group).

A recipe (``datasets/NAME.toml`` in the checkout, ``evaluation/recipes`` in an installed package) says what the data set is,
under which licence, how to get it and in which layouts it is commonly stored. Nothing is downloaded and nothing is executed, and
no image is opened before its sample is read.
"""

from __future__ import annotations

import tarfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from attribution.errors import UserError
from attribution.image import IMAGE_SUFFIXES
from evaluation.data.dataset import ImageDataset, index_of_name, some_names
from evaluation.data.lists import open_list

PHOTOS = "photos"
_PHOTO_FILES = (
    *(("skimage.data", name) for name in ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")),
    *(("sklearn.datasets.images", name) for name in ("china.jpg", "flower.jpg")),
)


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


def open_dataset(
    source: str | Path, *, root: str | Path | None = None, split: str = "test", class_names: Sequence[str] | None = None
) -> ImageDataset:
    """Open images that a user has: a recipe's data set, a folder or a list of files.

    Args:
        source: one of

            - "photos", a few photos that scikit-image and scikit-learn bring along, without labels;
            - the name of a recipe, together with root (see ``load_dataset``);
            - a folder with one subfolder a class (images at any depth below it; subfolders without images do not count), or a
              flat folder of images, which have no labels; names that begin with a dot are passed over;
            - a list, .csv, .tsv or .txt (UTF-8), with a header that names its columns: path, and if wanted label, mask (an image
              file, inside where it is not black), x0 y0 x1 y1 (a box in pixels, see ``box_mask``) and group. A .txt list may
              do without the header: "path label", or "path", on each line. Relative paths start at the list's folder, empty
              fields mean "not known", a label is a class name or an index.
        root, split: of a recipe.
        class_names: C names that labels are indices into, such as those of the classifier; matched exactly, then regardless of
            case. Without them: the recipe's; the sorted folder names; the sorted names in the list, or "class 0", "class 1" ...
            up to the largest index in it.

    Returns:
        the samples; those of a folder ordered by class and file name, those of a list in its own order.

    Raises:
        UserError: nothing of that name, no images, classes that class_names lack, or a list that cannot be understood (with
            the number of the line). Missing and damaged images are reported when their sample is read.
    """
    names = _checked_names(class_names)
    if root is not None:
        return _in_terms_of(load_dataset(str(source), root, split), names)
    if str(source) == PHOTOS:
        return _photos(names)
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, names)
    if path.is_file():
        return open_list(path, names)
    if str(source) in _recipes():
        raise UserError(f"the data set {str(source)!r} needs root: the folder where its images lie")
    raise UserError(f"{source}: no such folder or list, and no data set of that name (known: {', '.join(sorted(_recipes()))})")


def _photos(class_names: tuple[str, ...] | None) -> ImageDataset:
    """Photos inside installed packages: enough to try a benchmark without any data."""
    found = [Path(str(files(package) / name)) for package, name in _PHOTO_FILES]
    there = [path for path in found if path.is_file()]
    if not there:
        raise UserError("scikit-image and scikit-learn have lost their photos: reinstall them, or name your own images")
    ids = tuple(path.name for path in there)
    return ImageDataset(PHOTOS, class_names or (), ids, tuple(None for _ in ids), lambda index: there[index])


def load_recipe(name: str) -> Recipe:
    """Read a recipe by name.

    Raises:
        UserError: no such recipe.
    """
    recipes = _recipes()
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


def _recipes() -> dict[str, Any]:
    installed = files("evaluation") / "recipes"
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "datasets"
    return {path.name.removesuffix(".toml"): path for path in folder.iterdir() if path.name.endswith(".toml")}


def _from_folder(recipe: Recipe, layout: dict[str, str], path: Path, split: str) -> ImageDataset:
    return _from_recipe(recipe, split, path, _image_files(path), lambda file: file)


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

    return _from_recipe(recipe, split, path, members, read)


def _from_recipe(recipe: Recipe, split: str, path: Path, members: list[tuple[str, Any]], read: Callable[[Any], Any]) -> ImageDataset:
    if not members:
        raise UserError(f"{path} holds no images: expected one folder a class ({', '.join(recipe.classes)})")
    dataset = _by_class_folder(recipe.name, recipe.classes, recipe.title, path, members, read)
    return replace(dataset, ids=tuple(f"{split}/{name}" for name in dataset.ids))


def _open_folder(path: Path, class_names: tuple[str, ...] | None) -> ImageDataset:
    members, name = _image_files(path), path.resolve().name
    loose = [member for member, _ in members if "/" not in member]
    if not members:
        raise UserError(f"{path} holds no images: expected one folder a class, or images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if len(loose) == len(members):
        return ImageDataset(name, class_names or (), tuple(loose), (None,) * len(loose), lambda index: members[index][1])
    if loose:
        raise UserError(f"{path} has images ({', '.join(loose[:3])}) beside folders of images: expected one folder a class, or images only")
    classes = class_names or tuple(sorted({member.split("/")[0] for member, _ in members}))
    return _by_class_folder(name, classes, "class_names", path, members, lambda file: file)


def _image_files(path: Path) -> list[tuple[str, Path]]:
    """(name below the folder, file) of its images, sorted."""
    found = [(file.relative_to(path), file) for file in sorted(path.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES]
    hidden = [any(part.startswith(".") for part in name.parts) for name, _ in found]
    return [(name.as_posix(), file) for (name, file), skip in zip(found, hidden, strict=True) if not skip and not file.is_dir()]


def _by_class_folder(
    name: str, classes: tuple[str, ...], title: str, path: Path, members: list[tuple[str, Any]], read: Callable[[Any], Any]
) -> ImageDataset:
    folders = sorted({member.split("/")[0] for member, _ in members})
    indices = {folder: index_of_name(folder, classes) for folder in folders}
    unknown = [folder for folder, index in indices.items() if index is None]
    if unknown:
        raise UserError(f"{path} has folders that are no class of {title}: {', '.join(unknown[:5])} (expected {some_names(classes)})")
    return ImageDataset(
        name=name,
        class_names=classes,
        ids=tuple(member for member, _ in members),
        labels=tuple(indices[member.split("/")[0]] for member, _ in members),
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


def _in_terms_of(dataset: ImageDataset, class_names: tuple[str, ...] | None) -> ImageDataset:
    """The same samples with labels that are indices into other class names."""
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
}
