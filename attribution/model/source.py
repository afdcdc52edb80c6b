"""What every source of models is asked for, and what it returns. ``SOURCES`` of ``loading`` lists the sources."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from attribution.errors import UserError

LARGEST_UNASKED = 1024  # pixels a side of a model input that a file alone may ask for
LARGEST_INPUT = 4096  # pixels a side of a model input that a file or an option may ask for


class Checkpoint(NamedTuple):
    """A file of weights, and the key of the state dict in it; None for the usual ones."""

    path: Path
    key: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.key is None else f"{self.path} [{self.key}]"


@dataclass(frozen=True)
class Wanted:
    """What a user wants of a model that is built by name.

    Attributes:
        checkpoint: weights in place of the library's own.
        pretrained: whether to load the library's published weights; otherwise they are random.
        size: (h, w) of the input in place of the model's own, pixels.
        options: further arguments of the library's constructor, or of the model's configuration.
    """

    checkpoint: Checkpoint | None = None
    pretrained: bool = True
    size: tuple[int, int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def only(self, model: str, *taken: str) -> None:
        """Refuse what a source does not take.

        Args:
            model: the model as the user named it.
            taken: of "checkpoint", "size" and "options".

        Raises:
            UserError: something else was given.
        """
        given = {"checkpoint": self.checkpoint is not None, "size": self.size is not None, "options": bool(self.options)}
        words = {"checkpoint": "a checkpoint", "size": "another image size", "options": f"model options ({', '.join(self.options)})"}
        for name, is_given in given.items():
            if is_given and name not in taken:
                raise UserError(f"{model} does not take {words[name]}: leave it out, or name a model of another source")


class Built(NamedTuple):
    """A model by name: the module, its own preprocessing as settings of ``Classifier``, and the class names if known.

    A model of transformers brings its configuration along, so that it can be built again without the hub. Names are assumed where a
    checkpoint without names has as many classes as the published weights.
    """

    module: nn.Module
    settings: dict[str, Any]
    class_names: tuple[str, ...] | None
    config: Mapping[str, Any] | None = None
    assumed: bool = False


def optional_package(package: str, extra: str, what: str) -> ModuleType:
    """Import a package that only an optional extra installs.

    Raises:
        UserError: it is not installed; the message says which extra to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{what} needs {package} ({error}): install it by pip install 'vision-attribution[{extra}]'") from None


def resized_to(settings: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Settings of ``Classifier`` for another input size. The resize keeps its proportion to the crop."""
    resized, own = settings.get("resized"), settings["size"]
    larger = None if resized is None else tuple(side * new // old for side, new, old in zip(resized, size, own, strict=True))
    return {**settings, "size": size, "resized": larger}


def parsed_options(texts: Sequence[str]) -> dict[str, Any]:
    """Model options from texts such as "img_size=256" or "dynamic_img_size=true": int, float, bool, none or text.

    Raises:
        UserError: a text without a key and a value, or a key given twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not key.isidentifier() or not equals or not value or key in options:
            why = "is there twice" if key in options else "is not of the form key=value"
            raise UserError(f"model option {text!r} {why}: expected options such as img_size=256, each once")
        options[key] = _parsed(value)
    return options


def parsed_size(value: int | str) -> tuple[int, int]:
    """(h, w) of an image size: 224, "224" or "192x256" (height first).

    Raises:
        UserError: anything else.
    """
    parts = str(value).lower().split("x")
    sides = [int(part) if part.isdecimal() and len(part) < 6 else 0 for part in parts]
    if isinstance(value, bool) or not 1 <= len(parts) <= 2 or not all(1 <= side <= LARGEST_INPUT for side in sides):
        raise UserError(
            f"image size is {value!r}: expected pixels such as 224, or height x width such as 192x256, of at most {LARGEST_INPUT} each"
        )
    return int(parts[0]), int(parts[-1])


def _parsed(value: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return words[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
