"""Metrics by name: a number for one explanation of one image, under a stated protocol.

``METRICS`` holds them all; every method is measured by the same function. A metric that needs a curve says so, and the curve of
a protocol is measured once for all metrics that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from attribution.errors import UserError
from attribution.explanation import Explanation
from attribution.model.classifier import Classifier
from attribution.regions import Regions
from evaluation.metrics.curves import Curves, perturbation_curves
from evaluation.metrics.fidelity import infidelity, mu_fidelity, sensitivity
from evaluation.metrics.localization import energy_pointing_game, pointing_game
from evaluation.metrics.protocol import Protocol
from evaluation.metrics.road import road

Direction = Literal["higher", "lower"]


@dataclass
class Case:
    """One explanation to be judged.

    Attributes:
        classifier: the model.
        explanation: what a method gave, whatever scores it carries.
        target: class index.
        regions: the partition of region steps, the same for every method.
        explain: the method itself, image [3, H, W] -> map [H, W], for metrics that explain other images.
        mask: bool [H, W], where the object is; None where unknown.
        seed: of metrics that draw; the same for every method.
        curves: measured so far, by protocol label.
    """

    classifier: Classifier
    explanation: Explanation
    target: int
    regions: Regions
    explain: Callable[[Tensor], Tensor]
    mask: Tensor | None = None
    seed: int = 0
    curves: dict[str, Curves] = field(default_factory=dict)

    def curve(self, protocol: Protocol) -> Curves:
        """The insertion and deletion curves of a protocol, measured once."""
        label = protocol.label()
        if label not in self.curves:
            image = self.explanation.image
            self.curves[label] = perturbation_curves(
                self.classifier, image, self.explanation, self.target, protocol, regions=self.regions, seed=self.seed
            )
        return self.curves[label]


@dataclass(frozen=True)
class Measurement:
    """A metric's value, and the share of the image at which it was reached where there is one."""

    value: float
    area: float | None = None


@dataclass(frozen=True)
class Metric:
    """How well an explanation does in one respect.

    Attributes:
        function: (case, protocol) -> ``Measurement``.
        direction: whether higher or lower is better.
        summary: one line for tables and reports.
        curve: whether it reads the curves of a protocol, and so is measured for each fill and step rule.
        mask: whether it needs the place of the object.
        default: whether a benchmark measures it unless told otherwise.
        grid: whether it is a setting of ``evaluation.grids``: grids of images are explained, at each layer, and no function is needed.
    """

    function: Callable[[Case, Protocol], Measurement] | None
    direction: Direction
    summary: str
    curve: bool = False
    mask: bool = False
    default: bool = True
    grid: bool = False


@dataclass(frozen=True)
class Measure:
    """A metric under a protocol: a column of the tables.

    Attributes:
        metric: key of ``METRICS``.
        protocol: its label, or the layer for settings of grids; "" for metrics without a curve.
        direction: whether higher or lower is better.
    """

    metric: str
    protocol: str
    direction: Direction

    @property
    def label(self) -> str:
        """Such as "insertion (regions, black, p)"."""
        return f"{self.metric} ({self.protocol})" if self.protocol else self.metric


def expand_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Keys of ``METRICS`` in the order named, each once; "highest_confidence" stands for its four shares.

    Raises:
        UserError: an unknown name or none at all.
    """
    found: dict[str, None] = {}
    for name in names:
        family = [key for key in METRICS if name == "highest_confidence" and key.startswith("highest_confidence_")]
        if name not in METRICS and not family:
            raise UserError(f"unknown metric {name!r}: expected one of {', '.join(METRICS)}, highest_confidence")
        found.update(dict.fromkeys(family or [name]))
    if not found:
        raise UserError(f"no metric was named: expected some of {', '.join(METRICS)}")
    return tuple(found)


def _insertion(case: Case, protocol: Protocol) -> Measurement:
    return Measurement(case.curve(protocol).insertion_auc)


def _deletion(case: Case, protocol: Protocol) -> Measurement:
    return Measurement(case.curve(protocol).deletion_auc)


def _difference(case: Case, protocol: Protocol) -> Measurement:
    return Measurement(case.curve(protocol).difference)


def _highest_confidence(share: float) -> Callable[[Case, Protocol], Measurement]:
    def measure(case: Case, protocol: Protocol) -> Measurement:
        return Measurement(*case.curve(protocol).highest_confidence(share))

    return measure


def _mu_fidelity(case: Case, protocol: Protocol) -> Measurement:
    value = mu_fidelity(case.classifier, case.explanation.image, case.explanation, case.target, output=protocol.output, seed=case.seed)
    return Measurement(value)


def _infidelity(case: Case, protocol: Protocol) -> Measurement:
    value = infidelity(case.classifier, case.explanation.image, case.explanation, case.target, output=protocol.output, seed=case.seed)
    return Measurement(value)


def _sensitivity(case: Case, protocol: Protocol) -> Measurement:
    return Measurement(sensitivity(case.explain, case.explanation.image, seed=case.seed))


def _road(case: Case, protocol: Protocol) -> Measurement:
    found = road(case.classifier, case.explanation.image, case.explanation, case.target, output=protocol.output, seed=case.seed)
    return Measurement(found.score)


def _pointing_game(case: Case, protocol: Protocol) -> Measurement:
    assert case.mask is not None
    return Measurement(pointing_game(case.explanation, case.mask))


def _energy_pointing_game(case: Case, protocol: Protocol) -> Measurement:
    assert case.mask is not None
    return Measurement(energy_pointing_game(case.explanation, case.mask))


METRICS: dict[str, Metric] = {
    "insertion": Metric(_insertion, "higher", "area under the score while the image appears, most important first", curve=True),
    "deletion": Metric(_deletion, "lower", "area under the score while the image vanishes, most important first", curve=True),
    "insertion_deletion": Metric(_difference, "higher", "insertion minus deletion", curve=True),
    "highest_confidence_25": Metric(_highest_confidence(0.25), "higher", "highest score within 25 % of the image", curve=True),
    "highest_confidence_50": Metric(_highest_confidence(0.5), "higher", "highest score within 50 % of the image", curve=True),
    "highest_confidence_75": Metric(_highest_confidence(0.75), "higher", "highest score within 75 % of the image", curve=True),
    "highest_confidence_100": Metric(_highest_confidence(1.0), "higher", "highest score within the whole image", curve=True),
    "mu_fidelity": Metric(_mu_fidelity, "higher", "rank correlation of the score's drop with the attribution removed (7x7 cells)"),
    "road": Metric(_road, "higher", "(least - most relevant removed) / 2, removed pixels imputed linearly, 10 ... 90 %"),
    "infidelity": Metric(_infidelity, "lower", "squared error of the drop predicted for random squares (Captum)", default=False),
    "sensitivity": Metric(_sensitivity, "lower", "largest relative change of the map under small noise (Captum)", default=False),
    "pointing_game": Metric(_pointing_game, "higher", "the maximum lies on the object", mask=True, default=False),
    "energy_pointing_game": Metric(_energy_pointing_game, "higher", "share of the positive map on the object", mask=True, default=False),
    "gridpg": Metric(None, "higher", "share of the map in the class's cell; heads see the whole grid", default=False, grid=True),
    "difull": Metric(None, "higher", "share of the map in the head's cell; it sees nothing else", default=False, grid=True),
    "dipart": Metric(None, "higher", "share of the map in the head's cell of the final map", default=False, grid=True),
}
