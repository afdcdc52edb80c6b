"""Results of the study of neuron paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution.model.classifier import Classifier
from attribution.neurons.classes import class_paths
from attribution.neurons.layers import NeuronLayers
from evaluation.data.dataset import ImageDataset
from evaluation.neurons.settings import NeuronSettings

EDITED = ("remove", "enhance", "mean")
_LEAST_PROBABILITY = 1e-12  # below it a ratio says nothing


@dataclass(frozen=True, eq=False)
class Measured:
    """One kind of path on all N images, and what its edits do.

    The images are split into halves. The path of a class is taken from the selection half and judged on the E images of the
    evaluation half.

    Attributes:
        neurons: int64 [N, L], the path of each image.
        scores: float64 [N], joint scores.
        probabilities: by edit, float64 [N], of the target when the image's own path is edited.
        correct: by edit, bool [N], whether the edited prediction is the label.
        class_probabilities, class_correct: by edit, [E], the same on the evaluation half when the path of the image's class is edited.
        forwards, backwards: rows passed for one image, mean.
    """

    neurons: np.ndarray
    scores: np.ndarray
    probabilities: Mapping[str, np.ndarray]
    correct: Mapping[str, np.ndarray]
    class_probabilities: Mapping[str, np.ndarray]
    class_correct: Mapping[str, np.ndarray]
    forwards: float
    backwards: float


@dataclass(frozen=True, eq=False)
class Pruned:
    """The model on the evaluation half, when each class keeps K neurons of the first layers and others are removed.

    Attributes:
        kept, depth, share: K, number of layers, q.
        probabilities: float64 [E], of the label.
        correct: bool [E].
    """

    kept: int
    depth: int
    share: float
    probabilities: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True, eq=False)
class NeuronResults:
    """What ``run_neurons`` found.

    Attributes:
        settings: what was measured.
        classifier: the model.
        layers: where its neurons are.
        dataset: the images.
        chosen: indices into the data set, of the N images that could be followed.
        labels, targets, predicted: int64 [N].
        clean: float64 [N], probability of the target without edits.
        selection: bool [N], the half of the images from which the paths of classes are taken.
        measured: by kind of path.
        pruned: K x depth x share.
        failures: (sample, reason).
    """

    settings: NeuronSettings
    classifier: Classifier
    layers: NeuronLayers
    dataset: ImageDataset
    chosen: tuple[int, ...]
    labels: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray
    clean: np.ndarray
    selection: np.ndarray
    measured: Mapping[str, Measured]
    pruned: tuple[Pruned, ...]
    failures: tuple[tuple[str, str], ...]

    @property
    def classes(self) -> int:
        """C."""
        return self.classifier.num_classes

    def paths_of_classes(self, kind: str) -> np.ndarray:
        """The path of each class, from the selection half: int64 [C, L]; -1 for a class without images there."""
        return class_paths(self.measured[kind].neurons[self.selection], self.labels[self.selection], self.classes)[:, :, 0]

    def inputs(self, positions: Sequence[int]) -> Tensor:
        """Model inputs of some of the chosen images: float32 [n, 3, h, w]."""
        return torch.cat([self.classifier.inputs(self.dataset[self.chosen[p]].image) for p in positions])


def relative(edited: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Probability deviation P_edited / P_clean - 1 of each image; NaN where the clean probability is too small to divide by."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(clean < _LEAST_PROBABILITY, np.nan, edited / clean - 1)
