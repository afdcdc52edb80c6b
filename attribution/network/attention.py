"""Records queries, keys, values and attention weights of vision transformers while they run, and gives them other backward rules.

The global attention of timm and torchvision is known. It is replaced by code that computes the same numbers without a fused kernel, so
that attention weights exist and gradients with respect to them can be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution.errors import NotApplicable
from attribution.hooks import replaced_forwards
from attribution.task import Task

MatrixProduct = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Attention:
    """What one attention module computed in one call. Gradients flow through every tensor.

    Attributes:
        query, key, value: [n, heads, N, d].
        weights: [n, heads, N, N], rows sum to 1.
        context: [n, N, heads d], before the output projection.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weights: Tensor
    context: Tensor


@dataclass(frozen=True)
class AttentionRules:
    """How a replaced attention computes.

    Attributes:
        product: its two matrix products.
        softmax: of the scores.
        prepare: what queries, keys and values pass first.
        linear: projects to queries, keys and values where the attention holds their weights itself (torch's MultiheadAttention).
        one_head: whether all heads are computed as one.
    """

    product: MatrixProduct = torch.matmul
    softmax: Callable[[Tensor], Tensor] = field(default=lambda scores: scores.softmax(dim=-1))
    prepare: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = field(default=lambda q, k, v: (q, k, v))
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
    one_head: bool = False


def attention_modules(task: Task, method: str) -> list[nn.Module]:
    """The global attention modules in the order of ``named_modules``.

    Raises:
        UserError: none, or an attention of another kind (windows, convolutions, relative positions).
    """
    from timm.models import vision_transformer

    modules: list[nn.Module] = [m for m in task.module.modules() if isinstance(m, (vision_transformer.Attention, nn.MultiheadAttention))]
    others = sorted({type(m).__name__ for m in task.module.modules() if "Attention" in type(m).__name__ and m not in modules})
    if others or not modules:
        has = f"attention of type {', '.join(others)}" if others else "no attention"
        raise NotApplicable(
            f"{method} does not apply to {task.classifier.name}: it has {has}; expected a vision transformer with global attention "
            "(timm VisionTransformer or DeiT, torchvision vit); use grad_cam, rise or a region search"
        )
    return modules


@contextmanager
def open_attention(modules: list[nn.Module], rules: AttentionRules | None = None) -> Iterator[list[Attention]]:
    """Run the block with the given attention modules replaced; each call appends what it computed to the list."""
    calls: list[Attention] = []
    chosen = rules or AttentionRules()

    def replacement(module: nn.Module) -> Callable[..., Any]:
        if isinstance(module, nn.MultiheadAttention):
            return lambda query, key, value, **_: (_multihead(module, query, key, value, chosen, calls), None)
        return lambda x, attn_mask=None, **_: _timm(module, x, chosen, calls)

    with replaced_forwards({module: replacement(module) for module in modules}):
        yield calls


def reads_class_token(task: Task, prefix: int) -> bool:
    """Whether the head reads the class token rather than the mean of the patches."""
    pools = [m.global_pool for m in task.module.modules() if isinstance(getattr(m, "global_pool", None), str)]
    return prefix > 0 and all(pool in ("token", "") for pool in pools)


def _timm(module: Any, x: Tensor, rules: AttentionRules, calls: list[Attention]) -> Tensor:
    batch, tokens, _ = x.shape
    gate = getattr(module, "gate", None)
    heads = 1 if rules.one_head else module.num_heads
    query, key, value = module.qkv(x).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    query, key = module.q_norm(query), module.k_norm(key)
    if heads == 1:
        query, key, value = (t.transpose(1, 2).reshape(batch, 1, tokens, -1) for t in (query, key, value))
    context = _attend(query, key, value, rules, calls)
    context = getattr(module, "norm", nn.Identity())(context)
    if gate is not None:
        context = context * gate(x).sigmoid()
    return module.proj_drop(module.proj(context))


def _multihead(module: Any, query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules, calls: list[Attention]) -> Tensor:
    if not module.batch_first or module.in_proj_weight is None or query is not key or key is not value:
        raise NotApplicable("an nn.MultiheadAttention that is no batch-first self-attention cannot be opened: use another method")
    width = query.shape[2]
    weight, bias = module.in_proj_weight, module.in_proj_bias
    parts = []
    for index in range(3):
        rows = slice(index * width, (index + 1) * width)
        parts.append(rules.linear(query, weight[rows], None if bias is None else bias[rows]))
    heads = 1 if rules.one_head else module.num_heads
    split = [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts]
    return module.out_proj(_attend(split[0], split[1], split[2], rules, calls))


def _attend(query: Tensor, key: Tensor, value: Tensor, rules: AttentionRules, calls: list[Attention]) -> Tensor:
    query, key, value = rules.prepare(query, key, value)
    scores = rules.product(query, key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    weights = rules.softmax(scores)
    context = rules.product(weights, value).transpose(1, 2).flatten(2)
    calls.append(Attention(query, key, value, weights, context))
    return context
