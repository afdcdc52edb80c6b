"""How confident a classifier is in the label of each image: the probabilities by which images of grids are chosen."""

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
from attribution.provenance import digest_of, pixels_digest
from evaluation.data.dataset import ImageDataset
from evaluation.grids.sets import Progress


class Log(Protocol):
    """Where records are kept by key, such as ``RecordLog``."""

    records: dict[str, dict[str, Any]]

    def append(self, key: str, record: dict[str, Any]) -> None: ...


@dataclass(frozen=True, eq=False)
class Confidences:
    """How confident one model is in the labels of some images.

    Attributes:
        values: float64 [len(indices)], probability of the label if it is the predicted class, else 0; NaN for a failure.
        failures: (id, reason) of each image that could not be read, or for which the model returned scores that are not finite.
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
    """Measure how confident a model is in the labels of some images, with the model's own preprocessing.

    Images are read and forwarded in batches of the classifier's batch size. With a log, each batch is one record. It holds the
    digest of each image's pixels. On the next run all images are read again, and only those are forwarded whose pixels differ from
    the record's or that failed before. An image that can no longer be read keeps its recorded confidence, so that a lost file does
    not change which grids are drawn; it costs only the grid that needs it.

    Args:
        classifier: its class names are what the labels are indices into.
        dataset: the images.
        indices: which images; each needs a label.
        log: where the batches are recorded.
        progress: called with (images done, images in all) after each batch.

    Raises:
        UserError: an index out of range, a sample without a label, a label that is no class of the model, or a full disk. A
            problem with a single image raises nothing; it is returned in ``failures``.
    """
    indices = checked_indices(dataset, indices)
    _check_labels(classifier, dataset, indices)
    own = classifier.identity
    identity = [own.name, own.weights, own.preprocessing, __version__, dataset.name, *own.settings]
    values: list[float | None] = []
    failures: list[tuple[str, str]] = []
    for start in range(0, len(indices), classifier.batch_size):
        batch = indices[start : start + classifier.batch_size]
        key = "confidence-" + digest_of([*identity, [[dataset.ids[index], dataset.labels[index]] for index in batch]])
        known = None if log is None else log.records.get(key)
        digests, found = _judge(classifier, dataset, batch, {} if known is None else known)
        numbers = [None if isinstance(value, UserError) else value for value in found]
        failures += [(dataset.ids[index], str(value)) for index, value in zip(batch, found, strict=True) if isinstance(value, UserError)]
        record = {"model": classifier.name, "data": dataset.name, "values": numbers, "pixels": digests}
        if log is not None and (known is None or any(known.get(name) != value for name, value in record.items())):
            log.append(key, record)
        values += numbers
        if progress is not None:
            progress(len(values), len(indices))
    return Confidences(np.array([np.nan if value is None else value for value in values], dtype=np.float64), tuple(failures))


def _judge(
    classifier: Classifier, dataset: ImageDataset, batch: Sequence[int], known: dict[str, Any]
) -> tuple[list[str | None], list[float | UserError]]:
    """The digest of each image of a batch, and its confidence or its error.

    A confidence is taken from ``known``, the record of the batch, if the image has the same pixels or can no longer be read.
    """
    pairs = zip(batch, known.get("pixels", ()), known.get("values", ()), strict=False)
    recorded = {index: (pixels, value) for index, pixels, value in pairs if value is not None}
    digests: dict[int, str] = {}
    found: dict[int, float | UserError] = {}
    inputs: dict[int, Tensor] = {}
    for index in batch:
        try:
            image = dataset.image(index)
        except UserError as error:
            if index in recorded:
                digests[index], found[index] = recorded[index]
            else:
                found[index] = error
            continue
        digests[index] = pixels_digest(image)
        if index in recorded and recorded[index][0] == digests[index]:
            found[index] = recorded[index][1]
            continue
        try:
            inputs[index] = classifier.inputs(image)
        except UserError as error:
            found[index] = error
    found.update(_measure(classifier, dataset, inputs))
    return [digests.get(index) for index in batch], [found[index] for index in batch]


def _measure(classifier: Classifier, dataset: ImageDataset, inputs: dict[int, Tensor]) -> dict[int, float | UserError]:
    """The confidence in each image, or its error: scores that are not finite must not cost the other images of the batch."""
    try:
        return {**_forward(classifier, dataset, inputs)}
    except UserError as error:
        if len(inputs) == 1:
            return dict.fromkeys(inputs, error)
        return {index: value for each in inputs.items() for index, value in _measure(classifier, dataset, dict([each])).items()}


def _forward(classifier: Classifier, dataset: ImageDataset, inputs: dict[int, Tensor]) -> dict[int, float]:
    if not inputs:
        return {}
    probabilities = classifier.probabilities(torch.cat(list(inputs.values()))).cpu()
    labels = torch.tensor([dataset.labels[index] for index in inputs])
    of_label = probabilities.gather(1, labels[:, None])[:, 0]
    confident = torch.where(probabilities.argmax(dim=1) == labels, of_label, 0.0)
    return dict(zip(inputs, confident.tolist(), strict=True))


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
