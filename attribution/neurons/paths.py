"""Neuron paths of one image, as functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from attribution.image import ImageSource
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.neurons.finder import RERANKED, PathFinder
from attribution.neurons.layers import find_neurons
from attribution.neurons.path import STEPS, Mode, NeuronPath, Output
from attribution.provenance import plain_settings, provenance


def neuron_path(
    classifier: Classifier | str,
    image: ImageSource,
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
    """Find the neurons, one in each layer of a vision transformer, whose joint influence on the prediction is largest.

    Args:
        classifier: of a vision transformer, or a name that ``load_classifier`` takes.
        image: whatever ``load_image`` takes.
        target: class to explain, index or name; the predicted class by default.
        mode: "reference", the published search; "exact", which reranks candidates by their true joint score and is never worse;
            "removal", the neurons without which the target is least (see ``PathFinder.search``).
        steps: m, points of the Riemann sum.
        top: K, neurons of each layer; with more than one ``neurons`` is [L, K].
        output: "probability" of the target, as published, or its "logit".
        compat: of the reference's top-K code, see ``PathFinder.search``.
        reranked: candidates of each layer that the other modes try out.
        layers: see ``find_neurons``.

    Raises:
        NotApplicable: no vision transformer, or one whose neurons cannot be followed, with the reason.
        UserError: any input that does not fit.
    """
    settings = {"mode": mode, "top": top, "compat": compat, "reranked": reranked}
    return _one(
        classifier,
        image,
        target,
        steps,
        output,
        layers,
        settings,
        lambda finder: finder.search(mode, top=top, compat=compat, reranked=reranked),
    )


def activation_path(
    classifier: Classifier | str,
    image: ImageSource,
    target: int | str | None = None,
    *,
    steps: int = STEPS,
    output: Output = "probability",
    layers: Sequence[str] | None = None,
) -> NeuronPath:
    """The neuron of the largest (signed) activation in every layer; arguments and score as in ``neuron_path``."""
    return _one(classifier, image, target, steps, output, layers, {}, PathFinder.activation)


def influence_pattern_path(
    classifier: Classifier | str,
    image: ImageSource,
    target: int | str | None = None,
    steps: int = STEPS,
    *,
    output: Output = "probability",
    layers: Sequence[str] | None = None,
) -> NeuronPath:
    """The neuron of the largest mean gradient while the image is scaled, in every layer; arguments and score as in ``neuron_path``.

    What NeuronPath's code compares with under the name Influence Pattern; see ``PathFinder.influence_pattern`` for what it is.
    """
    return _one(classifier, image, target, steps, output, layers, {}, PathFinder.influence_pattern)


def layer_gradient_path(
    classifier: Classifier | str,
    image: ImageSource,
    target: int | str | None = None,
    steps: int = STEPS,
    *,
    output: Output = "probability",
    layers: Sequence[str] | None = None,
) -> NeuronPath:
    """The neuron of the largest layer-wise integrated gradient in every layer; arguments and score as in ``neuron_path``."""
    return _one(classifier, image, target, steps, output, layers, {}, PathFinder.layer_integrated_gradients)


def _one(
    classifier: Classifier | str,
    image: ImageSource,
    target: int | str | None,
    steps: int,
    output: Output,
    layers: Sequence[str] | None,
    settings: Mapping[str, Any],
    find: Callable[[PathFinder], list[NeuronPath]],
) -> NeuronPath:
    started = time.perf_counter()
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's mode: gradients are needed
        classifier = load_classifier(classifier)
        neurons = find_neurons(classifier, layers)
        inputs = classifier.inputs(image).detach()
        wanted = int(classifier.logits(inputs)[0].argmax()) if target is None else classifier.target_index(target)
        found = find(PathFinder(classifier, inputs, [wanted], steps=steps, output=output, layers=neurons))[0]
    used = plain_settings({**settings, "steps": steps, "output": output, "target": target})
    return replace(found, provenance=provenance(classifier, used, started))
