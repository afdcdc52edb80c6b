"""One label of a classifier whose labels are independent, as a question of two classes: absent or present."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor

from attribution.model.forwarding import Relay
from attribution.model.outputs import Outputs


@dataclass(frozen=True, eq=False)
class LabelForward(Relay):
    """The score of one label, see ``Classifier.of_label``.

    Attributes:
        base: gives the scores of all labels.
        index: of the label.
    """

    index: int

    @property
    def outputs(self) -> Outputs:
        return Outputs(1, "sigmoid", two_sided=True)

    @property
    def weights_digest(self) -> str | None:
        own = self.base.weights_digest
        return None if own is None else hashlib.sha256(f"{own} label {self.index}".encode()).hexdigest()

    def __call__(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        scores, features = self.base(inputs, want_features)
        return self.base.outputs.logits(scores, self.runner.name)[:, self.index, None], features
