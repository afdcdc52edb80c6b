"""Finds the neurons of a vision transformer: the hidden units of its MLPs, at the tokens that its head reads.

A neuron is an entry of the tensor that enters an MLP's last linear layer (the down projection): after the activation, after the gate
of a gated MLP and after a normalisation between them, before the projection and layer scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attribution.errors import NotApplicable, UserError
from attribution.hooks import edited_inputs, frozen_parameters, record_inputs, record_outputs, removed_after
from attribution.model.classifier import Classifier
from attribution.network.attention import open_attention
from attribution.network.maps import MOST_PREFIX_TOKENS


@dataclass(frozen=True, eq=False)
class NeuronLayers:
    """The MLPs of a vision transformer, and the tokens that its head reads. A neuron is a unit of an MLP at these tokens.

    Attributes:
        names: of the down projections, input to output, L of them.
        modules: the down projections; their inputs are the neurons.
        width: F, hidden units of each MLP.
        positions: of the tokens that the head reads, T of them: the class token, class and distillation token, the patches, or the class
            token and the patches.
        tokens: number of all tokens.
        grid: (h, w) of the patches, which are the last h w tokens; None if it could not be found.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Linear, ...]
    width: int
    positions: tuple[int, ...]
    tokens: int
    grid: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def read(self) -> int:
        """T, the number of tokens that the head reads."""
        return len(self.positions)

    @property
    def place(self) -> str:
        """These tokens in words."""
        if self.read == 1:
            return "class token" if self.positions == (0,) else f"token {self.positions[0]}"
        if self.positions[:2] == (0, 1):
            return "class and distillation token" if self.read == 2 else f"{self.read} tokens that the head pools"
        return (
            f"class token and {self.read - 1} tokens that the head pools"
            if self.positions[0] == 0
            else f"{self.read} tokens that the head pools"
        )

    def at_tokens(self, hidden: Tensor) -> Tensor:
        """The part of [n, tokens, F] at the tokens that the head reads: [n, T, F]."""
        return hidden[:, self._index]

    @property
    def _index(self) -> slice | list[int]:
        first, last = self.positions[0], self.positions[-1]
        return slice(first, last + 1) if last - first + 1 == self.read else list(self.positions)  # a slice copies nothing

    @contextmanager
    def recorded(self) -> Iterator[dict[int, Tensor]]:
        """Collect the hidden activations [n, tokens, F] of each layer, by its number, in one forward pass."""
        found: dict[int, Tensor] = {}
        with record_inputs(self.modules) as calls:
            yield found
        number = {module: index for index, module in enumerate(self.modules)}
        found.update({number[module]: hidden for module, hidden in calls if isinstance(module, nn.Linear)})

    @contextmanager
    def overridden(self, values: Mapping[int, Tensor]) -> Iterator[None]:
        """Run the block with the neurons of some layers at given values [n, T, F]; at other tokens nothing changes."""

        def imposing(value: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda _hidden: value

        with self.edited({layer: imposing(value) for layer, value in values.items()}):
            yield

    @contextmanager
    def edited(self, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Run the block with the neurons [n, T, F] of some layers replaced by ``edits[layer]`` of them."""

        def replacing(edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def replace(hidden: Tensor) -> Tensor:
                changed = hidden.clone()
                changed[:, self._index] = edit(self.at_tokens(hidden))
                return changed

            return replace

        with edited_inputs({self.modules[layer]: replacing(edit) for layer, edit in edits.items()}):
            yield


def find_neurons(classifier: Classifier, layers: Sequence[str] | None = None) -> NeuronLayers:
    """Find the MLPs of a vision transformer (timm, torchvision, Hugging Face) and the tokens that its head reads.

    The tokens are those of the last MLP on which the logits have a gradient: after it, only the pooling of the head mixes tokens. So a
    class token is found among register tokens, both tokens of a distilled model, and all patches where the head pools.

    Args:
        classifier: of images.
        layers: names of the down projections, input to output. None finds them: linear layers from [n, tokens, F] to [n, tokens, D]
            that follow one from D to F (or to 2 F, for a gate), with no attention between them. The MLP of a head that pools the
            tokens into one is left out.

    Raises:
        NotApplicable: no such layers, or neurons that cannot be compared from layer to layer, with the reason.
        UserError: no layer of a given name.
    """
    module = classifier.module
    if not isinstance(module, nn.Module):
        raise NotApplicable(f"{classifier.name} is a black box: neurons need an nn.Module")
    with torch.inference_mode(False), torch.enable_grad(), frozen_parameters(module):
        calls, logits, maps = _run(classifier, module)
        chosen = _named(classifier, module, calls, layers) if layers is not None else _found(classifier, calls)
        widths, tokens = {call.module.in_features for call in chosen}, {call.hidden.shape[1] for call in chosen}
        if len(widths) > 1:
            raise _refused(classifier, f"its MLPs have {_some(widths)} hidden units: expected as many in each")
        if len(tokens) > 1:
            raise _refused(classifier, f"its MLPs see {_some(tokens)} tokens: expected as many in each (no merging, no late class token)")
        mlps = [call.hidden for call in calls if call.module.in_features in widths and call.hidden.shape[1:-1] == (max(tokens),)]
        positions = _tokens_read(classifier, mlps[-1], logits)
    names, modules = tuple(call.name for call in chosen), tuple(call.module for call in chosen)
    count = tokens.pop()
    fitting = [grid for grid in maps if 0 <= count - grid[0] * grid[1] <= MOST_PREFIX_TOKENS]
    return NeuronLayers(names, modules, widths.pop(), positions, count, fitting[-1] if fitting else None)


@dataclass(frozen=True, eq=False)
class _Call:
    name: str
    module: nn.Linear
    hidden: Tensor  # what entered it
    attentions: int  # how many ran before
    pools: bool  # part of a module that makes one vector of the tokens


def _run(classifier: Classifier, module: nn.Module) -> tuple[list[_Call], Tensor, list[tuple[int, int]]]:
    """One forward pass: the calls of all linear layers, the logits, and the sizes of the maps that convolutions returned."""
    names = {each: name for name, each in module.named_modules() if isinstance(each, nn.Linear)}
    convolutions = [each for each in module.modules() if isinstance(each, nn.Conv2d)]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *classifier.preprocessing.shape, generator=generator).to(classifier.device)
    with torch.no_grad():
        classifier.logits(noise)  # passes that are made once must not be recorded
    made: list[tuple[nn.Linear, Tensor, int]] = []
    pooling: set[nn.Module] = set()

    def enter(linear: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].requires_grad and isinstance(linear, nn.Linear):
            made.append((linear, args[0], len(attentions)))

    def leave(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and (args[0].ndim, output.ndim) == (3, 2):
            pooling.update(part.modules())

    handles = [each.register_forward_pre_hook(enter) for each in names] + [each.register_forward_hook(leave) for each in module.modules()]
    with open_attention(module) as attentions, record_outputs(convolutions) as maps, removed_after(handles):
        logits = classifier.logits(noise.requires_grad_())
    sizes = [(found.shape[-2], found.shape[-1]) for _, found in maps]
    return [_Call(names[each], each, hidden, ran, each in pooling) for each, hidden, ran in made], logits, sizes


def _found(classifier: Classifier, calls: Sequence[_Call]) -> list[_Call]:
    chosen, before = [], set[tuple[int, int]]()
    for place, call in enumerate(calls):
        if place and call.attentions > calls[place - 1].attentions:
            before = set()
        if call.hidden.ndim != 3 or (call.pools and call.hidden.shape[1] == 1):
            continue
        hidden, out = call.module.in_features, call.module.out_features
        if hidden != out and before & {(out, hidden), (out, 2 * hidden)}:
            chosen.append(call)
            before = set()
        else:
            before.add((hidden, out))
    streams = {call.module.out_features for call in chosen}
    if len(streams) > 1:
        raise _refused(
            classifier, f"its tokens have {_some(streams)} channels, as where merging makes them fewer and wider: expected one width"
        )
    if not chosen:
        raise _refused(classifier, "no MLP over tokens was found in it: expected a vision transformer; name the down projections as layers")
    if len({call.module for call in chosen}) < len(chosen):
        raise _refused(classifier, "it runs one MLP several times in a pass, so that its layers cannot be told apart")
    return chosen


def _named(classifier: Classifier, module: nn.Module, calls: Sequence[_Call], layers: Sequence[str]) -> list[_Call]:
    known = dict(module.named_modules())
    chosen: list[_Call] = []
    for name in layers:
        if name not in known:
            raise UserError(f"{classifier.name} has no layer {name!r}: expected names of down projections, such as blocks.0.mlp.fc2")
        fitting = [call for call in calls if call.module is known[name]]
        if len(fitting) != 1 or fitting[0].hidden.ndim != 3:
            found = f"{name} of {classifier.name} was called {len(fitting)} times as a linear layer"
            raise UserError(f"{found}: expected one called once on [n, tokens, F]")
        if chosen and calls.index(fitting[0]) <= calls.index(chosen[-1]):
            raise UserError(f"layers name {name} after {chosen[-1].name}: expected each once, from input to output")
        chosen += fitting
    if not chosen:
        raise UserError("layers is empty: name at least one down projection")
    return chosen


def _tokens_read(classifier: Classifier, hidden: Tensor, logits: Tensor) -> tuple[int, ...]:
    """The tokens of the last MLP on which the logits depend."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.device)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), hidden, allow_unused=True)
    read = [] if gradient is None else gradient[0].ne(0).any(dim=1).nonzero()[:, 0].tolist()
    if not read:
        raise _refused(classifier, "its logits do not depend on its last MLP at all")
    return tuple(read)


def _refused(classifier: Classifier, reason: str) -> NotApplicable:
    return NotApplicable(f"neurons of {classifier.name} cannot be followed: {reason}")


def _some(numbers: Sequence[int] | set[int]) -> str:
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered[:6])) + (" ..." if len(ordered) > 6 else "")
