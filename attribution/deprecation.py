"""Old forms of calls that keep working for one version, with a DeprecationWarning."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

from attribution.model.classifier import Classifier

F = TypeVar("F", bound=Callable[..., Any])
_NAMED = ("zoo:", "timm:", "torchvision:")  # how names of models begin that ``load_classifier`` takes


def image_first(function: F) -> F:
    """Let a function of (image, classifier, ...) also be called as (classifier, image, ...), as it was until version 0.1.

    The order is told by the types: a ``Classifier``, or a name such as "zoo:vit", is never an image. The first parameter may have
    any name; the second is called ``classifier``.
    """
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if args and _is_classifier(args[0]) and not (len(args) > 1 and isinstance(args[1], Classifier)):
            warnings.warn(
                f"{function.__name__}(classifier, {first}, ...) is now {function.__name__}({first}, classifier, ...): "
                f"give what is explained first, then the classifier",
                DeprecationWarning,
                stacklevel=2,
            )
            explained = options.pop(first, None) if len(args) == 1 else args[1]
            args = (explained, args[0], *args[2:])
        return function(*args, **options)

    return cast(F, call)


def _is_classifier(value: Any) -> bool:
    return isinstance(value, Classifier) or (isinstance(value, str) and value.startswith(_NAMED))
