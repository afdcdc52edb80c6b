"""A CLIP-like head: scores are inner products of features with one embedding for each class."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.errors import UserError
from attribution.hooks import record_outputs
from attribution.model.forwarding import ModuleForward, Relay
from attribution.model.head import pooled_features
from attribution.model.outputs import Meaning, Outputs


@dataclass(frozen=True, eq=False)
class PrototypeForward(Relay):
    """Scores = scale * features @ matrix.T + bias, see ``Classifier.with_prototypes``.

    Attributes:
        base: gives the features, or the embedding itself (see ``takes_output``).
        matrix: float32 [C, D].
        scale: factor of the scores.
        normalize: whether features and rows of the matrix are divided by their L2 norms first.
        bias: added to every score.
        kind: what the scores are: "softmax", or "sigmoid" of independent labels.
        embeds: whether the embedding is what the module returns; None finds out.
    """

    matrix: Tensor
    scale: float
    normalize: bool
    bias: float = 0.0
    kind: Meaning = "softmax"
    embeds: bool | None = None

    @property
    def outputs(self) -> Outputs:
        return Outputs(len(self.matrix), self.kind)

    @property
    def weights_digest(self) -> str | None:
        settings = f"{self.base.weights_digest} {self.scale} {self.normalize}"
        settings += f" {self.bias} {self.kind}" if self.bias or self.kind != "softmax" else ""
        return hashlib.sha256(settings.encode() + self.matrix.cpu().numpy().tobytes()).hexdigest()

    @cached_property
    def takes_output(self) -> bool:
        """Whether the embedding of an image is what the module returns, as of a CLIP tower with its projection, not what its head takes.

        The number of columns of the matrix decides; if both have as many, whether the final layer gives the output.

        Raises:
            UserError: neither has as many values as the matrix has columns, or the final layer turns D values into D.
        """
        if self.embeds is not None:
            return self.embeds
        base, count, name = self.base, self.matrix.shape[1], self.runner.name
        base.find_out(False)
        try:
            heads = self.runner.heads
        except UserError:
            heads = []
        inputs = self.runner.preprocessing.gray_inputs(self.runner.device)
        with torch.no_grad(), record_outputs(heads) as calls:
            output, features = base(inputs, bool(heads))
        is_final = bool(calls) and all(torch.equal(pooled_features(each), output) for _, each in calls[-1:])
        fits = features.shape[1] == count if is_final or output.shape[1] != count else False
        if fits and output.shape[1] == count and self.runner.head is None and not torch.allclose(features, output):
            raise UserError(
                f"prototypes have {count} columns, and {name} has {count} features and {count} outputs: if its outputs are the embeddings, "
                "give at.Classifier(nn.Sequential(module, nn.Identity()), head='1', ...), else name its final layer with head="
            )
        if not fits and output.shape[1] != count:
            found = f"{features.shape[1]} features and " if heads else ""
            raise UserError(
                f"prototypes have {count} columns, {name} has {found}{output.shape[1]} outputs: give a matrix [classes, D] of embeddings "
                "of the same D, those of the projection that the model itself computes"
            )
        return not fits

    def on(self, runner: ModuleForward) -> Self:
        made = super().on(runner)
        vars(made)["takes_output"] = self.takes_output  # what was found out holds at any size; hooks may be in the way later
        return made

    def find_out(self, want_features: bool) -> None:
        self.base.find_out(not self.takes_output)

    def __call__(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        scores, features = self.base(inputs, not self.takes_output)
        features = scores if self.takes_output else features
        matrix = self.matrix.to(features.device)
        if self.normalize:
            features, matrix = F.normalize(features, dim=1), F.normalize(matrix, dim=1)
        return self.scale * features @ matrix.T + self.bias, features
