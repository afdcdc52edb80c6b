"""Metrics by name: a number for one explanation of one image, under a stated protocol.

``METRICS`` holds them all. Every method is measured by the same function. A metric that reads a curve says so; the curve of a protocol
is measured once for all metrics that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from attribution.checks import check_choice, did_you_mean
from attribution.errors import NotApplicable, UserError
from attribution.explanation import Explanation
from attribution.fills import DEFAULT_FILL, DROP, LINEAR, fill_label, is_named
from attribution.model.classifier import Classifier
from attribution.regions import Regions
from evaluation.metrics.curves import Curves, perturbation_curves
from evaluation.metrics.fidelity import infidelity, mu_fidelity, sensitivity
from evaluation.metrics.judged import Judged, judged
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
        explain: the method itself, image [3, H, W] -> explanation or map [H, W], for metrics that explain other images.
        mask: bool [H, W], where the object is; None where unknown.
        seed: of stochastic metrics; the same for every method.
        curves: measured so far, by protocol label.
    """

    classifier: Classifier
    explanation: Explanation
    target: int
    regions: Regions
    explain: Callable[[Tensor], Judged]
    mask: Tensor | None = None
    seed: int = 0
    curves: dict[str, Curves] = field(default_factory=dict)

    def curve(self, protocol: Protocol) -> Curves:
        """The insertion and deletion curves of a protocol, measured once."""
        label = protocol.label()
        if label not in self.curves:
            image = self.explanation.image
            self.curves[label] = perturbation_curves(
                image, self.classifier, self.explanation, self.target, protocol, regions=self.regions, seed=self.seed
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
        title: what tables and figures call it; its key with spaces where it has none.
        curve: whether it reads the curves of a protocol. A benchmark then measures it for each fill and step rule.
        filled: whether it hides pixels without reading a curve. A benchmark then measures it under the fill of its first protocol
            whose fill the metric can use, and states that fill beside the score.
        unfit: names of fills that a filled metric cannot use.
        mask: whether it needs the place of the object.
        default: whether a benchmark measures it unless told otherwise.
        grid: whether it is a setting of ``evaluation.grids``: grids of images are explained, at each layer, and no function is needed.

    Raises:
        UserError: another direction.
    """

    function: Callable[[Case, Protocol], Measurement] | None
    direction: Direction
    summary: str
    title: str = ""
    curve: bool = False
    filled: bool = False
    unfit: tuple[str, ...] = ()
    mask: bool = False
    default: bool = True
    grid: bool = False

    def __post_init__(self) -> None:
        check_choice("direction", self.direction, get_args(Direction))


@dataclass(frozen=True)
class Measure:
    """A metric under a protocol: a column of the tables.

    Attributes:
        metric: key of ``METRICS``.
        protocol: its label; for metrics that hide pixels without a curve the fill, such as "fill black"; for settings of grids the
            layer; "" for all others.
        direction: whether higher or lower is better.
    """

    metric: str
    protocol: str
    direction: Direction

    @property
    def label(self) -> str:
        """Such as "insertion (regions, black, p)"."""
        return f"{self.metric} ({self.protocol})" if self.protocol else self.metric


def measures_of(name: str, protocols: Sequence[Protocol]) -> list[tuple[Measure, Protocol]]:
    """List the measures of a metric of single images under some protocols, each with the protocol that its function is given."""
    metric = METRICS[name]
    if metric.curve:
        return [(Measure(name, protocol.label(), metric.direction), protocol) for protocol in protocols]
    used = next((protocol for protocol in protocols if not is_named(protocol.fill, metric.unfit)), protocols[0])
    return [(Measure(name, f"fill {fill_label(used.fill)}" if metric.filled else "", metric.direction), used)]


def metric_title(name: str) -> str:
    """What tables and figures call a metric, such as "muFidelity" or "highest confidence 25%"."""
    return METRICS[name].title or name.replace("_", " ")


def expand_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Keys of ``METRICS`` in the order named, each once; "highest_confidence" stands for its four shares.

    Raises:
        UserError: an unknown name or none at all.
    """
    found: dict[str, None] = {}
    for name in names:
        family = [key for key in METRICS if name == "highest_confidence" and key.startswith("highest_confidence_")]
        if name not in METRICS and not family:
            raise UserError(
                f"unknown metric {name!r}: expected one of {', '.join(METRICS)}, highest_confidence{did_you_mean(name, METRICS)}"
            )
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


def _highest_confidence(percent: int) -> Metric:
    def measure(case: Case, protocol: Protocol) -> Measurement:
        return Measurement(*case.curve(protocol).highest_confidence(percent / 100))

    part = "the whole image" if percent == 100 else f"{percent} % of the image"
    return Metric(measure, "higher", f"highest score within {part}", f"highest confidence {percent}%", curve=True)


def _with_fill(name: str, evaluator: Callable[..., float]) -> Callable[[Case, Protocol], Measurement]:
    """A metric that hides pixels by the fill of the protocol, and refuses a protocol whose fill it cannot use."""

    def measure(case: Case, protocol: Protocol) -> Measurement:
        if is_named(protocol.fill, METRICS[name].unfit):
            raise NotApplicable(f"{name} cannot hide pixels by fill {protocol.fill!r}: add another fill, such as {DEFAULT_FILL!r}")
        image, output = case.explanation.image, protocol.output
        return Measurement(
            evaluator(image, case.classifier, case.explanation, case.target, fill=protocol.fill, output=output, seed=case.seed)
        )

    return measure


def _sensitivity(case: Case, protocol: Protocol) -> Measurement:
    return Measurement(sensitivity(case.explain, case.explanation.image, seed=case.seed))


def _road(case: Case, protocol: Protocol) -> Measurement:
    found = road(case.explanation.image, case.classifier, case.explanation, case.target, output=protocol.output, seed=case.seed)
    return Measurement(found.score)


def _pointing(score: Callable[[Tensor, Tensor], float]) -> Callable[[Case, Protocol], Measurement]:
    """A pointing game on the pixels that the model sees: what its crop leaves out is neither map nor object."""

    def measure(case: Case, protocol: Protocol) -> Measurement:
        assert case.mask is not None
        heat, mask = judged(case.explanation).heat, case.mask
        if mask.shape == heat.shape:  # the score refuses others
            heat, mask = case.regions.seen_part(heat), case.regions.seen_part(mask)
        return Measurement(score(heat, mask))

    return measure


METRICS: dict[str, Metric] = {
    "insertion": Metric(_insertion, "higher", "area under the score while the image appears, most important first", curve=True),
    "deletion": Metric(_deletion, "lower", "area under the score while the image vanishes, most important first", curve=True),
    "insertion_deletion": Metric(_difference, "higher", "insertion minus deletion", "insertion - deletion", curve=True),
    **{f"highest_confidence_{percent}": _highest_confidence(percent) for percent in (25, 50, 75, 100)},
    "mu_fidelity": Metric(
        _with_fill("mu_fidelity", mu_fidelity),
        "higher",
        "rank correlation of the score's drop with the attribution removed (7x7 cells)",
        "muFidelity",
        filled=True,
        unfit=(LINEAR,),
    ),
    "road": Metric(_road, "higher", "(least - most relevant removed) / 2, removed pixels imputed linearly, 10 to 90 %", "ROAD"),
    "infidelity": Metric(
        _with_fill("infidelity", infidelity),
        "lower",
        "squared error of the drop predicted for random squares (Captum)",
        filled=True,
        unfit=(LINEAR, DROP),
        default=False,
    ),
    "sensitivity": Metric(_sensitivity, "lower", "largest relative change of the map under small noise (Captum)", default=False),
    "pointing_game": Metric(_pointing(pointing_game), "higher", "the maximum lies on the object", mask=True, default=False),
    "energy_pointing_game": Metric(
        _pointing(energy_pointing_game), "higher", "share of the positive map on the object", mask=True, default=False
    ),
    "gridpg": Metric(None, "higher", "share of the map in the class's cell; heads see the whole grid", "GridPG", default=False, grid=True),
    "difull": Metric(None, "higher", "share of the map in the head's cell; it sees nothing else", "DiFull", default=False, grid=True),
    "dipart": Metric(None, "higher", "share of the map in the head's cell of the final map", "DiPart", default=False, grid=True),
}
