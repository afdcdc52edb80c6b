"""The final layer of a classifier, and the pooled features that it takes."""

from __future__ import annotations

from torch import Tensor


def pooled_features(value: Tensor) -> Tensor:
    """[n, D] as it is; the mean over positions of a map [n, D, h, w] or of tokens [n, N, D]."""
    if value.ndim == 4:
        return value.mean(dim=(2, 3))
    return value.mean(dim=1) if value.ndim == 3 else value
