"""Identity: what a record depends on."""

from __future__ import annotations

from attribution import __version__
from attribution.model.classifier import Classifier
from attribution.provenance import digest_of


def sample_seed(seed: int, sample: str) -> int:
    """The seed of a stochastic method on one image: images draw independently, as if each had been explained on its own."""
    return int(digest_of([seed, sample]), 16) % 2**31


def identity_of(classifier: Classifier, name: str) -> str:
    """Digest of everything about a model that a number depends on."""
    own = classifier.identity
    return digest_of([name, own.weights, own.preprocessing, list(own.class_names), __version__, *own.precision])
