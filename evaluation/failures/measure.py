"""Predict the images of a data set, and explain those that the model gets wrong."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.errors import NotMisclassified, UserError
from attribution.failure import FailureExplanation, explain_failure
from attribution.image import limit_size
from attribution.model.classifier import Classifier
from attribution.provenance import pixels_digest
from attribution.regions import Regions
from evaluation.data.dataset import Sample
from evaluation.failures.results import Failed, FailureResults
from evaluation.failures.settings import FailureSettings
from evaluation.metrics.protocol import Protocol
from evaluation.study.attempts import Broken, attempted, together
from evaluation.study.identity import identity_of, record_key, sample_seed
from evaluation.study.records import Record
from evaluation.study.run import Run, Unit, batches, problems
from evaluation.study.settings import named_data, named_model

TOGETHER = 64  # images predicted in one batch
_EXPLAINED = "explanation"  # name of the only part of an image's unit


def measure_failures(run: Run[FailureSettings]) -> FailureResults:
    """Predict all images, and explain the first of those that the model gets wrong.

    Raises:
        UserError: no labels, or no image that can be predicted; when only reading, no prediction for these settings.
    """
    images = _Images(run)
    dataset, label, group = images.dataset, images.label, images.group
    chosen = dataset.choose(run.settings.samples, run.settings.seed, labels_only=True)
    predicted = images.predictions(chosen)
    if not predicted:
        raise images.nothing(len(chosen))
    wrong = [index for index, found in predicted.items() if found != label(index)]
    failures, right = images.failures(wrong[: run.settings.most or None])
    wrong = [index for index in wrong if index not in right]
    looked_at, wrong_of = (Counter(group(index) for index in each) for each in (predicted, wrong))
    return FailureResults(
        settings=run.settings,
        classifier=images.classifier,
        dataset=dataset,
        looked_at=len(predicted),
        right=len(predicted) - len(wrong),
        by_class=dict(sorted(Counter(map(label, predicted)).items())),
        by_group={name: (looked_at[name], wrong_of[name]) for name in sorted(each for each in looked_at if each is not None)},
        failures=tuple(failures),
        broken=tuple(images.broken()),
        out=run.out,
        confusions=dict(sorted(Counter((label(index), predicted[index]) for index in wrong).items())),
    )


def explain_sample(settings: FailureSettings, sample: str) -> FailureExplanation:
    """Explain one image as ``run_failures`` does, without writing anything.

    Raises:
        UserError: no such image, one without a label, or one that the model gets right.
    """
    classifier = named_model(settings, settings.model)
    dataset = named_data(settings, classifier.class_names)
    if sample not in dataset.ids:
        close = difflib.get_close_matches(sample, dataset.ids, 1) or dataset.ids[:1]
        raise UserError(f"{dataset.name} has no sample {sample!r}: expected an id such as {close[0]!r}")
    found = dataset[dataset.ids.index(sample)]
    if found.label is None:
        raise UserError(f"{sample} has no label: only a labelled sample can be misclassified")
    return _explained(settings, classifier, found)


def _explained(settings: FailureSettings, classifier: Classifier, sample: Sample) -> FailureExplanation:
    assert sample.label is not None
    return explain_failure(
        sample.image,
        classifier,
        sample.label,
        fill=settings.fill,
        regions=settings.regions,
        region_options=settings.region_options,
        search=settings.search,
        pending=settings.pending,
        seed=sample_seed(settings.seed, sample.id),
    )


class _Images:
    """The images of a data set under one model."""

    def __init__(self, run: Run[FailureSettings]) -> None:
        self.run, self.settings = run, run.settings
        self.classifier = named_model(run.settings, run.settings.model)
        self.dataset = named_data(run.settings, self.classifier.class_names)
        self.identity = identity_of(self.classifier)
        fill = Protocol(fill=run.settings.fill).settings()["fill"]
        self.ways = [fill, *(run.settings.plain()[name] for name in ("regions", "region_options", "search", "pending"))]
        self.pixels: dict[int, str] = {}  # digests, known from the predictions on

    def predictions(self, chosen: Sequence[int]) -> dict[int, int]:
        """The predicted class of every image that can be read, in the order given."""
        found = self.run.stage(batches(chosen, TOGETHER), self._batch, lambda batch: f"{len(batch)} predictions")
        return {index: record["predicted"] for records in found.values() for index, record in records.items()}

    def failures(self, wrong: Sequence[int]) -> tuple[list[Failed], set[int]]:
        """The failures explained, and the images that the model gets right when they are not in a batch."""
        found = self.run.stage(wrong, self._failure, lambda index: self.dataset.ids[index])
        records = {index: record for index, parts in found.items() for record in parts.values()}
        failures = []
        for index, record in records.items():
            if "found" in record:
                try:
                    failures.append(attempted(partial(self._failed, index, record["found"])))
                except Broken as error:
                    self.run.fail(index, None, str(error))
        return failures, {index for index, record in records.items() if "found" not in record}

    def broken(self) -> Iterator[tuple[str, str]]:
        """(sample, reason) of what failed."""
        return problems(self.run, lambda index: self.dataset.ids[index])

    def nothing(self, count: int) -> UserError:
        """The error for a run without any prediction."""
        if self.run.reading:
            return UserError(
                f"{self.run.log.path} holds no prediction for these settings: expected the model and the data of an earlier run"
            )
        sample, reason = next(self.broken())
        return UserError(f"none of {count} images could be predicted, such as {sample}: {reason}")

    def label(self, index: int) -> int:
        label = self.dataset.labels[index]
        assert label is not None
        return int(label)

    def group(self, index: int) -> str | None:
        return None if self.dataset.groups is None else self.dataset.groups[index]

    def _batch(self, batch: tuple[int, ...]) -> Unit:
        """A batch of images. It is predicted as a whole, because other batches would change the last digits in a resumed run."""
        keys: dict[int, str] = {}
        inputs: dict[int, Tensor] = {}
        unread: dict[int, Broken] = {}
        for index in batch:
            try:
                image = attempted(partial(self._image, index))
                self.pixels[index] = pixels_digest(image)
                keys[index] = self._key(index)
                if keys[index] not in self.run.log:
                    inputs[index] = attempted(partial(self._inputs, image))
            except Broken as error:
                keys[index], unread[index] = f"unread {index}", error  # under this key there is never a record

        def predicted(indices: Sequence[int]) -> list[Record]:
            stacked = torch.cat([inputs[index] if index in inputs else self._inputs(self._image(index)) for index in indices])
            most = self.classifier.probabilities(stacked).cpu().max(dim=1)
            found = zip(indices, most.indices.tolist(), most.values.tolist(), strict=True)
            return [{"sample": self.dataset.ids[index], "predicted": first, "confidence": p} for index, first, p in found]

        def measure(missing: Sequence[int]) -> Iterator[tuple[int, Record | Broken]]:
            yield from unread.items()
            if set(missing) - set(unread):
                yield from together([index for index in batch if index not in unread], predicted)

        return Unit(keys, measure)

    def _failure(self, index: int) -> Unit:
        """A misclassified image."""
        sample, key, path = self.dataset.ids[index], self._explanation_key(index), self._path(index)
        known = self.run.log.records.get(key)
        files = {_EXPLAINED: path} if known is None or "found" in known else {}

        def measure(_: Sequence[str]) -> Iterator[tuple[str, Record]]:
            record: Record = {"sample": sample, "label": self.label(index)}
            try:
                failure = _explained(self.settings, self.classifier, self.dataset[index])
            except NotMisclassified:  # two classes so close that the other images of its batch decided between them
                files.clear()
                yield _EXPLAINED, {**record, "right": True}
            else:
                failure.truth.save(path)
                yield _EXPLAINED, {**record, "found": failure.plain()}

        return Unit({_EXPLAINED: key}, measure, files)

    def _failed(self, index: int, found: dict[str, Any]) -> Failed:
        """A failure, with what its mask says about the causing regions; masks are read anew, since they may be added later."""
        sample, label = self.dataset.ids[index], self.label(index)
        failed = Failed(sample, index, label, found["predicted"], self.group(index), found, self._path(index))
        mask = None if self.dataset.read_mask is None else self.dataset[index].mask
        if mask is None or not mask.any():
            return failed
        regions, cause = failed.explanation().regions, found["cause"]
        assert regions is not None
        shares = object_shares(mask, regions)
        on_mask = None
        if cause is not None:
            area = regions.area[cause["regions"]]
            on_mask = float((area * shares[cause["regions"]]).sum() / area.sum())
        chance = float((regions.area * shares).sum())
        return replace(failed, on_mask=on_mask, chance_on_mask=chance, object_share=tuple(shares.tolist()))

    def _explanation_key(self, index: int) -> str:
        return self._key(index, self.label(index), *self.ways, sample_seed(self.settings.seed, self.dataset.ids[index]))

    def _path(self, index: int) -> Path:
        return self.run.file("explanations", self._explanation_key(index))

    def _key(self, index: int, *further: Any) -> str:
        return record_key(self.identity, self.pixels[index], self.dataset.ids[index], *further)

    def _image(self, index: int) -> Tensor:
        return self.dataset[index].image

    def _inputs(self, image: Tensor) -> Tensor:
        """Model inputs of the image as large as the searches see it: the prediction of a shrunk image may differ."""
        return self.classifier.inputs(limit_size(image))


def object_shares(mask: Tensor, regions: Regions) -> Tensor:
    """The share of each region's pixels that lies on the object.

    Args:
        mask: bool [H, W], True on the object; resized to the regions' size where it has another one.
        regions: of the image.

    Returns:
        float64 [R].
    """
    labels = regions.labels
    if mask.shape != labels.shape:
        mask = F.interpolate(mask[None, None].float(), size=tuple(labels.shape), mode="nearest-exact")[0, 0] > 0.5
    inside = torch.bincount(labels[mask], minlength=regions.count).double()
    return inside / torch.bincount(labels.flatten(), minlength=regions.count)
