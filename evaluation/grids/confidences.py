"""Confidence of a classifier in the labels of a data set's images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from attribution import __version__
from attribution.checks import is_whole
from attribution.errors import UserError
from attribution.model.classifier import Classifier
from attribution.provenance import digest_of
from evaluation.data.dataset import ImageDataset
from evaluation.grids.sets import Progress, load_cell


class Log(Protocol):
    """Where records are kept by key, such as ``RecordLog``."""

    records: dict[str, dict[str, Any]]

    def append(self, key: str, record: dict[str, Any]) -> None: ...


@dataclass(frozen=True, eq=False)
class Confidences:
    """How sure one model is of the labels of some images.

    Attributes:
        values: float64 [len(indices)], probability of the label where it is the prediction, else 0; NaN for a failure.
        failures: (id, reason) of each image that could not be read, or that the model returned no finite scores for.
    """

    values: np.ndarray
    failures: tuple[tuple[str, str], ...] = ()


def label_confidences(
    classifier: Classifier,
    dataset: ImageDataset,
    indices: Sequence[int],
    *,
    log: Log | None = None,
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
    indices = checked_indices(dataset, indices)
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


def _judge(classifier: Classifier, dataset: ImageDataset, indices: Sequence[int]) -> list[float | UserError]:
    """The confidence in each image, or what is wrong with it."""
    found: dict[int, float | UserError] = {}
    inputs: dict[int, Tensor] = {}
    for index in indices:
        try:
            inputs[index] = classifier.inputs(load_cell(dataset, index))
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


def checked_indices(dataset: ImageDataset, indices: Sequence[int]) -> list[int]:
    wrong = [index for index in indices if not is_whole(index) or not 0 <= index < len(dataset)]
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
