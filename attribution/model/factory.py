"""A user's own models: ``package.module:factory`` or ``file.py:factory`` names a function that makes one.

Naming it is the consent to run it. A saved file never runs a factory on its own.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from attribution.checks import did_you_mean
from attribution.errors import UserError, describe
from attribution.files import read_file
from attribution.model.classifier import Classifier
from attribution.model.forwarding import first_line
from attribution.model.matching import timm_geometry
from attribution.model.source import Built, Wanted


def names_factory(spec: str) -> bool:
    """Whether a model names a factory: a Python file or a module that exists, a colon, and the name of a function."""
    place, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        return False
    if place.endswith(".py"):
        return True
    if not all(part.isidentifier() for part in place.split(".")):
        return False
    with _importing(Path.cwd()):
        try:
            return importlib.util.find_spec(place) is not None
        except ImportError:
            return False
        except Exception as error:  # a package above it runs while it is looked for
            raise _raised(place, error) from error


def from_factory(spec: str, wanted: Wanted) -> Classifier | Built:
    """Call a factory, and check what it made.

    Args:
        spec: "package.module:factory" or "file.py:factory".
        wanted: options are the keyword arguments of the factory. A checkpoint is not loaded here.

    Returns:
        The factory's ``Classifier``, or its module with the size wanted. A timm module brings its preprocessing along.

    Raises:
        UserError: no such file or function; the factory raises, or returns something else.
    """
    factory = _find(spec)
    try:
        made = factory(**wanted.options)
    except (Exception, SystemExit) as error:  # the user's own code
        raise _raised(spec, error) from error
    if isinstance(made, Classifier):
        if wanted.size is not None and wanted.size != made.preprocessing.size:
            raise UserError(
                f"{spec} returned a Classifier of {made.preprocessing.size}, but the image size wanted is {wanted.size}: "
                "let the factory set it"
            )
        return made
    if not isinstance(made, nn.Module):
        raise UserError(f"{spec} returned {describe(made)}: expected an nn.Module, or an attribution.Classifier")
    return Built(made, _settings(made, wanted, spec), None)


def code_digest(spec: str) -> str | None:
    """16 hexadecimal digits of sha256 over the file that holds a factory; None where that is no file of Python.

    What this file imports is not in it.
    """
    place = spec.rpartition(":")[0]
    with _importing(Path.cwd()):
        found = place if place.endswith(".py") else getattr(importlib.util.find_spec(place), "origin", None)
    path = Path(str(found))
    return hashlib.sha256(read_file(path)).hexdigest()[:16] if path.suffix == ".py" and path.is_file() else None


def _settings(module: nn.Module, wanted: Wanted, spec: str) -> dict[str, Any]:
    if isinstance(getattr(module, "pretrained_cfg", None), Mapping):
        import timm

        size = {} if wanted.size is None else {"input_size": (3, *wanted.size)}
        config = timm.data.resolve_data_config(size, model=module)
        return {**timm_geometry(config), "mean": config["mean"], "std": config["std"]}
    if wanted.size is None:
        raise UserError(
            f"{spec} returned a bare {type(module).__name__}, which has no input size: give --image-size (size=), or let it return "
            "attribution.Classifier(module, size=..., mean=..., std=..., class_names=...)"
        )
    return {"size": wanted.size}


def _find(spec: str) -> Callable[..., Any]:
    place, _, name = spec.rpartition(":")
    path = Path(place)
    with _importing(path.parent if place.endswith(".py") else Path.cwd()):
        try:
            module = _run_file(path) if place.endswith(".py") else importlib.import_module(place)
        except (Exception, SystemExit) as error:  # the user's own code
            raise _raised(place, error) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__ and callable(value)]
        functions = [key for key in own if not key.startswith("_") and not isinstance(getattr(module, key), type)]
        meant = did_you_mean(name, functions)
        known = ", ".join(functions[:20]) or "none"
        raise UserError(f"{place} has no function {name!r}: expected one that returns a model; it has {known}{meant}")
    return factory


def _run_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    name = f"_attribution_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@contextmanager
def _importing(folder: Path) -> Iterator[None]:
    """Find modules of a folder too, after all others."""
    entry = os.fspath(folder.resolve())
    sys.path.append(entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _raised(what: str, error: BaseException) -> UserError:
    return error if isinstance(error, UserError) else UserError(f"{what} raised {type(error).__name__}: {first_line(error)}")
