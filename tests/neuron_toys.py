"""Vision transformers small enough to follow, neuron paths computed by loops, and what a call must leave as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

import attribution as at

SIDE = 8


class ToyAttention(nn.Module):
    """One head, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / x.shape[-1] ** 0.5
        return self.proj(scores.softmax(dim=-1) @ self.value(x))


class Averaging(nn.Module):
    """The mean token, in the first half of the dimensions only: a linear attention."""

    def forward(self, x: Tensor) -> Tensor:
        first = torch.arange(x.shape[-1]) < x.shape[-1] // 2
        return (x.mean(dim=1, keepdim=True) * first).expand_as(x)


class ToyMlp(nn.Module):
    def __init__(self, width: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), act, nn.Linear(hidden, width)


class ToyBlock(nn.Module):
    def __init__(self, width: int, hidden: int, linear: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.Identity() if linear else nn.LayerNorm(width) for _ in range(2))
        self.attn = Averaging() if linear else ToyAttention(width)
        self.mlp = ToyMlp(width, hidden, nn.Identity() if linear else nn.GELU())


class ToyTransformer(nn.Module):
    """A pre-norm vision transformer whose hidden units can be set by an argument: no hooks are needed to follow it.

    ``linear``: without normalisation and activation; attention and MLPs read the first half of the dimensions and MLPs write to the
    second, which nothing but the head reads, so that the logits are linear in all neurons together.
    """

    def __init__(
        self,
        *,
        depth: int = 3,
        width: int = 8,
        hidden: int = 12,
        classes: int = 4,
        patch: int = 4,
        pooled: bool = False,
        linear: bool = False,
        seed: int = 0,
        deviation: float = 0.6,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, (SIDE // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(ToyBlock(width, hidden, linear) for _ in range(depth))
        self.norm = nn.Identity() if linear else nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.start, self.stop = (1, self.position.shape[1]) if pooled else (0, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=deviation, generator=generator)
            for block in self.blocks if linear else []:
                block.mlp.fc1.weight[:, width // 2 :] = 0
                block.mlp.fc2.weight[: width // 2] = 0
                block.mlp.fc2.bias[: width // 2] = 0
        self.eval()

    def stream(self, x: Tensor, edit: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """What enters the final normalisation; ``edit`` gets layer and hidden units [n, tokens, F] and returns what they become."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        for layer, block in enumerate(self.blocks):
            x = x + block.attn(block.norm1(x))
            hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)))
            if edit is not None:
                hidden = edit(layer, hidden)
            x = x + block.mlp.fc2(hidden)
        return x

    def forward(self, x: Tensor, edit: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        return self.head(self.norm(self.stream(x, edit))[:, self.start : self.stop].mean(dim=1))

    def at_tokens(self, change: Callable[[int, Tensor], Tensor]) -> Callable[[int, Tensor], Tensor]:
        """An edit that changes hidden units [n, T, F] at the tokens that the head reads."""

        def edit(layer: int, hidden: Tensor) -> Tensor:
            own = change(layer, hidden[:, self.start : self.stop])
            return torch.cat([hidden[:, : self.start], own, hidden[:, self.stop :]], dim=1)

        return edit


def toy_classifier(module: nn.Module, **options: object) -> at.Classifier:
    return at.Classifier(module, **{"size": SIDE, "scores": "logits", "name": "toy", "batch_size": 64, **options})


def toy_images(count: int, seed: int = 0) -> Tensor:
    """Model inputs [count, 3, SIDE, SIDE] of either sign."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def counting_toy(hidden: int, depth: int) -> ToyTransformer:
    """Every neuron is 1 and adds 0.01 to the second of two logits, the first being 0."""
    toy = ToyTransformer(depth=depth, hidden=hidden, classes=2, linear=True)
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.zero_()
        for block in toy.blocks:
            block.mlp.fc1.bias.fill_(1)
            block.mlp.fc2.weight[-1] = 0.01
        toy.head.weight[1, -1] = 1
    return toy


class Naive:
    """NeuronPath's definitions for one image, in float64: loops over layers, steps, tokens and neurons.

    Args:
        toy: of which a copy is used.
        x: [1, 3, h, w].
    """

    def __init__(self, toy: ToyTransformer, x: Tensor, target: int, steps: int, output: str = "probability") -> None:
        self.toy, self.x = copy.deepcopy(toy).double().requires_grad_(False), x.double()
        self.target, self.steps, self.output = target, steps, output
        self.layers, self.width = len(toy.blocks), toy.head.in_features if not len(toy.blocks) else toy.blocks[0].mlp.fc2.in_features
        self.hidden: list[Tensor] = []  # [T, F] of each layer, clean

        def keep(_layer: int, hidden: Tensor) -> Tensor:
            self.hidden.append(hidden[0])
            return hidden

        self.clean = self.score(self.x, self.toy.at_tokens(keep))
        self.tokens = len(self.hidden[0])

    def score(self, x: Tensor, edit: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        logits = self.toy(x, edit)[0]
        return logits.softmax(dim=0)[self.target] if self.output == "probability" else logits[self.target]

    def gradients(self, imposed: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """d score / d imposed hidden units [T, F]."""
        leaves = {layer: value.clone().requires_grad_() for layer, value in imposed.items()}
        score = self.score(self.x, self.toy.at_tokens(lambda layer, hidden: leaves[layer][None] if layer in leaves else hidden))
        return dict(zip(leaves, torch.autograd.grad(score, list(leaves.values())), strict=True))

    def scaled(self, layer: int, units: Sequence[int], alpha: float) -> Tensor:
        value = self.hidden[layer].clone()
        for unit in set(units):
            value[:, unit] *= alpha
        return value

    def joint_parts(self, path: Sequence[Sequence[int]], compat: bool = False) -> tuple[float, list[list[float]], list[list[float]]]:
        """Section 2: score, and activations and summed gradients of each neuron (added up over tokens)."""
        found = [self.gradients({i: self.scaled(i, units, k / self.steps) for i, units in enumerate(path)}) for k in range(self.steps)]
        total = 0.0
        for t in range(self.tokens):
            weights = gradients = 0.0
            for layer, units in enumerate(path):
                for unit in units[-1:] if compat else units:
                    weights += float(self.hidden[layer][t, unit])
                    gradients += sum(float(each[layer][t, unit]) for each in found)
            total += weights / self.steps * gradients
        activations = [[float(self.hidden[i][:, u].sum()) for u in units] for i, units in enumerate(path)]
        sums = [[sum(float(each[i][:, u].sum()) for each in found) for u in units] for i, units in enumerate(path)]
        return total / self.tokens, activations, sums

    def joint(self, path: Sequence[Sequence[int]], compat: bool = False) -> float:
        return self.joint_parts(path, compat)[0]

    def candidates(self, chosen: Sequence[Sequence[int]], compat: bool = False) -> list[float]:
        """Section 3: the value of every unit of the layer after those chosen."""
        layer = len(chosen)
        found = []
        for k in range(self.steps):
            imposed = {i: self.scaled(i, units, k / self.steps) for i, units in enumerate(chosen)}
            found.append(self.gradients({**imposed, layer: k / self.steps * self.hidden[layer]}))
        values = []
        for unit in range(self.width):
            value = 0.0
            for t in range(self.tokens):
                weight, gradient = float(self.hidden[layer][t, unit]), sum(float(each[layer][t, unit]) for each in found)
                for i, units in enumerate(chosen):
                    for u in units[-1:] if compat else units:
                        weight += float(self.hidden[i][t, u])
                        gradient += sum(float(each[i][t, u]) for each in found)
                value += weight / self.steps * gradient
            values.append(value)
        return values

    def search(self, top: int = 1, compat: bool = False) -> tuple[list[list[int]], list[list[float]]]:
        """Sections 3 and 5: the path, and the values of all units of each layer."""
        path: list[list[int]] = []
        values = []
        for _ in range(self.layers):
            values.append(self.candidates(path, compat))
            path.append(ranked(values[-1])[:top])
        return path, values

    def exact(self, reranked: int) -> list[list[int]]:
        """The best of the first candidates by the joint score of the path so far; that of mode "reference" where it ends up better."""
        path: list[list[int]] = []
        for _ in range(self.layers):
            candidates = ranked(self.candidates(path))[:reranked]
            path.append([max(candidates, key=lambda unit: self.joint([*path, [unit]]))])
        return max(path, self.search()[0], key=self.joint)

    def activation_values(self) -> list[list[float]]:
        return [hidden.sum(dim=0).tolist() for hidden in self.hidden]

    def influence_values(self) -> list[list[float]]:
        """Section 4, one derivative for each layer and step: what is there plus zero, by the zero."""
        values = []
        for layer in range(self.layers):
            total = torch.zeros(self.width, dtype=torch.float64)
            for k in range(self.steps):
                zero = torch.zeros(self.tokens, self.width, dtype=torch.float64, requires_grad=True)
                edit = self.toy.at_tokens(lambda i, hidden, layer=layer, zero=zero: hidden + zero if i == layer else hidden)
                total += torch.autograd.grad(self.score(k / self.steps * self.x, edit), zero)[0].sum(dim=0)
            values.append((total / (self.steps * self.tokens)).tolist())
        return values

    def layer_gradient_values(self) -> list[list[float]]:
        values = []
        for layer, hidden in enumerate(self.hidden):
            gradient = sum(self.gradients({layer: k / self.steps * hidden})[layer] for k in range(self.steps))
            values.append((hidden * gradient / self.steps).sum(dim=0).tolist())
        return values


def ranked(values: Sequence[float]) -> list[int]:
    """Indices, largest value first, the first index on ties."""
    return sorted(range(len(values)), key=lambda index: -values[index])


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Assert that the block leaves parameters, gradients, modes, hooks, attributes and random generators as they were."""
    before, grad_mode = _state(module), (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    random = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    yield
    after = _state(module)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value == after[name], name
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == grad_mode
    assert torch.equal(torch.get_rng_state(), random[0]) and np.random.get_state()[1].tolist() == random[1]  # noqa: NPY002


def _state(module: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, each in module.named_modules():
        hooks = (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks)
        found[f"module {name}"] = (id(each), each.training, [len(h) for h in hooks], sorted(vars(each)))
    for name, parameter in module.named_parameters():
        gradient = None if parameter.grad is None else parameter.grad.tolist()
        found[f"parameter {name}"] = (id(parameter), parameter.requires_grad, gradient, parameter.tolist())
    return found


class ViTSelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(x) @ self.key(x).transpose(1, 2) / x.shape[-1] ** 0.5).softmax(dim=-1) @ self.value(x)


class ViTDense(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.dense = nn.Linear(before, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class ViTAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.output = ViTSelfAttention(width), ViTDense(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.attention(x))


class ViTLayer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = ViTAttention(width), ViTDense(width, hidden), ViTDense(hidden, width)
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(nn.functional.gelu(self.intermediate(self.layernorm_after(x))))


class ViTModel(nn.Module):
    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(ViTLayer(width, hidden) for _ in range(depth))
        self.layernorm = nn.LayerNorm(width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.projection(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for layer in self.encoder.layer:
            x = layer(x)
        return self.layernorm(x)


class LikeHuggingFace(nn.Module):
    """Named, nested and returning its logits as ViTForImageClassification of Hugging Face does."""

    def __init__(self, width: int = 16, hidden: int = 32, depth: int = 2, classes: int = 5) -> None:
        super().__init__()
        self.vit, self.classifier = ViTModel(width, hidden, depth), nn.Linear(width, classes)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.classifier(self.vit(pixel_values)[:, 0]), hidden_states=None)
