"""CRAFT: the concepts of a class, as non-negative parts of the activations of crops, and how much each matters.

Fel et al., "CRAFT: Concept Recursive Activation FacTorization for explainability" (CVPR 2023).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import qmc
from sklearn.decomposition import NMF, non_negative_factorization
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from attribution.checks import check_choice, check_seed, check_whole
from attribution.concepts.nonnegative import nonnegative_codes
from attribution.concepts.semi_nmf import semi_nmf
from attribution.errors import NotApplicable, UserError
from attribution.image import load_image
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.network.segments import Activation, Probe, Segment
from attribution.network.stages import find_layer

_LEAST_VARIANCE = 1e-12  # of the logits of masked images, below which an image says nothing about importance
_RESAMPLES = 1000
_TOP = 0.9  # quantile of the codes above which a concept counts as present
_PATCH = 64 / 224  # of the side of the input
_OVERLAP = 0.8  # stride of the crops, as a share of their side


@dataclass(frozen=True, eq=False)
class Concepts:
    """The concepts of a class in a layer.

    Attributes:
        classifier: the model.
        target: the class, as an index.
        layer: name of the layer.
        basis: W, float32 [r, C]: each concept as a direction in the channels of the layer.
        codes: U, float32 [crops, r], at least 0: what each crop has of each concept; crops image by image, row by row.
        relative_error: ||A - U W|| / ||A|| over the activations A [crops, C] of the crops.
        converged: whether the factorisation stopped because it changed no more.
        importance: float64 [r], total Sobol index of each concept for the logit of the class, mean over images. It has no sign, and
            may exceed 1.
        importance_interval: float64 [r, 2], 95 % bootstrap interval over images.
        effect: float64 [r], mean over images of the derivative of the logit by the mask of a concept, at 1: its signed contribution.
        image_importance: float64 [images, r].
        constant_images: images whose logit does not depend on the concepts; they count as importance 0.
        same_prediction: share of the images whose predicted class stays the same when activations are replaced by U W. Where it is low,
            the concepts do not carry the decision, and their importance is not to be interpreted.
        crops: int64 [crops, 3]: image, top and left of each crop, in pixels of the model input.
        patch_size: side of the crops in pixels.
        settings: everything else that numbers depend on.
    """

    classifier: Classifier
    target: int
    layer: str
    basis: Tensor
    codes: Tensor
    relative_error: float
    converged: bool
    importance: np.ndarray
    importance_interval: np.ndarray
    effect: np.ndarray
    image_importance: np.ndarray
    constant_images: int
    same_prediction: float
    crops: np.ndarray
    patch_size: int
    settings: dict[str, Any] = field(default_factory=dict)
    network: _Network = field(repr=False, kw_only=True)

    @property
    def order(self) -> np.ndarray:
        """The concepts by importance, most important first: int64 [r]. Ties go to the lower number."""
        return np.argsort(-self.importance, kind="stable")

    def encode(self, images: Tensor | Sequence[Any]) -> Tensor:
        """What every position of some images has of each concept.

        Args:
            images: float [N, 3, H, W] in [0, 1], or sources as ``load_image`` takes them.

        Returns:
            U, float32 [N, h, w, r].
        """
        return self.network.encode(images, self.basis, self.settings["codes"])

    def maps(self, images: Tensor | Sequence[Any], concept: int, quantile: float = _TOP) -> Tensor:
        """Where a concept is in some images.

        Args:
            images: as for ``encode``.
            concept: its number.
            quantile: codes below this quantile of all given positions are set to 0; 0 keeps all.

        Returns:
            float32 [N, h, w] of the model input, bilinear between positions.
        """
        check_whole("concept", concept, 0, len(self.basis) - 1)
        codes = self.encode(images)[..., concept]
        present = codes * (codes >= torch.quantile(codes, quantile)) if quantile > 0 else codes
        size = self.classifier.preprocessing.size
        return F.interpolate(present[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]

    def best_crops(self, concept: int, count: int = 10) -> np.ndarray:
        """The crops with the most of a concept, as rows of ``crops``: int64 [count]."""
        check_whole("concept", concept, 0, len(self.basis) - 1)
        return torch.sort(self.codes[:, concept], descending=True, stable=True).indices[:count].numpy()

    def removed(self, images: Tensor | Sequence[Any], order: Sequence[int] | np.ndarray | None = None, keep: bool = False) -> np.ndarray:
        """The mean logit of the class with the first k concepts of an order set to 0 at all positions, k = 0 ... r.

        Args:
            images: as for ``encode``.
            order: concepts; by importance by default.
            keep: the other way round: only the first k concepts are kept.

        Returns:
            float64 [r + 1].
        """
        chosen = self.order if order is None else np.asarray(order)
        masks = np.ones((len(self.basis) + 1, len(self.basis)), dtype=np.float32)
        for count in range(len(masks)):
            masks[count, chosen[:count]] = 0
        if keep:
            masks = 1 - masks
        found = [self.network.logits(codes, self.basis, masks, output)[:, self.target] for codes, output in self._parts(images)]
        return np.mean(found, axis=0)

    def removal_test(self, images: Tensor | Sequence[Any], orders: int = 100, seed: int = 0) -> tuple[float, np.ndarray, float]:
        """Compare removing the concepts by importance with removing them in random orders.

        Args:
            images: as for ``encode``; best other ones than those that the concepts were found on.
            orders: random orders.
            seed: of these.

        Returns:
            The mean logit over k = 0 ... r of the order by importance; those of the random orders, float64 [orders]; and the p-value, the
            share of orders that lower the logit as much, the order itself counted.
        """
        check_whole("orders", orders, 1)
        generator = np.random.default_rng(seed)
        own = float(self.removed(images).mean())
        others = np.array([self.removed(images, generator.permutation(len(self.basis))).mean() for _ in range(orders)])
        return own, others, float((1 + (others <= own).sum()) / (1 + orders))

    def _parts(self, images: Any) -> list[tuple[np.ndarray, Tensor | None]]:
        codes = self.encode(images).numpy()
        return [(codes[place], self.network.activation(images, place).output) for place in range(len(codes))]


def craft(
    images: Tensor | Sequence[Any],
    classifier: Classifier | str,
    target: int | str,
    layer: str = "final",
    n_concepts: int = 10,
    patch_size: int | None = None,
    stride: int | None = None,
    seed: int = 0,
    max_iter: int = 500,
    design: Literal["sobol", "halton"] = "sobol",
    samples: int = 128,
    codes: Literal["nnls", "coordinate_descent"] = "nnls",
    factorisation: Literal["nmf", "semi_nmf"] = "nmf",
    importance_images: int | None = None,
) -> Concepts:
    """Find the concepts of a class, and their importance.

    Square crops of the images are resized to the model input. Their activations, averaged over positions, are factorised into concepts and
    codes. The importance of a concept is its total Sobol index (Jansen's estimator) for the logit of the class, where random masks
    multiply the codes of the images.

    The settings of the published code are design="halton", samples=32, max_iter=200, codes="coordinate_descent". Its 32 points are
    biased: a dominant concept gets .7 instead of .97. Therefore they are not the default.

    Args:
        images: float [N, 3, H, W] in [0, 1], or sources as ``load_image`` takes them; of one class, best those that the model gets right.
        classifier: a ``Classifier``, or a name that ``load_classifier`` takes.
        target: the class, by name or index.
        layer: "final", "middle", or a module whose output is a map that everything passes; its values must not be negative.
        n_concepts: r, at most the number of crops and of channels.
        patch_size: side of a crop in pixels of the model input; 64 of 224 by default.
        stride: between crops; 0.8 of the side by default.
        seed: of the factorisation, the design and the intervals.
        max_iter: of the factorisation.
        design: "sobol", scrambled, or "halton", unscrambled, as published.
        samples: points of the design; a power of two for "sobol".
        codes: "nnls": exact, with a factorisation in float64 begun by an SVD ("nndsvda"). "coordinate_descent": scikit-learn's defaults, in
            float32, as published.
        factorisation: "semi_nmf" takes activations of any sign, as of transformers; concepts are then of any sign, and codes at least 0.
        importance_images: the first images, on which the importance is measured; all by default.

    Raises:
        UserError: no images, crops larger than the input, more concepts than crops or channels, negative activations, no such class
            or layer.
    """
    _check(n_concepts, stride, seed, max_iter, design, samples, codes, factorisation)
    if not len(images):
        raise UserError("no images were given: expected those of one class")
    classifier = load_classifier(classifier)
    index = classifier.target_index(target)
    network = _Network(classifier, layer)
    side = min(classifier.preprocessing.size)
    patch = max(2, round(_PATCH * side)) if patch_size is None else patch_size
    check_whole("patch_size", patch, 1)
    if patch > side:
        raise UserError(f"patch_size is {patch}: expected at most {side}, the side of the model input")
    step = max(1, int(_OVERLAP * patch)) if stride is None else stride
    activations, crops = network.crops(images, patch, step)
    if n_concepts > min(activations.shape):
        raise UserError(
            f"n_concepts is {n_concepts}: expected at most {min(activations.shape)}, since there are {activations.shape[0]} crops of "
            f"{activations.shape[1]} channels"
        )
    least = float(activations.min())
    if factorisation == "nmf" and least < 0:
        raise NotApplicable(
            f"layer {network.name} of {classifier.name} returns negative values (down to {least:.3g}): name one behind a ReLU, or give "
            "factorisation='semi_nmf'"
        )
    basis, found_codes, converged = _factorised(activations, n_concepts, factorisation, codes, max_iter, seed)
    if not converged:
        warnings.warn(f"the factorisation was stopped after {max_iter} iterations: concepts still change (max_iter=)", stacklevel=2)
    scale = float(np.linalg.norm(activations)) or 1.0
    error = float(np.linalg.norm(activations.astype(np.float64) - found_codes.astype(np.float64) @ basis.astype(np.float64))) / scale
    count = len(images) if importance_images is None else min(len(images), importance_images)
    check_whole("importance_images", count, 1)
    weights = torch.from_numpy(basis).float()
    measured = _Importance(network, weights, index, _design(design, samples, n_concepts, seed))
    per_image = [measured.of(images, place, codes) for place in range(count)]
    importance = np.array([each.total for each in per_image])
    same = float(np.mean([each.same for each in per_image]))
    if same < 0.5:
        warnings.warn(
            f"with activations rebuilt from the concepts only {same:.0%} of the images keep their predicted class: the importance of these "
            "concepts says little about the model; take a later layer or more concepts",
            stacklevel=2,
        )
    return Concepts(
        classifier=classifier,
        target=index,
        layer=network.name,
        basis=weights,
        codes=torch.from_numpy(found_codes).float(),
        relative_error=error,
        converged=converged,
        importance=importance.mean(axis=0),
        importance_interval=_interval(importance, seed),
        effect=np.mean([each.gradient for each in per_image], axis=0),
        image_importance=importance,
        constant_images=sum(each.constant for each in per_image),
        same_prediction=same,
        crops=crops,
        patch_size=patch,
        settings={
            **{"stride": step, "seed": seed, "max_iter": max_iter, "design": design, "samples": samples, "codes": codes},
            **{"factorisation": factorisation, "importance_images": count},
        },
        network=network,
    )


def _check(
    n_concepts: int, stride: int | None, seed: int, max_iter: int, design: str, samples: int, codes: str, factorisation: str
) -> None:
    check_whole("n_concepts", n_concepts, 1)
    check_whole("max_iter", max_iter, 1)
    check_whole("samples", samples, 2)
    check_seed(seed)
    check_choice("design", design, ("sobol", "halton"))
    check_choice("codes", codes, ("nnls", "coordinate_descent"))
    check_choice("factorisation", factorisation, ("nmf", "semi_nmf"))
    if stride is not None:
        check_whole("stride", stride, 1)
    if design == "sobol" and samples & (samples - 1):
        raise UserError(f"samples is {samples}: expected a power of two for the design sobol, such as 128")


class _Network:
    """A classifier cut at a layer: g before it, h behind it."""

    def __init__(self, classifier: Classifier, layer: str) -> None:
        found = find_layer(classifier, layer)
        if found is None:
            raise UserError("layer is 'input': expected a layer inside the network, whose channels are parts of what it sees")
        self.classifier, self.layer = classifier, found
        probe = Probe(classifier)
        self.before, self.behind = Segment(classifier, None, found, probe), Segment(classifier, found, None, probe)

    @property
    def name(self) -> str:
        return self.layer.name

    def activation(self, images: Any, place: int) -> Activation:
        """What the layer returns for an image."""
        with torch.no_grad():
            return self.before(Activation(self.classifier.inputs(load_image(images[place]))))

    def crops(self, images: Any, patch: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """Activations of all crops, float32 [crops, C], and image, top and left of each."""
        height, width = self.classifier.preprocessing.size
        places = [(top, left) for top in range(0, height - patch + 1, stride) for left in range(0, width - patch + 1, stride)]
        found, where = list[Tensor](), list[tuple[int, int, int]]()
        for number in range(len(images)):
            inputs = self.classifier.inputs(load_image(images[number]))
            cut = torch.cat([inputs[..., top : top + patch, left : left + patch] for top, left in places])
            resized = F.interpolate(cut, size=(height, width), mode="bilinear", align_corners=False)
            with torch.no_grad():
                for part in resized.split(self.classifier.batch_size):
                    found.append(self.before(Activation(part)).maps.float().mean(dim=(2, 3)).cpu())
            where += [(number, top, left) for top, left in places]
        return torch.cat(found).numpy(), np.array(where, dtype=np.int64)

    def encode(self, images: Any, basis: Tensor, codes: str) -> Tensor:
        """Codes of every position, float32 [N, h, w, r]."""
        maps = torch.cat([self.activation(images, place).maps.float().cpu() for place in range(len(images))])
        rows = maps.permute(0, 2, 3, 1)
        return torch.from_numpy(_encoded(rows.flatten(0, 2).numpy(), basis.numpy(), codes)).float().unflatten(0, rows.shape[:3])

    def logits(self, codes: np.ndarray, basis: Tensor, masks: np.ndarray, output: Tensor | None) -> np.ndarray:
        """Logits of an image whose concepts are multiplied by masks.

        Args:
            codes: of the image, [h, w, r].
            basis: W, [r, C].
            masks: float [n, r].
            output: what the layer returned for the image, for its prefix tokens.

        Returns:
            float64 [n, classes].
        """
        u, found = torch.from_numpy(np.asarray(codes)).float(), list[Tensor]()
        with torch.no_grad():
            for part in torch.from_numpy(np.asarray(masks)).float().split(self.classifier.batch_size):
                found.append(self.behind(Activation(self.rebuilt(u, part, basis), output)).maps.double().cpu())
        return torch.cat(found).numpy()

    def rebuilt(self, codes: Tensor, masks: Tensor, basis: Tensor) -> Tensor:
        """(u * m) W as maps [n, C, h, w] on the device of the model."""
        return ((codes * masks[:, None, None, :]) @ basis).permute(0, 3, 1, 2).to(self.classifier.device)


@dataclass(frozen=True)
class _OfImage:
    """Importance of the concepts for one image."""

    total: np.ndarray
    gradient: np.ndarray
    constant: bool
    same: bool


@dataclass(frozen=True)
class _Importance:
    """Total Sobol indices of the concepts of single images."""

    network: _Network
    basis: Tensor
    target: int
    masks: np.ndarray

    def of(self, images: Any, place: int, codes: str) -> _OfImage:
        """The importance for the image at a place."""
        activation = self.network.activation(images, place)
        rows = activation.maps.float().cpu().permute(0, 2, 3, 1)[0]
        flat = _encoded(rows.flatten(0, 1).numpy(), self.basis.numpy(), codes)
        u = flat.reshape(*rows.shape[:2], -1).astype(np.float32)
        logits = self.network.logits(u, self.basis, self.masks, activation.output)[:, self.target]
        total, constant = jansen(logits, u.shape[-1])
        mask = torch.ones(1, u.shape[-1], requires_grad=True)
        with torch.enable_grad():
            maps = self.network.rebuilt(torch.from_numpy(u), mask, self.basis)
            rebuilt = self.network.behind(Activation(maps, activation.output)).maps
            (gradient,) = torch.autograd.grad(rebuilt[0, self.target], mask)
        with torch.no_grad():
            whole = self.network.behind(activation).maps
        return _OfImage(total, gradient[0].double().numpy(), constant, bool(rebuilt.argmax() == whole.argmax()))


def jansen(outputs: np.ndarray, dimensions: int) -> tuple[np.ndarray, bool]:
    """Total Sobol indices by Jansen's estimator (Computer Physics Communications 117, 1999).

    Args:
        outputs: float [n (d + 1)]: those of the n rows A of a design, then of C_1 ... C_d, where C_i is A with column i of B.
        dimensions: d.

    Returns:
        sum (y_A - y_Ci)^2 / (2 n Var(y_A)), float64 [d], 0 where the outputs do not vary; and whether they do not.
    """
    rows = np.asarray(outputs, dtype=np.float64).reshape(dimensions + 1, -1)
    variance = rows[0].var(ddof=1)
    if variance < _LEAST_VARIANCE:
        return np.zeros(dimensions), True
    return ((rows[0] - rows[1:]) ** 2).sum(axis=1) / (2 * rows.shape[1] * variance), False


def _design(name: str, samples: int, dimensions: int, seed: int) -> np.ndarray:
    """The masks A, C_1 ... C_d of a design, float32 [samples (d + 1), d]; the rows B themselves are not needed."""
    sequence = qmc.Sobol(2 * dimensions, scramble=True, rng=seed) if name == "sobol" else qmc.Halton(2 * dimensions, scramble=False)
    points = sequence.random(samples).astype(np.float32)
    a, b = points[:, :dimensions], points[:, dimensions:]
    mixed = np.repeat(a[None], dimensions, axis=0)
    for number in range(dimensions):
        mixed[number, :, number] = b[:, number]
    return np.concatenate([a[None], mixed]).reshape(-1, dimensions)


def _factorised(
    activations: np.ndarray, count: int, factorisation: str, codes: str, max_iter: int, seed: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """W [r, C], U [crops, r], and whether the iterations ended by themselves."""
    if factorisation == "semi_nmf":
        found = semi_nmf(activations.T, count, sparsity=1.0, iterations=max_iter, seed=seed)
        return found.features.T.double().numpy(), found.coefficients.double().numpy(), found.converged
    published = codes == "coordinate_descent"
    model = NMF(n_components=count, init=None if published else "nndsvda", max_iter=max_iter, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        u = model.fit_transform(activations if published else activations.astype(np.float64))
    return model.components_, u, model.n_iter_ < max_iter


def _encoded(rows: np.ndarray, basis: np.ndarray, codes: str) -> np.ndarray:
    """Codes of activations [n, C] on W: exact, or as scikit-learn's ``transform`` finds them."""
    if codes == "nnls":
        return nonnegative_codes(rows, basis)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found, _, _ = non_negative_factorization(
            rows, H=basis.astype(rows.dtype), n_components=len(basis), update_H=False, init=None, solver="cd", tol=1e-4, max_iter=200
        )
    return found


def _interval(importance: np.ndarray, seed: int) -> np.ndarray:
    """95 % bootstrap interval of the mean over images, float64 [r, 2]."""
    generator = np.random.default_rng(seed)
    means = np.array([importance[generator.integers(0, len(importance), len(importance))].mean(axis=0) for _ in range(_RESAMPLES)])
    return np.quantile(means, (0.025, 0.975), axis=0).T
