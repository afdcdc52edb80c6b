"""Grid sets: which image is in which cell of each grid.

A grid is an image of n x n cells, each showing an image of a different class. An explanation of one cell's class should lie inside
that cell (GridPG: Böhle, Fritz, Schiele, CVPR 2021; DiFull and DiPart: Rao, Böhle, Schiele, CVPR 2022, section 3). Only images are
used that every model classifies correctly with high confidence, so a set belongs to a list of models. A set holds no pixels: the
cells are read from the data set when a grid is needed, at the input size of the model that is evaluated.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution import __version__
from attribution.checks import LARGEST_SEED, check_seed, check_whole, is_number, is_whole
from attribution.errors import UserError, describe
from attribution.files import whole_file
from attribution.image import load_image
from attribution.model.classifier import Classifier
from evaluation.data.dataset import ImageDataset

Progress = Callable[[int, int], None]
FORMAT = 1
_MAX_FILE_BYTES = 2**26


@dataclass(frozen=True, eq=False, repr=False)
class GridSet:
    """G grids of n x n images. Cells are numbered row by row from the top left: cell c is row c // n, column c % n.

    Attributes:
        data: name of the data set.
        split: of the data set; None if it has none.
        class_names: names that labels are indices into.
        n: cells along each side.
        threshold: every model gives the label of every image at least this probability.
        seed: of the draw.
        repeat_corners: whether the bottom-right cell has the class of the top-left cell, with a different image.
        models: ``name`` and ``weights_digest`` of each model whose confidence decided; empty if the images were chosen otherwise.
        ids: G tuples of n * n sample ids, all different.
        labels: int64 [G, n * n].
        indices: int64 [G, n * n], positions in the data set at the time of the draw.
        pool: the greatest number of images that could be judged, the first of the seeded permutation; None for all.
        judged: number of images judged.
        kept: number of images in which every model reached the threshold.
        failures: (id, reason) of the images that could not be judged. If several models failed, the reason of the first.
        versions: of this library and of torch at the time of the draw.

    Raises:
        UserError: fields that contradict each other.
    """

    data: str
    split: str | None
    class_names: tuple[str, ...]
    n: int
    threshold: float
    seed: int
    repeat_corners: bool
    models: tuple[dict[str, str | None], ...]
    ids: tuple[tuple[str, ...], ...]
    labels: np.ndarray
    indices: np.ndarray
    pool: int | None = None
    judged: int = 0
    kept: int = 0
    failures: tuple[tuple[str, str], ...] = ()
    versions: dict[str, str] = field(default_factory=lambda: {"attribution": __version__, "torch": str(torch.__version__)})

    def __post_init__(self) -> None:
        check_grid_settings(self.n, self.threshold, self.seed)
        shape = (len(self.ids), self.n**2)
        if not self.ids:
            raise UserError("the grid set has no grids: expected at least one")
        wrong = next((row for row in self.ids if len(row) != self.n**2), None)
        if wrong is not None:
            raise UserError(f"a grid of {len(wrong)} ids: expected {self.n**2}, one for each of {self.n}x{self.n} cells")
        for name in ("labels", "indices"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != np.int64:
                raise UserError(
                    f"{name} are {describe(array)}: expected int64 {list(shape)}, as there are {shape[0]} grids of {shape[1]} ids"
                )
            if array.min() < 0:
                raise UserError(f"{name} hold {array.min()}: expected numbers of at least 0")
        if self.class_names and self.labels.max() >= len(self.class_names):
            raise UserError(
                f"labels hold {self.labels.max()}, but there are {len(self.class_names)} class names: expected indices into them"
            )
        self._check_distinct()

    def _check_distinct(self) -> None:
        for name, values in (("id", [name for row in self.ids for name in row]), ("index", self.indices.flatten().tolist())):
            twice, times = Counter(values).most_common(1)[0]
            if times > 1:
                raise UserError(f"the {name} {twice!r} occurs {times} times: expected each image once")
        for number, row in enumerate(self.labels.tolist()):
            distinct = row[:-1] if self.repeat_corners else row
            if len(set(distinct)) < len(distinct) or (self.repeat_corners and row[-1] != row[0]):
                expected = "the first and last alike, all others different" if self.repeat_corners else "all different"
                raise UserError(f"grid {number} has the labels {row}: expected {expected}")

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        models = ", ".join(str(model["name"]) for model in self.models)
        return f"GridSet({self.data}, {len(self)} grids of {self.n}x{self.n}, confidence {self.threshold:g} of {models or 'no model'})"

    def __eq__(self, other: object) -> bool:
        return self._plain() == other._plain() if isinstance(other, GridSet) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def image(self, dataset: ImageDataset, index: int, classifier: Classifier) -> Tensor:
        """One grid as an image whose cells have the classifier's input size (h, w).

        Each cell is resized and cropped as the classifier does (padding has the mean colour), and not normalised.

        Args:
            dataset: the data set that the grids were drawn from, with the same class names. Its order may have changed.
            index: of the grid, 0 to G - 1.
            classifier: its preprocessing is used. It need not be one of ``models``.

        Returns:
            float32 [3, n * h, n * w], RGB in [0, 1], on the CPU.

        Raises:
            UserError: an image of this grid is missing from the data set, has another label there, or cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        cells = [_cell(classifier, dataset.image(self._find(dataset, index, cell))) for cell in range(self.n**2)]
        rows = [torch.cat(cells[start : start + self.n], dim=2) for start in range(0, self.n**2, self.n)]
        return torch.cat(rows, dim=1)

    def _find(self, dataset: ImageDataset, index: int, cell: int) -> int:
        """The current index in the data set of the image of a cell."""
        name, label, found = self.ids[index][cell], int(self.labels[index, cell]), int(self.indices[index, cell])
        if found >= len(dataset) or dataset.ids[found] != name:
            if name not in dataset.ids:
                raise UserError(
                    f"{dataset.name} has no image {name!r}, which grid {index} needs: the data set has changed; draw the grids again"
                )
            found = dataset.ids.index(name)
        if dataset.labels[found] not in (label, None):
            raise UserError(
                f"{name!r} has label {dataset.labels[found]} in {dataset.name} and {label} in the grid set: open the data with the "
                "class names of the set, or draw the grids again"
            )
        return found

    def save(self, path: str | Path) -> None:
        """Write ids, indices, labels and settings to a JSON file, completely or not at all. ``load`` returns an equal set.

        Raises:
            UserError: the file cannot be written.
        """
        text = json.dumps(self._plain(), allow_nan=False, indent=1)  # ASCII with escapes: file names need not be valid Unicode
        with whole_file(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> GridSet:
        """Read a file that ``save`` wrote. Every field is checked.

        Raises:
            UserError: the file is missing, larger than 64 MiB, damaged, or not a grid set. The message names the file and the field.
        """
        plain = _read_plain(Path(path))
        read: dict[str, Any] = {name: tuple(plain[name]) for name in ("class_names", "models")}
        read |= {name: tuple(map(tuple, plain[name])) for name in ("ids", "failures")}
        read |= {name: np.array(plain[name], dtype=np.int64) for name in ("labels", "indices")}
        try:
            return cls(**{name: plain[name] for name in _FIELDS} | read | {"threshold": float(plain["threshold"])})
        except UserError as error:
            raise UserError(f"{path} is not a valid grid set: {error}") from None

    def _plain(self) -> dict[str, Any]:
        """The fields as JSON types, listed in ``_FIELDS``."""
        arrays = {"labels": self.labels.tolist(), "indices": self.indices.tolist()}
        return json.loads(json.dumps({"format": FORMAT, **vars(self), **arrays}))


def _cell(classifier: Classifier, image: Tensor) -> Tensor:
    """float32 [3, h, w] in [0, 1]: the model input before its normalisation."""
    way = classifier.preprocessing
    way = replace(way, mean=way.mean_colour, std=way.std_colour, channels="RGB")
    inputs = way(load_image(image)[None].to(classifier.device))[0]
    mean, std = (inputs.new_tensor(values)[:, None, None] for values in (way.mean, way.std))
    return (inputs * std + mean).clamp(0, 1).cpu()


def check_grid_settings(n: int, threshold: float, seed: int) -> None:
    check_whole("n", n, 2)
    if not is_number(threshold) or not 0 < threshold <= 1:
        raise UserError(f"threshold is {threshold!r}: expected a confidence above 0 and at most 1")
    check_seed(seed)


def _read_plain(path: Path) -> dict[str, Any]:
    """The fields of a saved set, each checked for its type. Whether they fit together is checked by ``GridSet``."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): give a file that GridSet.save wrote") from None
    if len(data) > _MAX_FILE_BYTES:
        raise UserError(f"{path} is larger than {_MAX_FILE_BYTES // 2**20} MiB: expected a file that GridSet.save wrote")
    try:
        plain = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"{path} is not a grid set, or is damaged ({reason}): draw the grids again") from None
    if not isinstance(plain, dict) or not is_whole(plain.get("format")):
        raise UserError(f"{path} is not a grid set: expected a file that GridSet.save wrote")
    if plain["format"] != FORMAT:
        raise UserError(f"{path} has format {plain['format']}, this library reads {FORMAT}: upgrade the library, or draw the grids again")
    for name, (fits, expected) in _FIELDS.items():
        if name not in plain:
            raise UserError(f"{path} is not a valid grid set: {name!r} is missing")
        if not fits(plain[name]):
            raise UserError(f"{path} is not a valid grid set: {name!r} is {json.dumps(plain[name])[:60]}, expected {expected}")
    return plain


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return is_whole(value) and 0 <= value <= LARGEST_SEED


def _is_model(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"name", "weights_digest"}:
        return False
    return _is_text(value["name"]) and (value["weights_digest"] is None or _is_text(value["weights_digest"]))


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _is_table(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Rows of equal length."""
    return _is_list(value, lambda row: _is_list(row, fits)) and len(set(map(len, value))) == 1


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data": (_is_text, "a text"),
    "split": (lambda value: value is None or _is_text(value), "a text or null"),
    "class_names": (lambda value: _is_list(value, _is_text), "a list of texts"),
    "n": (_is_count, "a whole number"),
    "threshold": (is_number, "a number"),
    "seed": (_is_count, "a whole number"),
    "repeat_corners": (lambda value: isinstance(value, bool), "true or false"),
    "models": (lambda value: _is_list(value, _is_model), "a list of objects with name and weights_digest"),
    "ids": (lambda value: _is_table(value, _is_text), "rows of texts, all of one length"),
    "labels": (lambda value: _is_table(value, _is_count), "rows of whole numbers, all of one length"),
    "indices": (lambda value: _is_table(value, _is_count), "rows of whole numbers, all of one length"),
    "pool": (lambda value: value is None or _is_count(value), "a whole number or null"),
    "judged": (_is_count, "a whole number"),
    "kept": (_is_count, "a whole number"),
    "failures": (lambda value: _is_list(value, lambda row: _is_list(row, _is_text) and len(row) == 2), "a list of pairs of texts"),
    "versions": (lambda value: isinstance(value, dict) and all(map(_is_text, value.values())), "an object of texts"),
}
