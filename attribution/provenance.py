"""Record how an explanation was computed, as JSON types, and digests that tell whether two things are the same."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from torch import Tensor

from attribution.errors import describe
from attribution.model.classifier import Classifier


def provenance(classifier: Classifier, settings: Mapping[str, Any], started: float) -> dict[str, Any]:
    """How an explanation was computed, as JSON types.

    Args:
        classifier: the model explained.
        settings: arguments of the method.
        started: ``time.perf_counter()`` at the start, in seconds.
    """
    return {
        "model": classifier.name,
        "weights_digest": classifier.weights_digest,
        "device": str(classifier.device),
        "precision": classifier.precision,
        **({"labels": "independent"} if classifier.outputs.independent else {}),
        "settings": plain_settings(settings),
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 3),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that the numbers depend on."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in (
        "vision-attribution",
        "torch",
        "torchvision",
        "timm",
        "captum",
        "numpy",
        "scipy",
        "scikit-image",
        "scikit-learn",
        "opencv-contrib-python-headless",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def plain_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON types. Arrays and other objects become a short description (``describe``)."""
    return {key: _plain_value(value) for key, value in values.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return plain_settings({str(k): v for k, v in value.items()})
    if isinstance(value, tuple | list):
        return [_plain_value(v) for v in value]
    if isinstance(value, np.integer | np.floating):
        return value.item()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return repr(value) if isinstance(value, Classifier) else describe(value)


def digest_of(values: Any) -> str:
    """The first 16 hexadecimal digits of sha256 over values written as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def pixels_digest(image: Tensor) -> str:
    """The first 16 hexadecimal digits of sha256 over the shape, the dtype and the values of an image or a mask."""
    values = image.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{list(values.shape)} {values.dtype}".encode())
    digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
