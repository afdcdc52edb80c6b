"""Identity: the one place that says what a record depends on.

A record is kept under a key. The key is a digest of the model (weights, options, the file of a function that makes it, preprocessing,
class names, precision, our version, the library that cuts superpixels), of the pixels that were measured, and of every setting that the
number depends on. Where one of them changes, the key changes, and the record is measured again.
"""

from __future__ import annotations

from typing import Any

from attribution import __version__
from attribution.model.classifier import Classifier
from attribution.provenance import digest_of
from attribution.regions import slico_library


def identity_of(classifier: Classifier, name: str | None = None) -> str:
    """Digest of everything about a model that a number depends on; ``name`` is what the settings call it."""
    own, further = classifier.identity, list[str]()
    if (library := slico_library()) != "OpenCV":  # its superpixels are others, and so are numbers that depend on them
        further.append(f"slico of {library}")
    return digest_of([name or own.name, own.weights, own.preprocessing, list(own.class_names), __version__, *own.settings, *further])


def record_key(model: str, pixels: Any, *settings: Any) -> str:
    """The key of a record.

    Args:
        model: digest of the model, from ``identity_of``.
        pixels: digests of the images measured, from ``pixels_digest``.
        settings: everything else that the record depends on, as plain JSON.
    """
    return digest_of([model, pixels, *settings])


def sample_seed(seed: int, sample: str) -> int:
    """The seed of a stochastic method on one image: images draw independently, as if each had been explained on its own."""
    return int(digest_of([seed, sample]), 16) % 2**31
