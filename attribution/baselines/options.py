"""Values of a method's options against the types of its signature, checked before anything runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from torch import nn

from attribution.errors import UserError, describe

_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "a name",
    nn.Module: "a module",
    NoneType: "None",
}


def option_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """The keyword-only parameters of a method."""
    return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY)


def check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Whether a method takes these options; ranges are checked by the method itself.

    Raises:
        UserError: an unknown option, or a value of another type than the signature says.
    """
    known = option_names(function)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise UserError(f"{name} takes no option {', '.join(unknown)}: expected {', '.join(known) or 'none'}")
    hints = get_type_hints(function)
    for option, value in options.items():
        if not _fits(value, hints[option]):
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
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float | np.floating) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, origin or hint)


def _expected(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return _listed([_expected(part) for part in get_args(hint)])
    if get_origin(hint) is Literal:
        return _listed([repr(value) for value in get_args(hint)])
    return _WORDS.get(hint, "a dict" if get_origin(hint) is Mapping else getattr(hint, "__name__", str(hint)))


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
