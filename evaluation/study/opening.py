"""The model and the images that the settings of a study name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier, read_class_names
from evaluation.data.dataset import ImageDataset
from evaluation.data.recipes import open_dataset
from evaluation.study.settings import StudySettings


def named_model(settings: StudySettings, model: str | Classifier) -> Classifier:
    """The classifier that the settings name, or hold; with the class names of their file where they have one."""
    if isinstance(model, Classifier):
        return model
    names = None if settings.classes is None else read_class_names(Path(settings.classes))
    return load_classifier(model, device=settings.device, checkpoint=settings.checkpoint, class_names=names, batch_size=settings.batch_size)


def named_data(settings: StudySettings, class_names: Sequence[str]) -> ImageDataset:
    """The data set of the settings, its labels as indices into these names: those of a classifier."""
    return open_dataset(settings.data, root=settings.root, split=settings.split, class_names=class_names)
