"""Computations on single images, which may fail without ending a study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from attribution.errors import NotApplicable, NotMisclassified, UserError
from attribution.files import CannotWrite

T = TypeVar("T")
R = TypeVar("R")
_END = object()


class Broken(Exception):
    """One explanation or measurement failed; the study goes on."""


def attempted(compute: Callable[[], T]) -> T:
    """Compute something that may fail for one image. Its failure is a result of the study, but a failure to write a file ends the
    study.

    Raises:
        Broken: it failed, with the reason.
        NotApplicable: it is not defined for the model.
        NotMisclassified: the model is right after all.
        CannotWrite: a file could not be written.
    """
    try:
        return compute()
    except (NotApplicable, NotMisclassified, CannotWrite):
        raise
    except UserError as error:
        raise Broken(str(error)) from None
    except (RuntimeError, ArithmeticError) as error:  # out of memory, a singular system, a module that trips over an image
        reason = str(error).splitlines()[0][:200] if str(error) else "no message"
        raise Broken(f"{type(error).__name__}: {reason}") from error


def attempted_each(compute: Callable[[], Iterable[T]]) -> Iterator[T]:
    """``attempted`` for each value of an iterable: what was yielded before a failure is kept."""
    values = iter(attempted(compute))
    while (value := attempted(partial(next, values, _END))) is not _END:
        yield value


def together(items: Sequence[T], compute: Callable[[Sequence[T]], Sequence[R]]) -> Iterator[tuple[T, R | Broken]]:
    """Compute something for a batch; where that fails, for each item alone, since one image may spoil its batch.

    Yields:
        Each item with its result, or with the reason of its failure.
    """
    try:
        yield from zip(items, attempted(partial(compute, items)), strict=True)
    except Broken as error:
        if len(items) == 1:
            yield items[0], error
        else:
            for item in items:
                yield from together([item], compute)
