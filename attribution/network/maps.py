"""Finds the layers of a network that return a map of the image, and how their tokens lie on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attribution.errors import NotApplicable, UserError, describe
from attribution.hooks import counted_calls, exclusive, hookable, removed_after
from attribution.model.classifier import Classifier
from attribution.network.attention import reads_class_token
from attribution.task import Task

_MOST_PREFIX_TOKENS = 16
_NONLINEAR = (
    "relu",
    "gelu",
    "silu",
    "mish",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "elu",
    "leaky_relu",
    "prelu",
    "softplus",
    "sigmoid",
    "tanh",
    "celu",
    "prelu_kernel",
)
STRUCTURAL = ("residual sum", "product", "max_pool2d_with_indices")  # kinds that ``operations`` counts beside activations
_ATTENTION = ("scaled_dot_product", "softmax", "native_layer_norm", "native_multi_head_attention")


@dataclass(frozen=True, eq=False)
class FeatureLayer:
    """A module whose output is a map of the image.

    Attributes:
        name: in ``named_modules``.
        module: the module itself.
        kind: layout of the output: "nchw", "nhwc", or "tokens" [n, prefix + h w, C].
        grid: (h, w) of the map.
        prefix: tokens before those of the image: class, register and distillation tokens.
    """

    name: str
    module: nn.Module
    kind: Literal["nchw", "nhwc", "tokens"]
    grid: tuple[int, int]
    prefix: int = 0

    @property
    def channel(self) -> int:
        """The channel dimension of the output."""
        return 1 if self.kind == "nchw" else -1

    def to_map(self, output: Tensor) -> Tensor:
        """The output as [n, C, h, w], without prefix tokens."""
        if self.kind == "nchw":
            return output
        if self.kind == "nhwc":
            return output.permute(0, 3, 1, 2)
        return output[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)

    def from_map(self, maps: Tensor, output: Tensor) -> Tensor:
        """The inverse of ``to_map``: maps [n, C, h, w] in the layout of the output; prefix tokens are those of ``output`` [1 or n, ...]."""
        if self.kind == "nchw":
            return maps
        if self.kind == "nhwc":
            return maps.permute(0, 2, 3, 1)
        tokens = maps.flatten(2).transpose(1, 2)
        return torch.cat([output[:, : self.prefix].expand(len(maps), -1, -1), tokens], dim=1)


@dataclass(frozen=True)
class _Call:
    name: str
    module: nn.Module
    inputs: Tensor | None
    output: Tensor
    alone: bool  # not the first of a tuple


def find_feature_layer(task: Task, layer: str | nn.Module | FeatureLayer | None = None) -> FeatureLayer:
    """The last module whose output is a map of the image, or the one named.

    In a transformer that reads its class token the patch tokens of the last block no longer matter, so the layer is the
    normalised input of the last attention, as is usual for class activation maps; otherwise it is the last map before pooling.

    Args:
        task: what is explained.
        layer: name of a module, the module itself, or a layer that this function returned; None finds one.

    Raises:
        UserError: no such module, or an output that is no map.
        NotApplicable: a black box, or no layer that returns a map.
    """
    if isinstance(layer, FeatureLayer):
        return layer
    calls = _record(task)
    if layer is not None:
        return _named(task, calls, layer)
    maps = [call for call in calls if not isinstance(call.module, nn.Identity) and _as_layer(task, calls, call) is not None]
    attended = [call for call in calls if _is_global_attention(task, calls, call)]
    tokens = attended[-1].inputs if attended else None
    if tokens is not None and reads_class_token(task, (_token_grid(calls, tokens.shape[1]) or ((0, 0), 0))[1]):
        before = [call for call in maps if call.output.data_ptr() == tokens.data_ptr()]
        if before:
            found = _as_layer(task, calls, before[-1])
            assert found is not None
            return found
    if not maps:
        raise NotApplicable(
            f"no layer of {task.classifier.name} has a map of the image as output: name one with layer=, "
            f"such as {', '.join([call.name for call in calls if call.name][-3:])}"
        )
    width = _head_width(task.classifier)
    fitting = [call for call in maps if width in (call.output.shape[1], call.output.shape[-1])] or maps
    found = _as_layer(task, calls, fitting[-1])
    assert found is not None
    return found


def map_layers(task: Task) -> list[FeatureLayer]:
    """Every module that is called once and returns a map of the image, in the order in which the calls end."""
    calls = _record(task)
    counts = Counter(call.module for call in calls)
    found = [_as_layer(task, calls, call) for call in calls if call.name and counts[call.module] == 1]
    return [layer for layer in found if layer is not None]


def token_grid(task: Task, tokens: int) -> tuple[tuple[int, int], int] | None:
    """((h, w), prefix) of a sequence of tokens, from the patch embedding or else from a square number; None if neither fits."""
    return _token_grid(_record(task), tokens)


def operations(task: Task) -> Counter[str]:
    """How often each activation, and each sum or product of two maps, runs in one forward pass, as a module or as a function."""
    if "operations" not in task.structure:
        task.structure["operations"] = _count_operations(task)
    return Counter(task.structure["operations"])


def _count_operations(task: Task) -> Counter[str]:
    counts: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name.removeprefix("aten::").removesuffix("_")
            if name == "add" and isinstance(args[1], Tensor) and args[0].ndim == args[1].ndim == 4:
                counts["residual sum"] += 1
            if name == "mul" and isinstance(args[1], Tensor) and args[0].ndim == args[1].ndim == 4:
                counts["product"] += 1
            if name == "max_pool2d_with_indices":
                counts[name] += 1
            name = name.lstrip("_")  # fused attention is called _scaled_dot_product_... on some devices
            if name in _NONLINEAR or name.startswith(_ATTENTION):
                counts["attention" if name.startswith(("scaled_dot_product", "native_multi")) else name] += 1
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        task.run()
    return counts


def module_calls(task: Task, kinds: tuple[type[nn.Module], ...]) -> Counter[nn.Module]:
    """How often each module of some kinds is called in one forward pass."""
    if "calls" not in task.structure:
        with counted_calls(list(task.module.modules())) as counts, torch.no_grad():
            task.run()
        task.structure["calls"] = counts
    return Counter({module: count for module, count in task.structure["calls"].items() if isinstance(module, kinds)})


def _record(task: Task) -> list[_Call]:
    """Every module's call in one forward pass, in the order in which the calls end."""
    calls: list[_Call] = []
    names = {module: name for name, module in task.module.named_modules() if hookable([module])}

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            inputs = args[0] if args and isinstance(args[0], Tensor) else None
            calls.append(_Call(names[module], module, inputs, first, first is output))

    with exclusive(task.module), removed_after([module.register_forward_hook(remember) for module in names]), torch.no_grad():
        task.run()
    return calls


def _named(task: Task, calls: list[_Call], layer: str | nn.Module) -> FeatureLayer:
    wanted = [call for call in calls if layer in (call.name, call.module)]
    if not wanted:
        known = [call.name for call in calls if call.name]
        raise UserError(
            f"{task.classifier.name} never calls a layer {layer if isinstance(layer, str) else describe(layer)!r}: "
            f"its last layers are {', '.join(known[-4:])}"
        )
    found = _as_layer(task, calls, wanted[-1])
    if found is None:
        returned = describe(wanted[-1].output) if wanted[-1].alone else "a tuple"
        raise UserError(
            f"layer {wanted[-1].name!r} of {task.classifier.name} returns {returned}: "
            "expected a map [n, C, h, w], [n, h, w, C] or tokens [n, N, C] of the image"
        )
    return found


def _as_layer(task: Task, calls: list[_Call], call: _Call) -> FeatureLayer | None:
    shape = tuple(call.output.shape)
    if not call.alone:
        return None
    if len(shape) == 4 and shape[0] == 1:
        width = _head_width(task.classifier)
        last = shape[1] == shape[2] != shape[3] if shape[1] != width != shape[3] else shape[3] == width != shape[1]
        grid = (shape[1], shape[2]) if last else (shape[2], shape[3])
        if min(grid) > 1:
            return FeatureLayer(call.name, call.module, "nhwc" if last else "nchw", grid)
    if len(shape) == 3 and shape[0] == 1:
        found = _token_grid(calls, shape[1])
        if found is not None:
            return FeatureLayer(call.name, call.module, "tokens", *found)
    return None


def _token_grid(calls: list[_Call], tokens: int) -> tuple[tuple[int, int], int] | None:
    for call in calls:
        convolution = call.module
        if isinstance(convolution, nn.Conv2d) and convolution.stride == convolution.kernel_size and min(convolution.stride) > 1:
            height, width = call.output.shape[-2:]
            if 0 <= tokens - height * width <= _MOST_PREFIX_TOKENS:
                return (int(height), int(width)), tokens - int(height * width)
            break
    for prefix in (0, 1, 2, 4, 5, 8):
        side = round(max(0, tokens - prefix) ** 0.5)
        if side > 1 and side * side == tokens - prefix:
            return (side, side), prefix
    return None


def _is_global_attention(task: Task, calls: list[_Call], call: _Call) -> bool:
    kind = type(call.module).__name__.lower()
    if "attention" not in kind or any(word in kind for word in ("window", "shifted", "swin", "pool")):
        return False
    tokens = call.inputs
    return tokens is not None and tokens.ndim == 3 and tokens.shape[0] == 1 and _token_grid(calls, tokens.shape[1]) is not None


def _head_width(classifier: Classifier) -> int:
    try:
        head = classifier.heads[0]
    except UserError:
        return -1
    return int(getattr(head, "in_features", None) or getattr(head, "in_channels", None) or -1)
