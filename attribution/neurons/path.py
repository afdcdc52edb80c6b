"""Neuron paths: one neuron of each layer, found layer by layer by their joint influence on the prediction (NeuronPath, ICLR 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Output = Literal["probability", "logit"]
Mode = Literal["reference", "exact", "removal"]
STEPS = 20  # m, as published


@dataclass(frozen=True, eq=False)
class NeuronPath:
    """One neuron (or K) of each layer, and how they act together.

    Attributes:
        neurons: int64 [L], a hidden unit of each layer; [L, K] where K > 1 were asked for.
        score: joint attribution score (see ``PathFinder.joint``).
        target: class index.
        candidates: int64 [L, c], the best units of each layer by what was maximised there, best first.
        candidate_scores: float32 [L, c], their values.
        activations: float32 like neurons, in the clean pass; summed over the tokens where the head pools several.
        gradients: float32 like neurons: sum over the steps of d target / d activation, likewise.
        method: how it was found.
        class_names: names by index.
        target_score: the target's probability (or logit) in the clean pass.
        layers: names of the down projections.
        place: at which tokens.
        forwards, backwards: images passed forward and backward to find and score it.
        provenance: model, settings, versions, seconds.
    """

    neurons: Tensor
    score: float
    target: int
    candidates: Tensor
    candidate_scores: Tensor
    activations: Tensor
    gradients: Tensor
    method: str
    class_names: tuple[str, ...]
    target_score: float
    layers: tuple[str, ...]
    place: str
    forwards: int
    backwards: int
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def target_name(self) -> str:
        """Name of the class explained."""
        return self.class_names[self.target]

    @property
    def shares(self) -> Tensor:
        """float32 [L], how much of the score each layer brings; they sum to 1, a negative one works against the others.

        The score is a product of two sums over layers, (sum w)(sum g) up to a factor; a layer's share is the mean of its shares of
        both. Exact for one token, an account of the totals where the head pools several. NaN where a sum is 0.
        """
        parts = [values.reshape(len(self.neurons), -1).double().sum(dim=1) for values in (self.activations, self.gradients)]
        return (torch.stack([part / part.sum() for part in parts]).mean(dim=0)).float()

    def plain(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        tensors = ("neurons", "candidates", "candidate_scores", "activations", "gradients")
        plain = {name: getattr(self, name).tolist() for name in tensors}
        plain["shares"] = [value if math.isfinite(value) else None for value in self.shares.tolist()]
        others = ("score", "target", "target_name", "target_score", "method", "layers", "place", "forwards", "backwards", "provenance")
        return {**plain, **{name: getattr(self, name) for name in others}}
