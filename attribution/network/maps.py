"""Finds the layers of a network that return a map of the image, and how their tokens lie on it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from attribution.errors import NotApplicable, UserError, describe, such_as
from attribution.hooks import (
    counted_calls,
    edited_outputs,
    evaluation_mode,
    exclusive,
    frozen_parameters,
    hookable,
    record_inputs,
    record_outputs,
    removed_after,
)
from attribution.model.classifier import Classifier
from attribution.model.prototypes import PrototypeForward
from attribution.network.attention import Attention, AttentionRules, open_attention
from attribution.task import Task

MOST_PREFIX_TOKENS = 16  # class, distillation and register tokens
_MOST_STRETCH = math.log(2.5)  # between the proportions of a map and those of the input, of maps that are rounded to few positions
_ATTENTION_CALL = -1  # in the place of an address
_LEAST_ALIKE = 0.7  # correlation of tokens' places with those of their patches; a dozen shuffled ones reach it once in 100000
_MOST_TRIED = 32  # maps that are tested for whether everything passes them
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
_MOVES = frozenset(
    """view view_as reshape flatten unflatten permute transpose swapaxes squeeze unsqueeze movedim contiguous clone to float type_as chunk
    split tensor_split unbind cat concat stack __getitem__ select narrow index_select flip roll pad expand expand_as repeat unfold
    requires_grad_ __get__""".split()  # noqa: SIM905
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
    """The last module that returns a map of the image through which everything passes, or the one named.

    Found by gradients and dependence, not by names: the head has a gradient at the positions of the map, and depends on the image
    through this map alone. In a transformer whose head reads its class token, the patch tokens of the last block no longer matter; there
    the keys and values of the last attention have to depend on the image through the map alone. It is the normalised input of the last
    attention, as is usual for class activation maps.

    Args:
        task: what is explained.
        layer: name of a module, the module itself, or a layer that this function returned; None finds one.

    Raises:
        UserError: no such module, or an output that is no map.
        NotApplicable: a black box, no layer that returns a map, or none through which everything passes.
    """
    if layer is None and "feature layer" not in task.structure:
        with torch.enable_grad(), frozen_parameters(task.module):
            task.structure["feature layer"] = _found(task)
    if layer is None:
        layer = task.structure["feature layer"]
    found = layer if isinstance(layer, FeatureLayer) else _named(task, _record(task), layer)
    task.notes["layer"] = found.name
    return found


def probe_inputs(task: Task) -> Tensor:
    """Noise [1, channels, h, w] that requires gradients: what is found about a network with it does not depend on the image."""
    noise = torch.randn(task.inputs.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(task.inputs).requires_grad_()


def read_out(task: Task, inputs: Tensor) -> Tensor:
    """What the head reads, [1, D]: the features where the final layer is known, else the logits.

    Raises:
        NotApplicable: no gradient reaches the inputs.
    """
    values = _what_is_read(task, inputs)
    if not values.requires_grad:
        raise NotApplicable(
            f"no gradient flows through {task.classifier.name} to the image (does it run under torch.no_grad, or round its input?): "
            "use occlusion, rise or a region search"
        )
    return values


def _what_is_read(task: Task, inputs: Tensor) -> Tensor:
    if "head" not in task.structure:
        task.structure["head"] = bool(_heads(task.classifier))  # an unknown head would be looked for in every pass
    return task.classifier.features(inputs) if task.structure["head"] else task.classifier.logits(inputs)


def random_signs(values: Tensor) -> Tensor:
    """Random signs of the same shape: the direction in which gradients of vectors are taken."""
    drawn = torch.randint(0, 2, values.shape, generator=torch.Generator().manual_seed(1))
    return (2 * drawn - 1).to(values)


def in_place(maps: Tensor, inputs: Tensor) -> bool:
    """Whether positions of maps [1, C, h, w] depend on the inputs near their own place: a dozen rows and columns have to correlate.

    The place on which a position depends is the centre of its squared gradient. Convolutions between blocks widen and move it a little.
    """
    sides = torch.tensor(maps.shape[2:])
    places = (torch.rand(12, 2, generator=torch.Generator().manual_seed(2)) * sides).long()
    centres = []
    for row, column in places.tolist():
        values = maps[0, :, row, column]
        (gradient,) = torch.autograd.grad((values * random_signs(values)).sum(), inputs, retain_graph=True)
        strength = gradient[0].cpu().double().square().sum(dim=0)
        lines = (strength.sum(dim=1), strength.sum(dim=0))
        centres.append([float((line * torch.arange(len(line))).sum() / line.sum().clamp(min=1e-300)) for line in lines])
    own, found = places.double().T, torch.tensor(centres, dtype=torch.float64).T
    return all(float(torch.corrcoef(torch.stack([own[axis], found[axis]]))[0, 1]) > _LEAST_ALIKE for axis in range(2))


def _found(task: Task) -> FeatureLayer:
    calls, reached, attended = _probed(task)
    maps = _usable_maps(task, calls)
    if not maps:
        raise NotApplicable(
            f"no layer of {task.classifier.name} has a map of the image as output: name one with layer="
            f"{such_as([call.name for call in calls if call.name][-3:])}"
        )
    used = [(call, layer) for call, layer in maps if call.output.data_ptr() in reached] or maps  # a dead network has no gradient at all
    counts = Counter(call.module for call in calls)
    # an identity is named where nothing else returns the map
    tried = sorted(used[: -_MOST_TRIED - 1 : -1], key=lambda each: isinstance(each[0].module, nn.Identity))
    for call, layer in tried:
        others = [each for each in used if each[1].kind == layer.kind and each[1].grid != layer.grid] if attended else []
        if _carries_everything(task, call.module, counts[call.module], attended, others):
            while isinstance(layer.module, nn.Linear):  # queries, keys and values in one: their input is the map
                before = [(c, f) for c, f in used if call.inputs is not None and c.output.data_ptr() == call.inputs.data_ptr()]
                if not before or layer.kind != "tokens":
                    break
                call, layer = before[-1]
            _check_places(task, layer)
            return layer
    raise NotApplicable(
        f"{task.classifier.name} has no map of the image through which everything passes: its head reads several, or what passes beside "
        f"them; name one with layer={such_as(call.name for call, _ in used[-6:])}"
    )


def _check_places(task: Task, layer: FeatureLayer) -> None:
    """Refuse tokens that are not in the order of the patches. Attention, by which patches meet, is cut."""
    if layer.kind != "tokens":
        return
    inputs = probe_inputs(task)
    with open_attention(task.module, AttentionRules(context=Tensor.detach)) as attended, record_outputs([layer.module]) as calls:
        task.classifier.logits(inputs)
    maps = layer.to_map(calls[-1][1])
    if attended and maps.requires_grad and not in_place(maps, inputs):
        raise NotApplicable(
            f"the tokens of {task.classifier.name} at {layer.name!r} are not at the places of the patches (masked, shuffled or mixed?): "
            "use occlusion, rise or a region search"
        )


def _probed(task: Task) -> tuple[list[_Call], set[int], bool]:
    """All calls; addresses of outputs at whose image positions the head has a gradient; whether only the last attention reads patches."""
    reached: set[int] = set()
    calls: list[_Call] = []
    order: list[int] = []  # addresses of the outputs, and a mark for each attention

    def remember(call: _Call) -> None:
        calls.append(call)
        order.append(call.output.data_ptr())
        layer = _as_layer(task, calls, call)
        if layer is None or not call.output.requires_grad:
            return

        def note(gradient: Tensor, at: int = call.output.data_ptr()) -> None:
            if gradient is not None and layer.to_map(gradient).any():
                reached.add(at)

        call.output.register_hook(note)

    inputs = probe_inputs(task)
    read_out(task, inputs)  # what runs only once runs now
    with open_attention(task.module) as attentions, removed_after(_hooks(task, remember, lambda: _mark(order, attentions))):
        values = read_out(task, inputs)
    torch.autograd.grad((values * random_signs(values)).sum(), inputs, allow_unused=True)
    last = max((place for place, address in enumerate(order) if address == _ATTENTION_CALL), default=-1)
    return calls, reached, last >= 0 and not reached & set(order[last:])


def _mark(order: list[int], attentions: list[Attention]) -> None:
    """Mark each attention that was computed since the last call."""
    order.extend([_ATTENTION_CALL] * (len(attentions) - order.count(_ATTENTION_CALL)))


def _usable_maps(task: Task, calls: list[_Call]) -> list[tuple[_Call, FeatureLayer]]:
    """The calls before the head that return a map and are the last of their module."""
    heads = _heads(task.classifier)
    stop = next((place for place, call in enumerate(calls) if call.module in heads), len(calls))
    last = {call.module: place for place, call in enumerate(calls)}
    found = []
    for place, call in enumerate(calls[:stop]):
        layer = None if last[call.module] != place else _as_layer(task, calls, call)
        if layer is not None and call.name:
            found.append((call, layer))
    return found


def _carries_everything(task: Task, module: nn.Module, calls: int, attended: bool, others: Sequence[tuple[_Call, FeatureLayer]]) -> bool:
    """Whether the head depends on the image through a module alone; or the last attention does, where only it reads patches.

    In the second case none of the other maps, of another resolution, may be read beside: a second branch has a last attention too.
    """
    layers = {layer.module: layer for _, layer in others}
    edit = edited_outputs(module, Tensor.detach, calls)
    with edit, record_outputs(layers) as outputs, open_attention(task.module) as attentions:
        values = _what_is_read(task, probe_inputs(task))
    if not values.requires_grad:
        return True
    last = (attentions[-1].key, attentions[-1].value) if attended and attentions else ()
    if not last or any(each is not None and each.requires_grad for each in last):
        return False
    beside = [(layers[each], output) for each, output in dict(outputs).items() if output.requires_grad]
    signed = (values * random_signs(values)).sum()
    gradients = torch.autograd.grad(signed, [output for _, output in beside], allow_unused=True) if beside else ()
    return not any(g is not None and layer.to_map(g).any() for (layer, _), g in zip(beside, gradients, strict=True))


def map_layers(task: Task) -> list[FeatureLayer]:
    """Every module that is called once and returns a map of the image, in the order in which the calls end."""
    calls = _record(task)
    counts = Counter(call.module for call in calls)
    found = [_as_layer(task, calls, call) for call in calls if call.name and counts[call.module] == 1]
    return [layer for layer in found if layer is not None]


def token_grid(task: Task, tokens: int) -> tuple[tuple[int, int], int] | None:
    """((h, w), prefix) of a sequence of tokens, from the patch embedding or else from a square number; None if neither fits."""
    return _token_grid(task, _record(task), tokens)


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


def functions_between(task: Task) -> Counter[str]:
    """How often each function of torch changes values that depend on the image, outside of the modules without parts.

    Functions that only move values to other places do not count.
    """
    counts: Counter[str] = Counter()
    inside = [0]

    class Count(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            parts = output if isinstance(output, tuple | list) else (output,)
            depends = any(isinstance(part, Tensor) and part.requires_grad for part in parts)
            if not inside[0] and depends and func.__name__ not in _MOVES and not _same_values(args, output):
                counts[func.__name__] += 1
            return output

    def enter(*_: Any) -> None:
        inside[0] += 1

    def leave(*_: Any) -> None:
        inside[0] -= 1

    leaves = [module for module in task.module.modules() if not list(module.children())]
    handles = [each.register_forward_pre_hook(enter) for each in leaves] + [each.register_forward_hook(leave) for each in leaves]
    with torch.enable_grad(), frozen_parameters(task.module), removed_after(handles):
        inputs = task.leaf()
        with Count():
            task.scores("logit")(inputs)
    return counts


def _same_values(args: Any, output: Any) -> bool:
    """Whether a function returned the values of its first argument, in their order."""
    given = args[0] if args else None
    if not isinstance(given, Tensor) or not isinstance(output, Tensor) or given.numel() != output.numel():
        return False
    return torch.equal(given.flatten(), output.flatten())


def module_calls(task: Task, kinds: tuple[type[nn.Module], ...]) -> Counter[nn.Module]:
    """How often each module of some kinds is called in one forward pass."""
    if "calls" not in task.structure:
        with counted_calls(list(task.module.modules())) as counts, torch.no_grad():
            task.run()
        task.structure["calls"] = counts
    return Counter({module: count for module, count in task.structure["calls"].items() if isinstance(module, kinds)})


def elementwise_modules(task: Task) -> list[nn.Module]:
    """The modules without parts or parameters that map each value by one function with f(0) = 0, such as activations."""
    leaves = [m for m in task.module.modules() if not [*m.children(), *m.parameters(), *m.buffers()] and not isinstance(m, nn.Dropout)]
    found = []
    with torch.no_grad(), evaluation_mode(task.module):
        with record_inputs(leaves) as calls:
            task.run()
        for module, values in dict(calls).items():
            half = values * (torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) < 0.5).to(values)
            whole, part = module(values.clone()), module(half.clone())
            if isinstance(whole, Tensor) and whole.shape == values.shape and torch.allclose(part, torch.where(half == 0, 0, whole)):
                found.append(module)
    return found


def _record(task: Task) -> list[_Call]:
    """Every module's call in one forward pass, in the order in which the calls end."""
    calls: list[_Call] = []
    with exclusive(task.module), removed_after(_hooks(task, calls.append)), torch.no_grad():
        task.run()
    return calls


def _hooks(task: Task, remember: Callable[[_Call], None], before: Callable[[], None] = lambda: None) -> list[RemovableHandle]:
    """Hooks that tell each call of a module when it ends; ``before`` is called first, also when a module is called."""
    names = {module: name for name, module in task.module.named_modules() if hookable([module])}

    def end(module: nn.Module, args: Any, output: Any) -> None:
        before()
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            inputs = args[0] if args and isinstance(args[0], Tensor) else None
            remember(_Call(names[module], module, inputs, first, first is output))

    return [module.register_forward_hook(end) for module in names] + [
        module.register_forward_pre_hook(lambda _module, _args: before()) for module in names
    ]


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
        last = _channels_are_last(task, shape)
        grid = (shape[1], shape[2]) if last else (shape[2], shape[3])
        if min(grid) > 1 and _stretch(task, grid) <= _MOST_STRETCH:
            return FeatureLayer(call.name, call.module, "nhwc" if last else "nchw", grid)
    if len(shape) == 3 and shape[0] == 1:
        found = _token_grid(task, calls, shape[1])
        if found is not None:
            return FeatureLayer(call.name, call.module, "tokens", *found)
    return None


def _stretch(task: Task, grid: tuple[int, int]) -> float:
    """How far the sides of a grid are from the proportions of the model input, as the logarithm of a factor."""
    return abs(math.log(grid[0] / grid[1] * task.size[1] / task.size[0]))


def _channels_are_last(task: Task, shape: tuple[int, ...]) -> bool:
    """Whether [1, a, b, c] is a map of a x b positions rather than of b x c: the one whose sides are in the input's proportions."""
    last, first = _stretch(task, (shape[1], shape[2])), _stretch(task, (shape[2], shape[3]))
    if last != first:
        return last < first
    return shape[3] == _head_width(task.classifier) != shape[1]


def _token_grid(task: Task, calls: list[_Call], tokens: int) -> tuple[tuple[int, int], int] | None:
    for call in calls:
        convolution = call.module
        if isinstance(convolution, nn.Conv2d) and convolution.stride == convolution.kernel_size and min(convolution.stride) > 1:
            height, width = call.output.shape[-2:]
            if 0 <= tokens - height * width <= MOST_PREFIX_TOKENS:
                return (int(height), int(width)), tokens - int(height * width)
            break
    for prefix in (0, 1, 2, 4, 5, 8):
        patches = max(0, tokens - prefix)
        rows = round((patches * task.size[0] / task.size[1]) ** 0.5)
        if rows > 1 and patches % rows == 0 and patches // rows == round(rows * task.size[1] / task.size[0]) > 1:
            return (rows, patches // rows), prefix
    return None


def _heads(classifier: Classifier) -> list[nn.Module]:
    if isinstance(classifier.forward, PrototypeForward) and classifier.forward.takes_output:
        return []
    try:
        return classifier.heads
    except UserError:
        return []


def _head_width(classifier: Classifier) -> int:
    head = next(iter(_heads(classifier)), None)
    return int(getattr(head, "in_features", None) or getattr(head, "in_channels", None) or -1)
