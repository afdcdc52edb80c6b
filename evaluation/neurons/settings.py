"""What is measured of the neuron paths of a model on a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from attribution.errors import UserError
from attribution.model.classifier import Classifier
from attribution.neurons.path import STEPS
from attribution.provenance import plain_settings
from evaluation.study.settings import check_fields

PATHS = {
    "neuron_path": "the published search",
    "neuron_path_exact": "the search with candidates reranked by their true joint score",
    "neuron_path_removal": "the neurons, one a layer, without which the target is least",
    "influence_pattern": "largest mean gradient while the image is scaled, layers on their own (the reference's code of that name)",
    "layer_integrated_gradients": "largest integrated gradient of each layer on its own",
    "activation": "largest activation of each layer",
    "random": "neurons of about the same activation as those of the search, drawn at random",
}
_DEFAULT_PATHS = ("neuron_path_removal", "neuron_path", "influence_pattern", "layer_integrated_gradients", "activation", "random")


@dataclass(frozen=True)
class NeuronSettings:
    """Settings of ``run_neurons``.

    Attributes:
        data, root, split: of ``open_dataset``; the samples must be labelled.
        model: a classifier of a vision transformer, or a name that ``load_classifier`` takes.
        checkpoint, device, batch_size: of ``load_classifier``.
        samples: so many images, drawn by the seed; all when None.
        seed: of the samples, the halves and the random paths.
        target: class explained, the "label" of the image (as published) or the "predicted" one.
        paths: keys of ``PATHS``; the first is compared with the others.
        steps: m of the Riemann sums.
        output: "probability" or "logit".
        enhance: factor of the enhancing edit.
        kept: K, neurons of a layer that classes keep when the rest is pruned.
        shares: q, shares of the other neurons that are pruned.
        depths: numbers of layers that are pruned, from the first; quarters of the network when None.
        exemplars: images shown for each neuron of a class's path.
    """

    data: str
    root: str | None = None
    split: str = "test"
    model: str | Classifier = "zoo:vit"
    checkpoint: str | None = None
    device: str = "auto"
    batch_size: int | None = None
    samples: int | None = 500
    seed: int = 0
    target: Literal["label", "predicted"] = "label"
    paths: tuple[str, ...] = _DEFAULT_PATHS
    steps: int = STEPS
    output: Literal["probability", "logit"] = "probability"
    enhance: float = 2.0
    kept: tuple[int, ...] = (1, 5, 20)
    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 1.0)
    depths: tuple[int, ...] | None = None
    exemplars: int = 3

    def __post_init__(self) -> None:
        unknown = [name for name in self.paths if name not in PATHS]
        if unknown or not self.paths or len(set(self.paths)) < len(self.paths):
            raise UserError(f"paths are {', '.join(self.paths) or 'none'}: expected different ones of {', '.join(PATHS)}")
        if "random" in self.paths and not self.paths[0].startswith("neuron_path"):
            raise UserError("random paths imitate those of the search: expected a neuron_path as the first of the paths")
        if self.target not in ("label", "predicted"):
            raise UserError(f"target={self.target!r}: expected 'label' or 'predicted'")
        if self.output not in ("probability", "logit"):
            raise UserError(f"output={self.output!r}: expected 'probability' or 'logit'")
        for name, least in (("samples", 4), ("steps", 1), ("seed", 0), ("exemplars", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise UserError(f"{name} is {value!r}: expected a whole number of at least {least}")
        if any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in self.kept):
            raise UserError(f"kept is {list(self.kept)}: expected whole numbers of at least 1")
        if not all(0 <= share <= 1 for share in self.shares):
            raise UserError(f"shares are {list(self.shares)}: expected 0 to 1")
        if not self.enhance >= 0:
            raise UserError(f"enhance is {self.enhance}: expected a factor of at least 0")

    def plain(self) -> dict[str, Any]:
        """The settings as JSON."""
        return plain_settings({f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> NeuronSettings:
        """From plain values, lists included.

        Raises:
            UserError: an unknown field, or no data.
        """
        check_fields(cls, values)
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**given)
