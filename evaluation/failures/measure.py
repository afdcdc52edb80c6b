"""The failures of a data set: every prediction and every explanation is kept the moment it is known, so that a run can continue."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.errors import NotMisclassified, UserError
from attribution.failure import FailureExplanation, explain_failure
from attribution.image import limit_size
from attribution.model.classifier import Classifier
from attribution.provenance import digest_of
from attribution.regions import Regions
from evaluation.data.dataset import ImageDataset, Sample
from evaluation.failures.results import Failed, FailureResults
from evaluation.failures.settings import FailureSettings
from evaluation.metrics.protocol import Protocol
from evaluation.study.attempts import Broken, attempted
from evaluation.study.identity import identity_of, sample_seed
from evaluation.study.opening import named_data, named_model
from evaluation.study.records import RecordLog, open_log

Progress = Callable[[int, int, str], None]
TOGETHER = 64  # images predicted in one batch


def run_failures(settings: FailureSettings, out: str | Path, progress: Progress | None = None) -> FailureResults:
    """Predict all samples, explain those that the model gets wrong, keep what is new, and return everything.

    Args:
        settings: what is explained, and how.
        out: folder of ``records.jsonl`` and ``explanations``; one process at a time.
        progress: called with (images done, all of them, what is done now): first those predicted, then those explained.

    Raises:
        UserError: settings that cannot be run, no labels, no image that can be read, or a full disk. Samples that fail are
            returned instead, and tried again by the next run.
    """
    with open_log(Path(out) / "records.jsonl") as log:
        return _Run(settings, Path(out), log, progress).run()


def explain_sample(settings: FailureSettings, sample: str) -> FailureExplanation:
    """The explanation of one sample as ``run_failures`` finds it, without writing anything.

    Raises:
        UserError: no such sample, one without a label, or one that the model gets right.
    """
    classifier = named_model(settings)
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


@dataclass(eq=False)
class _Run:
    settings: FailureSettings
    out: Path
    log: RecordLog
    progress: Progress | None
    broken: dict[str, str] = field(default_factory=dict)

    def run(self) -> FailureResults:
        settings, dataset = self.settings, self.dataset
        chosen = dataset.choose(settings.samples, settings.seed, labels_only=True)
        predicted = self._predictions(chosen)
        if not predicted:
            sample, reason = next(iter(self.broken.items()))
            raise UserError(f"none of {len(chosen)} images could be predicted, such as {sample}: {reason}")
        wrong = [index for index, found in predicted.items() if found != dataset.labels[index]]
        failures: list[Failed] = []
        for index in wrong[: settings.most]:
            self._report(len(failures), len(wrong[: settings.most]), dataset.ids[index])
            try:
                failures.append(self._failed(index))
            except Broken as error:
                self.broken[dataset.ids[index]] = str(error)
            except NotMisclassified:  # two classes so close that the other images of its batch decided between them
                predicted[index] = self._label(index)
        wrong = [index for index in wrong if predicted[index] != self._label(index)]
        self._report(len(wrong[: settings.most]), len(wrong[: settings.most]), "done")
        looked_at = Counter(self._group(index) for index in predicted)
        wrong_of = Counter(self._group(index) for index in wrong)
        return FailureResults(
            settings=settings,
            classifier=self.classifier,
            dataset=dataset,
            looked_at=len(predicted),
            right=len(predicted) - len(wrong),
            by_class=dict(sorted(Counter(self._label(index) for index in predicted).items())),
            by_group={group: (looked_at[group], wrong_of[group]) for group in sorted(g for g in looked_at if g is not None)},
            failures=tuple(failures),
            broken=tuple(self.broken.items()),
            out=self.out,
            confusions=dict(sorted(Counter((self._label(index), predicted[index]) for index in wrong).items())),
        )

    @cached_property
    def classifier(self) -> Classifier:
        return named_model(self.settings)

    @cached_property
    def dataset(self) -> ImageDataset:
        return named_data(self.settings, self.classifier.class_names)

    @cached_property
    def identity(self) -> list[Any]:
        """What every prediction depends on beside the image."""
        return [identity_of(self.classifier, self.classifier.name), self.settings.data, self.settings.split]

    @cached_property
    def way(self) -> list[Any]:
        """What every explanation depends on beside that."""
        settings = self.settings
        fill = Protocol(fill=settings.fill).settings()["fill"]
        return [fill, settings.regions, settings.plain()["region_options"], settings.search, settings.pending]

    def _predictions(self, chosen: Sequence[int]) -> dict[int, int]:
        """The predicted class of every image that can be read, in the order given."""
        found: dict[int, int] = {}
        for start in range(0, len(chosen), TOGETHER):
            batch = chosen[start : start + TOGETHER]
            # a batch is predicted whole or not at all: other batches would change the last digits of what a resumed run writes
            if any(self._prediction_key(index) not in self.log for index in batch):
                self._predict(self._read(batch))
            for index in batch:
                if self._prediction_key(index) in self.log:
                    found[index] = self.log.records[self._prediction_key(index)]["predicted"]
            self._report(start + len(batch), len(chosen), "predictions")
        return found

    def _read(self, batch: Sequence[int]) -> list[tuple[int, Tensor]]:
        found = []
        for index in batch:
            try:
                found.append((index, attempted(partial(self._inputs, index))))
            except Broken as error:
                self.broken[self.dataset.ids[index]] = str(error)
        return found

    def _inputs(self, index: int) -> Tensor:
        """Model inputs of the image as large as the searches see it: the prediction of a shrunk image may differ."""
        return self.classifier.inputs(limit_size(self.dataset[index].image))

    def _predict(self, read: Sequence[tuple[int, Tensor]]) -> None:
        if not read:
            return
        inputs = torch.cat([each for _, each in read])
        try:
            probabilities = attempted(lambda: self.classifier.probabilities(inputs).cpu())
        except Broken as error:
            if len(read) == 1:
                self.broken[self.dataset.ids[read[0][0]]] = str(error)
            else:
                for each in read:  # one image may spoil its batch
                    self._predict([each])
            return
        for (index, _), row in zip(read, probabilities, strict=True):
            key = self._prediction_key(index)
            if key not in self.log:
                first = int(row.argmax())
                self.log.append(key, {"sample": self.dataset.ids[index], "predicted": first, "confidence": float(row[first])})

    def _failed(self, index: int) -> Failed:
        """A misclassified sample, explained now or before."""
        dataset, settings = self.dataset, self.settings
        sample, label = dataset.ids[index], self._label(index)
        key = digest_of([*self.identity, sample, label, *self.way, sample_seed(settings.seed, sample)])
        path = self.out / "explanations" / f"{key}.npz"
        if key not in self.log or not path.exists():
            failure = attempted(lambda: _explained(settings, self.classifier, dataset[index]))
            failure.truth.save(path)
            self.log.append(key, {"sample": sample, "label": label, "found": failure.plain()})
        found = self.log.records[key]["found"]
        failed = Failed(sample, index, label, found["predicted"], self._group(index), found, path)
        return failed if dataset.read_mask is None else self._on_object(failed)

    def _on_object(self, failed: Failed) -> Failed:
        """With what the sample's mask says about the causing regions; read anew, since masks may be added later."""
        mask = attempted(lambda: self.dataset[failed.index]).mask
        if mask is None or not mask.any():
            return failed
        regions = failed.explanation().regions
        assert regions is not None
        shares = object_shares(mask, regions)
        cause = failed.found["cause"]
        on_mask = None
        if cause is not None:
            area = regions.area[cause["regions"]]
            on_mask = float((area * shares[cause["regions"]]).sum() / area.sum())
        chance = float((regions.area * shares).sum())
        return replace(failed, on_mask=on_mask, chance_on_mask=chance, object_share=tuple(shares.tolist()))

    def _prediction_key(self, index: int) -> str:
        return digest_of([*self.identity, self.dataset.ids[index]])

    def _label(self, index: int) -> int:
        label = self.dataset.labels[index]
        assert label is not None
        return int(label)

    def _group(self, index: int) -> str | None:
        return None if self.dataset.groups is None else self.dataset.groups[index]

    def _report(self, done: int, total: int, what: str) -> None:
        if self.progress is not None:
            self.progress(done, total, what)


def object_shares(mask: Tensor, regions: Regions) -> Tensor:
    """Share of each region's pixels on the object: float64 [R] of a mask bool [H, W], resized to the regions' size."""
    if mask.shape != regions.labels.shape:
        mask = F.interpolate(mask[None, None].float(), size=tuple(regions.labels.shape), mode="nearest-exact")[0, 0] > 0.5
    labels = regions.labels
    inside = torch.bincount(labels[mask], minlength=regions.count).double()
    return inside / torch.bincount(labels.flatten(), minlength=regions.count)
