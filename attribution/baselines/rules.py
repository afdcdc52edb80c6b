"""Backward rules that replace gradients: layer-wise relevance propagation as autograd functions.

Two forms are used. In the relevance form, the relevance itself flows back as the "gradient". In the gradient x input form, relevance
divided by the activation flows back; the ordinary gradient then is the z-rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_EPSILON = 1e-9


def positive_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer by the alpha-beta rule with alpha = 1 (relevance form); the bias gets no relevance."""
    return _PositiveLinear.apply(x, weight, bias)


def shared_product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product whose factors get half of the relevance each by the z-rule (relevance form)."""
    return _SharedProduct.apply(a, b)


def residual(a: Tensor, b: Tensor) -> Tensor:
    """A sum by the z-rule, each branch scaled so that their totals are |a| / (|a| + |b|) of what arrives (relevance form)."""
    return _Residual.apply(a, b)


def unchanged(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function that relevance passes unchanged (relevance form)."""
    return _Unchanged.apply(x, function)


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x, and multiply its gradient by a factor."""
    return x * factor + (x * (1 - factor)).detach()


def layer_norm(x: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """Layer normalisation whose deviation is a constant in the backward pass (gradient x input form)."""
    dimensions = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(dim=dimensions, keepdim=True)
    deviation = (x.var(dim=dimensions, unbiased=False, keepdim=True) + eps).sqrt().detach()
    y = centred / deviation
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def ratio_slope(x: Tensor, *settings: Any, function: Callable[..., Tensor], **named: Any) -> Tensor:
    """An elementwise function f whose slope in the backward pass is f(x) / x (gradient x input form)."""
    with torch.no_grad():
        slope = function(x.clone(), *settings, **named) / torch.where(x == 0, 1, x)
    return x * slope


def gamma_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gamma: float = 0.0) -> Tensor:
    """A linear layer by the gamma rule (gradient x input form)."""
    return _Gamma.apply(x, weight, bias, gamma, F.linear) if gamma else F.linear(x, weight, bias)


def gamma_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *settings: Any, gamma: float = 0.0, **named: Any) -> Tensor:
    """A convolution by the gamma rule (gradient x input form); settings are those of ``F.conv2d``."""

    def convolve(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(value, weight, bias, *settings, **named)

    return _Gamma.apply(x, weight, bias, gamma, convolve) if gamma else convolve(x, weight, bias)


def gradient_times_input(gamma_conv: float, gamma_linear_layers: float) -> dict[Any, Callable[..., Tensor]]:
    """The rules of the gradient x input form, by the function of torch that each replaces."""

    def unit(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
        return x / x.norm(p, dim=dim, keepdim=True).clamp(min=eps).detach()

    activations = (F.gelu, F.silu, F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
    return {
        F.linear: partial(gamma_linear, gamma=gamma_linear_layers),
        F.conv2d: partial(gamma_convolution, gamma=gamma_conv),
        F.layer_norm: layer_norm,
        F.normalize: unit,
        **{each: partial(ratio_slope, function=each) for each in activations},
    }


# functions that the plain gradient passes by the z-rule: linear in the image, or views of it
_LINEAR = set(
    """add __add__ __radd__ __iadd__ add_ sub __sub__ __rsub__ sub_ neg __neg__ sum mean view view_as reshape flatten unflatten permute
    transpose swapaxes squeeze unsqueeze expand expand_as contiguous clone to type_as float chunk split tensor_split unbind cat stack
    __getitem__ select narrow index_select gather flip roll repeat movedim dropout adaptive_avg_pool1d adaptive_avg_pool2d avg_pool2d pad
    interpolate __get__ requires_grad_""".split()  # noqa: SIM905
)
_PRODUCTS = set("mul __mul__ __rmul__ __imul__ mul_ div __truediv__ __div__ true_divide div_".split())  # noqa: SIM905


def has_rule(function: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether the plain gradient of a function of torch is its rule: it is linear, or a product with what does not depend on the image."""
    name = getattr(function, "__name__", "")
    if name in _PRODUCTS:
        depend = [isinstance(each, Tensor) and each.requires_grad for each in args[:2]]
        return not depend[1] if "div" in name else not all(depend)
    return name in _LINEAR


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0."""
    safe = denominator + torch.where(denominator >= 0, _EPSILON, -_EPSILON)
    return torch.where(denominator == 0, 0, numerator / safe)


class _PositiveLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        up, down = weight.clamp(min=0), weight.clamp(max=0)
        positive, negative = x.clamp(min=0), x.clamp(max=0)
        share = _ratio(relevance[0], F.linear(positive, up) + F.linear(negative, down))
        return positive * (share @ up) + negative * (share @ down), None, None


class _SharedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        product = a @ b
        ctx.save_for_backward(a, b, product)
        return product

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, Tensor]:
        a, b, product = ctx.saved_tensors
        share = _ratio(relevance[0], product)
        return a * (share @ b.transpose(-2, -1)) / 2, b * (a.transpose(-2, -1) @ share) / 2


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        share = _ratio(relevance[0], a + b)
        first, second = a * share, b * share
        total, both = relevance[0].sum(), first.sum().abs() + second.sum().abs()
        scaled = [part * _ratio(_ratio(part.sum().abs(), both) * total, part.sum()) for part in (first, second)]
        return scaled[0], scaled[1]


class _Unchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, None]:
        return relevance[0], None


class _Gamma(torch.autograd.Function):
    """zennit's generalised gamma rule: where the output is positive, positive contributions count 1 + gamma times, else negative ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: float, run: Callable[..., Tensor]) -> Tensor:
        y = run(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, y)
        ctx.gamma, ctx.run = gamma, run
        return y

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, weight, bias, y = ctx.saved_tensors
        gamma, run = ctx.gamma, ctx.run
        more_up, more_down = weight + gamma * weight.clamp(min=0), weight + gamma * weight.clamp(max=0)
        result = torch.zeros_like(x)
        for sign, first, second in ((1, more_up, more_down), (-1, more_down, more_up)):
            shifted = None if bias is None else bias + gamma * (bias.clamp(min=0) if sign > 0 else bias.clamp(max=0))
            with torch.enable_grad():
                positive = x.clamp(min=0).detach().requires_grad_()
                negative = x.clamp(max=0).detach().requires_grad_()
                z = run(positive, first, shifted) + run(negative, second, None)
                share = torch.where(y * sign > 0, _ratio(gradient[0] * y, z.detach()), 0)
                parts = torch.autograd.grad(z, (positive, negative), share)
            result += torch.where(x > 0, parts[0], torch.where(x < 0, parts[1], 0))
        return result, None, None, None, None
