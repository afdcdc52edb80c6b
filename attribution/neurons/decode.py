"""What a neuron stands for: its direct effect on the logit of every class, and the images that excite it most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from attribution.checks import check_choice
from attribution.errors import NotApplicable, UserError
from attribution.hooks import frozen_parameters, record_inputs, record_outputs
from attribution.model.classifier import Classifier
from attribution.model.forwarding import even_chunks
from attribution.model.prototypes import PrototypeForward
from attribution.neurons.edits import mean_logit_changes
from attribution.neurons.finder import rows_at_once
from attribution.neurons.layers import NeuronLayers, find_neurons

DecodeMode = Literal["centred", "raw", "scaled"]


class NeuronDecoder:
    """The direct path from neurons to logits: the "logit lens" of MLP neurons (see Vilas et al., NeurIPS 2023, for hidden states).

    A unit of activation of neuron j of layer l adds v = layer scale * down projection[:, j] to the residual stream. The final
    normalisation is linearised: v is centred and multiplied by its weight, and its deviation, which depends on the input, is left out. So
    the head W changes the logits by s = W (weight * (v - mean v)). What later layers compute from v is not part of s, which therefore
    describes the last layers best. If the head pools T tokens, s is divided by T: it is per unit of activation summed over the tokens.

    Args:
        classifier: of a vision transformer with a linear head on a normalised class token or mean.
        mode: "centred" as above; "raw" without the normalisation, s = W v; "scaled" divides by the mean deviation at the final
            normalisation over ``inputs``, so that s is in logits.
        inputs: float32 [n, 3, h, w], for "scaled".
        layers: from ``find_neurons``; None calls it.

    Attributes:
        readout: float32 [C, D], how a displacement of the residual stream changes the logits.

    Raises:
        NotApplicable: a head that is more than normalisation, mean and linear layer, with the reason.
    """

    def __init__(
        self,
        classifier: Classifier,
        mode: DecodeMode = "centred",
        *,
        inputs: Tensor | None = None,
        layers: NeuronLayers | None = None,
    ) -> None:
        check_choice("mode", mode, ("centred", "raw", "scaled"))
        if mode == "scaled" and inputs is None:
            raise UserError("mode='scaled' needs inputs: images whose deviation at the final normalisation is averaged")
        self.classifier, self.mode = classifier, mode
        self.layers = find_neurons(classifier) if layers is None else layers
        found = _read_head(classifier, self.layers)
        self._scales = found.scales
        self.readout = found.weight if mode == "raw" else _through_norm(found.weight, found.norm)
        if mode == "scaled":
            assert inputs is not None
            self.readout = self.readout / _mean_deviation(classifier, self.layers, found.norm, inputs)
        self.readout = self.readout / self.layers.read

    def directions(self, layer: int, units: Sequence[int] | Tensor | None = None) -> Tensor:
        """What a unit of activation adds to the residual stream: float32 [n, D]."""
        weight = self.layers.modules[layer].weight.detach().float()
        chosen = weight if units is None else weight[:, torch.as_tensor(units).to(weight.device)]
        return chosen.T.cpu() * self._scales[layer]

    def effects(self, layer: int, units: Sequence[int] | Tensor | None = None) -> Tensor:
        """Direct effect on every class of neurons of a layer: float32 [n, C]; all neurons when None."""
        return self.directions(layer, units) @ self.readout.T

    def p_values(self, layer: int, units: Sequence[int] | Tensor | None = None) -> np.ndarray:
        """Probability that a random direction of the same length has as large an effect on a class, relative to the mean over classes.

        For a direction v uniform on a sphere in D dimensions the cosine with any fixed vector is distributed as 2 B - 1 with B
        from Beta((D - 1) / 2, (D - 1) / 2), so p is exact and needs no draws. Two-sided, float64 [n, C], not corrected for the number
        of tests (see ``top_classes``).
        """
        directions = self.directions(layer, units).double()
        readout = self.readout.double()
        readout = readout - readout.mean(dim=0)
        lengths = directions.norm(dim=1)[:, None] * readout.norm(dim=1)[None]
        cosine = torch.where(lengths > 0, (directions @ readout.T).abs() / lengths.clamp(min=1e-300), 0.0).clamp(max=1).numpy()
        half = (directions.shape[1] - 1) / 2
        return np.asarray(np.minimum(1, 2 * stats.beta.sf((1 + cosine) / 2, half, half)))

    def top_classes(self, units: Sequence[tuple[int, int]], count: int = 3) -> list[Decoded]:
        """The classes whose logits neurons raise and lower most, with p-values corrected over all these neurons and all classes.

        Args:
            units: (layer, unit) pairs.
            count: classes of each.
        """
        if not units:
            return []
        effects = torch.cat([self.effects(layer, [unit]) for layer, unit in units])
        effects = effects - effects.mean(dim=1, keepdim=True)
        p = np.concatenate([self.p_values(layer, [unit]) for layer, unit in units])
        adjusted = stats.false_discovery_control(p, axis=None).reshape(p.shape)
        order = effects.argsort(dim=1, descending=True, stable=True)[:, :count].tolist()
        lowest = effects.argsort(dim=1, stable=True)[:, :count].tolist()
        names = self.classifier.class_names
        made = []
        for row, (layer, unit) in enumerate(units):
            top, bottom = (
                tuple(ClassEffect(names[c], c, float(effects[row, c]), float(adjusted[row, c])) for c in chosen)
                for chosen in (order[row], lowest[row])
            )
            selectivity = float(1 - torch.special.entr(effects[row].softmax(dim=0)).sum() / np.log(max(2, effects.shape[1])))
            made.append(Decoded(layer, unit, top, bottom, selectivity))
        return made

    def agreement(self, inputs: Tensor, layer: int, units: Sequence[int]) -> np.ndarray:
        """Spearman's correlation, over the classes, of each neuron's direct effect with what removing it does to the logits.

        Args:
            inputs: float32 [n, 3, h, w]; the change of the logits is averaged over them.
            layer: of the neurons.
            units: which; each takes a pass over the inputs.

        Returns:
            float64 [len(units)], 1 where removing a neuron changes the logits in the order that was decoded. A neuron whose mean
            activation is negative changes them the other way, so the sign of that mean is taken into account. NaN if nothing changes.
        """
        changes, activations = mean_logit_changes(self.classifier, inputs, layer, units, layers=self.layers)
        found = []
        for unit, change, activation in zip(units, changes.numpy(), activations.tolist(), strict=True):
            direct = (-np.sign(activation) * self.effects(layer, [int(unit)])[0]).numpy()
            varies = np.ptp(direct) > 0 and np.ptp(change) > 0
            found.append(stats.spearmanr(direct, change).statistic if varies else np.nan)
        return np.array(found)


@dataclass(frozen=True)
class ClassEffect:
    """What a neuron does to a class.

    Attributes:
        name, index: of the class.
        effect: direct effect of a unit of activation, less its mean over the classes.
        p: of the null of random directions, corrected by Benjamini and Hochberg.
    """

    name: str
    index: int
    effect: float
    p: float


@dataclass(frozen=True)
class Decoded:
    """A neuron in terms of classes.

    Attributes:
        layer, unit: which neuron.
        top, bottom: the classes whose logits it raises most, and lowers most, strongest first.
        selectivity: 1 - entropy of softmax(effects) / log C: 0 for all classes alike, 1 for one class.
    """

    layer: int
    unit: int
    top: tuple[ClassEffect, ...]
    bottom: tuple[ClassEffect, ...]
    selectivity: float


@dataclass(frozen=True, eq=False)
class Exemplar:
    """An image that excites a neuron.

    Attributes:
        index: of the image, in the order given.
        activation: of the neuron there, averaged over the tokens that the head reads.
        patches: float32 [h, w], its activation at the patches; None if these could not be found among the tokens.
        threshold: the quantile of its activation at all patches of all images.
    """

    index: int
    activation: float
    patches: Tensor | None
    threshold: float

    def mask(self, height: int, width: int) -> Tensor:
        """Where the neuron is active, bool [height, width]: above the threshold, enlarged bilinearly, and at its maximum in any case."""
        if self.patches is None:
            return torch.ones(height, width, dtype=torch.bool)
        level = min(self.threshold, float(self.patches.max()))
        if height < self.patches.shape[0] or width < self.patches.shape[1]:
            return torch.ones(height, width, dtype=torch.bool)
        large = nn.functional.interpolate(self.patches[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
        return large >= min(level, float(large.max()))


def exemplars(
    classifier: Classifier,
    batches: Iterable[Tensor],
    units: Sequence[tuple[int, int]],
    count: int = 5,
    quantile: float = 0.99,
    *,
    layers: NeuronLayers | None = None,
) -> list[tuple[Exemplar, ...]]:
    """The images that excite neurons most, and where (Hernandez et al., MILAN, ICLR 2022, for the regions).

    Args:
        classifier: of a vision transformer.
        batches: model inputs [n, 3, h, w], one after the other.
        units: (layer, unit) pairs.
        count: images of each neuron, by its activation at the tokens that the head reads.
        quantile: of a neuron's activation at all patches of all images; regions lie above it.
        layers: from ``find_neurons``; None calls it.

    Returns:
        The images of each neuron, strongest first. Memory: 4 bytes for each image, patch and neuron.
    """
    layers = find_neurons(classifier) if layers is None else layers
    wanted = sorted({layer for layer, _ in units})
    rows: list[list[Tensor]] = [[] for _ in units]
    for batch in batches:
        for chunk in even_chunks(batch, rows_at_once(classifier)):
            with torch.no_grad(), layers.recorded() as hidden:
                classifier.logits(chunk)
            kept = {layer: hidden[layer].float() for layer in wanted}
            for found, (layer, unit) in zip(rows, units, strict=True):
                found.append(kept[layer][:, :, unit].cpu())
    if not rows or not rows[0]:
        return [() for _ in units]
    made = []
    for found in rows:
        values = torch.cat(found)  # [images, tokens]
        read = layers.at_tokens(values).mean(dim=1)
        patches = None if layers.grid is None else values[:, -layers.grid[0] * layers.grid[1] :].unflatten(1, layers.grid)
        threshold = float(np.quantile((values if patches is None else patches).numpy(), quantile))
        best = read.argsort(descending=True, stable=True)[:count].tolist()
        made.append(tuple(Exemplar(i, float(read[i]), None if patches is None else patches[i], threshold) for i in best))
    return made


@dataclass(frozen=True, eq=False)
class _Head:
    weight: Tensor  # float32 [C, D]
    norm: nn.Module | None
    scales: tuple[Tensor, ...]  # [D] of each layer, between its down projection and the residual stream


def _read_head(classifier: Classifier, layers: NeuronLayers) -> _Head:
    """The head, final normalisation and layer scales; it is verified on one image that they give the logits."""
    runner, module, heads = classifier.runner, classifier.module, classifier.heads
    assert isinstance(module, nn.Module)
    if not all(isinstance(head, nn.Linear) for head in heads):
        raise _refused(classifier, "its head is no linear layer")
    norms = [each for each in module.modules() if _is_norm(each)]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad(), frozen_parameters(module):
        noise = torch.randn(1, *classifier.preprocessing.shape, generator=generator).to(classifier.device)
        with record_inputs([*norms, *heads]) as received, record_outputs([*layers.modules, *norms]) as returned:
            scores, _ = runner(noise.requires_grad_(), want_features=False)
        outputs, entered = dict(returned), dict(received)
        called = [each for each, _ in returned]
        scales = []
        for layer, down in enumerate(layers.modules):
            following = [each for each in called[called.index(down) + 1 :] if each not in layers.modules]
            receiver = entered[following[0]] if following else torch.stack([entered[head] for head in heads if head in entered]).mean(dim=0)
            if receiver.shape == outputs[down].shape and torch.equal(receiver, outputs[down]):
                raise _refused(classifier, f"a normalisation follows layer {layer} directly, so that nothing linear leads to the classes")
            (gradient,) = torch.autograd.grad(receiver.sum(), outputs[down], retain_graph=True)
            tokens = layers.at_tokens(gradient)[0]
            scales.append((tokens[0] if receiver.ndim == 3 else tokens.sum(dim=0)).float().cpu())
    after = [each for each in called[called.index(layers.modules[-1]) + 1 :] if each not in layers.modules]
    if len(after) > 1:
        raise _refused(classifier, f"{len(after)} normalisations follow its last MLP: expected one at most")
    read = torch.stack([_pooled_tokens(entered[head]) for head in heads if head in entered])
    norm = after[0] if after else None
    if norm is not None:
        normal = outputs[norm]
        expected = layers.at_tokens(normal).mean(dim=1) if normal.ndim == 3 else normal
        if expected.shape != read.shape[1:] or not torch.allclose(expected, read.mean(dim=0), atol=1e-4):
            raise _refused(classifier, "its head reads more than the normalised class token or mean of tokens")
    answers = torch.stack([head(values) for head, values in zip(heads, read, strict=True)]).mean(dim=0).detach().float()
    if runner.outputs.are_logits and not torch.allclose(answers, scores.detach(), atol=1e-3):
        raise _refused(classifier, "its logits are not what its linear head returns")
    weight = torch.stack([head.weight.detach().float() for head in heads]).mean(dim=0)  # type: ignore[operator]
    if isinstance(forward := classifier.forward, PrototypeForward):
        if forward.normalize:
            raise _refused(classifier, "its scores are cosines, which no linear map gives")
        weight = forward.scale * forward.matrix
    return _Head(weight.cpu(), norm, tuple(scales))


def _pooled_tokens(values: Tensor) -> Tensor:
    return values.detach() if values.ndim == 2 else values.detach().mean(dim=1)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.lower().startswith(("rmsnorm", "layernorm"))


def _through_norm(weight: Tensor, norm: nn.Module | None) -> Tensor:
    """The rows of W as functions of the input of the normalisation, whose deviation is left out."""
    if norm is None:
        return weight
    gain = getattr(norm, "weight", None)
    scaled = weight if gain is None else weight * gain.detach().float().cpu()
    return scaled if "rms" in type(norm).__name__.lower() else scaled - scaled.mean(dim=1, keepdim=True)


def _mean_deviation(classifier: Classifier, layers: NeuronLayers, norm: nn.Module | None, inputs: Tensor) -> float:
    """Mean over images of the deviation by which the final normalisation divides, at the tokens that the head reads."""
    if norm is None:
        return 1.0
    found = []
    for rows in even_chunks(torch.arange(len(inputs)), rows_at_once(classifier)):
        with torch.no_grad(), record_inputs([norm]) as calls:
            classifier.logits(inputs[rows])
        entered = calls[-1][1].double()
        at_tokens = layers.at_tokens(entered) if entered.ndim == 3 else entered
        centred = at_tokens if "rms" in type(norm).__name__.lower() else at_tokens - at_tokens.mean(dim=-1, keepdim=True)
        found.append(centred.square().mean(dim=-1).sqrt().flatten())
    return float(torch.cat(found).mean())


def _refused(classifier: Classifier, reason: str) -> NotApplicable:
    return NotApplicable(f"neurons of {classifier.name} cannot be decoded: {reason}")
