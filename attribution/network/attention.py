"""Records queries, keys, values and attention weights of any network while it runs, and gives attention other backward rules.

Attention is recognised by what is computed, not by the class of a module: torch's fused function, or a softmax of the product of queries
and keys that is multiplied by values. The fused function is replaced by code that computes the same numbers, so that attention weights
exist and gradients with respect to them can be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attribution.errors import NotApplicable
from attribution.hooks import replaced_forwards

_PRODUCTS = ("matmul", "__matmul__", "bmm", "einsum")


def _same(value: Tensor) -> Tensor:
    return value


@dataclass
class Attention:
    """What one attention computed in one call for one image. Gradients flow through every tensor.

    Attributes:
        query, key, value: [1, heads, N, d]; without the first dimension where the network computes so. None where they are unknown.
        weights: [1, heads, N, M], rows sum to 1.
        context: [1, heads, N, d], before the output projection.
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor
    weights: Tensor
    context: Tensor


@dataclass(frozen=True)
class AttentionRules:
    """How attention computes while it is open.

    Attributes:
        product: its two matrix products.
        softmax: of the scores.
        scores, value, context: what scores, values and contexts pass.
        functions: other functions in the place of functions of torch, such as ``F.linear``.
        other: told every other function with its arguments, if its result depends on the image.
        one_head: number of the call in which all heads are computed as one.
    """

    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    softmax: Callable[[Tensor], Tensor] = field(default=lambda scores: scores.softmax(dim=-1))
    scores: Callable[[Tensor], Tensor] = _same
    value: Callable[[Tensor], Tensor] = _same
    context: Callable[[Tensor], Tensor] = _same
    functions: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)
    other: Callable[[Callable[..., Any], Sequence[Any]], Any] | None = None
    one_head: int | None = None


@contextmanager
def open_attention(module: nn.Module, rules: AttentionRules | None = None) -> Iterator[list[Attention]]:
    """Run the block with every attention of a module open; each call appends what it computed to the list, in order."""
    opened = _Open(rules or AttentionRules())
    # torch's own module calls a function that hides the fused one inside
    inner = [each for each in module.modules() if isinstance(each, nn.MultiheadAttention)]
    parts: dict[nn.Module, Callable[..., Any]] = {each: _multihead(each) for each in inner}
    with replaced_forwards(parts), opened:
        yield opened.calls


def _depends(given: Any) -> bool:
    items = given if isinstance(given, tuple | list) else (given,)
    return any(isinstance(each, Tensor) and each.requires_grad for each in items)


@dataclass
class _Origin:
    """Where a tensor comes from: scores from queries and keys, or weights from such scores. It is kept alive, so that its id is its own."""

    tensor: Tensor
    query: Tensor | None
    key: Tensor | None
    normalised: bool = False


class _Open(TorchFunctionMode):
    """Sees every function of torch that the network calls, and follows the products of queries and keys to their softmax."""

    def __init__(self, rules: AttentionRules) -> None:
        super().__init__()
        self.rules, self.calls = rules, list[Attention]()
        self._origins: dict[int, _Origin] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func in self.rules.functions:
            return self.rules.functions[func](*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS:
            return self._product(func, args, kwargs)
        origin = next((self._origins[id(each)] for each in args if id(each) in self._origins), None)
        if name == "softmax":
            scores = args[0] if args else kwargs["input"]
            known = origin or _Origin(scores, None, None)
            return self._remember(func(self.rules.scores(scores), *args[1:], **kwargs), known.query, known.key, True)
        output = func(*args, **kwargs)
        if self.rules.other is not None and _depends(output):
            self.rules.other(func, args)
        if origin is not None and isinstance(output, Tensor) and output.shape == origin.tensor.shape:
            self._remember(output, origin.query, origin.key, origin.normalised)
        return output

    def _remember(self, tensor: Tensor, query: Tensor | None, key: Tensor | None, normalised: bool) -> Tensor:
        self._origins[id(tensor)] = _Origin(tensor, query, key, normalised)
        return tensor

    def _product(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        equation = args[0] if isinstance(args[0], str) else None
        given = args if equation is None else args[1:]
        given = tuple(given[0]) if len(given) == 1 and not isinstance(given[0], Tensor) else given
        if len(given) != 2 or min(each.ndim for each in given) < 3:
            return func(*args, **kwargs)
        first, second = given
        weights = self._origins.get(id(first))
        attends = weights is not None and weights.normalised
        if attends:
            second = self.rules.value(second)
        output: Tensor = func(equation, first, second) if equation is not None else self.rules.product(first, second)
        if attends:
            assert weights is not None
            output = self.rules.context(output)
            self.calls.append(Attention(weights.query, weights.key, second, first, output))
        elif output.shape[:-1] == first.shape[:-1]:
            transposed = equation is None or equation.replace(" ", "").split("->")[0][-1] == equation.replace(" ", "")[-1]
            self._remember(output, first, second.transpose(-2, -1) if transposed else second, False)
        return output

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        rules, heads, one_head = self.rules, query.shape[-3], self.rules.one_head == len(self.calls)
        if enable_gqa:
            key, value = (each.repeat_interleave(heads // each.shape[-3], dim=-3) for each in (key, value))
        if one_head:
            query, key, value = (each.transpose(-3, -2).flatten(-2).unsqueeze(-3) for each in (query, key, value))
            scale = None
        value = rules.value(value)
        scores = rules.product(query, key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = rules.softmax(rules.scores(scores))
        context = rules.context(rules.product(weights, value))
        self.calls.append(Attention(query, key, value, weights, context))
        return context.squeeze(-3).unflatten(-1, (heads, -1)).transpose(-3, -2) if one_head else context


def _multihead(module: nn.MultiheadAttention) -> Callable[..., tuple[Tensor, None]]:
    """The forward of torch's attention module, by the fused function. It returns no weights."""

    def forward(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Any = None, need_weights: Any = None,
                attn_mask: Any = None, average_attn_weights: Any = None, is_causal: bool = False) -> tuple[Tensor, None]:  # fmt: skip
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn or key_padding_mask is not None:
            raise NotApplicable("an nn.MultiheadAttention with keys of another width, added keys or padding cannot be opened")
        biases = module.in_proj_bias.chunk(3) if module.in_proj_bias is not None else (None, None, None)
        parts = []
        for given, weight, bias in zip((query, key, value), module.in_proj_weight.chunk(3), biases, strict=True):
            projected = F.linear(given if module.batch_first else given.transpose(0, 1), weight, bias)
            parts.append(projected.unflatten(-1, (module.num_heads, -1)).transpose(1, 2))
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, module.num_heads))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # here True hides, there it shows
        context = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask)
        output = module.out_proj(context.transpose(1, 2).flatten(2))
        return (output if module.batch_first else output.transpose(0, 1)), None

    return forward
