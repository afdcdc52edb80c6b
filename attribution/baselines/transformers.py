"""Methods for vision transformers: attention rollout, transformer attribution, Grad-ECLIP, AttnLRP.

Each returns a map over the model input, enlarged bilinearly from the grid of patches; ``attn_lrp`` reaches the pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution.baselines import rules
from attribution.baselines.method import Method
from attribution.checks import check_choice, check_number
from attribution.errors import NotApplicable
from attribution.hooks import replaced_forwards
from attribution.network.attention import AttentionRules, attention_modules, open_attention, reads_class_token
from attribution.network.maps import STRUCTURAL, module_calls, operations, token_grid
from attribution.task import Output, Task, enlarged

_ACTIVATIONS = (nn.GELU, nn.SiLU, nn.ReLU)
_RULED = (*_ACTIVATIONS, nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Dropout, nn.Flatten, nn.Identity)


def attention_rollout(task: Task) -> Tensor:
    """The product over the blocks of row-normalised (mean over heads of A + I) (Abnar & Zuidema, ACL 2020). Ignores the class."""
    modules = attention_modules(task, "attention_rollout")
    with torch.no_grad(), open_attention(modules) as calls:
        task.scores("logit")(task.inputs)
    joint: Tensor | None = None
    for call in calls:
        mixed = call.weights[0].mean(dim=0) + torch.eye(call.weights.shape[-1], device=call.weights.device)
        mixed = mixed / mixed.sum(dim=1, keepdim=True)
        joint = mixed if joint is None else mixed @ joint
    assert joint is not None
    return _read_out(task, joint)


def transformer_attribution(task: Task, *, variant: Literal["generic", "lrp"] = "generic", output: Output = "logit") -> Tensor:
    """Relevance of the patches through all attention layers: the product of I + mean over heads of relu(dA o R).

    Args:
        task: what is explained.
        variant: "generic" takes R = A, the attention itself (Chefer et al., ICCV 2021, equation 5); "lrp" takes the relevance of the
            attention by layer-wise relevance propagation (Chefer et al., CVPR 2021, equations 3 to 13). Where the head reads the mean
            of the tokens, each of them gets an equal share.
        output: "logit" or "probability".
    """
    check_choice("variant", variant, ("generic", "lrp"))
    modules = attention_modules(task, "transformer_attribution")
    with open_attention(modules) as calls:
        score = task.scores(output)(task.leaf())[0, task.target]
    weights = [call.weights for call in calls]
    gradients = torch.autograd.grad(score, weights)
    relevances = [w.detach() for w in weights] if variant == "generic" else _attention_relevance(task, modules)
    joint = torch.eye(weights[0].shape[-1], device=score.device)
    for relevance, gradient in zip(relevances, gradients, strict=True):
        joint = joint + (relevance * gradient)[0].relu().mean(dim=0) @ joint
    return _read_out(task, joint - torch.eye(len(joint), device=joint.device))


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
    last = attention_modules(task, "grad_eclip")[-1:]
    with open_attention(last, AttentionRules(one_head=heads == "single")) as calls:
        score = task.scores(output)(task.leaf())[0, task.target]
    call = calls[-1]
    grid, prefix = _grid(task, call.weights.shape[-1])
    if not reads_class_token(task, prefix):
        raise NotApplicable(
            f"grad_eclip does not apply to {task.classifier.name}: its head reads the mean of the patches, not a class token"
        )
    (gradient,) = torch.autograd.grad(score, call.context)
    query, key, value = (t.detach()[0].transpose(0, 1).flatten(1) for t in (call.query, call.key, call.value))
    similarity = F.cosine_similarity(query[:1], key[prefix:], dim=1)
    spread = similarity.max() - similarity.min()
    similarity = (similarity - similarity.min()) / spread if spread > 0 else torch.ones_like(similarity)
    patches = (gradient[0, 0] * value[prefix:] * similarity[:, None]).sum(dim=1).relu()
    return enlarged(task, patches.view(grid))


def attn_lrp(task: Task, *, gamma_conv: float = 0.25, gamma_linear: float = 0.05, output: Output = "logit") -> Tensor:
    """AttnLRP (Achtibat et al., ICML 2024) in its gradient x input form, signed, on the pixels.

    Layer normalisation with a detached deviation, f(x) / x as slope of the activations, both matrix products of the attention by
    the uniform rule, and the gamma rule for convolutions and linear layers.

    Args:
        task: what is explained.
        gamma_conv, gamma_linear: how much positive weights count more; 0 is the plain z-rule. Biases, position embeddings and the
            softmax take relevance too, so that the pixels' sum is not the score.
        output: "logit" or "probability".
    """
    check_number("gamma_conv", gamma_conv, 0)
    check_number("gamma_linear", gamma_linear, 0)
    modules = attention_modules(task, "attn_lrp")
    _refuse_layers_without_rule(task, "attn_lrp")

    def halve_twice(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return rules.scaled_gradient(query, 0.25), rules.scaled_gradient(key, 0.25), rules.scaled_gradient(value, 0.5)

    def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return rules.gamma_linear(x, weight, bias, gamma_linear) if gamma_linear else F.linear(x, weight, bias)

    replaced: dict[nn.Module, Callable[..., Any]] = {}
    for module in task.module.modules():
        if isinstance(module, nn.LayerNorm):
            replaced[module] = lambda x, m=module: rules.layer_norm(x, m)
        elif isinstance(module, _ACTIVATIONS):
            replaced[module] = lambda x, m=module: rules.ratio_slope(x, m)
        elif isinstance(module, nn.Linear) and gamma_linear:
            replaced[module] = lambda x, m=module: project(x, m.weight, m.bias)
        elif isinstance(module, nn.Conv2d) and gamma_conv:
            replaced[module] = lambda x, m=module: rules.gamma_convolution(x, m, gamma_conv)
    inputs = task.leaf()
    with replaced_forwards(replaced), open_attention(modules, AttentionRules(prepare=halve_twice, linear=project)):
        score = task.scores(output)(inputs)[0, task.target]
    (gradient,) = torch.autograd.grad(score, inputs)
    return (inputs.detach() * gradient)[0].sum(dim=0)


def _attention_relevance(task: Task, modules: list[nn.Module]) -> list[Tensor]:
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
        if isinstance(module, nn.Linear):
            replaced[module] = lambda x, m=module: rules.positive_linear(x, m.weight, m.bias)
        elif isinstance(module, (nn.LayerNorm, LayerScale, *_ACTIVATIONS)):
            replaced[module] = lambda x, m=module: rules.unchanged(x, lambda value: type(m).forward(m, value))
        elif isinstance(module, vision_transformer.Block):
            replaced[module] = lambda x, m=module, **_: _timm_block(x, m)
        elif isinstance(module, EncoderBlock):
            replaced[module] = lambda x, m=module: _torchvision_block(x, m)
    blocks = sum(isinstance(m, vision_transformer.Block | EncoderBlock) for m in replaced)
    if blocks != len(modules):
        raise NotApplicable(
            f"transformer_attribution(variant='lrp') does not apply to {task.classifier.name}: {len(modules) - blocks} of its "
            f"{len(modules)} blocks are of an unknown kind; use variant='generic'"
        )
    z_rule = AttentionRules(
        product=rules.shared_product,
        softmax=lambda scores: rules.unchanged(scores, lambda s: s.softmax(dim=-1)),
        linear=rules.positive_linear,
    )
    with replaced_forwards(replaced), open_attention(modules, z_rule) as calls:
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


def _grid(task: Task, tokens: int) -> tuple[tuple[int, int], int]:
    found = token_grid(task, tokens)
    if found is None:
        raise NotApplicable(f"the {tokens} tokens of {task.classifier.name} are no grid of patches")
    return found


def _read_out(task: Task, joint: Tensor) -> Tensor:
    """Read the patches' shares in the token that the head reads (the mean of several for pooled and distilled models), enlarged."""
    grid, prefix = _grid(task, len(joint))
    distilled = any(hasattr(m, "head_dist") for m in task.module.modules())
    first, last = (0, 2 if distilled else 1) if reads_class_token(task, prefix) else (prefix, len(joint))
    return enlarged(task, joint[first:last, prefix:].mean(dim=0).view(grid))


METHODS: dict[str, Method] = {
    "attention_rollout": Method(attention_rollout, "transformer"),
    "transformer_attribution": Method(transformer_attribution, "transformer"),
    "grad_eclip": Method(grad_eclip, "transformer"),
    "attn_lrp": Method(attn_lrp, "transformer"),
}
