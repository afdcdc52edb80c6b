"""Settings of the study of quality against evaluations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from attribution.errors import UserError
from attribution.fills import DEFAULT_FILL, DROP, LINEAR
from attribution.model.classifier import Classifier
from attribution.model.zoo import DEFAULT_MODEL
from attribution.regions import REGIONS
from attribution.search import SEARCHES
from evaluation.metrics.protocol import Protocol
from evaluation.study.settings import StudySettings, setting

BUDGETS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 2590, 3072, 4000)
SAMPLED = ("rise", "kernel_shap", "hsic", "occlusion")  # methods of METHODS whose cost is chosen
BALANCED_SUFFIX = " 1:1"  # of a search with the weights 1 and 1 of the search by budget
SAMPLED_BUDGETS = (64, 256, 1024, 2590)
POLISHED = "polished"
WHITE_BOX = "budget gradients"
REFERENCE = "bidirectional"
BEST = "exact"  # the search that no order beats; for few regions


def pareto_methods() -> list[str]:
    """Names that ``ParetoSettings.methods`` takes."""
    return [*SEARCHES, *(f"{name}{BALANCED_SUFFIX}" for name in SEARCHES), POLISHED, WHITE_BOX, *SAMPLED]


@dataclass(frozen=True, kw_only=True)
class ParetoSettings(StudySettings):
    """Settings of ``run_pareto``; every field is an option of ``attribution pareto``."""

    models: tuple[str | Classifier, ...] = setting(
        (DEFAULT_MODEL,), option="--model", short="-m", help="Comma-separated names of models, as for explain."
    )
    partitions: tuple[str, ...] = setting(
        ("grid:64",), option="--partition", help="Comma-separated: a way to cut images and about how many regions, such as slico:64."
    )
    methods: tuple[str, ...] = setting(
        ("budget", REFERENCE),
        choices=pareto_methods,
        help=f"Comma-separated: searches, searches with balanced weights ('greedy{BALANCED_SUFFIX}'), {POLISHED}, '{WHITE_BOX}', "
        f"{', '.join(SAMPLED)}.",
    )
    budgets: tuple[int, ...] = setting(BUDGETS, least=1, help="Images forwarded by the search by budget and by polishing, ascending.")
    sampled_budgets: tuple[int, ...] = setting(SAMPLED_BUDGETS, least=1, help=f"The same for {', '.join(SAMPLED)}.")
    fill: str = setting(DEFAULT_FILL, short="-f", help="What hides regions while methods work, and in the curves.")
    samples: int = setting(
        100, short="-n", least=1, help="Number of images: the first of a seeded permutation that the model gets right with confidence."
    )
    confidence: float = setting(0.7, least=0, most=1, help="Least probability of the label.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for budgets in (self.budgets, self.sampled_budgets):
            if not budgets or list(budgets) != sorted(set(budgets)):
                raise UserError(f"budgets are {list(budgets)}: expected ascending numbers of images")
        names = tuple(model.name if isinstance(model, Classifier) else model for model in self.models)
        for field_name, given in (("models", names), ("partitions", self.partitions), ("methods", self.methods)):
            if not given or len(set(given)) < len(given):
                raise UserError(f"{field_name} are {', '.join(given) or 'none'}: expected at least one, each once")
        for name in self.partitions:
            partition(name)
        if self.fill in (LINEAR, DROP):
            raise UserError(f"fill is {self.fill!r}, which is no image: expected a colour, an image or another named fill")
        Protocol(fill=self.fill)

    def budgets_of(self, method: str) -> tuple[int, ...]:
        """Budgets within which the method is measured; 0 alone for a search without a budget."""
        if method in SAMPLED:
            return self.sampled_budgets
        return self.budgets if method in ("budget", POLISHED, WHITE_BOX) else (0,)


def partition(name: str) -> tuple[str, Mapping[str, int]]:
    """The region method and its options, of a name such as "slico:50", about so many regions, or "grid:2x7", rows and columns.

    Raises:
        UserError: anything else.
    """
    method, _, count = name.partition(":")
    if cells := re.fullmatch(r"grid:([1-9]\d{0,3})x([1-9]\d{0,3})", name):
        return method, {"rows": int(cells[1]), "columns": int(cells[2])}
    if method not in REGIONS or not re.fullmatch(r"[1-9]\d{0,5}", count) or int(count) < 2:
        raise UserError(
            f"partition is {name!r}: expected one of {', '.join(REGIONS)} with a number of regions, such as grid:64, or grid:2x7"
        )
    return method, {"count": int(count)}


@dataclass(frozen=True)
class Point:
    """One explanation of one image.

    Attributes:
        method: its name.
        budget: images that it was allowed to forward; 0 for a search without a budget.
        evaluations: images that it forwarded.
        insertion, deletion: areas under its curves.
    """

    method: str
    budget: int
    evaluations: int
    insertion: float
    deletion: float

    @property
    def difference(self) -> float:
        """Insertion - Deletion."""
        return self.insertion - self.deletion


@dataclass(frozen=True)
class ParetoResults:
    """Points of every image.

    Attributes:
        settings: what was measured.
        points: by (model, partition) and sample id, in the order measured.
        failures: (sample, reason).
    """

    settings: ParetoSettings
    points: Mapping[tuple[str, str], Mapping[str, tuple[Point, ...]]] = field(default_factory=dict)
    failures: tuple[tuple[str, str], ...] = ()
