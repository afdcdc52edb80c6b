"""Methods for vision transformers: attention rollout, transformer attribution, Grad-ECLIP, AttnLRP.

Each returns a map over the model input, enlarged bilinearly from the grid of patches; ``attn_lrp`` reaches the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution.baselines import rules
from attribution.baselines.method import Method
from attribution.checks import check_choice, check_number
from attribution.errors import NotApplicable
from attribution.hooks import frozen_parameters, replaced_forwards
from attribution.network.attention import AttentionRules, open_attention
from attribution.network.maps import STRUCTURAL, elementwise_modules, module_calls, operations
from attribution.network.reading import Reading, read_tokens
from attribution.task import Output, Task, enlarged

_ACTIVATIONS = (nn.GELU, nn.SiLU, nn.ReLU)
_RULED = (*_ACTIVATIONS, nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Dropout, nn.Flatten, nn.Identity)


def attention_rollout(task: Task) -> Tensor:
    """The product over the blocks of row-normalised (mean over heads of A + I) (Abnar & Zuidema, ACL 2020). Ignores the class."""
    reading = read_tokens(task, "attention_rollout")
    with torch.no_grad(), open_attention(task.module) as calls:
        task.scores("logit")(task.inputs)
    weights = [_by_head(call.weights).mean(dim=0) for call in calls[: reading.blocks + reading.pools]]
    joint = torch.eye(reading.tokens, device=weights[0].device)
    for mean in weights[: reading.blocks]:
        mixed = mean + torch.eye(len(mean), device=mean.device)
        joint = mixed / mixed.sum(dim=1, keepdim=True) @ joint
    return enlarged(task, reading.of_patches(joint, weights[-1][0] if reading.pools else None))


def transformer_attribution(task: Task, *, variant: Literal["generic", "lrp"] = "generic", output: Output = "logit") -> Tensor:
    """Relevance of the patches through all attention layers: the product of I + mean over heads of relu(dA o R).

    Where the head reads the mean of the tokens, each of them gets an equal share. Where it pools them by an attention, they get that
    attention's mean over heads of relu(dA o R).

    Args:
        task: what is explained.
        variant: "generic" takes R = A, the attention itself (Chefer et al., ICCV 2021, equation 5); "lrp" takes the relevance of the
            attention by layer-wise relevance propagation (Chefer et al., CVPR 2021, equations 3 to 13).
        output: "logit" or "probability".
    """
    check_choice("variant", variant, ("generic", "lrp"))
    reading = read_tokens(task, "transformer_attribution")
    with open_attention(task.module) as calls:
        score = task.scores(output)(task.leaf())[0, task.target]
    weights = [call.weights for call in calls[: reading.blocks + reading.pools]]
    gradients = torch.autograd.grad(score, weights)
    relevances = [w.detach() for w in weights] if variant == "generic" else _attention_relevance(task, reading)
    by_block = [_by_head(r * g).relu().mean(dim=0) for r, g in zip(relevances, gradients, strict=True)]
    unit = torch.eye(reading.tokens, device=score.device)
    joint = unit
    for relevance in by_block[: reading.blocks]:
        joint = joint + relevance @ joint
    return enlarged(task, reading.of_patches(joint, by_block[-1][0]) if reading.pools else reading.of_patches(joint - unit, None))


def grad_eclip(task: Task, *, heads: Literal["native", "single"] = "native", output: Output = "logit") -> Tensor:
    """relu(sum_d g_d v_id s_i) in the last block (Zhao et al., Grad-ECLIP, ICML 2024).

    g is the gradient at the class token's attention output, v the values, s the cosine between the class token's query and the
    keys, scaled to [0, 1]. A distillation token, where there is one, does not count.

    Args:
        task: what is explained.
        heads: "native" keeps the model's heads; "single" computes the last attention with one head of full width, as published,
            which changes the score that is differentiated.
        output: "logit" or "probability".

    Raises:
        NotApplicable: a model that pools its patches: there is no class token to start from.
    """
    check_choice("heads", heads, ("native", "single"))
    reading = read_tokens(task, "grad_eclip")
    if reading.reads_patches:
        raise NotApplicable(f"grad_eclip does not apply to {task.classifier.name}: its head reads the patches, not a class token alone")
    one_head = reading.blocks - 1 if heads == "single" else None
    with open_attention(task.module, AttentionRules(one_head=one_head)) as calls:
        score = task.scores(output)(task.leaf())[0, task.target]
    call = calls[reading.blocks - 1]
    if call.query is None or call.key is None or (heads == "single" and len(_by_head(call.weights)) > 1):
        what = "queries and keys of its attention weights are unknown" if call.query is None else "heads='single' needs fused attention"
        raise NotApplicable(f"grad_eclip does not apply to {task.classifier.name}: {what}; use transformer_attribution")
    (gradient,) = torch.autograd.grad(score, call.context)
    query, key, value, gradient = (
        _by_head(each.detach()).transpose(0, 1).flatten(1) for each in (call.query, call.key, call.value, gradient)
    )
    token, prefix = int(reading.shares.nonzero()[0]), reading.prefix
    similarity = F.cosine_similarity(query[token : token + 1], key[prefix:], dim=1)
    spread = similarity.max() - similarity.min()
    similarity = (similarity - similarity.min()) / spread if spread > 0 else torch.ones_like(similarity)
    patches = (gradient[token] * value[prefix:] * similarity[:, None]).sum(dim=1).relu()
    return enlarged(task, patches.view(reading.grid))


def _by_head(values: Tensor) -> Tensor:
    """[1, heads, a, b] or [heads, a, b] of one image as [heads, a, b]."""
    return values.flatten(0, -3)


def attn_lrp(task: Task, *, gamma_conv: float = 0.25, gamma_linear: float = 0.05, output: Output = "logit") -> Tensor:
    """AttnLRP (Achtibat et al., ICML 2024) in its gradient x input form, signed, on the pixels.

    Layer normalisation with a detached deviation, f(x) / x as slope of the activations, both matrix products of the attention by
    the uniform rule, and the gamma rule for convolutions and linear layers. Rules stand in the place of functions of torch, whatever
    the modules that call them. A function of the image without a rule is refused.

    Args:
        task: what is explained.
        gamma_conv, gamma_linear: how much positive weights count more; 0 is the plain z-rule. Biases, position embeddings and the
            softmax take relevance too, so that the pixels' sum is not the score.
        output: "logit" or "probability".
    """
    check_number("gamma_conv", gamma_conv, 0)
    check_number("gamma_linear", gamma_linear, 0)
    read_tokens(task, "attn_lrp", as_product=False)
    elementwise = {m: partial(rules.ratio_slope, function=partial(type(m).forward, m)) for m in elementwise_modules(task)}
    unknown: set[str] = set()

    def other(function: Callable[..., Any], args: Sequence[Any]) -> None:
        if not rules.has_rule(function, args):
            unknown.add(function.__name__)

    halved = AttentionRules(
        scores=lambda scores: rules.scaled_gradient(scores, 0.25),  # half of the product with values, and of that half of the other product
        value=lambda value: rules.scaled_gradient(value, 0.5),
        functions=rules.gradient_times_input(gamma_conv, gamma_linear),
        other=other,
    )
    inputs = task.leaf()
    with frozen_parameters(task.module), replaced_forwards(elementwise), open_attention(task.module, halved):
        logits = task.scores("logit")(inputs)
    if unknown:
        raise NotApplicable(
            f"attn_lrp does not apply to {task.classifier.name}: it has no rule for {', '.join(sorted(unknown)[:4])}; use "
            "transformer_attribution or rise"
        )
    score = (logits.softmax(dim=1) if output == "probability" else logits)[0, task.target]
    (gradient,) = torch.autograd.grad(score, inputs)
    return (inputs.detach() * gradient)[0].sum(dim=0)


def _attention_relevance(task: Task, reading: Reading) -> list[Tensor]:
    """Relevance of every attention matrix, by rules in the place of gradients (Chefer et al., CVPR 2021, section 3.1)."""
    from timm.layers import LayerScale
    from timm.models import vision_transformer
    from torchvision.models.vision_transformer import EncoderBlock

    name = "transformer_attribution(variant='lrp')"
    _refuse_layers_without_rule(task, name)
    if not task.classifier.outputs.are_logits or task.classifier.forward is not task.classifier.runner:
        raise NotApplicable(
            f"{name} does not apply to {task.classifier.name}: its scores are no output of a linear layer of the module, where the "
            "relevance starts; use variant='generic'"
        )
    replaced: dict[nn.Module, Callable[..., Any]] = {}
    for module in task.module.modules():
        if isinstance(module, (nn.LayerNorm, LayerScale, *_ACTIVATIONS)):
            replaced[module] = lambda x, m=module: rules.unchanged(x, lambda value: type(m).forward(m, value))
        elif isinstance(module, vision_transformer.Block):
            replaced[module] = lambda x, m=module, **_: _timm_block(x, m)
        elif isinstance(module, EncoderBlock):
            replaced[module] = lambda x, m=module: _torchvision_block(x, m)
    known = sum(isinstance(m, vision_transformer.Block | EncoderBlock) for m in replaced)
    if known != reading.blocks or reading.pools:
        raise NotApplicable(
            f"{name} does not apply to {task.classifier.name}: only {known} of its {reading.blocks + reading.pools} attentions are in a "
            "block of a known kind; use variant='generic'"
        )
    z_rule = AttentionRules(
        product=rules.shared_product,
        softmax=lambda scores: rules.unchanged(scores, lambda s: s.softmax(dim=-1)),
        functions={F.linear: rules.positive_linear},
    )
    with replaced_forwards(replaced), open_attention(task.module, z_rule) as calls:
        score = task.scores("logit")(task.leaf())[0, task.target]
    return list(torch.autograd.grad(score, [call.weights for call in calls]))


def _refuse_layers_without_rule(task: Task, name: str) -> None:
    """Refuse networks with a layer that has no rule: the plain gradient would pass it unnoticed."""
    from timm.layers import DropPath, LayerScale

    calls = module_calls(task, (nn.Module,))
    unknown = {type(m).__name__ for m in calls if not list(m.children()) and not isinstance(m, (*_RULED, DropPath, LayerScale))}
    unknown |= {type(m).__name__ for m in calls if "glu" in type(m).__name__.lower() and list(m.children())}
    unknown |= {"gated attention" for m in calls if getattr(m, "gate", None) is not None}
    ran = operations(task)
    functions = sum(ran.values()) - sum(ran[op] for op in ("attention", "softmax", "native_layer_norm", *STRUCTURAL))
    functions -= sum(count for m, count in calls.items() if isinstance(m, _ACTIVATIONS))
    if unknown or functions > 0:
        what = ", ".join(sorted(unknown)) or f"{functions} activations that are functions, not modules"
        raise NotApplicable(
            f"{name} does not apply to {task.classifier.name}: it has no rule for {what}; use transformer_attribution or rise"
        )


def _timm_block(x: Tensor, block: Any) -> Tensor:
    x = rules.residual(x, block.ls1(block.attn(block.norm1(x))))
    return rules.residual(x, block.ls2(block.mlp(block.norm2(x))))


def _torchvision_block(x: Tensor, block: Any) -> Tensor:
    normalised = block.ln_1(x)
    attended, _ = block.self_attention(normalised, normalised, normalised, need_weights=False)
    x = rules.residual(x, block.dropout(attended))
    return rules.residual(x, block.mlp(block.ln_2(x)))


METHODS: dict[str, Method] = {
    "attention_rollout": Method(attention_rollout, "transformer"),
    "transformer_attribution": Method(transformer_attribution, "transformer"),
    "grad_eclip": Method(grad_eclip, "transformer"),
    "attn_lrp": Method(attn_lrp, "transformer"),
}
