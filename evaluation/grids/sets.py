"""Grid sets: which images stand in which cell, chosen so that the models are sure of every one of them.

A grid is an image of n x n cells, each with an image of another class. An explanation of the class of one cell should fall on that
cell (GridPG: Böhle, Fritz, Schiele, CVPR 2021; DiFull and DiPart: Rao, Böhle, Schiele, CVPR 2022, section 3). Only images that every model
classifies correctly with high confidence are used, so a set belongs to a list of models. A set holds no pixels: cells are read again
from the data and made at the size of the model that is judged.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution import __version__
from attribution.classifier import Classifier
from attribution.errors import UserError, describe
from attribution.files import whole_file
from attribution.image import load_image
from evaluation.dataset import ImageDataset, some_names
from evaluation.records import RecordLog, digest_of

Progress = Callable[[int, int], None]
FORMAT = 1
_MAX_FILE_BYTES = 2**26
_LARGEST = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Confidences:
    """How sure one model is of the labels of some images.

    Attributes:
        values: float64 [len(indices)], probability of the label where it is the prediction, else 0; NaN for a failure.
        failures: (id, reason) of each image that could not be read, or that the model returned no finite scores for.
    """

    values: np.ndarray
    failures: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class GridSet:
    """G grids of n x n images. Cells are numbered row by row from the top left: cell c is row c // n, column c % n.

    Attributes:
        data: name of the data set.
        split: of the data set; None where it has none.
        class_names: what labels are indices into.
        n: cells along each side.
        threshold: least probability that every model gives to the label of every image.
        seed: of the draw.
        repeat_corners: whether the bottom-right cell has the class of the top-left cell, with another image.
        models: ``name`` and ``weights_digest`` of each model that had to be sure; empty where the images were chosen in another way.
        ids: G tuples of n * n sample ids; none occurs twice.
        labels: int64 [G, n * n].
        indices: int64 [G, n * n], positions in the data set when the grids were made.
        pool: how many images of the seeded permutation could be judged at most; None for all.
        judged, kept: how many images were judged, and how many of these every model was sure of.
        failures: (id, reason) of the images that could not be judged, by the first of the models where they fail with several.
        versions: of the library and of torch, which the draw comes from.

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
        _check_settings(self.n, self.threshold, self.seed)
        shape = (len(self.ids), self.n**2)
        if not self.ids:
            raise UserError("a grid set without grids: expected at least one")
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
                raise UserError(f"{name} hold {array.min()}: expected none negative")
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
        """One grid as an image of cells at the classifier's own input size.

        Each cell went through the classifier's resize and crop (what these pad has the mean colour), without its normalisation.
        Bicubic resizing overshoots at sharp edges, so values are clamped: for such models the input made from the grid differs
        there from the input made from the single image.

        Args:
            dataset: the data that the set was made from, with the same class names; its order may have changed.
            index: of the grid, 0 to G - 1.
            classifier: whose preprocessing is used, (h, w) being its input size; it need not be one of ``models``.

        Returns:
            float32 [3, n * h, n * w], RGB in [0, 1], on the CPU.

        Raises:
            UserError: the data has lost an image of this grid, gives it another label, or cannot read it.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        cells = [_cell(classifier, _load(dataset, self._find(dataset, index, cell))) for cell in range(self.n**2)]
        rows = [torch.cat(cells[start : start + self.n], dim=2) for start in range(0, self.n**2, self.n)]
        return torch.cat(rows, dim=1)

    def _find(self, dataset: ImageDataset, index: int, cell: int) -> int:
        """Where the data set has the image of a cell now."""
        name, label, found = self.ids[index][cell], int(self.labels[index, cell]), int(self.indices[index, cell])
        if found >= len(dataset) or dataset.ids[found] != name:
            if name not in dataset.ids:
                raise UserError(f"{dataset.name} has no image {name!r}, which grid {index} needs: the data changed; choose the grids again")
            found = dataset.ids.index(name)
        if dataset.labels[found] not in (label, None):
            raise UserError(
                f"{name!r} has label {dataset.labels[found]} in {dataset.name} and {label} in the grid set: open the data with the "
                "class names of the set, or choose the grids again"
            )
        return found

    def save(self, path: str | Path) -> None:
        """Write ids, indices, labels and settings as JSON, whole or not at all; ``load`` gives an equal set back.

        Raises:
            UserError: the file cannot be written.
        """
        text = json.dumps(self._plain(), allow_nan=False, indent=1)  # escaped: file names need not be valid Unicode
        with whole_file(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> GridSet:
        """Read a file that ``save`` wrote; nothing in it is believed unchecked.

        Raises:
            UserError: missing, larger than 64 MiB, damaged, or not a grid set; names the file and what is wrong in it.
        """
        plain = _read_plain(Path(path))
        try:
            return cls(
                data=plain["data"],
                split=plain["split"],
                class_names=tuple(plain["class_names"]),
                n=plain["n"],
                threshold=float(plain["threshold"]),
                seed=plain["seed"],
                repeat_corners=plain["repeat_corners"],
                models=tuple(plain["models"]),
                ids=tuple(map(tuple, plain["ids"])),
                labels=np.array(plain["labels"], dtype=np.int64),
                indices=np.array(plain["indices"], dtype=np.int64),
                pool=plain["pool"],
                judged=plain["judged"],
                kept=plain["kept"],
                failures=tuple(map(tuple, plain["failures"])),
                versions=plain["versions"],
            )
        except UserError as error:
            raise UserError(f"{path} is not a valid grid set: {error}") from None

    def _plain(self) -> dict[str, Any]:
        """Plain JSON types, as ``_FIELDS`` lists them."""
        arrays = {"labels": self.labels.tolist(), "indices": self.indices.tolist()}
        return json.loads(json.dumps({"format": FORMAT, **vars(self), **arrays}))


def label_confidences(
    classifier: Classifier,
    dataset: ImageDataset,
    indices: Sequence[int],
    *,
    log: RecordLog | None = None,
    progress: Progress | None = None,
) -> Confidences:
    """How sure a model is of the labels of some images, by the preprocessing that it is evaluated with.

    Images are read and forwarded in batches of the classifier's batch size. With a log each batch is a record, and batches that it
    holds are not forwarded again; images that failed are tried again. A record stands for the model, the ids and the labels of the
    batch, not for its pixels: begin another log when the files behind the ids have changed.

    Args:
        classifier: its classes are what the labels are indices into.
        dataset: the images.
        indices: which of them; each needs a label.
        log: where the batches are kept.
        progress: called with (images done, all of them) after each batch.

    Raises:
        UserError: an index out of range, a sample without a label, a label that is no class of the model, or a full disk. What is
            wrong with a single image is returned instead.
    """
    indices = _checked_indices(dataset, indices)
    _check_labels(classifier, dataset, indices)
    own = classifier.identity
    identity = [own.name, own.weights, own.preprocessing, __version__, dataset.name, *own.precision]
    values: list[float | None] = []
    failures: list[tuple[str, str]] = []
    for start in range(0, len(indices), classifier.batch_size):
        batch = indices[start : start + classifier.batch_size]
        key = "confidence-" + digest_of([*identity, [[dataset.ids[index], dataset.labels[index]] for index in batch]])
        known = None if log is None else log.records.get(key)
        found: list[float | None] = [None] * len(batch) if known is None else list(known["values"])
        missing = [position for position, value in enumerate(found) if value is None]
        for position, value in zip(missing, _judge(classifier, dataset, [batch[p] for p in missing]), strict=True):
            if isinstance(value, UserError):
                failures.append((dataset.ids[batch[position]], str(value)))
            else:
                found[position] = value
        if log is not None and (known is None or known["values"] != found):
            log.append(key, {"model": classifier.name, "data": dataset.name, "values": found})
        values += found
        if progress is not None:
            progress(len(values), len(indices))
    return Confidences(np.array([np.nan if value is None else value for value in values], dtype=np.float64), tuple(failures))


def make_grids(
    dataset: ImageDataset,
    confidences: Sequence[np.ndarray],
    indices: Sequence[int] | None = None,
    *,
    count: int | None,
    n: int = 2,
    threshold: float = 0.99,
    seed: int = 0,
    repeat_corners: bool = False,
    models: Sequence[dict[str, str | None]] = (),
    split: str | None = None,
    pool: int | None = None,
    failures: Sequence[tuple[str, str]] = (),
) -> GridSet:
    """Draw grids from the images that every model is sure of (Rao, Böhle, Schiele, CVPR 2022, section 3 and their code).

    The images kept are shuffled once within each class. Each grid takes n * n different classes, every tuple of classes that
    still have images being equally likely, and the next image of each; no image is used twice. The draw depends on the images
    kept, the seed, n and repeat_corners alone; a larger count begins with the grids of a smaller one.

    Args:
        dataset: the images; those without a label are passed over.
        confidences: one array for each model, float [len(indices)] in [0, 1], as ``label_confidences`` gives them: the probability
            of the label, 0 where another class is predicted, NaN where it is not known. An image is kept when all are at least
            the threshold. Without any, all of indices are kept.
        indices: which images the confidences belong to, in their order, which has no influence; None for all of the data set.
        count: how many grids; None for as many as the draw gives.
        n: cells along each side, at least 2.
        threshold: above 0, at most 1.
        seed: 0 to 2**63 - 1.
        repeat_corners: draw n * n - 1 classes, and give the bottom-right cell another image of the class of the top-left cell.
        models, split, pool, failures: kept in the set.

    Raises:
        UserError: settings out of range, arrays of other lengths, or too few images for so many grids.
    """
    _check_settings(n, threshold, seed)
    if count is not None and (not _is_whole(count) or count < 1):
        raise UserError(f"{count!r} grids asked for: expected a whole number of at least 1, or None for as many as can be made")
    if indices is None and len(confidences) == 0:
        raise UserError("neither confidences nor indices were given: expected the confidences of one model or more, or the images to use")
    judged = _checked_indices(dataset, range(len(dataset)) if indices is None else indices)
    if len(set(judged)) < len(judged):
        raise UserError(f"indices hold {Counter(judged).most_common(1)[0][0]} more than once: give each image once")
    sure = np.ones(len(judged), dtype=bool)
    for number, values in enumerate(confidences):
        sure &= _checked_confidences(values, number, len(judged)) >= threshold
    by_class = _by_class(dataset, [index for index, good in zip(judged, sure, strict=True) if good])
    labelled = sum(dataset.labels[index] is not None for index in judged)
    grids = _draw(by_class, count, n, repeat_corners, torch.Generator().manual_seed(int(seed)))
    if not grids or (count is not None and len(grids) < count):
        asked = f"{'grids' if count is None else f'{count} grids'} of {n}x{n}"
        needs = f"{n * n - 1} different classes, one of them twice" if repeat_corners else f"{n * n} different classes"
        fewer = f"ask for at most {len(grids)}, " if grids else "make smaller grids, " if n > 2 else ""
        broken = f"{len(failures)} could not be judged, the first: {failures[0][0]} ({failures[0][1]}); " if failures else ""
        raise UserError(
            f"{dataset.name}: {asked} asked for, {len(grids)} can be made with seed {seed}; every model is sure (confidence at least "
            f"{threshold:g}) of {_counts(dataset, by_class, labelled)}; a grid takes {n * n} images of {needs}, and no image is used "
            f"twice; {broken}lower the threshold, {fewer}or give more images"
        )
    return GridSet(
        data=dataset.name,
        split=split,
        class_names=dataset.class_names,
        n=int(n),
        threshold=float(threshold),
        seed=int(seed),
        repeat_corners=bool(repeat_corners),
        models=tuple(models),
        ids=tuple(tuple(dataset.ids[index] for index in grid) for grid in grids),
        labels=np.array([[dataset.labels[index] for index in grid] for grid in grids], dtype=np.int64),
        indices=np.array(grids, dtype=np.int64),
        pool=pool,
        judged=labelled,
        kept=sum(map(len, by_class.values())),
        failures=tuple(failures),
    )


def choose_grids(
    dataset: ImageDataset,
    classifiers: Sequence[Classifier],
    *,
    count: int | None,
    n: int = 2,
    threshold: float = 0.99,
    seed: int = 0,
    repeat_corners: bool = False,
    pool: int | None = None,
    split: str | None = None,
    log: RecordLog | None = None,
    progress: Progress | None = None,
) -> GridSet:
    """Judge the labelled images of a data set by some models and draw grids from those that all are sure of.

    Args:
        dataset: opened with the class names of the models, which all have the same classes.
        classifiers: at least one.
        count, n, threshold, seed, repeat_corners, split: see ``make_grids``.
        pool: judge only so many images, the first of ``dataset.choose(None, seed, labels_only=True)``; None for all. The grids
            depend on it, as images outside are not used.
        log: keeps what was judged, so that a run that was killed goes on where it stopped (see ``label_confidences``).
        progress: called with (images judged, images times models).

    Raises:
        UserError: see ``label_confidences`` and ``make_grids``; no classifier.
    """
    if not classifiers:
        raise UserError("no classifier was given: expected at least one that is sure of the images")
    _check_settings(n, threshold, seed)
    indices = dataset.choose(pool, seed, labels_only=True)
    total = len(indices) * len(classifiers)
    judged: list[Confidences] = []
    for number, classifier in enumerate(classifiers):

        def report(done: int, _: int, before: int = number * len(indices)) -> None:
            if progress is not None:
                progress(before + done, total)

        judged.append(label_confidences(classifier, dataset, indices, log=log, progress=report))
    return make_grids(
        dataset,
        [confidences.values for confidences in judged],
        indices,
        count=count,
        n=n,
        threshold=threshold,
        seed=seed,
        repeat_corners=repeat_corners,
        models=[{"name": classifier.name, "weights_digest": classifier.weights_digest} for classifier in classifiers],
        split=split,
        pool=None if pool is None else int(pool),
        failures=list({name: (name, reason) for found in reversed(judged) for name, reason in found.failures}.values()),
    )


def _judge(classifier: Classifier, dataset: ImageDataset, indices: Sequence[int]) -> list[float | UserError]:
    """The confidence in each image, or what is wrong with it."""
    found: dict[int, float | UserError] = {}
    inputs: dict[int, Tensor] = {}
    for index in indices:
        try:
            inputs[index] = classifier.inputs(_load(dataset, index))
        except UserError as error:
            found[index] = error
    try:
        found.update(_forward(classifier, dataset, inputs))
    except UserError:  # one image that the model trips over must not cost the others of its batch
        for index, single in inputs.items():
            try:
                found.update(_forward(classifier, dataset, {index: single}))
            except UserError as error:
                found[index] = error
    return [found[index] for index in indices]


def _forward(classifier: Classifier, dataset: ImageDataset, inputs: dict[int, Tensor]) -> dict[int, float]:
    if not inputs:
        return {}
    probabilities = classifier.probabilities(torch.cat(list(inputs.values()))).cpu()
    labels = torch.tensor([dataset.labels[index] for index in inputs])
    of_label = probabilities.gather(1, labels[:, None])[:, 0]
    sure = torch.where(probabilities.argmax(dim=1) == labels, of_label, 0.0)
    return dict(zip(inputs, sure.tolist(), strict=True))


def _load(dataset: ImageDataset, index: int) -> Tensor:
    """The image alone: a mask that cannot be read is no reason to leave an image out of a grid."""
    try:
        return load_image(dataset.read(index))
    except UserError as error:
        raise error if dataset.places is None else UserError(f"{dataset.places[index]}: {error}") from None


def _cell(classifier: Classifier, image: Tensor) -> Tensor:
    """float32 [3, h, w] in [0, 1]: the model input before its normalisation."""
    inputs = classifier.inputs(image)[0]
    mean, std = (inputs.new_tensor(values)[:, None, None] for values in (classifier.preprocessing.mean, classifier.preprocessing.std))
    return (inputs * std + mean).clamp(0, 1).cpu()


def _by_class(dataset: ImageDataset, indices: Sequence[int]) -> dict[int, list[int]]:
    """Labelled images by class, both in ascending order, so that the order of judging does not matter."""
    found: dict[int, list[int]] = {}
    for label, index in sorted((label, index) for index in indices if (label := dataset.labels[index]) is not None):
        found.setdefault(label, []).append(index)
    return found


def _draw(by_class: dict[int, list[int]], count: int | None, n: int, repeat_corners: bool, generator: torch.Generator) -> list[list[int]]:
    """As many grids of indices as were asked for, or as there are images for."""
    unused = {label: _shuffled(images, generator) for label, images in by_class.items()}
    grids: list[list[int]] = []
    while count is None or len(grids) < count:
        classes = _draw_classes(unused, n, repeat_corners, generator)
        if classes is None:
            break
        grids.append([unused[label].pop() for label in classes])
    return grids


def _draw_classes(unused: dict[int, list[int]], n: int, repeat_corners: bool, generator: torch.Generator) -> list[int] | None:
    """Classes of the cells of a grid, uniform over all tuples that there are images for; None when there is no such tuple."""
    there = [label for label, images in unused.items() if images]
    if not repeat_corners:
        return _shuffled(there, generator)[: n * n] if len(there) >= n * n else None
    # the first cell needs a class of two images: drawn on its own, since the first such class of one permutation would favour tuples in
    # which classes of one image follow it
    pairs = [label for label in there if len(unused[label]) >= 2]
    if not pairs or len(there) < n * n - 1:
        return None
    corner = _shuffled(pairs, generator)[0]
    others = _shuffled([label for label in there if label != corner], generator)
    return [corner, *others[: n * n - 2], corner]


def _shuffled(values: list[int], generator: torch.Generator) -> list[int]:
    return [values[position] for position in torch.randperm(len(values), generator=generator).tolist()]


def _counts(dataset: ImageDataset, by_class: dict[int, list[int]], judged: int) -> str:
    """How many images were kept, and of which classes there are few."""
    known = {label for label in dataset.labels if label is not None} | set(range(len(dataset.class_names)))
    counts = {label: len(by_class.get(label, ())) for label in known}
    names = [
        f"{dataset.class_names[label] if dataset.class_names else f'class {label}'} {counts[label]}"
        for label in sorted(known, key=lambda label: (counts[label], label))
    ]
    kept = sum(counts.values())
    return f"{kept} of {judged} images, in {len(by_class)} of {len(known)} classes, fewest first: {some_names(names) or 'no class'}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_settings(n: int, threshold: float, seed: int) -> None:
    if not _is_whole(n) or n < 2:
        raise UserError(f"grids of {n!r} cells a side: expected a whole number of at least 2")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float | np.number) or not 0 < threshold <= 1:
        raise UserError(f"threshold is {threshold!r}: expected a confidence above 0 and at most 1")
    if not _is_whole(seed) or not 0 <= seed <= _LARGEST:
        raise UserError(f"seed is {seed!r}: expected 0 to 2**63 - 1")


def _checked_indices(dataset: ImageDataset, indices: Sequence[int]) -> list[int]:
    wrong = [index for index in indices if not _is_whole(index) or not 0 <= index < len(dataset)]
    if wrong:
        raise UserError(f"index {wrong[0]!r} is out of range: {dataset.name} has images 0 to {len(dataset) - 1}")
    return [int(index) for index in indices]


def _check_labels(classifier: Classifier, dataset: ImageDataset, indices: Sequence[int]) -> None:
    labels = {index: dataset.labels[index] for index in indices}
    for index, label in labels.items():
        if label is None:
            raise UserError(f"{dataset.ids[index]} has no label: choose labelled samples, as dataset.choose does with labels_only=True")
    largest = max((label for label in labels.values() if label is not None), default=0)
    if labels and largest >= classifier.num_classes:
        raise UserError(
            f"{dataset.name} has the label {largest}, {classifier.name} has classes 0 to {classifier.num_classes - 1}: open the data with "
            "class_names=classifier.class_names"
        )


def _checked_confidences(values: Any, number: int, length: int) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (length,) or array.dtype.kind not in "fiu":
        raise UserError(f"confidences of model {number} are {describe(values)}: expected float [{length}], one for each image judged")
    if bool(((array < 0) | (array > 1)).any()):
        raise UserError(
            f"confidences of model {number} are {np.nanmin(array):.4g} to {np.nanmax(array):.4g}: expected probabilities in [0, 1]"
        )
    return array


def _read_plain(path: Path) -> dict[str, Any]:
    """The fields of a saved set, each of its own type; whether they fit together is another matter."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): name a saved grid set") from None
    if len(data) > _MAX_FILE_BYTES:
        raise UserError(f"{path} is larger than {_MAX_FILE_BYTES // 2**20} MiB: it is no saved grid set")
    try:
        plain = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"{path} is not a grid set, or is damaged ({reason}): choose the grids again") from None
    if not isinstance(plain, dict) or not _is_whole(plain.get("format")):
        raise UserError(f"{path} is not a grid set: expected a file that GridSet.save wrote")
    if plain["format"] != FORMAT:
        raise UserError(f"{path} has format {plain['format']}, this library reads {FORMAT}: upgrade the library, or choose the grids again")
    for name, (fits, expected) in _FIELDS.items():
        if name not in plain:
            raise UserError(f"{path} is not a valid grid set: {name!r} is missing")
        if not fits(plain[name]):
            raise UserError(f"{path} is not a valid grid set: {name!r} is {json.dumps(plain[name])[:60]}, expected {expected}")
    return plain


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and 0 <= value <= _LARGEST


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
    "threshold": (lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"),
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
