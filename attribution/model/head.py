"""The final layers of a network, its heads, and the pooled features that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attribution.errors import UserError
from attribution.hooks import edited_outputs, record_outputs


def find_heads(module: Any, named: str | None, count: int, run: Callable[[], Tensor], name: str) -> list[nn.Module]:
    """Find the final layers: the one named, else the last linear layer (or 1x1 convolution) called that has C outputs.

    A distilled model has two, whose outputs it averages. A layer past which something else reaches the scores is not the final one.

    Args:
        module: an ``nn.Module``; a black box is refused.
        named: name of the final layer.
        count: C, the number of scores.
        run: forwards an image, whose gradients are asked for, through the module and returns its scores [1, C].
        name: of the classifier, for messages.

    Raises:
        UserError: a black box, no layer of that name, or none with C outputs.
    """
    if not isinstance(module, nn.Module):
        raise UserError(f"{name} is a black box without features: give an nn.Module, or set the weights that need features to 0")
    modules = dict(module.named_modules())
    if named is not None:
        if named not in modules:
            raise UserError(f"{name} has no layer {named!r}: its last layers are {', '.join([n for n in modules if n][-4:])}")
        return [modules[named]]
    for kind, outputs in ((nn.Linear, "out_features"), (nn.Conv2d, "out_channels")):
        candidates = [m for m in modules.values() if isinstance(m, kind) and getattr(m, outputs) == count]
        with torch.no_grad(), record_outputs(candidates) as calls:
            scores = run()
        if calls:
            given = [module for module, output in calls if output.shape == scores.shape and torch.equal(output.to(scores), scores)]
            if given:  # of several heads the one whose scores are explained
                return given[-1:]
            last = list(dict(calls).items())[-2:]
            widths = {value.shape for module, _ in last for value in module.parameters() if value.ndim > 1}
            alike = len(widths) == 1  # branches of several widths have no mean feature
            averaged = len(last) == 2 and alike and all(output.shape == scores.shape for _, output in last)
            if averaged and torch.allclose((last[0][1] + last[1][1]) / 2, scores.to(last[0][1]), atol=1e-5):
                return [module for module, _ in last]
            if not _is_passed_by(calls[-1][0], run):
                return [calls[-1][0]]
    raise UserError(f"no final layer with {count} outputs was found in {name}: name it with head=")


def _is_passed_by(layer: nn.Module, run: Callable[[], Tensor]) -> bool:
    """Whether the scores have a gradient at the image that does not flow through a layer."""
    with torch.enable_grad(), edited_outputs(layer, Tensor.detach):
        return run().requires_grad


def features_of(calls: Sequence[tuple[nn.Module, Tensor]], name: str) -> Tensor:
    """Pooled features float32 [n, D] from what entered the heads in one pass; the mean of both heads of a distilled model.

    Raises:
        UserError: no head was called.
    """
    last = dict(calls)  # the last call counts where a head is called twice
    if not last:
        raise UserError(f"the final layer of {name} was never called: name the right one with head=")
    return torch.stack([pooled_features(value) for value in last.values()]).mean(dim=0).float()


def pooled_features(value: Tensor) -> Tensor:
    """Features [n, D] unchanged; for a map [n, D, h, w] or tokens [n, N, D], their mean over the positions."""
    if value.ndim == 4:
        return value.mean(dim=(2, 3))
    return value.mean(dim=1) if value.ndim == 3 else value
