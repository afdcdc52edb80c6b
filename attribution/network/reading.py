"""Finds out how the tokens of a vision transformer meet, and which of them its head reads.

All of it is measured: which attention runs and over how many tokens, whether tokens meet anywhere else, and, by gradients, how much each
token of the last block counts in what the head reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from attribution.errors import NotApplicable
from attribution.hooks import frozen_parameters, removed_after
from attribution.network.attention import Attention, AttentionRules, open_attention
from attribution.network.maps import in_place, probe_inputs, random_signs, read_out, token_grid
from attribution.task import Task

_SAME_SHARES = 0.25  # total variation between the shares of tokens in a feature and in all; 0 for a mean, .4 and more with a maximum in it


@dataclass(frozen=True)
class Reading:
    """The tokens of a vision transformer with global attention, and how its head reads them.

    Attributes:
        blocks: number of attentions in which all tokens meet.
        tokens: N.
        grid: (h, w) of the patches, which are the last h w tokens.
        shares: float32 [N], sum 1, how much each token of the last block counts for the head: 1 for a class token alone, equal shares of
            the tokens whose mean it takes.
        pools: whether the head pools the tokens by one more attention, of a query of its own. The shares then are those of all tokens
            alike, and say nothing.
        no_product: why what the head reads of each patch is no product of the attentions in their order; "" if it is.
    """

    blocks: int
    tokens: int
    grid: tuple[int, int]
    shares: Tensor
    pools: bool
    no_product: str

    @property
    def prefix(self) -> int:
        """Number of tokens before those of patches."""
        return self.tokens - self.grid[0] * self.grid[1]

    @property
    def reads_patches(self) -> bool:
        """Whether the head reads patches rather than class tokens alone."""
        return self.pools or bool(self.shares[self.prefix :].any())

    def of_patches(self, joint: Tensor, pooling: Tensor | None) -> Tensor:
        """What the head reads of each patch, [h, w], from how much each token holds of each, [N, N].

        Args:
            joint: rows are the tokens of the last block, columns those of the first.
            pooling: [N], weights of the attention that pools the tokens, if there is one.
        """
        shares = self.shares.to(joint) if pooling is None else pooling
        return (shares @ joint)[self.prefix :].unflatten(0, self.grid)


def read_tokens(task: Task, method: str, as_product: bool = True) -> Reading:
    """How the tokens of the task's network meet and are read.

    Args:
        task: what is explained.
        method: its name, for messages.
        as_product: whether the method takes what the head reads for a product of the attentions in their order.

    Raises:
        NotApplicable: no global attention between all tokens in every block, or no such product, with the reason.
    """
    if "tokens" not in task.structure:
        with torch.enable_grad(), frozen_parameters(task.module):
            task.structure["tokens"] = _read(task)
    found: Reading | str = task.structure["tokens"]
    if isinstance(found, Reading) and as_product and found.no_product:
        found = found.no_product
    if isinstance(found, str):
        raise NotApplicable(
            f"{method} does not apply to {task.classifier.name}: {found}; expected a vision transformer in which all tokens meet by "
            "softmax attention in every block, and nowhere else; use grad_cam, rise or a region search"
        )
    return found


def _read(task: Task) -> Reading | str:
    """The reading, or why there is none."""
    inputs = probe_inputs(task)
    read_out(task, inputs)  # what runs only once runs now
    calls, stream, values = _probed(task, inputs, AttentionRules())
    misfit = _misfit(calls, [tensor for _, tensor in stream])
    if misfit:
        return misfit
    tokens, last_pools = calls[0].weights.shape[-1], calls[-1].weights.shape[-2] == 1
    blocks = len(calls) - last_pools
    signed = (values * random_signs(values)).sum()
    (through,) = torch.autograd.grad(signed, calls[-1].weights, retain_graph=True, allow_unused=True)
    pools = last_pools and through is not None  # Hugging Face's SigLIP also computes a pooling that its classifier does not read
    found = token_grid(task, tokens)
    if found is None:
        return f"its {tokens} tokens are no grid of patches"
    last = [tensor for when, tensor in stream if when == blocks and tensor.shape[1] == tokens and tensor.requires_grad]
    last = last or [calls[blocks - 1].context.flatten(0, -3).transpose(0, 1).flatten(1)[None]]
    (gradient,) = torch.autograd.grad(signed, last[-1], allow_unused=True)
    norms = torch.zeros(tokens) if gradient is None else gradient[0].norm(dim=1).cpu()
    if gradient is None or not norms.any():
        return "its head has no gradient at the tokens of its last block"
    no_product = ""
    if not pools and _picks(gradient[0]):
        no_product = "its head picks tokens by their values (a maximum), so that other tokens count in each image"
    elif not all(_follows(later, earlier) for earlier, later in pairwise(calls[:blocks])):
        no_product = "attentions run side by side in its blocks"
    reading = Reading(blocks, tokens, found[0], norms / norms.sum(), pools, no_product)
    return _misplaced(task, reading) or reading


def _misfit(calls: list[Attention], sequences: list[Tensor]) -> str:
    """Why the attentions of a pass are not those of all tokens in every block, and perhaps one that pools them; "" if they are."""
    if not calls:
        return "no attention was found in it"
    lengths, widths = {each.shape[1] for each in sequences}, {each.shape[2] for each in sequences}
    heads = [call.value.shape[:-2].numel() for call in calls]
    turned = [call.value.shape[-1] in lengths and call.value.shape[-2] not in lengths for call in calls]
    if any(each and call.value.shape[-2] * count in widths - lengths for each, call, count in zip(turned, calls, heads, strict=True)):
        return "it has attention between channels, not between tokens (cross-covariance attention)"
    shapes = [(tuple(call.weights.shape[:-3]), *call.weights.shape[-2:]) for call in calls]
    tokens = shapes[0][2]
    blocks = shapes[:-1] if len(calls) > 1 and shapes[-1][1:] == (1, tokens) else shapes
    odd = [shape for shape in (*blocks, shapes[-1]) if any(size != 1 for size in shape[0]) or shape[2] != tokens]
    odd += [shape for shape in blocks if shape[1] != tokens]
    if odd:
        kinds = dict.fromkeys("x".join(map(str, call.weights.shape)) for call in calls)
        return f"it has attention within windows, stages or other parts of the image (weights {', '.join(list(kinds)[:4])})"
    if any((call.weights.sum(dim=-1) - 1).abs().max() > 1e-3 for call in calls):
        return "its attention weights do not sum to 1"
    return ""


def _follows(later: Attention, earlier: Attention) -> bool:
    """Whether an attention depends on what another one computed."""
    signed = (later.context * random_signs(later.context)).sum()
    (gradient,) = torch.autograd.grad(signed, earlier.context, retain_graph=True, allow_unused=True)
    return gradient is not None


def _picks(gradient: Tensor) -> bool:
    """Whether features [C] are read from tokens of their own, by the gradient [N, C] of what is read.

    The mean of tokens, or one of them, is read in the same shares for every feature; a maximum is not.
    """
    shares = gradient.abs() / gradient.abs().sum(dim=0).clamp(min=1e-30)
    return bool((shares - shares.mean(dim=1, keepdim=True)).abs().sum(dim=0).mean() / 2 > _SAME_SHARES)


def _misplaced(task: Task, reading: Reading) -> str:
    """Whether a token of the last block depends on another one of the first, or on another patch, while attention passes nothing on."""
    inputs = probe_inputs(task)
    _, stream, _ = _probed(task, inputs, AttentionRules(context=Tensor.detach))
    own = [(when, tensor) for when, tensor in stream if tensor.shape[1] == reading.tokens and tensor.requires_grad]
    first = [tensor for when, tensor in own if when == 0]
    last = [tensor for when, tensor in own if when == reading.blocks]
    if not first or not last:
        return "its tokens could not be followed from the first block to the last"
    token = (reading.prefix + reading.tokens) // 2
    picked = last[-1][0, token]
    (gradient,) = torch.autograd.grad((picked * random_signs(picked)).sum(), first[0], retain_graph=True, allow_unused=True)
    if gradient is None or gradient[0].any(dim=1).nonzero()[:, 0].tolist() != [token]:
        return "tokens also meet outside of its attention"
    maps = last[-1][:, reading.prefix :].transpose(1, 2).unflatten(2, reading.grid)
    return "" if in_place(maps, inputs) else "its tokens are not at the places of the patches (masked, shuffled or mixed?)"


def _probed(task: Task, inputs: Tensor, rules: AttentionRules) -> tuple[list[Attention], list[tuple[int, Tensor]], Tensor]:
    """The attentions of a pass; all sequences [1, N, C] that modules took or gave, with how many attentions ran before; what is read."""
    stream: list[tuple[int, Tensor]] = []

    def remember(values: Any) -> None:
        if isinstance(values, Tensor) and values.ndim == 3 and values.shape[0] == 1:
            stream.append((len(calls), values))

    def before(_module: nn.Module, args: Any) -> None:
        remember(args[0] if args else None)

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        remember(output[0] if isinstance(output, tuple) and output else output)

    modules = list(task.module.modules())
    handles = [each.register_forward_pre_hook(before) for each in modules] + [each.register_forward_hook(after) for each in modules]
    with open_attention(task.module, rules) as calls, removed_after(handles):
        values = read_out(task, inputs) if rules.context is not Tensor.detach else task.classifier.logits(inputs)
    return calls, stream, values
