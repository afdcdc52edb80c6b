"""Class activation maps: a weighted sum over the channels of a layer's map of the image, bilinearly enlarged.

``layer`` is the name of a module or the module itself; by default the last map is found (``network.maps.find_feature_layer``). Tokens
of a transformer count as a map, without class and register tokens.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution.baselines.method import Method
from attribution.checks import check_choice
from attribution.hooks import edited_outputs, record_outputs
from attribution.model.forwarding import even_chunks
from attribution.network.maps import FeatureLayer, find_feature_layer
from attribution.task import Output, Task, enlarged

Layer = str | nn.Module | FeatureLayer | None
_LEAST_SCORE = 1e-6  # of Ablation-CAM's denominator
_FEW_PLACES = 4  # of a map so small that a single place may matter


def grad_cam(task: Task, *, layer: Layer = None, output: Output = "logit") -> Tensor:
    """relu(sum_c mean(g_c) A_c), g = d score / d A (Selvaraju et al., ICCV 2017, equations 1 and 2)."""
    activation, gradient, _ = _activation_and_gradient(task, layer, output)
    return enlarged(task, grad_cam_map(activation, gradient))


def grad_cam_plus_plus(
    task: Task,
    *,
    layer: Layer = None,
    spatial: Literal["sum", "mean"] = "sum",
    weight: Literal["sum", "mean"] = "sum",
    exponential: bool = False,
    output: Output = "logit",
) -> Tensor:
    """Grad-CAM++ (Chattopadhay et al., WACV 2018, equation 19).

    Args:
        task: what is explained.
        layer: see the docstring of this module.
        spatial: S_c in the denominator of alpha = g^2 / (2 g^2 + g^3 S_c): sum (the paper) or mean (xplique) of A_c.
        weight: w_c = sum (the paper) or mean (xplique) over positions of alpha relu(g).
        exponential: multiply g by exp(score) inside the relu, the paper's Y = exp(S) (as Rao et al., CVPR 2022).
        output: the score, "logit" or "probability".
    """
    activation, gradient, score = _activation_and_gradient(task, layer, output)
    return enlarged(task, grad_cam_plus_plus_map(activation, gradient, score if exponential else None, spatial, weight))


def layer_cam(task: Task, *, layer: Layer = None, output: Output = "logit") -> Tensor:
    """relu(sum_c relu(g_c) A_c) (Jiang et al., TIP 2021, equation 5)."""
    activation, gradient, _ = _activation_and_gradient(task, layer, output)
    return enlarged(task, layer_cam_map(activation, gradient))


def score_cam(task: Task, *, layer: Layer = None, weights: Literal["score", "softmax"] = "score", output: Output = "probability") -> Tensor:
    """Score-CAM (Wang et al., CVPR workshop 2020): each channel's map, scaled to [0, 1], masks the image; its score is its weight.

    Args:
        task: what is explained. Pixels that a channel hides show the fill.
        layer: see the docstring of this module.
        weights: "score", the target's score of the masked image (as Rao et al.), or its "softmax" over the channels.
        output: the score.
    """
    check_choice("weights", weights, ("score", "softmax"))
    activation, _ = _activation(task, find_feature_layer(task, layer))
    low, high = activation.amin(dim=(1, 2)), activation.amax(dim=(1, 2))
    used = (high > low).nonzero()[:, 0]  # a constant channel masks nothing
    score = task.score_of(output)
    parts = [activation.new_zeros(0)]
    for chunk in even_chunks(used, task.classifier.batch_size) if len(used) else ():
        masks = F.interpolate(activation[chunk][None], size=task.size, mode="bilinear", align_corners=False)[0]
        lowest, highest = masks.amin(dim=(1, 2), keepdim=True), masks.amax(dim=(1, 2), keepdim=True)
        parts.append(score(task.blend(((masks - lowest) / (highest - lowest).clamp(min=1e-12))[:, None])))
    values = torch.cat(parts)
    if weights == "softmax":
        values = values.softmax(dim=0)
    return enlarged(task, torch.einsum("c,chw->hw", values, activation[used]).relu())


def ablation_cam(task: Task, *, layer: Layer = None, output: Output = "logit") -> Tensor:
    """relu(sum_c w_c A_c), w_c = (z - z_c) / z with z_c the score when channel c is zero (Desai & Ramaswamy, WACV 2020, equation 4)."""
    found = find_feature_layer(task, layer)
    activation, calls = _activation(task, found)
    channels = activation.shape[0]
    score = task.score_of(output)
    full = score(task.inputs)
    dropped = []
    for chunk in even_chunks(torch.arange(channels, device=task.inputs.device), task.classifier.batch_size):

        def without(value: Tensor, chunk: Tensor = chunk) -> Tensor:
            value = value.clone()
            value.movedim(found.channel, 1)[torch.arange(len(chunk), device=chunk.device), chunk] = 0
            return value

        with edited_outputs(found.module, without, calls), task.rows_together(len(chunk)):
            dropped.append(score(task.inputs.expand(len(chunk), -1, -1, -1)))
    denominator = full if full.abs() >= _LEAST_SCORE else 1
    weights = (full - torch.cat(dropped)) / denominator
    return enlarged(task, torch.einsum("c,chw->hw", weights, activation).relu())


def grad_cam_map(activation: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM of [C, h, w] activations and gradients -> [h, w]."""
    return torch.einsum("c,chw->hw", gradient.mean(dim=(1, 2)), activation).relu()


def layer_cam_map(activation: Tensor, gradient: Tensor) -> Tensor:
    """LayerCAM of [C, h, w] activations and gradients -> [h, w]."""
    return (gradient.relu() * activation).sum(dim=0).relu()


def grad_cam_plus_plus_map(
    activation: Tensor,
    gradient: Tensor,
    score: Tensor | None = None,
    spatial: Literal["sum", "mean"] = "sum",
    weight: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Grad-CAM++ of [C, h, w] activations and gradients -> [h, w]; ``score`` adds the factor exp(score)."""
    check_choice("spatial", spatial, ("sum", "mean"))
    check_choice("weight", weight, ("sum", "mean"))
    total = getattr(activation, spatial)(dim=(1, 2), keepdim=True)
    denominator = 2 * gradient.square() + gradient.pow(3) * total
    alpha = gradient.square() / torch.where(denominator == 0, 1, denominator)
    positive = (gradient if score is None else score.clamp(max=80).exp() * gradient).relu()
    return torch.einsum("c,chw->hw", getattr(alpha * positive, weight)(dim=(1, 2)), activation).relu()


def _activation(task: Task, layer: FeatureLayer) -> tuple[Tensor, int]:
    """The layer's map [C, h, w] (of its last call), and how often it is called in a pass."""
    with torch.no_grad(), record_outputs([layer.module]) as calls:
        task.scores("logit")(task.inputs)
    return layer.to_map(calls[-1][1])[0], len(calls)


def _activation_and_gradient(task: Task, layer: Layer, output: Output) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's map [C, h, w], the gradient of the target's score there, and the score."""
    found = find_feature_layer(task, layer)
    with record_outputs([found.module]) as calls:
        score = task.scores(output)(task.leaf())[0, task.target]
    tensor = calls[-1][1]
    (gradient,) = torch.autograd.grad(score, tensor)
    gradient = found.to_map(gradient)[0]
    if (places := gradient[0].numel()) > _FEW_PLACES and int((gradient != 0).any(dim=0).sum()) == 1:
        warnings.warn(
            f"the score of {task.classifier.name} has a gradient at one of {places} places of layer {found.name!r} (a maximum over them?): "
            "a class activation map says little there; name an earlier layer, or use occlusion or a region search",
            stacklevel=2,
        )
    return found.to_map(tensor.detach())[0], gradient, score.detach()


METHODS: dict[str, Method] = {
    "grad_cam": Method(grad_cam, "cam"),
    "grad_cam_plus_plus": Method(grad_cam_plus_plus, "cam"),
    "layer_cam": Method(layer_cam, "cam"),
    "score_cam": Method(score_cam, "cam"),
    "ablation_cam": Method(ablation_cam, "cam"),
}
