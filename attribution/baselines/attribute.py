"""attribute: any attribution method on an image, by name."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from attribution.baselines import cams, controls, gradients, perturbation, transformers
from attribution.baselines.method import Method
from attribution.baselines.options import check_options, current_names
from attribution.baselines.presets import METHOD_PRESETS, PRESET_FILLS
from attribution.baselines.smoothing import Smoothing, smoothed
from attribution.checks import check_choice, check_seed, did_you_mean
from attribution.errors import ChanceWarning, NotApplicable, UserError, describe
from attribution.explanation import Explanation
from attribution.fills import DEFAULT_FILL, Fill, classifier_fill
from attribution.hooks import evaluation_mode
from attribution.image import MAX_SIDE, ImageSource, limit_size, load_image
from attribution.model.classifier import Classifier
from attribution.model.forwarding import no_gradient
from attribution.model.loading import load_classifier
from attribution.provenance import provenance
from attribution.task import Task

_STABLE = 0.8  # the correlation of two seeds' maps below which a warning says so


def attribute(
    image: ImageSource,
    classifier: Classifier | str,
    method: str = "integrated_gradients",
    target: int | str | None = None,
    *,
    preset: str | None = None,
    smoothing: Smoothing | int | Mapping[str, Any] | None = None,
    fill: Fill | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    max_side: int | None = MAX_SIDE,
    **options: Any,
) -> Explanation:
    """Attribute the score of a class to the pixels of an image, by one of ``METHODS``.

    Args:
        image: whatever ``load_image`` takes.
        classifier: a ``Classifier``, or a name that ``load_classifier`` takes.
        method: a key of ``METHODS``.
        target: class to explain, index or name; the predicted class by default.
        preset: a key of ``METHOD_PRESETS``, settings of the reference code; options override it.
        smoothing: Gaussian smoothing of the map, or the side of its kernel in pixels of the model input (see ``Smoothing``). S-IxG
            and S-IntGrad of Rao et al. (TPAMI 2024) are "input_x_gradient" and "integrated_gradients" with a smoothing.
        fill: baseline of the method and what hidden pixels show (see ``explain``). "black" by default; with a preset, the fill of its
            reference code (``PRESET_FILLS``).
        seed: of stochastic methods.
        batch_size: most images in memory at once, also under gradients; the classifier's own by default. The result does not
            depend on it.
        max_side: longer images are shrunk to this side first; None for no limit.
        options: of the method, see its docstring. Those of Captum's methods have Captum's names.

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
    check_seed(seed)
    settings = {**_preset_options(preset, method), **current_names(method, options)}
    if fill is None:
        fill = DEFAULT_FILL if preset is None else PRESET_FILLS[preset]
    window = Smoothing.parse(smoothing)
    check_options(method, chosen.function, settings)
    classifier = load_classifier(classifier)
    _refuse_what_it_cannot_look_into(method, classifier)
    with classifier.forwarding(batch_size):
        original = load_image(image).cpu()
        loaded = limit_size(original, max_side)
        filled = classifier_fill(loaded, fill, classifier, (original.shape[1], original.shape[2]))
        inputs = classifier.inputs(loaded)
        logits = classifier.logits(inputs)
        probabilities = classifier.outputs.probabilities(logits)[0].cpu()
        wanted = int(probabilities.argmax()) if target is None else classifier.target_index(target)
        if logits[0, wanted].isneginf():
            masked = classifier.class_names[wanted]
            raise UserError(f"{classifier.name} never predicts {masked!r}, its logit is -inf: expected a class that is not masked")
        baseline = classifier.preprocessing(filled[None].to(inputs))
        task = Task(classifier, loaded, filled, wanted, inputs, baseline, seed)
        try:
            pixel_map = run_method(chosen, task, settings)
        except RuntimeError:
            if chosen.black_box or classifier.runner.differentiable:
                raise
            raise no_gradient(classifier.name) from None
        if not pixel_map.isfinite().all() and (dtype := classifier.runner.dtype) in (torch.float16, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{method} leaves the range of {kind}, in which {classifier.name} computes: give the module in float32, module.float()"
            )
        if chosen.family != "control" and pixel_map.min() == pixel_map.max():
            _warn_of_nothing(method, task, float(pixel_map[0, 0]))
        if window is not None:
            pixel_map = smoothed(pixel_map, window, pixel_map.shape[-1] / task.size[1])
    if "samples" not in settings:
        _warn_of_chance(method, task.notes.get("stable"))
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
        provenance={**provenance(classifier, made, started), **task.notes},
    )


def _warn_of_nothing(method: str, task: Task, value: float) -> None:
    at = f" at the layer {task.notes['layer']}" if "layer" in task.notes else ""
    reason = "nothing counts for the class there, or no gradient arrives" if value == 0 else "the method tells no pixel from another"
    warnings.warn(
        f"the map of {method} for class {task.classifier.class_names[task.target]!r} of {task.classifier.name}{at} is "
        f"{value:g} everywhere: {reason}",
        UserWarning,
        stacklevel=3,
    )


def _refuse_what_it_cannot_look_into(method: str, classifier: Classifier) -> None:
    """Refuse a black box, and a module whose layers are out of sight where the method looks at them."""
    chosen, name = METHODS[method], classifier.name
    others = ", ".join(each for each, entry in METHODS.items() if entry.family == "perturbation")
    if not chosen.black_box and not isinstance(classifier.module, torch.nn.Module):
        raise NotApplicable(
            f"{method} does not apply to {name}: it is a black box, and the method needs an nn.Module to look inside; use {others} "
            "or a region search"
        )
    if chosen.needs_layers:
        classifier.find_out(False)  # finds out how many images the module takes at once
    if chosen.needs_layers and (reason := classifier.runner.opaque):
        plain = ", ".join(each for each, entry in METHODS.items() if not entry.needs_layers and not entry.black_box)
        raise NotApplicable(
            f"{method} does not apply to {name}: it looks at layers, which fails {reason}; use {plain}, {others} or a region search"
        )


def _warn_of_chance(method: str, stable: float | None) -> None:
    if stable is not None and stable < _STABLE:
        warnings.warn(
            f"maps of {method} for two seeds would have a correlation of about {stable:.2f} with as many samples as it takes by default: "
            "give more, such as samples=8000",
            ChanceWarning,
            stacklevel=3,
        )


def find_method(name: str) -> Method:
    """A method by name.

    Raises:
        UserError: no such method.
    """
    if not isinstance(name, str) or name not in METHODS:
        received = repr(name) if isinstance(name, str) else describe(name)
        raise UserError(f"unknown method {received}: expected one of {', '.join(METHODS)}{did_you_mean(name, METHODS)}")
    return METHODS[name]


def run_method(method: Method, task: Task, options: Mapping[str, Any]) -> Tensor:
    """The map of a method over the task's image, float32 [H, W] on the CPU. The module is unchanged afterwards.

    Raises:
        UserError: the method returned no map.
    """
    module = task.classifier.module
    mode = evaluation_mode(module) if isinstance(module, torch.nn.Module) else nullcontext()
    with mode, torch.inference_mode(False), torch.enable_grad():  # whatever the caller's gradient mode
        values = method.function(task, **options)
    if not isinstance(values, Tensor) or values.ndim != 2:
        name = getattr(method.function, "__name__", "the method")
        raise UserError(f"{name} returned {describe(values)}: expected a map, a float tensor [h, w]")
    values = values.detach().float().cpu()
    if method.domain == "input":
        height, width = task.image.shape[1:]
        values = task.classifier.preprocessing.to_image(values[None], height, width)[0]
    return values.contiguous()


def _preset_options(preset: str | None, method: str) -> dict[str, Any]:
    if preset is None:
        return {}
    check_choice("preset", preset, METHOD_PRESETS)
    if method not in METHOD_PRESETS[preset]:
        raise UserError(f"preset {preset!r} has no settings for {method}: it has {', '.join(METHOD_PRESETS[preset])}")
    return METHOD_PRESETS[preset][method]


METHODS: dict[str, Method] = {
    **gradients.METHODS,
    **cams.METHODS,
    **perturbation.METHODS,
    **transformers.METHODS,
    **controls.METHODS,
}
