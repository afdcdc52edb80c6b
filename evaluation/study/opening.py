"""The model and the images that the settings of a job on labelled data name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from evaluation.data.dataset import ImageDataset
from evaluation.data.recipes import open_dataset


class NamesData(Protocol):
    """Settings that name a data set; see ``open_dataset``."""

    @property
    def data(self) -> str: ...
    @property
    def root(self) -> str | None: ...
    @property
    def split(self) -> str: ...


class NamesModel(Protocol):
    """Settings that name a model, or hold it; see ``load_classifier``."""

    @property
    def model(self) -> str | Classifier: ...
    @property
    def checkpoint(self) -> str | None: ...
    @property
    def device(self) -> str: ...
    @property
    def batch_size(self) -> int | None: ...


def named_model(settings: NamesModel) -> Classifier:
    """The classifier of the settings."""
    if isinstance(settings.model, Classifier):
        return settings.model
    return load_classifier(settings.model, device=settings.device, checkpoint=settings.checkpoint, batch_size=settings.batch_size)


def named_data(settings: NamesData, class_names: Sequence[str]) -> ImageDataset:
    """The data set of the settings, its labels as indices into these names: those of a classifier."""
    return open_dataset(settings.data, root=settings.root, split=settings.split, class_names=class_names)
