"""Non-negative least squares, solved exactly: the codes of given activations on given concepts."""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls


def nonnegative_codes(activations: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """argmin over u >= 0 of ||a - u W||, for each row a.

    Args:
        activations: float [n, C].
        basis: W, float [r, C].

    Returns:
        float64 [n, r]; the conditions of Karush, Kuhn and Tucker hold.
    """
    basis = np.asarray(basis, dtype=np.float64)
    orthogonal, small = np.linalg.qr(basis.T)  # what lies outside the span of the concepts does not change the codes
    projected = np.asarray(activations, dtype=np.float64) @ orthogonal
    found = np.zeros((len(projected), len(basis)))
    for number, row in enumerate(projected):
        found[number] = nnls(small, row)[0]
    return found
