"""What a module returns: read as scores, checked, and turned into logits and probabilities."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from attribution.errors import UserError, describe

SCORES = ("auto", "logits", "probabilities")


@dataclass(frozen=True)
class Outputs:
    """What the scores of a classifier mean. Nothing else turns scores into logits, or logits into probabilities.

    Attributes:
        count: C, the number of scores of an image.
        kind: what they are.
    """

    count: int
    kind: Literal["logits", "probabilities"]

    @classmethod
    def of(cls, scores: Tensor, kind: str) -> Outputs:
        """Determine the meaning from a first batch of scores [n, C].

        "auto" takes them for probabilities if C > 1, none is negative and each row sums to 1.
        """
        count = scores.shape[1]
        if kind == "auto":
            sums_to_one = bool(((scores.sum(dim=1) - 1).abs() < 1e-4).all())
            kind = "probabilities" if count > 1 and sums_to_one and bool((scores >= 0).all()) else "logits"
        return cls(count, "probabilities" if kind == "probabilities" else "logits")

    def logits(self, scores: Tensor, name: str) -> Tensor:
        """Scores [n, C] as logits; probabilities become their logarithm.

        Raises:
            UserError: scores that are not finite, or probabilities of which one is negative or all are zero.
        """
        _check_finite(scores, name)
        if self.kind == "logits":
            return scores
        _check_probabilities(scores, name)
        return scores.log()

    def probabilities(self, logits: Tensor) -> Tensor:
        """The softmax of logits [n, C]."""
        return logits.softmax(dim=1)


def read_scores(output: Any, count: int, device: torch.device, name: str) -> Tensor:
    """Take the scores out of what a module returned for ``count`` images: float32 [count, C].

    Args:
        output: a tensor or array; or a tuple or list whose first item is one, a dict or an object with ``logits``.
        count: number of images.
        device: where the scores are wanted.
        name: of the classifier, for messages.

    Raises:
        UserError: the output holds no such scores.
    """
    received = output
    if isinstance(output, dict):
        output = output.get("logits", output)
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and len(output):
        output = output[0]
    if isinstance(output, np.ndarray):
        output = torch.from_numpy(output.copy())  # torch takes neither read-only nor flipped arrays
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[0] != count or output.shape[1] < 1:
        raise UserError(f"{name} returned {_describe_output(received)} for {count} images: expected scores [{count}, classes]")
    return output.float().to(device)


def _check_finite(scores: Tensor, name: str) -> None:
    bad = scores.isnan() | scores.eq(torch.inf) | scores.isneginf().all(dim=1, keepdim=True)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise UserError(
            f"{name} returned {scores[row, column].item()} for class {column} of image {row} in a batch of {len(scores)}: "
            "expected finite scores; check its weights and its preprocessing"
        )


def _check_probabilities(scores: Tensor, name: str) -> None:
    bad = (scores < 0).any(dim=1) | (scores.sum(dim=1) <= 0)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        low, high = scores[row].min().item(), scores[row].max().item()
        raise UserError(
            f"{name} returned {low:.4g} to {high:.4g} as the probabilities of image {row}: expected none negative and not all "
            "zero; give scores='logits' if they are logits"
        )


def _describe_output(output: Any) -> str:
    if isinstance(output, dict):
        return f"a dict with {', '.join(map(str, list(output)[:5])) or 'no keys'}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {', '.join(describe(item) for item in output[:3]) or 'nothing'}"
    logits = inspect.getattr_static(output, "logits", None)
    return describe(output) if logits is None else f"{type(output).__name__} with logits {describe(output.logits)}"
