"""PathFinder: the searches for neuron paths on a batch of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attribution.errors import UserError, describe
from attribution.hooks import frozen_parameters
from attribution.model.classifier import Classifier
from attribution.model.forwarding import even_chunks
from attribution.neurons.layers import NeuronLayers, find_neurons
from attribution.neurons.path import STEPS, Mode, NeuronPath, Output

RERANKED = 8  # candidates of a layer that the other modes try out
_SWEEPS = 3  # of the mode "removal" over the layers, at most
_ALL = None  # every unit of a layer is scaled


def _finding(method: Callable[..., list[NeuronPath]]) -> Callable[..., list[NeuronPath]]:
    """A method of ``PathFinder`` with gradients, whatever the caller's mode, and rows counted from the clean pass on."""

    @wraps(method)
    def find(self: PathFinder, *args: Any, **kwargs: Any) -> list[NeuronPath]:
        self.forwards, self.backwards = len(self), 0
        with torch.inference_mode(False), torch.enable_grad():
            return method(self, *args, **kwargs)

    return find


class PathFinder:
    """Finds and scores neuron paths for a batch of images, each with a target of its own.

    Rows of all images and steps are packed into batches of the classifier's batch size, which bounds the memory and never changes a
    result beyond rounding. Nothing is copied; the model leaves every call as it came.

    Args:
        classifier: of a vision transformer.
        inputs: float32 [B, 3, h, w], as ``Classifier.inputs`` returns them.
        targets: int [B], class indices.
        steps: m, points of the left Riemann sum, alpha = 0, 1/m ... (m-1)/m.
        output: what is differentiated, the target's "probability" (as published) or "logit".
        layers: of ``find_neurons``, found when None.

    Attributes:
        hidden: L tensors [B, T, F], the clean activations.
        target_scores: float32 [B], clean.
        forwards, backwards: rows passed by the last method, the clean pass included.

    Wang et al., "Discovering Influential Neuron Path in Vision Transformers" (NeuronPath), ICLR 2025.
    """

    def __init__(
        self,
        classifier: Classifier,
        inputs: Tensor,
        targets: Tensor | Sequence[int],
        *,
        steps: int = STEPS,
        output: Output = "probability",
        layers: NeuronLayers | None = None,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UserError(f"steps is {steps!r}: expected a whole number of at least 1")
        if output not in ("probability", "logit"):
            raise UserError(f"output={output!r}: expected 'probability' or 'logit'")
        self.classifier, self.steps, self.output = classifier, steps, output
        self.layers = find_neurons(classifier) if layers is None else layers
        with torch.inference_mode(False):
            self._start(inputs, targets)

    def _start(self, inputs: Tensor, targets: Tensor | Sequence[int]) -> None:
        self.inputs = inputs.detach().clone().to(self.classifier.device)
        self.targets = torch.as_tensor(targets, dtype=torch.long, device=self.inputs.device).reshape(-1)
        if len(self.targets) != len(self.inputs):
            raise UserError(f"{len(self.inputs)} images and {len(self.targets)} targets: give one for each")
        classes = self.classifier.num_classes
        if len(self.targets) and not 0 <= int(self.targets.min()) <= int(self.targets.max()) < classes:
            raise UserError(f"targets run from {int(self.targets.min())} to {int(self.targets.max())}: expected 0 to {classes - 1}")
        self.forwards = self.backwards = 0
        self.hidden, self.target_scores = self._clean()

    def __len__(self) -> int:
        return len(self.inputs)

    @_finding
    def search(self, mode: Mode = "reference", *, top: int = 1, compat: bool = False, reranked: int = RERANKED) -> list[NeuronPath]:
        """Layer-progressive search: in each layer the neuron whose joint score with those chosen before is largest.

        Mode "reference" scores all neurons of layer l in one pass in which the whole layer is scaled together:
        score_j = (h_l[j] / m + sum_{i<l} w_i / m) (sum_k g_kl[j] + sum_{i<l} sum_k g_ki), a surrogate for the joint score of the partial
        path. Mode "exact" computes the true joint score of the ``reranked`` best of these in every layer and takes the best; where
        the reference path ends up better, that one is returned, so that it is never worse. Mode "removal" looks for the neurons that
        the prediction rests on instead: it starts from the neurons of the largest h_l[j] / m sum_k g_kl[j], scaled together with those
        chosen before, and goes through the layers until nothing changes, three times at most: of the ``reranked`` best of a layer, the
        one without which, and without the rest of the path, the target is least.

        Args:
            mode: "reference", "exact" or "removal".
            top: K, neurons of each layer, best first; all of them are scaled together and enter the sums. Mode "reference" only.
            compat: the reference's top-K code, in which only the last of the K neurons of a layer enters the sums.
            reranked: r, candidates of the other modes.
        """
        if mode not in ("reference", "exact", "removal"):
            raise UserError(f"mode={mode!r}: expected 'reference', 'exact' or 'removal'")
        width = self.layers.width
        if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= width:
            raise UserError(f"top is {top!r}: expected a whole number from 1 to {width}, the hidden units of a layer")
        if isinstance(reranked, bool) or not isinstance(reranked, int) or reranked < 1:
            raise UserError(f"reranked is {reranked!r}: expected a whole number of at least 1")
        reranked = min(reranked, width)
        if mode != "reference" and top > 1:
            raise UserError(f"top={top} with mode={mode!r}: expected top=1, or mode='reference'")
        if mode == "removal":
            return self._searched_by_removal(reranked)
        found = self._searched(top, compat, 0, "reference")
        if mode == "reference":
            return found
        exact = self._searched(1, False, reranked, "exact")
        return [
            e if e.score >= f.score else replace(f, method="exact", forwards=e.forwards, backwards=e.backwards)
            for e, f in zip(exact, found, strict=True)
        ]

    @_finding
    def activation(self) -> list[NeuronPath]:
        """The neuron of the largest (signed) activation in every layer."""
        return self._independent([hidden.sum(dim=1) for hidden in self.hidden], "activation")

    @_finding
    def influence_pattern(self) -> list[NeuronPath]:
        """The neuron of the largest mean gradient while the image is scaled from zero, layers independent of one another.

        What the reference code of NeuronPath compares with, a simplification of influence patterns (Lu et al., 2021): the total
        derivative, not multiplied by the activation, whatever the other layers chose.
        """
        sums = [torch.zeros_like(hidden) for hidden in self.hidden]
        for owners, alphas in self._rows(torch.arange(len(self), device=self.inputs.device)):
            scaled = alphas[:, None, None, None] * self.inputs[owners]
            with self._differentiable():
                with self.layers.recorded() as hidden:
                    score = self._score(scaled.requires_grad_(), owners)
                gradients = torch.autograd.grad(score.sum(), [hidden[layer] for layer in range(len(self.layers))])
            self.forwards, self.backwards = self.forwards + len(owners), self.backwards + len(owners)
            for total, gradient in zip(sums, gradients, strict=True):
                total.index_add_(0, owners, self.layers.at_tokens(gradient))
        return self._independent([total.sum(dim=1) / (self.steps * self.layers.read) for total in sums], "influence_pattern")

    @_finding
    def layer_integrated_gradients(self) -> list[NeuronPath]:
        """The neuron of the largest integrated gradient in every layer, each layer scaled from zero on its own."""
        values = []
        everyone = torch.arange(len(self), device=self.inputs.device)
        for layer, hidden in enumerate(self.hidden):
            scaled: dict[int, Tensor | None] = {layer: _ALL}
            values.append((hidden / self.steps * self._gradients(everyone, scaled)[layer]).sum(dim=1))
        return self._independent(values, "layer_integrated_gradients")

    @_finding
    def random(self, like: Tensor, seeds: Sequence[int], *, nearest: int = 8) -> list[NeuronPath]:
        """Other neurons of about the same activation, layer by layer, drawn at random: a control of the same strength.

        Args:
            like: int64 [B, L], a path of each image.
            seeds: B whole numbers of at least 0, one for the draws of each image.
            nearest: how many neurons of the closest activations are drawn from.
        """
        if tuple(like.shape) != (len(self), len(self.layers)):
            raise UserError(f"like is {describe(like)}: expected a path for each image, int64 [{len(self)}, {len(self.layers)}]")
        if len(seeds) != len(self):
            raise UserError(f"{len(seeds)} seeds for {len(self)} images: give one for each")
        if not 1 <= nearest < self.layers.width:
            raise UserError(f"nearest is {nearest}: expected 1 to {self.layers.width - 1}")
        wanted = like.to(self.inputs.device)
        chosen, ranked = [], []
        for layer, hidden in enumerate(self.hidden):
            activations = hidden.sum(dim=1)
            own = wanted[:, layer, None]
            distance = (activations - activations.gather(1, own)).abs().scatter(1, own, torch.inf)
            order = distance.sort(dim=1, stable=True).indices[:, :nearest]
            draws = [np.random.default_rng([seed, layer]).integers(nearest) for seed in seeds]
            chosen.append(order.gather(1, torch.as_tensor(draws, device=order.device)[:, None]))
            ranked.append((order, -distance.gather(1, order)))
        return self._made(chosen, ranked, "random")

    def joint(self, neurons: Tensor, *, compat: bool = False, scored: Sequence[int] | None = None) -> Tensor:
        """Joint attribution scores of paths.

        With w the clean activations of a path's neurons and g_k their gradients when all of them are imposed at alpha_k w (every other
        unit of the same layers at its clean value), the score is (sum w / m) (sum_k sum g_k): the product of the sums, at each
        token that the head reads, averaged over these.

        Args:
            neurons: int64 [P, l] or [P, l, K], units of the first l layers.
            compat: see ``search``.
            scored: the image of each path; path p belongs to image p when None.

        Returns:
            float32 [P].
        """
        owners = torch.arange(len(self)) if scored is None else torch.as_tensor(scored)
        units = neurons.to(self.inputs.device)
        units = units[:, :, None] if units.ndim == 2 else units
        if len(units) != len(owners) or units.shape[1] > len(self.layers):
            raise UserError(f"neurons are {describe(neurons)}: expected [{len(owners)}, {len(self.layers)}], a unit of each layer")
        if units.numel() and not 0 <= int(units.min()) <= int(units.max()) < self.layers.width:
            raise UserError(f"neurons run from {int(units.min())} to {int(units.max())}: expected 0 to {self.layers.width - 1}")
        with torch.inference_mode(False), torch.enable_grad():
            return self._joint(units, owners.to(self.inputs.device), compat)[0]

    def _clean(self) -> tuple[list[Tensor], Tensor]:
        hidden: list[list[Tensor]] = [[] for _ in range(len(self.layers))]
        scores = []
        for rows in even_chunks(torch.arange(len(self)), rows_at_once(self.classifier)):
            with torch.no_grad(), self.classifier.in_float32(), self.layers.recorded() as found:
                scores.append(self._score(self.inputs[rows], rows))
            for layer, kept in enumerate(hidden):
                kept.append(self.layers.at_tokens(found[layer]).detach())
        self.forwards += len(self)
        return [torch.cat(kept) for kept in hidden], torch.cat(scores)

    def _searched(self, top: int, compat: bool, reranked: int, method: str) -> list[NeuronPath]:
        everyone = torch.arange(len(self), device=self.inputs.device)
        chosen: list[Tensor] = []
        ranked = []
        for layer, hidden in enumerate(self.hidden):
            scaled: dict[int, Tensor | None] = {**dict(enumerate(chosen)), layer: _ALL}
            gradients = self._gradients(everyone, scaled)
            activation = hidden / self.steps
            gradient = gradients[layer]
            if layer:
                weights = self._activations(chosen, everyone)
                activation = activation + _summed(weights, compat)[:, :, None] / self.steps
                gradient = gradient + _summed([gradients[i] for i in range(layer)], compat)[:, :, None]
            values = (activation * gradient).sum(dim=1)
            order = values.sort(dim=1, descending=True, stable=True).indices[:, : max(top, RERANKED, reranked)]
            values = values.gather(1, order)
            if reranked:
                order, values = self._reranked(chosen, order, reranked)
            chosen.append(order[:, :top])
            ranked.append((order, values))
        return self._made(chosen, ranked, method, compat)

    def _searched_by_removal(self, count: int) -> list[NeuronPath]:
        everyone = torch.arange(len(self), device=self.inputs.device)
        chosen: list[Tensor] = []
        ranked = []
        for layer, hidden in enumerate(self.hidden):
            scaled: dict[int, Tensor | None] = {**dict(enumerate(chosen)), layer: _ALL}
            values = (hidden / self.steps * self._gradients(everyone, scaled)[layer]).sum(dim=1)
            order = values.sort(dim=1, descending=True, stable=True).indices[:, : max(RERANKED, count)]
            chosen.append(order[:, :1])
            ranked.append((order, values.gather(1, order)))
        units = torch.cat(chosen, dim=1)
        owners = everyone.repeat_interleave(count)
        for _ in range(_SWEEPS):
            before = units.clone()
            for layer, (order, _) in enumerate(ranked):
                tried = units.repeat_interleave(count, dim=0)
                tried[:, layer] = order[:, :count].reshape(-1)
                scores = self._without(tried, owners).view(len(self), count)
                current = (order[:, :count] == units[:, layer, None]).float().argmax(dim=1, keepdim=True)
                best = scores.argmin(dim=1, keepdim=True)
                best = torch.where(scores.gather(1, best) < scores.gather(1, current), best, current)
                units[:, layer] = order.gather(1, best)[:, 0]
            if torch.equal(units, before):
                break
        return self._made(list(units.split(1, dim=1)), ranked, "removal")

    def _without(self, units: Tensor, owners: Tensor) -> Tensor:
        """The target's score [P] when units [P, l] of the first layers are 0."""
        found = []
        for rows in even_chunks(torch.arange(len(owners), device=owners.device), rows_at_once(self.classifier)):
            edits = {layer: _removing(units[rows, layer]) for layer in range(units.shape[1])}
            with torch.no_grad(), self.layers.edited(edits):
                found.append(self._score(self.inputs[owners[rows]], owners[rows]))
            self.forwards += len(rows)
        return torch.cat(found)

    def _reranked(self, chosen: Sequence[Tensor], order: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The first candidates of each image by the true joint score of the path that ends in them, best first, with these scores."""
        owners = torch.arange(len(self), device=order.device).repeat_interleave(count)
        before = [units.repeat_interleave(count, dim=0) for units in chosen]
        units = torch.stack([*before, order[:, :count].reshape(-1, 1)], dim=1)
        scores = self._joint(units, owners, False)[0].view(len(self), count).to(order.device)
        scores, best = scores.sort(dim=1, descending=True, stable=True)
        return order[:, :count].gather(1, best), scores

    def _independent(self, values: Sequence[Tensor], method: str) -> list[NeuronPath]:
        """The paths of the largest values [B, F] of each layer."""
        orders = [value.sort(dim=1, descending=True, stable=True).indices[:, :RERANKED] for value in values]
        ranked = [(order, value.gather(1, order)) for order, value in zip(orders, values, strict=True)]
        return self._made([order[:, :1] for order in orders], ranked, method)

    def _made(
        self, chosen: Sequence[Tensor], ranked: Sequence[tuple[Tensor, Tensor]], method: str, compat: bool = False
    ) -> list[NeuronPath]:
        owners = torch.arange(len(self), device=self.inputs.device)
        scores, weights, gradients = self._joint(torch.stack(list(chosen), dim=1), owners, compat)
        units = torch.stack(list(chosen), dim=1).cpu()  # [B, L, K]
        candidates = torch.stack([order for order, _ in ranked], dim=1).cpu()
        values = torch.stack([value for _, value in ranked], dim=1).float().cpu()
        totals = [torch.stack([part.sum(dim=1) for part in parts], dim=1).float().cpu() for parts in (weights, gradients)]
        single = units.shape[2] == 1
        return [
            NeuronPath(
                neurons=units[b, :, 0] if single else units[b],
                score=float(scores[b]),
                target=int(self.targets[b]),
                candidates=candidates[b],
                candidate_scores=values[b],
                activations=totals[0][b, :, 0] if single else totals[0][b],
                gradients=totals[1][b, :, 0] if single else totals[1][b],
                method=method,
                class_names=self.classifier.class_names,
                target_score=float(self.target_scores[b]),
                layers=self.layers.names,
                place=self.layers.place,
                forwards=self.forwards // len(self),
                backwards=self.backwards // len(self),
            )
            for b in range(len(self))
        ]

    def _joint(self, units: Tensor, owners: Tensor, compat: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Scores [P], and activations and summed gradients [P, T, K] of each layer, of units [P, l, K]."""
        by_layer = list(units.unbind(dim=1))
        gradients = self._gradients(owners, dict(enumerate(by_layer)))
        weights = self._activations(by_layer, owners)
        found = [gradients[layer] for layer in range(len(by_layer))]
        product = _summed(weights, compat) / self.steps * _summed(found, compat)
        return product.mean(dim=1).float().cpu(), weights, found

    def _activations(self, units: Sequence[Tensor], owners: Tensor) -> list[Tensor]:
        """Clean activations [P, T, K] of units [P, K] of the first layers."""
        return [_at_units(hidden[owners], each) for hidden, each in zip(self.hidden, units, strict=False)]

    def _gradients(self, owners: Tensor, scaled: Mapping[int, Tensor | None]) -> dict[int, Tensor]:
        """Sums over the steps of d target / d activation, with the neurons of some layers imposed at their clean values times alpha.

        Args:
            owners: int64 [P], the image of each path.
            scaled: by layer, the units int64 [P, K] that are scaled, all others being imposed as they are; None scales all. Layers
                that are not named run freely.

        Returns:
            by layer, [P, T, K] at the scaled units, or [P, T, F].
        """
        shape = (len(owners), self.layers.read)
        sums = {
            layer: self.hidden[layer].new_zeros(*shape, self.layers.width if units is None else units.shape[1])
            for layer, units in scaled.items()
        }
        paths = torch.arange(len(owners), device=owners.device)
        for rows, alphas in self._rows(paths):
            imposed = {}
            for layer, units in scaled.items():
                clean = self.hidden[layer][owners[rows]]
                imposed[layer] = (clean * alphas[:, None, None] if units is None else _scaled(clean, units[rows], alphas)).requires_grad_()
            with self._differentiable(), self.layers.overridden(imposed):
                score = self._score(self.inputs[owners[rows]].requires_grad_(), owners[rows])
                found = torch.autograd.grad(score.sum(), list(imposed.values()))
            self.forwards, self.backwards = self.forwards + len(rows), self.backwards + len(rows)
            for (layer, units), gradient in zip(scaled.items(), found, strict=True):
                sums[layer].index_add_(0, rows, gradient if units is None else _at_units(gradient, units[rows]))
        return sums

    def _rows(self, paths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Every path at every step, in batches: (paths [n], alphas [n])."""
        everything = torch.arange(self.steps * len(paths), device=paths.device)
        for rows in even_chunks(everything, rows_at_once(self.classifier)):
            yield paths[rows % len(paths)], torch.div(rows, len(paths), rounding_mode="floor") / self.steps

    def _score(self, inputs: Tensor, owners: Tensor) -> Tensor:
        logits = self.classifier.logits(inputs)
        values = logits.softmax(dim=1) if self.output == "probability" else logits
        return values.gather(1, self.targets[owners.to(self.targets.device), None])[:, 0]

    def _differentiable(self) -> Any:
        assert isinstance(self.classifier.module, nn.Module)
        return frozen_parameters(self.classifier.module)


def rows_at_once(classifier: Classifier) -> int:
    """Most rows of one forward pass under hooks, which must meet them all at once: no classifier of a chain may split them."""
    return min(each.batch_size for each in classifier.chain)


def _removing(units: Tensor) -> Callable[[Tensor], Tensor]:
    """Sets units [P] of neurons [P, T, F] to 0."""
    return lambda hidden: hidden.scatter(2, units[:, None, None].expand(-1, hidden.shape[1], 1), 0)


def _summed(values: Sequence[Tensor], compat: bool) -> Tensor:
    """The sum over layers and units of [P, T, K] -> [P, T]; the reference's top-K code keeps the last unit of a layer only."""
    return torch.stack([value[:, :, -1] if compat else value.sum(dim=2) for value in values]).sum(dim=0)


def _at_units(values: Tensor, units: Tensor) -> Tensor:
    """[P, T, F] at units [P, K] -> [P, T, K]."""
    return values.gather(2, units[:, None, :].expand(-1, values.shape[1], -1))


def _scaled(values: Tensor, units: Tensor, alphas: Tensor) -> Tensor:
    """A copy of [P, T, F] whose units [P, K] are multiplied by alphas [P]."""
    index = units[:, None, :].expand(-1, values.shape[1], -1)
    return values.scatter(2, index, values.gather(2, index) * alphas[:, None, None])
