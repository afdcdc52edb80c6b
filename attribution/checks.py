"""Checks of values that a user gives: each says what was received and what was expected.

A library function checks its arguments with these at the public edge, and then computes without checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from attribution.errors import UserError, describe

LARGEST_SEED = 2**63 - 1  # what torch and numpy both take


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number: an int of Python or NumPy. True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of Python or NumPy. True and False are not."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse what is not a whole number in a range.

    Args:
        name: of the argument or setting, for the message.
        value: what was received.
        least, most: both included; no upper limit when None.

    Raises:
        UserError: anything else.
    """
    if not is_whole(value) or value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name} is {_shown(value)}: expected a whole number {wanted}")


def check_number(name: str, value: Any, least: float, most: float = math.inf) -> None:
    """Refuse what is not a finite number in a range, both ends included.

    Raises:
        UserError: anything else.
    """
    if not is_number(value) or not least <= value <= most:
        wanted = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise UserError(f"{name} is {_shown(value)}: expected a number {wanted}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse what is not one of some names.

    Raises:
        UserError: anything else.
    """
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name} is {_shown(value)}: expected one of {', '.join(choices)}")


def check_seed(seed: Any, name: str = "seed") -> None:
    """Refuse what cannot seed a generator: expected 0 to 2^63 - 1.

    Raises:
        UserError: anything else.
    """
    if not is_whole(seed) or not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"{name} is {_shown(seed)}: expected a whole number from 0 to 2**63 - 1")


def _shown(value: Any) -> str:
    plain = isinstance(value, str | int | float | np.number | tuple | list | type(None)) and len(repr(value)) < 80
    return repr(value) if plain else describe(value)
