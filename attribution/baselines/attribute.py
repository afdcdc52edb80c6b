"""attribute: any attribution method on an image, by name."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attribution.baselines import cams, controls, gradients, perturbation, transformers
from attribution.baselines.options import check_options, option_names
from attribution.baselines.presets import METHOD_PRESETS
from attribution.baselines.smoothing import Smoothing, smoothed
from attribution.errors import NotApplicable, UserError, describe
from attribution.explanation import Explanation
from attribution.fills import Fill, classifier_fill
from attribution.hooks import evaluation_mode
from attribution.image import MAX_SIDE, ImageSource, limit_size, load_image
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.provenance import provenance
from attribution.task import Task


@dataclass(frozen=True)
class Method:
    """An attribution method.

    Attributes:
        function: (task, **options) -> float map.
        family: "gradient", "cam", "perturbation", "transformer" or "control".
        domain: what the map lies on, the model "input" [h, w] or the "image" [H, W].
        stochastic: whether the result depends on the seed.
    """

    function: Callable[..., Tensor]
    family: Literal["gradient", "cam", "perturbation", "transformer", "control"]
    domain: Literal["input", "image"] = "input"
    stochastic: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that it takes."""
        return option_names(self.function)

    @property
    def summary(self) -> str:
        """One line that says what it computes."""
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")


def attribute(
    image: ImageSource,
    classifier: Classifier | str,
    method: str = "integrated_gradients",
    target: int | str | None = None,
    *,
    preset: str | None = None,
    smoothing: Smoothing | int | Mapping[str, Any] | None = None,
    fill: Fill = "model_mean",
    seed: int = 0,
    batch_size: int | None = None,
    max_side: int | None = MAX_SIDE,
    **options: Any,
) -> Explanation:
    """A map of how much each pixel counts for a class, by one of ``METHODS``.

    Args:
        image: whatever ``load_image`` takes.
        classifier: a ``Classifier``, or a name that ``load_classifier`` takes.
        method: a key of ``METHODS``.
        target: class to explain, index or name; the predicted class by default.
        preset: a key of ``METHOD_PRESETS``, settings of the reference code; options override it.
        smoothing: Gaussian smoothing of the map, or the side of its kernel in pixels of the model input (see ``Smoothing``); S-IxG and
            S-IntGrad of Rao et al. (TPAMI 2024) are "input_x_gradient" and "integrated_gradients" with one.
        fill: baseline of the method and what hidden pixels show; default "model_mean", zero after normalisation, as published
            for nearly all of them (see ``explain`` for others).
        seed: of methods that draw.
        batch_size: most images in memory at once, also under gradients; the classifier's own by default. The result does not
            depend on it.
        max_side: longer images are shrunk to this side first; None for no limit.
        options: of the method, see its docstring.

    Returns:
        An ``Explanation`` with ``pixel_map`` float32 [H, W], signed or not; no regions and no order until ``ranked_over``.
        ``evaluations`` counts the images forwarded through the method's score (not those forwarded to find layers).

    Raises:
        UserError: an unknown method or option, or a value out of range.
        NotApplicable: a model to which the method does not apply, with the reason.
    """
    started = time.perf_counter()
    chosen = find_method(method)
    if isinstance(classifier, torch.nn.Module):
        raise UserError("a bare nn.Module has no input size: wrap it, at.Classifier(module, size=..., mean=..., std=..., class_names=...)")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed!r}: expected a whole number from 0 to 2**63 - 1")
    settings = {**_preset_options(preset, method), **options}
    window = Smoothing.parse(smoothing)
    check_options(method, chosen.function, settings)
    classifier = load_classifier(classifier)
    if chosen.family not in ("perturbation", "control") and not isinstance(classifier.module, torch.nn.Module):
        raise NotApplicable(
            f"{method} does not apply to {classifier.name}: it is a black box, and the method needs an nn.Module to look inside; use "
            f"{', '.join(name for name, each in METHODS.items() if each.family == 'perturbation')} or a region search"
        )
    with classifier.forwarding(batch_size):
        original = load_image(image).cpu()
        loaded = limit_size(original, max_side)
        filled = classifier_fill(loaded, fill, classifier, (original.shape[1], original.shape[2]))
        inputs = classifier.inputs(loaded)
        probabilities = classifier.probabilities(inputs)[0].cpu()
        wanted = int(probabilities.argmax()) if target is None else classifier.target_index(target)
        baseline = classifier.preprocessing(filled[None].to(inputs))
        task = Task(classifier, loaded, filled, wanted, inputs, baseline, seed)
        pixel_map = run_method(chosen, task, settings)
        if window is not None:
            pixel_map = smoothed(pixel_map, window, pixel_map.shape[-1] / task.size[1])
    made = {
        "method": method,
        "preset": preset,
        "options": settings,
        "smoothing": None if window is None else dict(vars(window)),
        "fill": fill,
        "target": target,
        "seed": seed,
        "max_side": max_side,
    }
    return Explanation(
        image=loaded,
        target=wanted,
        class_names=classifier.class_names,
        probabilities=probabilities,
        pixel_map=pixel_map,
        evaluations=task.evaluations,
        provenance=provenance(classifier, made, started),
    )


def find_method(name: str) -> Method:
    """A method by name.

    Raises:
        UserError: no such method.
    """
    if not isinstance(name, str) or name not in METHODS:
        received = repr(name) if isinstance(name, str) else describe(name)
        raise UserError(f"unknown method {received}: expected one of {', '.join(METHODS)}")
    return METHODS[name]


def run_method(method: Method, task: Task, options: Mapping[str, Any]) -> Tensor:
    """The map of a method over the task's image, float32 [H, W] on the CPU; the module leaves as it came."""
    module = task.classifier.module
    mode = evaluation_mode(module) if isinstance(module, torch.nn.Module) else nullcontext()
    with mode, torch.inference_mode(False), torch.enable_grad():  # whatever the caller's gradient mode
        values = method.function(task, **options)
    values = values.detach().float().cpu()
    if method.domain == "input":
        height, width = task.image.shape[1:]
        values = task.classifier.preprocessing.to_image(values[None], height, width)[0]
    return values.contiguous()


def _preset_options(preset: str | None, method: str) -> dict[str, Any]:
    if preset is None:
        return {}
    if preset not in METHOD_PRESETS:
        raise UserError(f"unknown preset {preset!r}: expected one of {', '.join(METHOD_PRESETS)}")
    if method not in METHOD_PRESETS[preset]:
        raise UserError(f"preset {preset!r} has no settings for {method}: it has {', '.join(METHOD_PRESETS[preset])}")
    return METHOD_PRESETS[preset][method]


METHODS: dict[str, Method] = {
    "saliency": Method(gradients.saliency, "gradient"),
    "input_x_gradient": Method(gradients.input_x_gradient, "gradient"),
    "integrated_gradients": Method(gradients.integrated_gradients, "gradient"),
    "smooth_grad": Method(gradients.smooth_grad, "gradient", stochastic=True),
    "gradient_shap": Method(gradients.gradient_shap, "gradient", stochastic=True),
    "deep_lift": Method(gradients.deep_lift, "gradient"),
    "guided_backprop": Method(gradients.guided_backprop, "gradient"),
    "deconvolution": Method(gradients.deconvolution, "gradient"),
    "lrp": Method(gradients.lrp, "gradient"),
    "guided_grad_cam": Method(gradients.guided_grad_cam, "gradient"),
    "grad_cam": Method(cams.grad_cam, "cam"),
    "grad_cam_plus_plus": Method(cams.grad_cam_plus_plus, "cam"),
    "layer_cam": Method(cams.layer_cam, "cam"),
    "score_cam": Method(cams.score_cam, "cam"),
    "ablation_cam": Method(cams.ablation_cam, "cam"),
    "occlusion": Method(perturbation.occlusion, "perturbation"),
    "feature_ablation": Method(perturbation.feature_ablation, "perturbation", "image"),
    "shapley_value_sampling": Method(perturbation.shapley_value_sampling, "perturbation", "image", stochastic=True),
    "kernel_shap": Method(perturbation.kernel_shap, "perturbation", "image", stochastic=True),
    "lime": Method(perturbation.lime, "perturbation", "image", stochastic=True),
    "rise": Method(perturbation.rise, "perturbation", stochastic=True),
    "hsic": Method(perturbation.hsic, "perturbation", stochastic=True),
    "sobol": Method(perturbation.sobol, "perturbation", stochastic=True),
    "attention_rollout": Method(transformers.attention_rollout, "transformer"),
    "transformer_attribution": Method(transformers.transformer_attribution, "transformer"),
    "grad_eclip": Method(transformers.grad_eclip, "transformer"),
    "attn_lrp": Method(transformers.attn_lrp, "transformer"),
    "random": Method(controls.random, "control", "image", stochastic=True),
    "constant": Method(controls.constant, "control", "image"),
    "center_prior": Method(controls.center_prior, "control", "image"),
    "edge_filter": Method(controls.edge_filter, "control", "image"),
}
