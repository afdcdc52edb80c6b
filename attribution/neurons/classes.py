"""Compare classes by their neuron paths: frequencies, similarity, clusters and paths of whole classes (NeuronPath, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from attribution.errors import UserError, describe


@dataclass(frozen=True, eq=False)
class Similarity:
    """How similar classes are in the neurons on the paths of their images.

    Attributes:
        matrix: float64 [C, C], cosine similarity of the frequencies; NaN for a class without images.
        order: int64, the classes with images, similar ones next to each other (average linkage on 1 - cosine).
    """

    matrix: np.ndarray
    order: np.ndarray

    def most(self, label: int, count: int = 50) -> np.ndarray:
        """The other classes most similar to a class, most similar first: int64 [at most count]."""
        return self._ranked(label, -1)[:count]

    def least(self, label: int, count: int = 50) -> np.ndarray:
        """The other classes least similar to a class, least similar first: int64 [at most count]."""
        return self._ranked(label, 1)[:count]

    def clusters(self, count: int) -> np.ndarray:
        """Cut the tree of average linkage into ``count`` clusters.

        Returns:
            int64 [C], the cluster of each class, numbered by their first class; -1 for a class without images.
        """
        found = np.full(len(self.matrix), -1)
        if not len(self.order):
            return found
        known = np.sort(self.order)
        if len(known) == 1:
            found[known] = 0
            return found
        cut = hierarchy.fcluster(_tree(self.matrix[np.ix_(known, known)]), t=max(1, count), criterion="maxclust")
        first = {number: place for place, number in enumerate(dict.fromkeys(cut.tolist()))}
        found[known] = [first[number] for number in cut.tolist()]
        return found

    def _ranked(self, label: int, sign: int) -> np.ndarray:
        """The other classes by similarity, ascending for sign 1, descending for -1."""
        row = self.matrix[label]
        others = np.array([c for c in range(len(row)) if c != label and np.isfinite(row[c])], dtype=np.int64)
        return others[np.argsort(sign * row[others], kind="stable")]


def path_frequency(neurons: Any, labels: Any, classes: int, width: int) -> np.ndarray:
    """Count, for each class and neuron, the images whose path contains the neuron.

    Args:
        neurons: int [N, L] or [N, L, K], paths.
        labels: int [N], classes of the images.
        classes: C.
        width: F, units in a layer.

    Returns:
        int64 [C, L, F]. For each class and layer the counts sum to the class's images times K.

    Raises:
        UserError: arrays of other shapes, or labels or units out of range.
    """
    paths, known = _checked(neurons, labels, classes, width)
    found = np.zeros((classes, paths.shape[1], width), dtype=np.int64)
    layers = np.broadcast_to(np.arange(paths.shape[1])[None, :, None], paths.shape)
    np.add.at(found, (np.broadcast_to(known[:, None, None], paths.shape), layers, paths), 1)
    return found


def class_similarity(frequency: np.ndarray) -> Similarity:
    """Cosine similarity of the classes' frequencies [C, L, F] (``path_frequency``), over all layers and units."""
    flat = np.asarray(frequency, dtype=np.float64).reshape(len(frequency), -1)
    lengths = np.linalg.norm(flat, axis=1)
    matrix = np.full((len(flat), len(flat)), np.nan)
    known = np.flatnonzero(lengths > 0)
    normal = flat[known] / lengths[known, None]
    matrix[np.ix_(known, known)] = np.clip(normal @ normal.T, -1, 1)
    order = known if len(known) < 3 else known[hierarchy.leaves_list(_tree(matrix[np.ix_(known, known)]))]
    return Similarity(matrix, order)


def class_paths(neurons: Any, labels: Any, classes: int, depth: int | None = None) -> np.ndarray:
    """The paths of whole classes: in each layer and at each rank, the neuron that most images of the class have.

    Args:
        neurons: int [N, L] or [N, L, K], paths of images.
        labels: int [N], classes of the images.
        classes: C.
        depth: fill only this many first layers; the others hold -1. All by default.

    Returns:
        int64 [C, L, K], the most frequent unit; ties go to the smallest. -1 for classes without images. A unit may appear at several
        ranks of a layer, as in the reference code.

    Raises:
        UserError: arrays of other shapes, or labels out of range.
    """
    paths, known = _checked(neurons, labels, classes)
    found = np.full((classes, *paths.shape[1:]), -1, dtype=np.int64)
    for label in np.unique(known):
        own = paths[known == label]
        for place in np.ndindex(*own.shape[1:]):
            found[(label, *place)] = np.bincount(own[(slice(None), *place)]).argmax()
    if depth is not None:
        found[:, depth:] = -1
    return found


def halves(labels: Any, share: float = 0.5, *, seed: int = 0) -> np.ndarray:
    """Split samples at random into two disjoint parts, class by class.

    Args:
        labels: [N], classes of the samples.
        share: of each class in the first part, rounded; at least one sample, so that a class with one sample is in the first part.
        seed: of the split.

    Returns:
        bool [N], True for the first part, from which paths of classes are computed.
    """
    known = np.asarray(labels)
    first = np.zeros(len(known), dtype=bool)
    generator = np.random.default_rng(seed)
    for label in np.unique(known):
        members = generator.permutation(np.flatnonzero(known == label))
        first[members[: max(1, round(share * len(members)))]] = True
    return first


def _tree(matrix: np.ndarray) -> np.ndarray:
    distance = np.clip(1 - (matrix + matrix.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    return np.asarray(hierarchy.linkage(squareform(distance, checks=False), method="average"))


def _checked(neurons: Any, labels: Any, classes: int, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    paths, known = np.asarray(neurons), np.asarray(labels)
    if paths.ndim not in (2, 3) or paths.dtype.kind not in "iu":
        raise UserError(f"neurons are {describe(paths)}: expected whole numbers [N, L] or [N, L, K]")
    if known.shape != paths.shape[:1] or known.dtype.kind not in "iu":
        raise UserError(f"labels are {describe(known)}: expected {len(paths)} whole numbers, one for each path")
    if known.size and (known.min() < 0 or known.max() >= classes):
        raise UserError(f"labels run from {known.min()} to {known.max()}: expected 0 to {classes - 1}")
    if paths.size and (paths.min() < 0 or (width is not None and paths.max() >= width)):
        raise UserError(f"units run from {paths.min()} to {paths.max()}: expected 0 to {'the width' if width is None else width - 1}")
    return (paths[:, :, None] if paths.ndim == 2 else paths), known
