"""The exceptions for mistakes that a user can correct, and the words for values in their messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_LONGEST = 2000  # characters of a message


class UserError(ValueError):
    """Wrong input. The message is one line: what was received, what was expected, what to do.

    The command prints the line and exits with code 2. Programming errors keep their traceback. Where a text of data makes the message
    longer than 2,000 characters, its middle is left out; what is no letter of a line, such as a line break, is written as an escape.
    """

    def __init__(self, message: str) -> None:
        message, half = printable(message), _LONGEST // 2
        super().__init__(message if len(message) <= _LONGEST else f"{message[:half]} ... {message[-half:]}")


class NotApplicable(UserError):
    """The method is not defined for this model, for any image. A comparison leaves the method out and gives the reason."""


class NotMisclassified(UserError):
    """The model classifies the image correctly, so there is no failure to explain."""


class ChanceWarning(UserWarning):
    """The result of a stochastic method depends much on its seed."""


def describe(value: Any) -> str:
    """Describe a value in a few words for an error message: ``float32 [3, 32, 32]`` for an array, else text or type."""
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(shape)}"
    if isinstance(value, str):
        return repr(value)
    return type(value).__name__


def reason_of(error: BaseException) -> str:
    """Why something failed, in a few words: of a file, without its name and the number of the error, which messages need not repeat."""
    return str(getattr(error, "strerror", None) or error)


def printable(text: str) -> str:
    """A text of data, such as the name of a file, as a terminal can show it: one line, and nothing that steers the terminal.

    Line breaks, control characters, marks of direction and bytes that are no UTF-8 are written as escapes, such as ``\\n``.
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def such_as(names: Iterable[str]) -> str:
    """The end of a sentence that names examples; empty where there are none."""
    examples = ", ".join(dict.fromkeys(name for name in names if name))
    return f", such as {examples}" if examples else ""
