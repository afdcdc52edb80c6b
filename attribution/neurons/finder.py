"""Search for neuron paths on a batch of images: NeuronPath (Wang et al., ICLR 2025) in three modes, its baselines and its score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attribution.checks import check_choice, check_whole
from attribution.errors import UserError, describe
from attribution.hooks import frozen_parameters
from attribution.model.classifier import Classifier
from attribution.model.forwarding import even_chunks
from attribution.neurons.layers import NeuronLayers, find_neurons
from attribution.neurons.path import STEPS, Mode, NeuronPath, Output

RERANKED = 8  # candidates of a layer that the modes "exact" and "removal" evaluate
_SWEEPS = 3  # at most, of the mode "removal" over the layers
_ALL = None  # scale every unit of a layer


def _finding(method: Callable[..., list[NeuronPath]]) -> Callable[..., list[NeuronPath]]:
    """Let a method of ``PathFinder`` compute gradients in any mode of the caller, and count its rows from the clean pass on."""

    @wraps(method)
    def find(self: PathFinder, *args: Any, **kwargs: Any) -> list[NeuronPath]:
        self.forwards, self.backwards = len(self), 0
        with torch.inference_mode(False), torch.enable_grad():
            return method(self, *args, **kwargs)

    return find


class PathFinder:
    """Find and score neuron paths for a batch of images, each with its own target.

    The rows of all images and steps are packed into batches of the classifier's batch size. The batch size limits the memory and
    changes results by rounding errors only. The model is not copied and is unchanged after every call.

    Args:
        classifier: of a vision transformer.
        inputs: float32 [B, 3, h, w], as ``Classifier.inputs`` returns them.
        targets: int [B], class indices.
        steps: m, number of points of the left Riemann sum, alpha = 0, 1/m, ..., (m-1)/m.
        output: the function that is differentiated, the target's "probability" (as published) or its "logit".
        layers: from ``find_neurons``; None to find them.

    Attributes:
        hidden: L tensors [B, T, F], the activations of the clean (unedited) pass at the T tokens that the head reads.
        target_scores: float32 [B], of the clean pass.
        forwards, backwards: number of rows that the last method passed forward and backward, including the clean pass.

    Raises:
        NotApplicable: the model is no vision transformer whose neurons can be recorded.
        UserError: any wrong argument.

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
        check_whole("steps", steps, 1)
        check_choice("output", output, ("probability", "logit"))
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
        """Layer-progressive search: in each layer, the neuron with the largest joint score together with those chosen before.

        Mode "reference" scores all neurons of layer l in one pass, in which the whole layer is scaled together:
        score_j = (h_l[j] / m + sum_{i<l} w_i / m) (sum_k g_kl[j] + sum_{i<l} sum_k g_ki). This is a surrogate for the joint score of
        the partial path.

        Mode "exact" computes the true joint score of the ``reranked`` best candidates of each layer and takes the best. If the path
        of mode "reference" scores higher in the end, that path is returned.

        Mode "removal" looks for the neurons whose removal lowers the target most. It starts from the neurons with the largest
        h_l[j] / m sum_k g_kl[j], scaled together with those chosen before. Then it goes through the layers, at most three times,
        until nothing changes. In each layer it takes the one of the ``reranked`` best candidates for which the target is lowest
        when the candidate and the rest of the path are removed.

        Args:
            mode: "reference", "exact" or "removal".
            top: K, neurons in each layer, best first. All K are scaled together and enter the sums. Mode "reference" only.
            compat: compute like the reference's top-K code: only the last of a layer's K neurons enters the sums.
            reranked: r, number of candidates of the modes "exact" and "removal".

        Raises:
            UserError: any wrong argument.
        """
        check_choice("mode", mode, ("reference", "exact", "removal"))
        check_whole("top", top, 1, self.layers.width)
        check_whole("reranked", reranked, 1)
        reranked = min(reranked, self.layers.width)
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
        """The neuron with the largest (signed) activation in each layer."""
        return self._independent([hidden.sum(dim=1) for hidden in self.hidden], "activation")

    @_finding
    def influence_pattern(self) -> list[NeuronPath]:
        """The neuron with the largest mean gradient in each layer while the image is scaled from 0 to itself.

        The baseline of NeuronPath's reference code, a simplification of influence patterns (Lu et al., 2021): it takes the total
        derivative, does not multiply it by the activation, and treats each layer on its own.
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
        """The neuron with the largest integrated gradient in each layer; each layer is scaled from 0 on its own."""
        values = []
        everyone = torch.arange(len(self), device=self.inputs.device)
        for layer, hidden in enumerate(self.hidden):
            scaled: dict[int, Tensor | None] = {layer: _ALL}
            values.append((hidden / self.steps * self._gradients(everyone, scaled)[layer]).sum(dim=1))
        return self._independent(values, "layer_integrated_gradients")

    @_finding
    def random(self, like: Tensor, seeds: Sequence[int], *, nearest: int = 8) -> list[NeuronPath]:
        """A control: random neurons whose activations are close to those of a given path, layer by layer.

        Args:
            like: int64 [B, L], the given path of each image. Its own neurons are not drawn.
            seeds: B whole numbers of at least 0, one for the draws of each image.
            nearest: number of neurons with the closest activations that each draw chooses from.

        Raises:
            UserError: arrays of other shapes, or nearest out of range.
        """
        if tuple(like.shape) != (len(self), len(self.layers)):
            raise UserError(f"like is {describe(like)}: expected a path for each image, int64 [{len(self)}, {len(self.layers)}]")
        if len(seeds) != len(self):
            raise UserError(f"{len(seeds)} seeds for {len(self)} images: give one for each")
        check_whole("nearest", nearest, 1, self.layers.width - 1)
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

        The score is (sum w / m) (sum_k sum g_k), the mean over the tokens that the head reads. w are the clean activations of the
        path's neurons. g_k are the neurons' gradients when all of them are set to alpha_k w and every other unit of the same layers
        to its clean value.

        Args:
            neurons: int64 [P, l] or [P, l, K], units of the first l layers.
            compat: see ``search``.
            scored: int [P], the image of each path; by default path p belongs to image p.

        Returns:
            float32 [P].

        Raises:
            UserError: neurons of another shape or out of range.
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
        return self._made(*self._progressive(max(top, RERANKED, reranked), top, compat, reranked), method, compat)

    def _progressive(
        self, kept: int, top: int = 1, compat: bool = False, reranked: int = 0, joint: bool = True
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Layer by layer, the ``top`` units that are chosen [B, top], and the best ``kept`` ones [B, kept] with their values.

        A unit's value is its score together with those chosen before; where not ``joint``, its own, while these are scaled with it.
        """
        everyone = torch.arange(len(self), device=self.inputs.device)
        chosen: list[Tensor] = []
        ranked = []
        for layer, hidden in enumerate(self.hidden):
            scaled: dict[int, Tensor | None] = {**dict(enumerate(chosen)), layer: _ALL}
            gradients = self._gradients(everyone, scaled)
            activation = hidden / self.steps
            gradient = gradients[layer]
            if layer and joint:
                weights = self._activations(chosen, everyone)
                activation = activation + _summed(weights, compat)[:, :, None] / self.steps
                gradient = gradient + _summed([gradients[i] for i in range(layer)], compat)[:, :, None]
            order, values = _best((activation * gradient).sum(dim=1), kept)
            if reranked:
                order, values = self._reranked(chosen, order, reranked)
            chosen.append(order[:, :top])
            ranked.append((order, values))
        return chosen, ranked

    def _searched_by_removal(self, count: int) -> list[NeuronPath]:
        everyone = torch.arange(len(self), device=self.inputs.device)
        chosen, ranked = self._progressive(max(RERANKED, count), joint=False)
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
        """The target's score [P] with units [P, l] of the first l layers set to 0."""
        found = []
        for rows in even_chunks(torch.arange(len(owners), device=owners.device), rows_at_once(self.classifier)):
            edits = {layer: _removing(units[rows, layer]) for layer in range(units.shape[1])}
            with torch.no_grad(), self.layers.edited(edits):
                found.append(self._score(self.inputs[owners[rows]], owners[rows]))
            self.forwards += len(rows)
        return torch.cat(found)

    def _reranked(self, chosen: Sequence[Tensor], order: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count`` candidates of each image, sorted by the true joint score of the path that ends in them, and these scores."""
        owners = torch.arange(len(self), device=order.device).repeat_interleave(count)
        before = [units.repeat_interleave(count, dim=0) for units in chosen]
        units = torch.stack([*before, order[:, :count].reshape(-1, 1)], dim=1)
        scores = self._joint(units, owners, False)[0].view(len(self), count).to(order.device)
        scores, best = scores.sort(dim=1, descending=True, stable=True)
        return order[:, :count].gather(1, best), scores

    def _independent(self, values: Sequence[Tensor], method: str) -> list[NeuronPath]:
        """The paths that take the unit with the largest value [B, F] in each layer."""
        ranked = [_best(value, RERANKED) for value in values]
        return self._made([order[:, :1] for order, _ in ranked], ranked, method)

    def _made(
        self, chosen: Sequence[Tensor], ranked: Sequence[tuple[Tensor, Tensor]], method: str, compat: bool = False
    ) -> list[NeuronPath]:
        owners = torch.arange(len(self), device=self.inputs.device)
        units = torch.stack(list(chosen), dim=1)  # [B, L, K]
        scores, weights, gradients = self._joint(units, owners, compat)
        candidates = torch.stack([order for order, _ in ranked], dim=1).cpu()
        values = torch.stack([value for _, value in ranked], dim=1).float().cpu()
        totals = [torch.stack([part.sum(dim=1) for part in parts], dim=1).float().cpu() for parts in (weights, gradients)]
        units, *totals = (each.squeeze(2) for each in (units, *totals))  # K = 1 has no axis of its own
        return [
            NeuronPath(
                neurons=units[b].cpu(),
                score=float(scores[b]),
                target=int(self.targets[b]),
                candidates=candidates[b],
                candidate_scores=values[b],
                activations=totals[0][b],
                gradients=totals[1][b],
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
        """Of units [P, l, K]: scores [P], and the activations and summed gradients [P, T, K] of each layer."""
        by_layer = list(units.unbind(dim=1))
        gradients = self._gradients(owners, dict(enumerate(by_layer)))
        weights = self._activations(by_layer, owners)
        found = [gradients[layer] for layer in range(len(by_layer))]
        product = _summed(weights, compat) / self.steps * _summed(found, compat)
        return product.mean(dim=1).float().cpu(), weights, found

    def _activations(self, units: Sequence[Tensor], owners: Tensor) -> list[Tensor]:
        """Clean activations [P, T, K] of units [P, K] in each of the first layers."""
        return [_at_units(hidden[owners], each) for hidden, each in zip(self.hidden, units, strict=False)]

    def _gradients(self, owners: Tensor, scaled: Mapping[int, Tensor | None]) -> dict[int, Tensor]:
        """Sum d target / d activation over the steps, with units of some layers set to alpha times their clean activations.

        Args:
            owners: int64 [P], the image of each path.
            scaled: for each layer that is set, its units int64 [P, K] that are scaled; its other units get their clean activations.
                None scales all units. Other layers compute as usual.

        Returns:
            for each of these layers [P, T, K] at the scaled units, or [P, T, F] if all are scaled.
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
        """Each path at each step, in batches: (paths [n], alphas [n])."""
        everything = torch.arange(self.steps * len(paths), device=paths.device)
        for rows in even_chunks(everything, rows_at_once(self.classifier)):
            yield paths[rows % len(paths)], torch.div(rows, len(paths), rounding_mode="floor") / self.steps

    def _score(self, inputs: Tensor, owners: Tensor) -> Tensor:
        logits = self.classifier.logits(inputs)
        values = self.classifier.outputs.probabilities(logits) if self.output == "probability" else logits
        return values.gather(1, self.targets[owners.to(self.targets.device), None])[:, 0]

    def _differentiable(self) -> Any:
        assert isinstance(self.classifier.module, nn.Module)
        return frozen_parameters(self.classifier.module)


def rows_at_once(classifier: Classifier) -> int:
    """The most rows of one forward pass under hooks: hooks need all rows at once."""
    return classifier.batch_size


def _best(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The units with the largest values [B, F], largest first, and these values: both [B, count]."""
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return order, values.gather(1, order)


def _removing(units: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that sets units [P] of neurons [P, T, F] to 0."""
    return lambda hidden: hidden.scatter(2, units[:, None, None].expand(-1, hidden.shape[1], 1), 0)


def _summed(values: Sequence[Tensor], compat: bool) -> Tensor:
    """The sum of tensors [P, T, K] over layers and units: [P, T]. The reference's top-K code takes only a layer's last unit."""
    return torch.stack([value[:, :, -1] if compat else value.sum(dim=2) for value in values]).sum(dim=0)


def _at_units(values: Tensor, units: Tensor) -> Tensor:
    """Values [P, T, F] at units [P, K]: [P, T, K]."""
    return values.gather(2, units[:, None, :].expand(-1, values.shape[1], -1))


def _scaled(values: Tensor, units: Tensor, alphas: Tensor) -> Tensor:
    """A copy of values [P, T, F] with units [P, K] multiplied by alphas [P]."""
    index = units[:, None, :].expand(-1, values.shape[1], -1)
    return values.scatter(2, index, values.gather(2, index) * alphas[:, None, None])
