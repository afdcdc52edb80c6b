"""Predict the images of a data set, and explain those that the model gets wrong."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
_EXPLAINED = "explanation"  # name of the only part of a question's unit


@dataclass(frozen=True)
class Question:
    """What a model decided about an image: its class or, where labels are independent, whether it has one of them.

    Attributes:
        index: of the image.
        label, predicted: the right answer and the model's, as indices into ``FailureResults.names``.
        asked: the label asked about; None for a class.
    """

    index: int
    label: int
    predicted: int
    asked: int | None = None


def measure_failures(run: Run[FailureSettings]) -> FailureResults:
    """Predict all images, and explain the first of those that the model gets wrong.

    Raises:
        UserError: no labels, or no image that can be predicted; when only reading, no prediction for these settings.
    """
    images = _Images(run)
    dataset, group = images.dataset, images.group
    chosen = dataset.choose(run.settings.samples, run.settings.seed, labels_only=dataset.label_sets is None)
    predicted = images.predictions(chosen)
    if not predicted:
        raise images.nothing(len(chosen))
    asked = [question for index, found in predicted.items() for question in images.questions(index, found)]
    wrong = [question for question in asked if question.predicted != question.label]
    failures, right = images.failures(wrong[: run.settings.most or None])
    wrong = [question for question in wrong if question not in right]
    looked_at, wrong_of = (Counter(group(question.index) for question in each) for each in (asked, wrong))
    return FailureResults(
        settings=run.settings,
        classifier=images.classifier,
        dataset=dataset,
        looked_at=len(asked),
        right=len(asked) - len(wrong),
        by_class=dict(sorted(Counter(question.label for question in asked).items())),
        by_group={name: (looked_at[name], wrong_of[name]) for name in sorted(each for each in looked_at if each is not None)},
        failures=tuple(failures),
        broken=tuple(images.broken()),
        out=run.out,
        confusions=dict(sorted(Counter((question.label, question.predicted) for question in wrong).items())),
    )


def explain_sample(settings: FailureSettings, sample: str) -> FailureExplanation:
    """Explain one image as ``run_failures`` does, without writing anything.

    Args:
        settings: of the study.
        sample: id of an image; where labels are independent, followed by a colon and the label, such as "0007.png:cat".

    Raises:
        UserError: no such image or label, an image without a label, or one that the model gets right.
    """
    classifier = named_model(settings, settings.model)
    dataset = named_data(settings, classifier.class_names)
    asked = None
    if classifier.outputs.independent:
        sample, _, name = sample.rpartition(":")
        asked = classifier.target_index(name)
    if sample not in dataset.ids:
        close = difflib.get_close_matches(sample, dataset.ids, 1) or dataset.ids[:1]
        wanted = close[0] if asked is None else f"{close[0]}:{classifier.class_names[asked]}"
        raise UserError(f"{dataset.name} has no sample {sample!r}: expected an id such as {wanted!r}")
    index = dataset.ids.index(sample)
    truth = dataset.label_set(index)
    if truth is None:
        raise UserError(f"{sample} has no label: only a labelled sample can be misclassified")
    label = next(iter(truth)) if asked is None else asked + (asked not in truth) * classifier.num_classes
    return _explained(settings, classifier, dataset[index], Question(index, label, -1, asked))


def _explained(settings: FailureSettings, classifier: Classifier, sample: Sample, question: Question) -> FailureExplanation:
    asked = question.asked
    return explain_failure(
        sample.image,
        classifier if asked is None else classifier.of_label(asked),
        question.label if asked is None else int(question.label == asked),
        fill=settings.fill,
        regions=settings.regions,
        region_options=settings.region_options,
        search=settings.search,
        pending=settings.pending,
        evaluations=settings.evaluations,
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
        self.ways = [fill, *(run.settings.plain()[name] for name in ("regions", "region_options", "search", "pending", "evaluations"))]
        self.pixels: dict[int, str] = {}  # digests, known from the predictions on
        if self.dataset.label_sets is not None and not self.classifier.outputs.independent:
            raise UserError(
                f"{self.dataset.name} has several labels for an image, and {self.classifier.name} has classes of which one is right: "
                "give a column 'label', or scores='sigmoid' (--scores sigmoid) if each class is a label of its own"
            )

    def questions(self, index: int, predicted: int | Sequence[int]) -> list[Question]:
        """What the model decided about an image: the class predicted, or for each label whether it is among those predicted."""
        truth = self.dataset.label_set(index)
        assert truth is not None
        if isinstance(predicted, int):
            return [Question(index, next(iter(truth)), predicted)]
        count = self.classifier.num_classes
        return [Question(index, k + (k not in truth) * count, k + (k not in predicted) * count, k) for k in range(count)]

    def name(self, item: int | Question) -> str:
        """The id of an image, with the label that is asked about."""
        if isinstance(item, int) or item.asked is None:
            return self.dataset.ids[item if isinstance(item, int) else item.index]
        return f"{self.dataset.ids[item.index]}:{self.classifier.class_names[item.asked]}"

    def predictions(self, chosen: Sequence[int]) -> dict[int, int | list[int]]:
        """The predicted class, or the predicted labels, of every image that can be read, in the order given."""
        found = self.run.stage(batches(chosen, TOGETHER), self._batch, lambda batch: f"{len(batch)} predictions", share="all")
        return {index: record["predicted"] for records in found.values() for index, record in records.items()}

    def failures(self, wrong: Sequence[Question]) -> tuple[list[Failed], set[Question]]:
        """The failures explained, and those where the model is right when the image is not in a batch."""
        found = self.run.stage(wrong, self._failure, self.name)
        records = {question: record for question, parts in found.items() for record in parts.values()}
        failures = []
        for question, record in records.items():
            if "found" in record:
                try:
                    failures.append(attempted(partial(self._failed, question, record["found"])))
                except Broken as error:
                    self.run.fail(question, None, str(error))
        return failures, {question for question, record in records.items() if "found" not in record}

    def broken(self) -> Iterator[tuple[str, str]]:
        """(sample, reason) of what failed."""
        return problems(self.run, self.name)

    def nothing(self, count: int) -> UserError:
        """The error for a run without any prediction."""
        if self.run.reading:
            return UserError(
                f"{self.run.log.path} holds no prediction for these settings: expected the model and the data of an earlier run"
            )
        sample, reason = next(self.broken())
        return UserError(f"none of {count} images could be predicted, such as {sample}: {reason}")

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
            found = self.classifier.probabilities(stacked).cpu()
            several = self.classifier.outputs.independent
            records: list[Record] = []
            for index, row in zip(indices, found, strict=True):
                labels = self.classifier.predicted(row)
                answer = {"predicted": list(labels)} if several else {"predicted": labels[0], "confidence": float(row[labels[0]])}
                records.append({"sample": self.dataset.ids[index], **answer})
            return records

        def measure(missing: Sequence[int]) -> Iterator[tuple[int, Record | Broken]]:
            yield from unread.items()
            if set(missing) - set(unread):
                yield from together([index for index in batch if index not in unread], predicted)

        return Unit(keys, measure)

    def _failure(self, question: Question) -> Unit:
        """A wrong decision about an image."""
        key, path = self._explanation_key(question), self._path(question)
        known = self.run.log.records.get(key)
        files = {_EXPLAINED: path} if known is None or "found" in known else {}

        def measure(_: Sequence[str]) -> Iterator[tuple[str, Record]]:
            record: Record = {"sample": self.name(question), "label": question.label}
            try:
                failure = _explained(self.settings, self.classifier, self.dataset[question.index], question)
            except NotMisclassified:  # two classes so close that the other images of its batch decided between them
                files.clear()
                yield _EXPLAINED, {**record, "right": True}
            else:
                failure.truth.save(path)
                yield _EXPLAINED, {**record, "found": failure.plain()}

        return Unit({_EXPLAINED: key}, measure, files)

    def _failed(self, question: Question, found: dict[str, Any]) -> Failed:
        """A failure, with what its mask says about the causing regions; masks are read anew, since they may be added later."""
        index, predicted = question.index, found["predicted"] if question.asked is None else question.predicted
        failed = Failed(self.name(question), index, question.label, predicted, self.group(index), found, self._path(question))
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

    def _explanation_key(self, question: Question) -> str:
        index, asked = question.index, () if question.asked is None else ("label", question.asked)
        return self._key(index, question.label, *asked, *self.ways, sample_seed(self.settings.seed, self.dataset.ids[index]))

    def _path(self, question: Question) -> Path:
        return self.run.file("explanations", self._explanation_key(question))

    def _key(self, index: int, *further: Any) -> str:
        return record_key(self.identity, self.pixels[index], self.dataset.ids[index], *further)

    def _image(self, index: int) -> Tensor:
        return self.dataset[index].image

    def _inputs(self, image: Tensor) -> Tensor:
        """Model inputs of the image as large as the searches see it: the prediction of a shrunk image may differ."""
        return self.classifier.inputs(limit_size(image))


def object_shares(mask: Tensor, regions: Regions) -> Tensor:
    """The share of each region's pixels that lies on the object, among the pixels that the model sees.

    Args:
        mask: bool [H, W], True on the object; resized to the regions' size where it has another one.
        regions: of the image.

    Returns:
        float64 [R]; 0 for regions that a crop leaves out.
    """
    if mask.shape != regions.labels.shape:
        mask = F.interpolate(mask[None, None].float(), size=tuple(regions.labels.shape), mode="nearest-exact")[0, 0] > 0.5
    labels = regions.seen_labels
    inside = torch.bincount(labels[regions.seen_part(mask)], minlength=regions.count).double()
    return inside / torch.bincount(labels.flatten(), minlength=regions.count).clamp(min=1)
