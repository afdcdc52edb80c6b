"""Find the neuron path of one image: NeuronPath (ICLR 2025) in three modes, and its baselines."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from attribution.deprecation import image_first
from attribution.image import ImageSource
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.neurons.finder import RERANKED, PathFinder
from attribution.neurons.layers import find_neurons
from attribution.neurons.path import STEPS, Mode, NeuronPath, Output
from attribution.provenance import plain_settings, provenance


@image_first
def neuron_path(
    image: ImageSource,
    classifier: Classifier | str,
    target: int | str | None = None,
    mode: Mode = "reference",
    steps: int = STEPS,
    *,
    top: int = 1,
    output: Output = "probability",
    compat: bool = False,
    reranked: int = RERANKED,
    layers: Sequence[str] | None = None,
) -> NeuronPath:
    """Find the neurons, one in each layer of a vision transformer, with the largest joint influence on the prediction.

    NeuronPath (Wang et al., ICLR 2025).

    Args:
        image: anything ``load_image`` accepts.
        classifier: of a vision transformer, or a name that ``load_classifier`` accepts.
        target: class to explain, index or name; the predicted class by default.
        mode: "reference", the published search; "exact", which reranks candidates by their true joint score and never scores less;
            "removal", the neurons whose removal lowers the target most (see ``PathFinder.search``).
        steps: m, number of points of the Riemann sum.
        top: K, neurons in each layer; for K > 1 ``neurons`` is [L, K].
        output: "probability" of the target, as published, or its "logit".
        compat: compute like the reference's top-K code (see ``PathFinder.search``).
        reranked: number of candidates of each layer that the modes "exact" and "removal" evaluate.
        layers: see ``find_neurons``.

    Raises:
        NotApplicable: the model is no vision transformer, or its neurons cannot be recorded; with the reason.
        UserError: any wrong argument.
    """
    settings = {"mode": mode, "top": top, "compat": compat, "reranked": reranked}
    return _one(image, classifier, target, steps, output, layers, PathFinder.search, **settings)


@image_first
def activation_path(
    image: ImageSource,
    classifier: Classifier | str,
    target: int | str | None = None,
    *,
    steps: int = STEPS,
    output: Output = "probability",
    layers: Sequence[str] | None = None,
) -> NeuronPath:
    """The neuron with the largest (signed) activation in each layer. Arguments and score as in ``neuron_path``."""
    return _one(image, classifier, target, steps, output, layers, PathFinder.activation)


@image_first
def influence_pattern_path(
    image: ImageSource,
    classifier: Classifier | str,
    target: int | str | None = None,
    steps: int = STEPS,
    *,
    output: Output = "probability",
    layers: Sequence[str] | None = None,
) -> NeuronPath:
    """The neuron with the largest mean gradient in each layer while the image is scaled from 0 to itself.

    The baseline that NeuronPath's code calls Influence Pattern (see ``PathFinder.influence_pattern``). Arguments and score as in
    ``neuron_path``.
    """
    return _one(image, classifier, target, steps, output, layers, PathFinder.influence_pattern)


@image_first
def layer_gradient_path(
    image: ImageSource,
    classifier: Classifier | str,
    target: int | str | None = None,
    steps: int = STEPS,
    *,
    output: Output = "probability",
    layers: Sequence[str] | None = None,
) -> NeuronPath:
    """The neuron with the largest layer-wise integrated gradient in each layer. Arguments and score as in ``neuron_path``."""
    return _one(image, classifier, target, steps, output, layers, PathFinder.layer_integrated_gradients)


def _one(
    image: ImageSource,
    classifier: Classifier | str,
    target: int | str | None,
    steps: int,
    output: Output,
    layers: Sequence[str] | None,
    find: Callable[..., list[NeuronPath]],
    **settings: Any,
) -> NeuronPath:
    started = time.perf_counter()
    with torch.inference_mode(False), torch.enable_grad():  # gradients are needed, whatever mode the caller is in
        classifier = load_classifier(classifier)
        neurons = find_neurons(classifier, layers)
        inputs = classifier.inputs(image).detach()
        wanted = int(classifier.logits(inputs)[0].argmax()) if target is None else classifier.target_index(target)
        found = find(PathFinder(classifier, inputs, [wanted], steps=steps, output=output, layers=neurons), **settings)[0]
    used = plain_settings({**settings, "steps": steps, "output": output, "target": target})
    return replace(found, provenance=provenance(classifier, used, started))
