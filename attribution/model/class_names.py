"""Names of classes: those of ImageNet and its larger sets, those that a checkpoint carries, and the class that a text means."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_KEYS = ("class_names", "classes", "class_to_idx", "idx_to_class", "id2label", "label2id", "label_names", "CLASSES")
_DEEPEST = 4  # mappings inside each other that are searched for names
_SHOWN = 8  # candidates in a message


def imagenet_names(subset: str = "imagenet-1k") -> tuple[str, ...]:
    """Names of the classes of ImageNet-1k, or of a larger set: short, and each once.

    Args:
        subset: a set of timm's ``ImageNetInfo``, such as "imagenet-12k". The names of ImageNet-1k are torchvision's. Those of the others
            are the first of the synonyms of WordNet; where several classes share it, the second follows in brackets, or the index.
    """
    if subset == "imagenet-1k":
        import torchvision

        return tuple(torchvision.models.get_model_weights("resnet18").DEFAULT.meta["categories"])
    import timm

    synonyms = [text.split(", ") for text in timm.data.ImageNetInfo(subset).label_descriptions()]
    repeated = Counter(each[0] for each in synonyms)
    names = [f"{each[0]} ({each[1]})" if repeated[each[0]] > 1 and len(each) > 1 else each[0] for each in synonyms]
    return unique(names)


def unique(names: Sequence[str]) -> tuple[str, ...]:
    """Names made unambiguous: a second "crane" becomes "crane (517)"."""
    seen: set[str] = set()
    result = []
    for index, name in enumerate(names):
        result.append(f"{name} ({index})" if name in seen else name)
        seen.add(name)
    return tuple(result)


def timm_names(module: Any) -> tuple[str, ...] | None:
    """Names of the classes of a timm model: those of its published weights, or those of the ImageNet set with as many classes.

    None where the module has another number of classes than the published weights, or where these are of an unknown set.
    """
    import timm

    config = getattr(module, "pretrained_cfg", None)
    config = config if isinstance(config, Mapping) else {}
    classes = getattr(module, "num_classes", None)
    if not classes or classes != config.get("num_classes"):
        return None
    labels, descriptions = config.get("label_names"), config.get("label_descriptions")
    if labels and not isinstance(labels, Mapping) and len(labels) == classes:
        described = descriptions if isinstance(descriptions, Mapping) else {}
        return unique([str(described.get(label, label)).split(", ")[0] for label in labels])
    subset = timm.data.infer_imagenet_subset(module)
    return None if subset is None else imagenet_names(subset)


def carried_names(loaded: Any, classes: int | None, source: str) -> tuple[str, ...] | None:
    """The class names that a checkpoint holds beside its weights, under a usual key such as "class_names", "class_to_idx" or "id2label".

    Args:
        loaded: what was read from the file: mappings inside each other, or the metadata of a safetensors file.
        classes: C, of the model.
        source: the file, for the warnings.

    Returns:
        C names; None where the file has none. Lists of another length, and several that differ, are passed over with a warning.
    """
    found = list(dict.fromkeys(_lists(loaded, _DEEPEST)))
    fitting = [names for names in found if len(names) == classes]
    if len(fitting) == 1:
        return unique(fitting[0])
    if found:
        what = f"{len(fitting)} different lists" if fitting else f"{len(found[0])} names ({', '.join(found[0][:3])} ...)"
        warnings.warn(f"{source} has {what} for {classes} classes, so none is used: give class_names (--classes)", stacklevel=2)
    return None


def matching_class(text: str, class_names: Sequence[str]) -> int | list[int]:
    """The index of the class that a text names, or all indices that it may mean, none or several.

    An exact name comes first, then one that differs in case only, then a part of a single name: one that begins a word, else any.
    A whole number is no part of a name.
    """
    lower = text.lower()
    tests: list[Callable[[str], Any]] = [lambda name: name == text, lambda name: name.lower() == lower]
    if lower.strip() and not text.isdecimal():
        begins = re.compile(rf"(?<!\w){re.escape(lower)}")
        tests += [lambda name: begins.search(name.lower()), lambda name: lower in name.lower()]
    for test in tests:
        found = [index for index, name in enumerate(class_names) if test(name)]
        if found:
            return found[0] if len(found) == 1 else found
    return []


def some_classes(indices: Sequence[int], class_names: Sequence[str]) -> str:
    """Classes by name and index, as candidates in a message."""
    shown = ", ".join(f"{class_names[index]} ({index})" for index in indices[:_SHOWN])
    return shown + (f" and {len(indices) - _SHOWN} more" if len(indices) > _SHOWN else "")


def _lists(value: Any, depth: int) -> Iterator[tuple[str, ...]]:
    """All lists of names in mappings inside each other."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if not isinstance(value, Mapping) or depth == 0:
        return
    for key in _KEYS:
        if names := _as_names(value.get(key)):
            yield names
    for each in value.values():
        yield from _lists(each, depth - 1)


def _as_names(value: Any) -> tuple[str, ...] | None:
    """Names by index, from a list, a mapping from or to indices, or either as JSON; None from anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        pairs = {_index(key): name for key, name in value.items()}
        if not all(isinstance(name, str) for name in pairs.values()):
            pairs = {_index(index): name for name, index in value.items()}
        value = [pairs.get(index) for index in range(len(value))]
    if not isinstance(value, list | tuple) or not value or not all(isinstance(each, str) for each in value):
        return None
    return tuple(value)


def _index(value: Any) -> int | None:
    digits = isinstance(value, str) and value.isdecimal()
    return int(value) if digits or (isinstance(value, int) and not isinstance(value, bool)) else None
