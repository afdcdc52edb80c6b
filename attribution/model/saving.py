"""A classifier as one self-describing safetensors file: the weights, and a card that says how to build the model again."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attribution.checks import is_whole
from attribution.errors import UserError, describe
from attribution.files import whole_file
from attribution.model.classifier import Classifier
from attribution.model.factory import from_factory
from attribution.model.prototypes import PrototypeForward
from attribution.model.source import LARGEST_INPUT, Wanted

_METADATA_KEY = "vision-attribution"
_WAY = ("size", "mean", "std", "resize", "resized", "interpolation", "channels", "rounding", "padding")
_SAVED_SETTINGS = (*_WAY, "head", "scores", "output", "forward_kwargs", "channels_last")
PROTOTYPES = "vision-attribution.prototypes"  # the name of their matrix among the weights
_OF_FILES = ("path", "dir", "pretrained", "weights", "url", "file")  # options of libraries that read further files
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _is_size(value: Any) -> bool:
    """Whether a value is a side, or (height, width), that a file may ask for."""
    sides = value if isinstance(value, tuple) else (value, value)
    return len(sides) == 2 and all(is_whole(side) and 1 <= side <= LARGEST_INPUT for side in sides)


def _is_mapping(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _names_no_file(options: Any) -> bool:
    return _is_mapping(options) and not any(word in key for key in options or () for word in _OF_FILES)


def _anything(value: Any) -> bool:
    return True  # the classifier checks it


_PARTS: Mapping[str, tuple[Callable[[Any], bool], str]] = {  # of a card: whether a value can be one, and what else was expected
    "size": (_is_size, f"a side, or [height, width], of at most {LARGEST_INPUT} pixels"),
    "resized": (lambda value: value is None or _is_size(value), f"a side, or [height, width], of at most {LARGEST_INPUT} pixels"),
    "head": (lambda value: isinstance(value, str | None), "the name of a layer, or null"),
    "output": (lambda value: isinstance(value, str | int | None) and not isinstance(value, bool), "a name, an index, or null"),
    "channels_last": (lambda value: isinstance(value, bool), "true or false"),
    "forward_kwargs": (_is_mapping, "names with values"),
    "class_names": (lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value), "a list of texts"),
    "options": (_names_no_file, "names with values, none of which names a file"),
    "config": (_is_mapping, "names with values"),
    "prototypes": (_is_mapping, "names with values"),
}


@dataclass(frozen=True)
class Recipe:
    """How a module is built again.

    Attributes:
        model: its name, as ``load_classifier`` takes it.
        options: of the model.
        config: of a model of transformers; with it nothing has to be downloaded.
        tower: whether the module is the image tower of a model of images and texts.
        code: digest of the file of the user's function that makes the module; none for models of libraries.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    tower: bool = False
    code: str | None = None

    def further(self) -> list[str]:
        """What the scores depend on beside the weights: the options, and the code where it is the user's."""
        return [f"{name} {value}" for name, value in (("options", sorted(self.options.items())), ("code", self.code)) if value]


@dataclass(frozen=True)
class Card:
    """What a saved file says about its model.

    Attributes:
        recipe: how the module is built.
        class_names: C names.
        settings: of ``Classifier``.
        prototypes: scale, bias, kind, normalize and takes_output of a head of prototypes; None without one.
    """

    recipe: Recipe
    class_names: tuple[str, ...]
    settings: Mapping[str, Any]
    prototypes: Mapping[str, Any] | None = None


def save_classifier(classifier: Classifier, path: str | Path, *, factory: str | None = None, dtype: torch.dtype | None = None) -> None:
    """Write a classifier as one safetensors file that ``load_classifier`` reads back, with its preprocessing and class names.

    Args:
        classifier: from ``load_classifier`` or ``zero_shot`` (with its text side), also with prototypes; or any with a module that
            ``factory`` makes.
        path: of the file, ending in .safetensors.
        factory: "package.module:function" or "file.py:function" that makes the module of this classifier. It is called once, to compare.
            ``load_classifier(factory, checkpoint=path)`` reads the file; a file alone never runs a factory.
        dtype: of the weights in the file, float32, float16 or bfloat16; as they are by default. They load as float32.

    Raises:
        UserError: nothing says how to build the module again, or the file cannot hold it.
    """
    if not isinstance(classifier, Classifier) or not isinstance(path, str | Path):
        raise UserError(
            f"save_classifier received {describe(classifier)} and {describe(path)}: expected a Classifier, then the path of a file"
        )
    recipe = classifier.recipe if factory is None else _made_by(factory, classifier)
    runner, forward = classifier.runner, classifier.forward
    if not isinstance(recipe, Recipe) or not isinstance(runner.module, nn.Module):
        raise UserError(
            f"{classifier.name} was not made by load_classifier, so a file could not say how to build it: give factory='module:function'"
        )
    prototypes = forward if isinstance(forward, PrototypeForward) and forward.base is runner else None
    if forward is not runner and prototypes is None:
        raise UserError(f"{classifier.name} has scores computed by {type(forward).__name__}: save the classifier that it was made from")
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype}: expected torch.float32, torch.float16 or torch.bfloat16")
    # shared tensors are written once per name: safetensors refuses aliases
    state = {key: _stored(value, dtype) for key, value in runner.module.state_dict().items()}
    if prototypes is not None:
        state[PROTOTYPES] = _stored(prototypes.matrix, dtype)
    card = _text(_card(classifier, recipe, prototypes), classifier.name)
    with whole_file(path) as temporary:
        save_file(state, temporary, metadata={_METADATA_KEY: card})


def read_card(path: Path) -> Card | None:
    """The card of a saved file; None for a safetensors file without one.

    Raises:
        UserError: not a readable safetensors file, or a card that ``save_classifier`` did not write.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get(_METADATA_KEY, "null"))
    except (SafetensorError, json.JSONDecodeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from None
    if not isinstance(card, dict) or not isinstance(card.get("model"), str) or not isinstance(card.get("settings"), dict):
        return None
    own: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in card["settings"].items()}
    parts = {name: card.get(name) for name in ("options", "config", "prototypes")}
    if unknown := sorted(own.keys() - set(_SAVED_SETTINGS)):
        raise _foreign(path, f"its settings have {unknown[0]!r}: expected {', '.join(_SAVED_SETTINGS)}")
    for name, value in {**own, **parts, "class_names": card.get("class_names"), "size": own.get("size")}.items():
        fits, expected = _PARTS.get(name, (_anything, ""))
        if not fits(value):
            raise _foreign(path, f"its {name} is {reprlib.repr(value)}: expected {expected}")
    recipe = Recipe(card["model"].partition("@")[0], parts["options"] or {}, parts["config"], bool(card.get("tower")))
    return Card(recipe, tuple(card["class_names"]), own, parts["prototypes"])


def _foreign(path: Path, what: str) -> UserError:
    return UserError(f"{path} has a card that save_classifier did not write: {what}")


def _card(classifier: Classifier, recipe: Recipe, prototypes: PrototypeForward | None) -> dict[str, Any]:
    runner = classifier.runner
    if callable(runner.output):
        raise UserError(f"{classifier.name} takes its scores by a function, output=, which no file can hold: name the part instead")
    settings = {name: getattr(classifier.preprocessing, name) for name in _WAY}
    settings |= {"head": runner.head, "scores": runner.scores, "output": runner.output}
    if runner.channels_last:
        settings["channels_last"] = True
    if runner.forward_kwargs:
        settings["forward_kwargs"] = runner.forward_kwargs
    card: dict[str, Any] = {"model": recipe.model, "class_names": classifier.class_names, "settings": settings}
    card |= {
        name: value for name, value in (("options", dict(recipe.options)), ("config", recipe.config), ("tower", recipe.tower)) if value
    }
    if prototypes is not None:
        names = ("scale", "bias", "kind", "normalize", "takes_output")
        card["prototypes"] = {name: getattr(prototypes, name) for name in names}
    return card


def _text(card: Mapping[str, Any], name: str) -> str:
    try:
        return json.dumps(card)
    except TypeError as error:
        raise UserError(f"{name} has settings that no file can hold ({error}): expected numbers, texts and lists of them") from None


def _stored(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    kept = value.detach().cpu().clone().contiguous()
    return kept.to(dtype) if dtype is not None and kept.is_floating_point() else kept


def _made_by(factory: str, classifier: Classifier) -> Recipe:
    """The recipe of a factory that makes a module with the weights of this classifier's by name and shape.

    Raises:
        UserError: it makes another module.
    """
    made = from_factory(factory, Wanted(size=classifier.preprocessing.size))
    module, own = made.module, classifier.module
    if not isinstance(module, nn.Module) or not isinstance(own, nn.Module) or _shapes(module) != _shapes(own):
        raise UserError(f"{factory} makes {describe(module)} with other weights than those of {classifier.name}: expected the same module")
    return Recipe(factory)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
