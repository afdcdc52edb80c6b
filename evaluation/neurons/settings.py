"""What is measured of the neuron paths of a model on a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attribution.errors import UserError
from attribution.model.classifier import Classifier
from attribution.neurons.path import STEPS
from evaluation.study.settings import MODEL_HELP, StudySettings, setting

PATHS = {
    "neuron_path": "the published search",
    "neuron_path_exact": "the search with candidates reranked by their true joint score",
    "neuron_path_removal": "the neurons, one in each layer, whose removal lowers the target most",
    "influence_pattern": "largest mean gradient while the image is scaled, layers on their own (the reference's code of that name)",
    "layer_integrated_gradients": "largest integrated gradient of each layer on its own",
    "activation": "largest activation of each layer",
    "random": "neurons of about the same activation as those of the search, drawn at random",
}
_DEFAULT_PATHS = ("neuron_path_removal", "neuron_path", "influence_pattern", "layer_integrated_gradients", "activation", "random")


@dataclass(frozen=True, kw_only=True)
class NeuronSettings(StudySettings):
    """Settings of ``run_neurons``; every field is an option of ``attribution neurons``."""

    data: str = setting(
        short="-d",
        help="Instead of IMAGES, labelled images: a recipe name (with --root), a folder with one subfolder a class, or a CSV or text list.",
    )
    samples: int | None = setting(500, short="-n", least=4, help="With --data: number of images, drawn by the seed.")
    model: str | Classifier = setting("zoo:vit", short="-m", help=f"A vision transformer: {MODEL_HELP}")
    target: Literal["label", "predicted"] = setting(
        "label",
        short="-t",
        help="Class explained. For IMAGES a name or an index, the predicted class when not given. With --data: label, as published, "
        "or predicted.",
    )
    paths: tuple[str, ...] = setting(
        _DEFAULT_PATHS, choices=PATHS, help="With --data: comma-separated kinds of path. The first is compared with the others."
    )
    steps: int = setting(STEPS, least=1, help="Steps m of the Riemann sums.")
    output: Literal["probability", "logit"] = setting("probability", help="What is differentiated: probability or logit.")
    enhance: float = setting(2.0, least=0, help="With --data: the factor by which neurons are enhanced.")
    kept: tuple[int, ...] = setting(
        (1, 5, 20), least=1, help="With --data: comma-separated K, neurons of a layer that each class keeps when others are pruned."
    )
    shares: tuple[float, ...] = setting(
        (0.1, 0.3, 0.5, 1.0), least=0, most=1, help="With --data: comma-separated q, shares of the other neurons that are pruned."
    )
    depths: tuple[int, ...] | None = setting(
        None, least=1, help="With --data: comma-separated numbers of layers that are pruned, from the first. Default: quarters of all."
    )
    exemplars: int = setting(3, least=0, help="With --data: images shown for each neuron of a class's path.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.paths or len(set(self.paths)) < len(self.paths):
            raise UserError(f"paths are {', '.join(self.paths) or 'none'}: expected different ones of {', '.join(PATHS)}")
        if "random" in self.paths and not self.paths[0].startswith("neuron_path"):
            raise UserError("random paths imitate those of the search: expected a neuron_path as the first of the paths")
