"""Methods on the gradient with respect to the input; Captum's implementations on the classifier's own inputs.

Each takes a ``Task`` and returns a map [h, w] over the model input. ``output`` is what is explained, "logit" (default) or
"probability"; ``channels`` says how the colours become one value.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import captum.attr
import torch
from captum.attr._utils.lrp_rules import EpsilonRule, GammaRule, IdentityRule
from torch import Tensor, nn

from attribution.errors import NotApplicable, UserError
from attribution.fills import make_fill
from attribution.hooks import evaluation_mode, one_module_a_call
from attribution.network.maps import STRUCTURAL, FeatureLayer, find_feature_layer, module_calls, operations
from attribution.task import Channels, Output, Task, over_channels, seeded

_SMOOTH = {"smooth_grad": "smoothgrad", "smooth_grad_squared": "smoothgrad_sq", "var_grad": "vargrad"}
_OPERATIONS: dict[type[nn.Module], str] = {  # the nonlinearities for which Captum's DeepLift has a rule, and what they run
    nn.ReLU: "relu",
    nn.ELU: "elu",
    nn.LeakyReLU: "leaky_relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Softplus: "softplus",
    nn.MaxPool2d: "max_pool2d_with_indices",
}


def saliency(task: Task, *, channels: Channels = "sum", absolute: bool = True, output: Output = "logit") -> Tensor:
    """|d score / d input| (Simonyan et al., ICLR workshop 2014), by default summed over the channels."""
    found = captum.attr.Saliency(task.scores(output)).attribute(task.leaf(), target=task.target, abs=absolute)
    return over_channels(found[0], channels)


def input_x_gradient(task: Task, *, channels: Channels = "sum", output: Output = "logit") -> Tensor:
    """(input) x (gradient) (Shrikumar et al., 2016), signed."""
    return over_channels(captum.attr.InputXGradient(task.scores(output)).attribute(task.leaf(), target=task.target)[0], channels)


def integrated_gradients(
    task: Task,
    *,
    steps: int = 50,
    rule: Literal["gausslegendre", "riemann_trapezoid", "riemann_middle", "riemann_left", "riemann_right"] = "gausslegendre",
    channels: Channels = "sum",
    output: Output = "logit",
) -> Tensor:
    """Integrated gradients from the fill to the image (Sundararajan et al., ICML 2017, equation 1), signed."""
    _at_least(steps, 1, "steps")
    method = captum.attr.IntegratedGradients(task.scores(output))
    found = method.attribute(task.leaf(), baselines=task.baseline, target=task.target, n_steps=steps, method=rule)
    return over_channels(found[0].float(), channels)


def smooth_grad(
    task: Task,
    *,
    samples: int = 50,
    noise: float = 0.2,
    kind: Literal["smooth_grad", "smooth_grad_squared", "var_grad"] = "smooth_grad",
    absolute: bool = True,
    channels: Channels = "sum",
    output: Output = "logit",
) -> Tensor:
    """Gradients of noisy inputs, averaged (Smilkov et al., 2017), squared or their variance (Hooker et al., NeurIPS 2019).

    Args:
        task: what is explained.
        samples: noisy copies.
        noise: standard deviation in units of the normalised input.
        kind: mean of the gradients, of their squares, or their variance.
        absolute: take the magnitude of each gradient before averaging; False averages signed gradients.
        channels, output: see the module.
    """
    _at_least(samples, 2 if kind == "var_grad" else 1, "samples")
    _not_negative(noise, "noise")
    if kind not in _SMOOTH:
        raise UserError(f"kind={kind!r}: expected one of {', '.join(_SMOOTH)}")
    tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(task.scores(output)))
    with seeded(task.seed):
        found = tunnel.attribute(
            task.leaf(), nt_type=_SMOOTH[kind], nt_samples=samples, stdevs=float(noise), target=task.target, abs=absolute
        )
    return over_channels(found[0], channels)


def gradient_shap(task: Task, *, samples: int = 50, noise: float = 0.0, channels: Channels = "sum", output: Output = "logit") -> Tensor:
    """Expected gradients over random points between baselines and the noisy image (Lundberg & Lee, NeurIPS 2017; Captum), signed.

    The baselines are the fill and a blurred copy of the image.
    """
    _at_least(samples, 1, "samples")
    _not_negative(noise, "noise")
    blurred = task.classifier.preprocessing(make_fill(task.image, "blur")[None].to(task.inputs))
    baselines = torch.cat([task.baseline, blurred])
    method = captum.attr.GradientShap(task.scores(output))
    with seeded(task.seed):
        found = method.attribute(task.leaf(), baselines=baselines, n_samples=samples, stdevs=float(noise), target=task.target)
    return over_channels(found[0].float(), channels)


def deep_lift(task: Task, *, channels: Channels = "sum", output: Output = "logit") -> Tensor:
    """DeepLIFT with the rescale rule against the fill (Shrikumar et al., ICML 2017), signed.

    Raises:
        UserError: a network whose activations the rule does not know (GELU, SiLU, attention, functional ReLU).
    """
    _refuse_unknown_activations(task, "deep_lift", tuple(_OPERATIONS))
    with _separated(task), task.rows_together(2):
        found = captum.attr.DeepLift(task.scores(output)).attribute(task.leaf(), baselines=task.baseline, target=task.target)
    return over_channels(found[0].detach(), channels)


def guided_backprop(task: Task, *, channels: Channels = "sum", absolute: bool = True, output: Output = "logit") -> Tensor:
    """Gradients that pass a ReLU only where they are positive too (Springenberg et al., ICLR workshop 2015).

    Raises:
        UserError: a network without ReLU modules or with other activations, where it would be the plain gradient.
    """
    return _modified_relu(task, captum.attr.GuidedBackprop, "guided_backprop", channels, absolute, output)


def deconvolution(task: Task, *, channels: Channels = "sum", absolute: bool = True, output: Output = "logit") -> Tensor:
    """Gradients whose negative part is cut at every ReLU (Zeiler & Fergus, ECCV 2014); same limits as ``guided_backprop``."""
    return _modified_relu(task, captum.attr.Deconvolution, "deconvolution", channels, absolute, output)


def lrp(task: Task, *, gamma: float = 0.25, epsilon: float = 1e-9, channels: Channels = "sum", output: Output = "logit") -> Tensor:
    """Layer-wise relevance propagation (Bach et al., PLOS ONE 2015; Captum's rules), signed.

    Args:
        task: what is explained.
        gamma: convolutions take the gamma rule (Montavon et al., 2019) and batch normalisations pass relevance unchanged; 0 is
            Captum's default, the epsilon rule everywhere.
        epsilon: stabiliser of the epsilon rule, which all other layers take.
        channels, output: see the module.

    Raises:
        UserError: layers for which Captum has no rule (transformers, ConvNeXt, GELU and SiLU networks), or residual sums: Captum
            passes the relevance of a sum to both branches in full, so that it doubles with every block.
    """
    sums = _refuse_unknown_activations(task, "lrp", (nn.ReLU, nn.Tanh, nn.MaxPool2d))["residual sum"]
    if sums:
        raise NotApplicable(
            f"lrp does not apply to {task.classifier.name}: relevance would double at each of its {sums} residual sums; "
            "use integrated_gradients, deep_lift or grad_cam"
        )
    if gamma < 0 or epsilon <= 0:
        raise UserError(f"lrp gamma={gamma}, epsilon={epsilon}: expected a gamma of at least 0 and a positive epsilon")
    with _separated(task):
        try:
            with _lrp_rules(task, gamma, epsilon):
                found = captum.attr.LRP(task.scores(output)).attribute(task.leaf(), target=task.target)
        except TypeError as error:
            raise NotApplicable(f"lrp has no rule for a layer of {task.classifier.name} ({str(error).splitlines()[0][:120]})") from None
    return over_channels(found[0].detach(), channels)


@contextmanager
def _lrp_rules(task: Task, gamma: float, epsilon: float) -> Iterator[None]:
    """Captum reads the rule of a layer from its attribute ``rule`` and removes it after a run that went well."""
    rules: dict[type[nn.Module], Callable[[], Any]] = {kind: lambda: EpsilonRule(epsilon) for kind in (nn.Linear, nn.Flatten)}
    if gamma:
        rules |= {nn.Conv2d: lambda: GammaRule(gamma=gamma), nn.BatchNorm2d: IdentityRule}
    before = {module: set(vars(module)) for module in task.module.modules()}
    try:
        for module in before:
            if type(module) in rules:
                module.rule = rules[type(module)]()
        yield
    finally:
        for module, names in before.items():
            for name in set(vars(module)) - names:
                vars(module).pop(name)


def guided_grad_cam(
    task: Task,
    *,
    layer: str | nn.Module | FeatureLayer | None = None,
    channels: Channels = "sum",
    absolute: bool = False,
    output: Output = "logit",
) -> Tensor:
    """Guided backpropagation times the upsampled Grad-CAM map (Selvaraju et al., ICCV 2017, section 3.2), signed.

    Raises:
        UserError: as ``guided_backprop``, or a layer that is no map [n, C, h, w].
    """
    _refuse_unknown_activations(task, "guided_grad_cam", (nn.ReLU,))
    found = find_feature_layer(task, layer)
    if found.kind != "nchw":
        raise NotApplicable(f"guided_grad_cam needs a convolutional layer [n, C, h, w], {found.name!r} has {found.kind}: use grad_cam")
    with _separated(task, keep=found.module):
        method = captum.attr.GuidedGradCam(task.scores(output), found.module)
        values = method.attribute(task.leaf(), target=task.target, interpolate_mode="bilinear")[0].detach()
    return over_channels(values.abs() if absolute else values, channels)


def _modified_relu(
    task: Task, method: type[captum.attr.Attribution], name: str, channels: Channels, absolute: bool, output: Output
) -> Tensor:
    _refuse_unknown_activations(task, name, (nn.ReLU,))
    with _separated(task):
        found = method(task.scores(output)).attribute(task.leaf(), target=task.target)[0].detach()
    return over_channels(found.abs() if absolute else found, channels)


@contextmanager
def _separated(task: Task, keep: nn.Module | None = None) -> Iterator[None]:
    """The module in evaluation mode, with one activation module a call and none of them in place."""

    def probe() -> None:
        with torch.no_grad():
            task.module(task.inputs)

    kinds = tuple(kind for kind in (*_OPERATIONS, nn.Dropout) if not isinstance(keep, kind))
    with evaluation_mode(task.module), one_module_a_call(task.module, kinds, probe), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*Setting (forward, )?backward hooks")
        yield


def _refuse_unknown_activations(task: Task, name: str, kinds: tuple[type[nn.Module], ...]) -> Counter[str]:
    """What ran, in networks whose every nonlinearity is a module of the given kinds: elsewhere the rule would not be applied."""
    ran = operations(task)
    known = {_OPERATIONS[kind] for kind in kinds}
    foreign = [f"{count} x {op}" for op, count in ran.items() if op not in {*known, *STRUCTURAL}]
    if foreign:
        raise NotApplicable(
            f"{name} does not apply to {task.classifier.name}: it runs {', '.join(foreign)}, where the rule is not defined and the "
            "result would be the plain gradient; use integrated_gradients, grad_cam or a region search"
        )
    calls = module_calls(task, kinds)
    for kind in kinds:
        operation = _OPERATIONS[kind]
        missed = ran[operation] - sum(count for module, count in calls.items() if type(module) is kind)
        if missed > 0:
            raise NotApplicable(
                f"{name} does not apply to {task.classifier.name}: {missed} of its {ran[operation]} {operation} operations are functions, "
                f"not nn.{kind.__name__} modules, and would be missed; use integrated_gradients or grad_cam"
            )
    if kinds != (nn.ReLU,) and ran["product"]:
        raise NotApplicable(
            f"{name} does not apply to {task.classifier.name}: {ran['product']} products of two maps (gates), which have no rule; "
            "use integrated_gradients or grad_cam"
        )
    if kinds == (nn.ReLU,) and not calls:
        raise NotApplicable(f"{name} does not apply to {task.classifier.name}: it has no ReLU, so the result would be the plain gradient")
    return ran


def _at_least(value: int, least: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}: expected a whole number of at least {least}")


def _not_negative(value: float, name: str) -> None:
    if not value >= 0:
        raise UserError(f"{name} is {value!r}: expected a number of at least 0")
