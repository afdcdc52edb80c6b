"""Draw grids from images that every model classifies correctly and with high confidence (Rao, Böhle, Schiele, CVPR 2022)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from attribution.checks import check_whole
from attribution.errors import UserError, describe
from attribution.model.classifier import Classifier
from evaluation.data.dataset import ImageDataset, some_names
from evaluation.grids.confidences import Confidences, Log, checked_indices, label_confidences
from evaluation.grids.sets import GridSet, Progress, check_grid_settings


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
    """Draw grids from the images of which every model is confident (Rao, Böhle, Schiele, CVPR 2022, section 3, and its code).

    The images kept are shuffled once within each class. Each grid takes n * n different classes and the next image of each. All
    tuples of classes that still have images are equally likely. No image is used twice. The draw depends only on the images kept,
    the seed, n and repeat_corners. A larger count begins with the grids of a smaller one.

    Args:
        dataset: the images; those without a label are left out.
        confidences: one array for each model, float [len(indices)] in [0, 1], as ``label_confidences`` returns them: the
            probability of the label, 0 if another class is predicted, NaN if unknown. An image is kept if all its confidences
            are at least the threshold. Without confidences, all of ``indices`` are kept.
        indices: the images that the confidences belong to; None for the whole data set. Their order does not change the grids.
        count: number of grids; None for as many as possible.
        n: cells along each side, at least 2.
        threshold: above 0, at most 1.
        seed: 0 to 2**63 - 1.
        repeat_corners: draw n * n - 1 classes, and give the bottom-right cell a second image of the top-left cell's class.
        models, split, pool, failures: stored in the set.

    Raises:
        UserError: settings out of range, arrays of other lengths, or too few images for this number of grids.
    """
    check_grid_settings(n, threshold, seed)
    if count is not None:
        check_whole("count", count, 1)
    if indices is None and len(confidences) == 0:
        raise UserError("neither confidences nor indices were given: expected the confidences of at least one model, or the images to use")
    judged = checked_indices(dataset, range(len(dataset)) if indices is None else indices)
    if len(set(judged)) < len(judged):
        raise UserError(f"indices hold {Counter(judged).most_common(1)[0][0]} more than once: give each image once")
    confident = np.ones(len(judged), dtype=bool)
    for number, values in enumerate(confidences):
        confident &= _checked_confidences(values, number, len(judged)) >= threshold
    by_class = _by_class(dataset, [index for index, good in zip(judged, confident, strict=True) if good])
    labelled = sum(dataset.labels[index] is not None for index in judged)
    grids = _draw(by_class, count, n, repeat_corners, torch.Generator().manual_seed(int(seed)))
    if not grids or (count is not None and len(grids) < count):
        limits = f"with seed {seed}; every model is sure (confidence at least {threshold:g}) of {_counts(dataset, by_class, labelled)}"
        raise _too_few(dataset.name, len(grids), count, n, repeat_corners, limits, failures)
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
    log: Log | None = None,
    progress: Progress | None = None,
) -> GridSet:
    """Measure the confidence of some models in the labelled images of a data set, and draw grids from the confident ones.

    Args:
        dataset: opened with the class names of the models, which must all be the same.
        classifiers: at least one.
        count, n, threshold, seed, repeat_corners, split: see ``make_grids``.
        pool: use only this many images, the first of ``dataset.choose(None, seed, labels_only=True)``; None for all. The grids
            depend on it.
        log: records the confidences, so that a killed run resumes where it stopped (see ``label_confidences``).
        progress: called with (images judged, number of images times number of models).

    Raises:
        UserError: see ``label_confidences`` and ``make_grids``; no classifier.
    """
    if not classifiers:
        raise UserError("no classifier was given: expected at least one")
    check_grid_settings(n, threshold, seed)
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


def _by_class(dataset: ImageDataset, indices: Sequence[int]) -> dict[int, list[int]]:
    """Labelled images by class, classes and images in ascending order, so that the order of ``indices`` has no influence."""
    found: dict[int, list[int]] = {}
    for label, index in sorted((label, index) for index in indices if (label := dataset.labels[index]) is not None):
        found.setdefault(label, []).append(index)
    return found


def _draw(by_class: dict[int, list[int]], count: int | None, n: int, repeat_corners: bool, generator: torch.Generator) -> list[list[int]]:
    """Grids of indices: ``count`` of them, or fewer if the images run out."""
    unused = {label: _shuffled(images, generator) for label, images in by_class.items()}
    grids: list[list[int]] = []
    while count is None or len(grids) < count:
        classes = _draw_classes(unused, n, repeat_corners, generator)
        if classes is None:
            break
        grids.append([unused[label].pop() for label in classes])
    return grids


def _draw_classes(unused: dict[int, list[int]], n: int, repeat_corners: bool, generator: torch.Generator) -> list[int] | None:
    """The classes of a grid's cells, uniform over all tuples of classes with enough images; None if there is no such tuple."""
    left = [label for label, images in unused.items() if images]
    if not repeat_corners:
        return _shuffled(left, generator)[: n * n] if len(left) >= n * n else None
    # The class of the corners needs two images. It is drawn first and on its own: taking the first class with two images of one
    # permutation would favour tuples in which classes with one image follow it.
    pairs = [label for label in left if len(unused[label]) >= 2]
    if not pairs or len(left) < n * n - 1:
        return None
    corner = _shuffled(pairs, generator)[0]
    others = _shuffled([label for label in left if label != corner], generator)
    return [corner, *others[: n * n - 2], corner]


def _shuffled(values: list[int], generator: torch.Generator) -> list[int]:
    return [values[position] for position in torch.randperm(len(values), generator=generator).tolist()]


def _counts(dataset: ImageDataset, by_class: dict[int, list[int]], judged: int) -> str:
    """For a message: how many images were kept, and the classes with the fewest."""
    known = {label for label in dataset.labels if label is not None} | set(range(len(dataset.class_names)))
    counts = {label: len(by_class.get(label, ())) for label in known}
    names = [
        f"{dataset.class_names[label] if dataset.class_names else f'class {label}'} {counts[label]}"
        for label in sorted(known, key=lambda label: (counts[label], label))
    ]
    kept = sum(counts.values())
    return f"{kept} of {judged} images, in {len(by_class)} of {len(known)} classes, fewest first: {some_names(names) or 'no class'}"


def _too_few(
    name: str, made: int, count: int | None, n: int, repeat_corners: bool, limits: str, failures: Sequence[tuple[str, str]]
) -> UserError:
    asked = f"{'grids' if count is None else f'{count} grids'} of {n}x{n}"
    needs = f"{n * n - 1} different classes, one of them twice" if repeat_corners else f"{n * n} different classes"
    fewer = f"ask for at most {made}, " if made else "make smaller grids, " if n > 2 else ""
    broken = f"{len(failures)} could not be judged, the first: {failures[0][0]} ({failures[0][1]}); " if failures else ""
    return UserError(
        f"{name}: {asked} asked for, {made} can be made {limits}; a grid takes {n * n} images of {needs}, and no image is used "
        f"twice; {broken}lower the threshold, {fewer}or give more images"
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
