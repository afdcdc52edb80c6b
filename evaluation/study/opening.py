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
    """The classifier that the settings name or hold. If they name a file of class names, it gets these."""
    if isinstance(model, Classifier):
        return model
    names = None if settings.classes is None else read_class_names(Path(settings.classes))
    return load_classifier(
        model,
        device=settings.device,
        checkpoint=settings.checkpoint,
        checkpoint_key=settings.checkpoint_key,
        class_names=names,
        batch_size=settings.batch_size,
    )


def named_data(settings: StudySettings, class_names: Sequence[str]) -> ImageDataset:
    """The data set of the settings. Its labels are indices into the given class names, those of a classifier."""
    return open_dataset(settings.data, root=settings.root, split=settings.split, class_names=class_names)
