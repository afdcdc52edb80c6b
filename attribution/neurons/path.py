"""The result of a search for a neuron path: one neuron in each layer, and their joint influence (NeuronPath, ICLR 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Output = Literal["probability", "logit"]
Mode = Literal["reference", "exact", "removal"]
STEPS = 20  # m, as published


@dataclass(frozen=True, eq=False)
class NeuronPath:
    """One neuron (or K neurons) in each layer, and their joint score.

    Attributes:
        neurons: int64 [L], a hidden unit of each layer; [L, K] for K > 1.
        score: joint attribution score (see ``PathFinder.joint``).
        target: index of the class explained.
        candidates: int64 [L, c], the best units of each layer by the search's criterion, best first.
        candidate_scores: float32 [L, c], their values of this criterion.
        activations: float32, same shape as neurons: activations in the unedited pass, summed over the tokens that the head reads.
        gradients: float32, same shape as neurons: d target / d activation, summed over the steps and over these tokens.
        method: name of the search.
        class_names: names by index.
        target_score: the target's probability (or logit) in the unedited pass.
        layers: names of the down projections, whose inputs are the neurons.
        place: the tokens that are read, in words.
        forwards, backwards: number of images passed forward and backward to find and score the path.
        provenance: model, settings, versions and seconds, as JSON types.
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

    def __repr__(self) -> str:
        found = f"neurons {self.neurons.tolist()}, score {self.score:.4g}"
        return f"NeuronPath({self.kind}, {self.target_name} {self.target_score:.3f}, {found}, {len(self.layers)} layers)"

    @property
    def target_name(self) -> str:
        """Name of the class explained."""
        return self.class_names[self.target]

    @property
    def kind(self) -> str:
        """What the path is, in words: "neuron path, mode removal", or "activation path" for a baseline."""
        return f"neuron path, mode {self.method}" if self.method in get_args(Mode) else f"{self.method.replace('_', ' ')} path"

    @property
    def shares(self) -> Tensor:
        """float32 [L], the contribution of each layer to the score. The shares sum to 1; a negative share lowers the score.

        Up to a factor, the score is a product of two sums over layers, (sum w)(sum g). A layer's share is the mean of its shares in
        both sums. This is exact if the head reads one token; if it pools several, it describes the totals. NaN if a sum is 0.
        """
        parts = [values.reshape(len(self.neurons), -1).double().sum(dim=1) for values in (self.activations, self.gradients)]
        return (torch.stack([part / part.sum() for part in parts]).mean(dim=0)).float()

    def plain(self) -> dict[str, Any]:
        """All fields as JSON types."""
        tensors = ("neurons", "candidates", "candidate_scores", "activations", "gradients")
        plain = {name: getattr(self, name).tolist() for name in tensors}
        plain["shares"] = [value if math.isfinite(value) else None for value in self.shares.tolist()]
        others = ("score", "target", "target_name", "target_score", "method", "layers", "place", "forwards", "backwards", "provenance")
        return {**plain, **{name: getattr(self, name) for name in others}}
