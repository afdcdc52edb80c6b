"""Methods on the gradient with respect to the input: Captum's implementations, on the classifier's own inputs.

Each takes a ``Task`` and returns a map [h, w] over the model input. Options of Captum have Captum's names. Two more options are common
to all methods: ``output`` is the score that is explained, "logit" (default) or "probability"; ``channels`` says how the colours of a
pixel become one value. ``abs`` takes magnitudes before that.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import captum.attr
import numpy as np
import torch
from captum.attr._utils.lrp_rules import EpsilonRule, GammaRule, IdentityRule
from torch import Tensor, nn

from attribution.baselines.method import Method
from attribution.checks import check_choice, check_number, check_whole, is_number
from attribution.errors import NotApplicable, UserError
from attribution.fills import make_fill
from attribution.hooks import evaluation_mode, one_module_a_call
from attribution.model.forwarding import even_chunks
from attribution.network.maps import STRUCTURAL, FeatureLayer, find_feature_layer, functions_between, module_calls, operations
from attribution.task import Channels, Output, Task, over_channels

_BLOCK = 16  # noisy copies drawn at once; torch's generator makes normal numbers in groups of 16
_INCOMPLETE = 0.05  # share of a map's values by which its sum may miss the change of the score
_OPERATIONS: dict[type[nn.Module], str] = {  # the nonlinearities for which Captum's DeepLift has a rule, and their operations
    nn.ReLU: "relu",
    nn.ELU: "elu",
    nn.LeakyReLU: "leaky_relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Softplus: "softplus",
    nn.MaxPool2d: "max_pool2d_with_indices",
}


def saliency(task: Task, *, channels: Channels = "sum", abs: bool = True, output: Output = "logit") -> Tensor:
    """|d score / d input| (Simonyan et al., ICLR workshop 2014), by default summed over the channels."""
    found = captum.attr.Saliency(task.scores(output)).attribute(task.leaf(), target=task.target, abs=abs)
    return over_channels(found[0], channels)


def input_x_gradient(task: Task, *, channels: Channels = "sum", output: Output = "logit") -> Tensor:
    """The input times the gradient (Shrikumar et al., 2016), signed."""
    return over_channels(captum.attr.InputXGradient(task.scores(output)).attribute(task.leaf(), target=task.target)[0], channels)


def integrated_gradients(
    task: Task,
    *,
    n_steps: int = 50,
    rule: Literal["gausslegendre", "riemann_trapezoid", "riemann_middle", "riemann_left", "riemann_right"] = "gausslegendre",
    channels: Channels = "sum",
    output: Output = "logit",
) -> Tensor:
    """Integrated gradients from the fill to the image (Sundararajan et al., ICML 2017, equation 1), signed.

    Args:
        task: what is explained.
        n_steps: number of points on the straight line from the fill to the image.
        rule: rule of numerical integration, Captum's ``method`` (a name that ``attribute`` uses for the attribution method).
        channels, output: see the docstring of this module.
    """
    check_whole("n_steps", n_steps, 1)
    method = captum.attr.IntegratedGradients(task.scores(output))
    given = {"baselines": task.baseline, "target": task.target, "internal_batch_size": task.classifier.batch_size}
    return over_channels(method.attribute(task.leaf(), n_steps=n_steps, method=rule, **given)[0].float(), channels)


def smooth_grad(
    task: Task,
    *,
    nt_samples: int = 50,
    stdevs: float = 0.2,
    nt_type: Literal["smoothgrad", "smoothgrad_sq", "vargrad"] = "smoothgrad",
    abs: bool = True,
    channels: Channels = "sum",
    output: Output = "logit",
) -> Tensor:
    """Mean gradient of noisy inputs (Smilkov et al., 2017), or the mean square or variance (Hooker et al., NeurIPS 2019).

    Args:
        task: what is explained.
        nt_samples: number of noisy copies.
        stdevs: standard deviation of the noise, in units of the normalised input.
        nt_type: mean of the gradients, of their squares, or their variance.
        abs: take the magnitude of each gradient before averaging; False averages signed gradients.
        channels, output: see the docstring of this module.
    """
    check_choice("nt_type", nt_type, ("smoothgrad", "smoothgrad_sq", "vargrad"))
    check_whole("nt_samples", nt_samples, 2 if nt_type == "vargrad" else 1)
    check_number("stdevs", stdevs, 0)
    sums = torch.zeros(2, *task.inputs.shape[1:], dtype=torch.float64)  # of the gradients and of their squares
    for points in _noisy(task, nt_samples, stdevs):
        found = task.gradients(points, output)
        found = found.abs() if abs else found
        sums += torch.stack([found.sum(dim=0), found.square().sum(dim=0)]).cpu()
    mean, square = sums / nt_samples
    chosen = {"smoothgrad": mean, "smoothgrad_sq": square, "vargrad": square - mean.square()}[nt_type]
    return over_channels(chosen.float(), channels)


def gradient_shap(task: Task, *, n_samples: int = 50, stdevs: float = 0.0, channels: Channels = "sum", output: Output = "logit") -> Tensor:
    """Expected gradients over random points between baselines and the noisy image (Lundberg & Lee, NeurIPS 2017; Captum), signed.

    The baselines are the fill and a blurred copy of the image.

    Args:
        task: what is explained.
        n_samples: number of random points.
        stdevs: standard deviation of the noise, in units of the normalised input.
        channels, output: see the docstring of this module.
    """
    check_whole("n_samples", n_samples, 1)
    check_number("stdevs", stdevs, 0)
    blurred = task.classifier.preprocessing(make_fill(task.image, "blur")[None].to(task.inputs))
    baselines = torch.cat([task.baseline, blurred])
    draws = np.random.RandomState(task.seed % 2**32)
    which = torch.from_numpy(draws.choice(len(baselines), n_samples)).to(baselines.device)
    shares = torch.from_numpy(draws.uniform(size=n_samples)).to(baselines)[:, None, None, None]
    total, first = torch.zeros(task.inputs.shape[1:], dtype=torch.float64), 0
    for noisy in _noisy(task, n_samples, stdevs):
        rows = slice(first, first := first + len(noisy))
        hidden = baselines[which[rows]]
        total += ((noisy - hidden) * task.gradients(torch.lerp(hidden, noisy, shares[rows]), output)).sum(dim=0).cpu()
    return over_channels((total / n_samples).float(), channels)


def _noisy(task: Task, samples: int, stdevs: float) -> Iterator[Tensor]:
    """The inputs under normal noise, ``samples`` rows in all, a batch at a time. The draws do not depend on the size of the batches.

    They are made in blocks. On a CPU the blocks are parts of the stream that one large draw takes, as that of Captum's NoiseTunnel.
    """
    generator = torch.Generator(task.inputs.device).manual_seed(task.seed)
    blocks = torch.arange(samples).split(_BLOCK)
    for some in even_chunks(torch.arange(len(blocks)), max(1, task.classifier.batch_size // _BLOCK)):
        shapes = [(len(blocks[index]), *task.inputs.shape[1:]) for index in some]
        noise = torch.cat([torch.randn(shape, generator=generator, device=task.inputs.device) for shape in shapes])
        yield task.inputs + stdevs * noise


def deep_lift(task: Task, *, channels: Channels = "sum", output: Output = "logit") -> Tensor:
    """DeepLIFT with the rescale rule against the fill (Shrikumar et al., ICML 2017), signed.

    Raises:
        NotApplicable: a network whose activations the rule does not know (GELU, SiLU, attention, functional ReLU).
    """
    _refuse_unknown_activations(task, "deep_lift", tuple(_OPERATIONS))
    with _separated(task), task.rows_together(2):
        found = captum.attr.DeepLift(task.scores(output)).attribute(task.leaf(), baselines=task.baseline, target=task.target)
    _check_complete("deep_lift", task, found[0].detach(), output)
    return over_channels(found[0].detach(), channels)


def _check_complete(name: str, task: Task, found: Tensor, output: Output) -> None:
    """Refuse a map whose sum is not the change of the score from the fill to the image: an operation without a rule was met."""
    with torch.no_grad():
        logits = task.classifier.logits(torch.cat([task.inputs, task.baseline]))
    scores = (task.classifier.outputs.probabilities(logits) if output == "probability" else logits)[:, task.target].double()
    change, total = float(scores[0] - scores[1]), float(found.double().sum())
    if abs(total - change) > _INCOMPLETE * max(abs(change), float(found.abs().double().sum())) + 1e-3:
        raise NotApplicable(
            f"{name} does not apply to {task.classifier.name}: its map sums to {total:.4g}, but the score changes by {change:.4g} from the "
            "fill to the image, so that an operation without a rule is among its layers; use integrated_gradients or occlusion"
        )


def guided_backprop(task: Task, *, channels: Channels = "sum", abs: bool = True, output: Output = "logit") -> Tensor:
    """Gradients that pass a ReLU only where they are positive too (Springenberg et al., ICLR workshop 2015).

    Raises:
        NotApplicable: a network without ReLU modules or with other activations, where it would be the plain gradient.
    """
    return _modified_relu(task, captum.attr.GuidedBackprop, "guided_backprop", channels, abs, output)


def deconvolution(task: Task, *, channels: Channels = "sum", abs: bool = True, output: Output = "logit") -> Tensor:
    """Gradients whose negative part is cut at every ReLU (Zeiler & Fergus, ECCV 2014); same limits as ``guided_backprop``."""
    return _modified_relu(task, captum.attr.Deconvolution, "deconvolution", channels, abs, output)


def lrp(task: Task, *, gamma: float = 0.25, epsilon: float = 1e-9, channels: Channels = "sum", output: Output = "logit") -> Tensor:
    """Layer-wise relevance propagation (Bach et al., PLOS ONE 2015; Captum's rules), signed.

    Args:
        task: what is explained.
        gamma: convolutions take the gamma rule (Montavon et al., 2019) and batch normalisations pass relevance unchanged; 0 is
            Captum's default, the epsilon rule everywhere.
        epsilon: stabiliser of the epsilon rule, which all other layers take.
        channels, output: see the docstring of this module.

    Raises:
        NotApplicable: layers for which Captum has no rule (transformers, ConvNeXt, GELU and SiLU networks); functions of torch between
            its modules that change values, which Captum passes by the plain gradient; or residual sums: Captum passes the relevance of
            a sum to both branches in full, so that it doubles with every block.
    """
    sums = _refuse_unknown_activations(task, "lrp", (nn.ReLU, nn.Tanh, nn.MaxPool2d))["residual sum"]
    if sums:
        raise NotApplicable(
            f"lrp does not apply to {task.classifier.name}: relevance would double at each of its {sums} residual sums; "
            "use integrated_gradients, deep_lift or grad_cam"
        )
    between = functions_between(task)
    if between:
        raise NotApplicable(
            f"lrp does not apply to {task.classifier.name}: it has rules for modules, and none for its functions "
            f"{', '.join(sorted(between)[:4])}; make modules of them (such as nn.AdaptiveAvgPool2d), or use integrated_gradients"
        )
    check_number("gamma", gamma, 0)
    if not is_number(epsilon) or epsilon <= 0:
        raise UserError(f"epsilon is {epsilon!r}: expected a positive number")
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
    abs: bool = False,
    output: Output = "logit",
) -> Tensor:
    """Guided backpropagation times the upsampled Grad-CAM map (Selvaraju et al., ICCV 2017, section 3.2), signed.

    Raises:
        NotApplicable: as ``guided_backprop``, or a layer that is no map [n, C, h, w].
    """
    _refuse_unknown_activations(task, "guided_grad_cam", (nn.ReLU,))
    found = find_feature_layer(task, layer)
    if found.kind != "nchw":
        raise NotApplicable(f"guided_grad_cam needs a convolutional layer [n, C, h, w], {found.name!r} has {found.kind}: use grad_cam")
    with _separated(task, keep=found.module):
        method = captum.attr.GuidedGradCam(task.scores(output), found.module)
        values = method.attribute(task.leaf(), target=task.target, interpolate_mode="bilinear")[0].detach()
    return over_channels(values.abs() if abs else values, channels)


def _modified_relu(task: Task, method: type[captum.attr.Attribution], name: str, channels: Channels, abs: bool, output: Output) -> Tensor:
    _refuse_unknown_activations(task, name, (nn.ReLU,))
    with _separated(task):
        found = method(task.scores(output)).attribute(task.leaf(), target=task.target)[0].detach()
    return over_channels(found.abs() if abs else found, channels)


@contextmanager
def _separated(task: Task, keep: nn.Module | None = None) -> Iterator[None]:
    """Run the block with the module in evaluation mode, and with a separate activation module for each call, not in place."""

    def probe() -> None:
        with torch.no_grad():
            task.run()

    kinds = tuple(kind for kind in (*_OPERATIONS, nn.Dropout) if not isinstance(keep, kind))
    with evaluation_mode(task.module), one_module_a_call(task.module, kinds, probe), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*Setting (forward, )?backward hooks")
        yield


def _refuse_unknown_activations(task: Task, name: str, kinds: tuple[type[nn.Module], ...]) -> Counter[str]:
    """Count the operations that run. Refuse networks with a nonlinearity of other kinds, where the rule would not be applied."""
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


METHODS: dict[str, Method] = {
    "saliency": Method(saliency, "gradient", from_input=True),
    "input_x_gradient": Method(input_x_gradient, "gradient", from_input=True),
    "integrated_gradients": Method(integrated_gradients, "gradient", from_input=True),
    "smooth_grad": Method(smooth_grad, "gradient", stochastic=True, from_input=True),
    "gradient_shap": Method(gradient_shap, "gradient", stochastic=True, from_input=True),
    "deep_lift": Method(deep_lift, "gradient"),
    "guided_backprop": Method(guided_backprop, "gradient"),
    "deconvolution": Method(deconvolution, "gradient"),
    "lrp": Method(lrp, "gradient"),
    "guided_grad_cam": Method(guided_grad_cam, "gradient"),
}
