"""The one exception type for mistakes a user can mend."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """Bad input: one line that says what was received, what was expected and what to do.

    The command line prints the line and exits with code 2; programming errors keep their traceback.
    """


class NotApplicable(UserError):
    """A method that is not defined for this model, whatever the image: a comparison leaves it out and says why."""


class NotMisclassified(UserError):
    """An image that the model is right about: there is no failure to explain."""


def describe(value: Any) -> str:
    """What a value is, in a few words, for the 'received' part of a message: ``float32 [3, 32, 32]``."""
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(shape)}"
    if isinstance(value, str):
        return repr(value)
    return type(value).__name__
