"""Batch normalisation as a part of the convolutions before it: the same scores, up to rounding, from fewer operations."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attribution.hooks import exclusive, hookable, removed_after


def folded(module: nn.Module, forward: Callable[[], Any]) -> nn.Module | None:
    """A copy of a module whose convolutions do what the batch normalisations behind them did.

    In evaluation mode a normalisation multiplies each channel by a constant and adds another. Both go into the weights and the bias of
    the convolution. The copy shares everything else with the module, which stays as it is. It does not follow later changes of weights.

    Args:
        module: in evaluation mode.
        forward: runs the module once, on any input, without gradients.

    Returns:
        The copy; None where no convolution is followed by a normalisation alone. Whether the scores are the same is for the caller to
        check: what a convolution returns may have been used elsewhere too.
    """
    others: dict[nn.Module, nn.Module] = {}
    for norm, convolution in _pairs(module, forward).items():
        if (rest := _rest(norm)) is not None and (whole := _with_norm(convolution, norm)) is not None:
            others[norm], others[convolution] = rest, whole
    return _copied(module, others) if others else None


def _pairs(module: nn.Module, forward: Callable[[], Any]) -> dict[nn.BatchNorm2d, nn.Conv2d]:
    """Each normalisation that gets what a convolution has returned, both being called once, with that convolution."""
    norms = [each for each in hookable(module.modules()) if isinstance(each, nn.BatchNorm2d)]
    convolutions = [each for each in hookable(module.modules()) if isinstance(each, nn.Conv2d)]
    if not norms or not convolutions:
        return {}
    returned: dict[int, tuple[Tensor, nn.Conv2d]] = {}  # identity of an output -> the output, which keeps the identity its own
    found: dict[nn.BatchNorm2d, nn.Conv2d] = {}
    calls: Counter[nn.Module] = Counter()

    def remember(convolution: Any, _args: Any, output: Any) -> None:
        calls[convolution] += 1
        returned[id(output)] = output, convolution

    def compare(norm: Any, args: tuple[Any, ...]) -> None:
        calls[norm] += 1
        if args and id(args[0]) in returned:
            found[norm] = returned[id(args[0])][1]

    with exclusive(module):
        bare = [each for each in (*norms, *convolutions) if not (each._forward_hooks or each._forward_pre_hooks)]
        handles = [each.register_forward_hook(remember) for each in convolutions]
        handles += [each.register_forward_pre_hook(compare) for each in norms]
        with removed_after(handles):
            forward()
    if any(calls[each] == 0 for each in norms):  # another input may go another way, and normalise what is normalised already
        return {}
    uses = Counter(found.values())
    usable = {each for each in bare if calls[each] == 1}
    return {norm: conv for norm, conv in found.items() if norm in usable and conv in usable and uses[conv] == 1}


def _rest(norm: nn.BatchNorm2d) -> nn.Module | None:
    """What is left of a normalisation once its constants are elsewhere; None where that is not known."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    if type(norm).__module__.startswith("timm.layers.") and set(norm._modules) == {"drop", "act"}:
        return nn.Sequential(norm._modules["drop"], norm._modules["act"]).eval()  # type: ignore[arg-type]
    return None


def _with_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d | None:
    """The convolution with the constants of the normalisation; None where its weights are not plainly its own."""
    mean, variance = norm.running_mean, norm.running_var
    own = set(convolution._parameters) == {"weight", "bias"} and not convolution._modules
    if not own or mean is None or variance is None or norm.training or convolution.weight is None:
        return None
    scale = (variance.double() + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.detach().double())
    bias = (0.0 if convolution.bias is None else convolution.bias.detach().double()) - mean.double()
    bias = bias * scale + (0.0 if norm.bias is None else norm.bias.detach().double())
    weight = convolution.weight.detach()
    made = copy.copy(convolution)
    layout = torch.channels_last if weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    new = (weight.double() * scale[:, None, None, None]).to(weight.dtype).contiguous(memory_format=layout)
    made._parameters = {
        "weight": nn.Parameter(new, requires_grad=False),
        "bias": nn.Parameter(bias.to(weight.dtype), requires_grad=False),
    }
    return made


def _copied(module: nn.Module, others: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy of a module and of the modules below it, with others in the place of some; parameters and buffers are shared."""
    made: dict[nn.Module, nn.Module] = dict(others)

    def copied(each: nn.Module) -> nn.Module:
        if each not in made:
            made[each] = twin = copy.copy(each)
            twin._modules = {name: None if child is None else copied(child) for name, child in each._modules.items()}
        return made[each]

    return copied(module)
