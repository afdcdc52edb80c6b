"""A CLIP-like head: scores are inner products of features with one embedding for each class."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from attribution.errors import UserError
from attribution.model.forwarding import Relay
from attribution.model.outputs import Outputs


@dataclass(frozen=True, eq=False)
class PrototypeForward(Relay):
    """Scores = scale * features @ matrix.T, see ``Classifier.with_prototypes``.

    Attributes:
        base: gives the features.
        matrix: float32 [C, D].
        scale: factor of the scores.
        normalize: whether features and rows of the matrix are divided by their L2 norms first.
    """

    matrix: Tensor
    scale: float
    normalize: bool

    @property
    def outputs(self) -> Outputs:
        return Outputs(len(self.matrix), "softmax")

    @property
    def weights_digest(self) -> str | None:
        settings = f"{self.base.weights_digest} {self.scale} {self.normalize}"
        return hashlib.sha256(settings.encode() + self.matrix.cpu().numpy().tobytes()).hexdigest()

    def find_out(self, want_features: bool) -> None:
        self.base.find_out(True)

    def __call__(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        features = self.base(inputs, True)[1]
        matrix = self.matrix.to(features.device)
        if features.shape[1] != matrix.shape[1]:
            raise UserError(
                f"prototypes have {matrix.shape[1]} features, {self.runner.name} has {features.shape[1]}: "
                f"give a matrix [classes, {features.shape[1]}]"
            )
        if self.normalize:
            features, matrix = F.normalize(features, dim=1), F.normalize(matrix, dim=1)
        return self.scale * features @ matrix.T, features
