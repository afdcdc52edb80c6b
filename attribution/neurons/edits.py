"""What a prediction becomes when neurons of a vision transformer are removed, enhanced or replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from attribution.errors import UserError, describe
from attribution.image import ImageSource
from attribution.model.classifier import Classifier
from attribution.model.forwarding import even_chunks
from attribution.model.loading import load_classifier
from attribution.neurons.finder import rows_at_once
from attribution.neurons.layers import NeuronLayers, find_neurons

Edit = Literal["remove", "enhance", "mean"]
EDITS = ("remove", "enhance", "mean")


def edited_probability(
    classifier: Classifier | str,
    image: ImageSource,
    neurons: Any,
    target: int | str,
    edit: Edit = "remove",
    *,
    factor: float = 2.0,
    means: Tensor | None = None,
    layers: Sequence[str] | None = None,
) -> float:
    """Probability of a class when neurons are edited, all of them in one forward pass.

    Args:
        classifier: of a vision transformer, or a name that ``load_classifier`` takes.
        image: whatever ``load_image`` takes.
        neurons: int [L] or [L, K], hidden units of each layer; -1 edits nothing.
        target: class index or name.
        edit: "remove" sets them to 0, "enhance" multiplies what they have in the edited run by ``factor``, "mean" sets them to
            ``means``.
        factor: of "enhance".
        means: float [L, F], of "mean" (see ``mean_activations``).
        layers: see ``find_neurons``.

    Raises:
        NotApplicable, UserError: see ``neuron_path``.
    """
    classifier = load_classifier(classifier)
    with torch.inference_mode(False):
        found = find_neurons(classifier, layers)
        units = torch.as_tensor(np.asarray(neurons) if not isinstance(neurons, Tensor) else neurons)
        wanted = classifier.target_index(target)
        inputs = classifier.inputs(image)
        return float(edited_probabilities(classifier, inputs, units[None], edit, factor=factor, means=means, layers=found)[0, wanted])


def edited_probabilities(
    classifier: Classifier,
    inputs: Tensor,
    neurons: Tensor,
    edit: Edit = "remove",
    *,
    factor: float = 2.0,
    means: Tensor | None = None,
    layers: NeuronLayers | None = None,
) -> Tensor:
    """Probabilities of all classes for images whose neurons are edited, each with neurons of its own.

    Args:
        classifier: of a vision transformer.
        inputs: float32 [n, 3, h, w], as ``Classifier.inputs`` returns them.
        neurons: int [n, L] or [n, L, K]; -1 edits nothing.
        edit, factor, means: see ``edited_probability``.
        layers: of ``find_neurons``, found when None.

    Returns:
        float32 [n, C].
    """
    layers = find_neurons(classifier) if layers is None else layers
    units = _checked_units(neurons, len(inputs), layers)
    if edit not in EDITS:
        raise UserError(f"unknown edit {edit!r}: expected one of {', '.join(EDITS)}")
    if edit == "mean" and (means is None or tuple(means.shape) != (len(layers), layers.width)):
        received = "nothing" if means is None else describe(means)
        expected = f"float [{len(layers)}, {layers.width}], as mean_activations returns them"
        raise UserError(f"edit='mean' needs means: received {received}, expected {expected}")
    values = None if means is None else means.to(inputs)

    def edited(hidden: Tensor, layer: int, rows: Tensor) -> Tensor:
        chosen = _as_mask(units[rows, layer], layers.width).to(hidden.device)[:, None, :]
        if edit == "enhance":
            return torch.where(chosen, hidden * factor, hidden)
        if edit == "remove":
            return torch.where(chosen, 0, hidden)
        assert values is not None
        return torch.where(chosen, values[layer].to(hidden.dtype), hidden)

    return _run(classifier, inputs, layers, edited)


def pruned_probabilities(
    classifier: Classifier,
    inputs: Tensor,
    kept: Tensor,
    share: float = 1.0,
    *,
    depth: int | None = None,
    seed: int = 0,
    layers: NeuronLayers | None = None,
) -> Tensor:
    """Probabilities of all classes when only some neurons are kept: every other one is set to 0 with a given probability.

    Args:
        classifier: of a vision transformer.
        inputs: float32 [n, 3, h, w].
        kept: int [n, L] or [n, L, K], the neurons that each image keeps; -1 stands for none.
        share: q, the probability with which another neuron is removed, drawn anew for each image and layer; 1 removes all others.
        depth: only the first so many layers are pruned; all when None.
        seed: of the draws; row i draws with seed + i.
        layers: of ``find_neurons``, found when None.

    Returns:
        float32 [n, C].
    """
    layers = find_neurons(classifier) if layers is None else layers
    units = _checked_units(kept, len(inputs), layers)
    depth = len(layers) if depth is None else depth
    if not 0 <= share <= 1:
        raise UserError(f"share is {share}: expected 0 to 1")
    if not 0 <= depth <= len(layers):
        raise UserError(f"depth is {depth}: expected 0 to {len(layers)} layers")

    def pruned(hidden: Tensor, layer: int, rows: Tensor) -> Tensor:
        if layer >= depth:
            return hidden
        removed = ~_as_mask(units[rows, layer], layers.width)
        if share < 1:
            drawn = [np.random.default_rng([seed + int(row), layer]).random(layers.width) < share for row in rows]
            removed &= torch.from_numpy(np.stack(drawn))
        return torch.where(removed.to(hidden.device)[:, None, :], 0, hidden)

    return _run(classifier, inputs, layers, pruned)


def mean_activations(classifier: Classifier, inputs: Tensor, *, layers: NeuronLayers | None = None) -> Tensor:
    """Mean activation of every neuron over images [n, 3, h, w] and the tokens that the head reads: float32 [L, F]."""
    layers = find_neurons(classifier) if layers is None else layers
    total = torch.zeros(len(layers), layers.width, dtype=torch.float64)
    for rows in even_chunks(torch.arange(len(inputs)), rows_at_once(classifier)):
        with torch.no_grad(), layers.recorded() as hidden:
            classifier.logits(inputs[rows])
        for layer in range(len(layers)):
            total[layer] += layers.at_tokens(hidden[layer]).double().mean(dim=1).sum(dim=0).cpu()
    return (total / max(1, len(inputs))).float()


def mean_logit_changes(
    classifier: Classifier, inputs: Tensor, layer: int, units: Sequence[int], *, layers: NeuronLayers | None = None
) -> tuple[Tensor, Tensor]:
    """What removing each neuron alone does to the logits, float32 [len(units), C] (edited - clean, mean over images).

    And their mean activations, float32 [len(units)].
    """
    layers = find_neurons(classifier) if layers is None else layers
    clean, activations = [], []
    for rows in even_chunks(torch.arange(len(inputs)), rows_at_once(classifier)):
        with torch.no_grad(), layers.recorded() as hidden:
            clean.append(classifier.logits(inputs[rows]).cpu())
        activations.append(layers.at_tokens(hidden[layer])[:, :, list(units)].float().mean(dim=1).cpu())
    usual = torch.cat(clean)

    def without(unit: int) -> Tensor:
        def removed(hidden: Tensor, at: int, _rows: Tensor) -> Tensor:
            return hidden.index_fill(2, torch.tensor([unit], device=hidden.device), 0) if at == layer else hidden

        return (_run(classifier, inputs, layers, removed, classifier.logits) - usual).mean(dim=0)

    changes = [without(int(unit)) for unit in units]
    return torch.stack(changes) if changes else usual.new_empty(0, usual.shape[1]), torch.cat(activations).mean(dim=0)


def _run(
    classifier: Classifier,
    inputs: Tensor,
    layers: NeuronLayers,
    edit: Callable[[Tensor, int, Tensor], Tensor],
    scores: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Probabilities (or other scores) with ``edit`` (hidden [n, T, F], layer, rows) at the tokens that the head reads."""
    scores = classifier.probabilities if scores is None else scores
    found = []
    for rows in even_chunks(torch.arange(len(inputs)), rows_at_once(classifier)):

        def at_layer(layer: int, rows: Tensor = rows) -> Callable[[Tensor], Tensor]:
            return lambda hidden: edit(hidden, layer, rows)

        with torch.no_grad(), layers.edited({layer: at_layer(layer) for layer in range(len(layers))}):
            found.append(scores(inputs[rows]))
    return torch.cat(found).cpu()


def _checked_units(neurons: Any, count: int, layers: NeuronLayers) -> Tensor:
    units = torch.as_tensor(neurons).cpu()
    whole = not units.is_floating_point() and units.dtype != torch.bool
    shaped = whole and units.ndim in (2, 3) and units.shape[:2] == (count, len(layers))
    if not shaped or not bool(((units >= -1) & (units < layers.width)).all()):
        raise UserError(
            f"neurons are {describe(units)}: expected whole numbers [{count}, {len(layers)}] or [{count}, {len(layers)}, K] "
            f"from 0 to {layers.width - 1}, or -1 for none"
        )
    return units.long() if units.ndim == 3 else units.long()[:, :, None]


def _as_mask(units: Tensor, width: int) -> Tensor:
    """Units [n, K], -1 for none, as bool [n, width]."""
    return torch.zeros(len(units), width + 1, dtype=torch.bool).scatter(1, units % (width + 1), True)[:, :width]
