"""Checks of values that a user gives: each says what was received and what was expected.

A library function checks its arguments with these at the public edge, and then computes without checks.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from torch import nn

from attribution.errors import UserError, describe

_SHORTEST, _ALIKE = 3, 0.7  # letters of a name for which others are proposed, and how much they have in common
_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "a name",
    nn.Module: "a module",
    NoneType: "None",
    Mapping: "a dict",
    Sequence: "a list",
    list: "a list",
    tuple: "a tuple",
}
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
        raise UserError(f"{name} is {_shown(value)}: expected one of {', '.join(choices)}{did_you_mean(value, choices)}")


def check_types(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse values of other types than the signature of a function says. Parameters without a type that can be read take anything.

    Args:
        name: of the method, for the message.
        function: whose parameters the options are.
        options: values by parameter.

    Raises:
        UserError: the first value of another type.
    """
    try:
        hints = get_type_hints(function)
    except (TypeError, NameError):  # a callable object, or types that only its author knows
        return
    for option, value in options.items():
        if not _fits(value, hints.get(option, Any)):
            received = repr(value) if isinstance(value, str | int | float) else describe(value)
            raise UserError(f"{name}: {option} is {received}: expected {_expected(hints[option])}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is int:
        return is_whole(value)
    if hint is float:
        return is_number(value)
    return not isinstance(origin or hint, type) or isinstance(value, origin or hint)


def _expected(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return _either([_expected(part) for part in get_args(hint)])
    if get_origin(hint) is Literal:
        return _either([repr(value) for value in get_args(hint)])
    return _WORDS.get(hint, _WORDS.get(get_origin(hint), getattr(hint, "__name__", str(hint))))


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def did_you_mean(value: Any, choices: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known names that are spelled alike, or contain it; empty where there are none."""
    if not isinstance(value, str) or len(value) < _SHORTEST:
        return ""
    plain = {choice: _letters(choice) for choice in choices}
    wanted = _letters(value)
    near = difflib.get_close_matches(wanted, plain.values(), n=3, cutoff=_ALIKE)
    meant = [choice for choice, letters in plain.items() if letters in near or (wanted and wanted in letters)]
    return f"; did you mean {' or '.join(meant[:3])}?" if meant else ""


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


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
