"""What a model or a method makes of an image may fail without ending a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from attribution.errors import NotApplicable, NotMisclassified, UserError

T = TypeVar("T")


class Broken(Exception):
    """One explanation or measurement failed; the run goes on."""


def attempted(compute: Callable[[], T]) -> T:
    """What a model or method makes of an image. Its failures are results of the benchmark; those of writing files are not.

    Raises:
        Broken: it failed, with the reason.
        NotApplicable: it is not defined for the model.
        NotMisclassified: the model is right after all.
    """
    try:
        return compute()
    except (NotApplicable, NotMisclassified):
        raise
    except UserError as error:
        raise Broken(str(error)) from None
    except (RuntimeError, ArithmeticError) as error:  # out of memory, a singular system, a module that trips over an image
        reason = str(error).splitlines()[0][:200] if str(error) else "no message"
        raise Broken(f"{type(error).__name__}: {reason}") from error
