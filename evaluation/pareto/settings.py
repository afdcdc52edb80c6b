"""What the study of quality against evaluations measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attribution.errors import UserError
from attribution.model.classifier import Classifier
from attribution.regions import REGIONS
from attribution.search import SEARCHES

BUDGETS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 2590, 3072, 4000)
SAMPLED = ("rise", "kernel_shap", "hsic", "occlusion")  # methods of METHODS whose cost is chosen
BALANCED_SUFFIX = " 1:1"  # of a search with weights 1 and 1, as the search by budget has them
SAMPLED_BUDGETS = (64, 256, 1024, 2590)
POLISHED = "polished"
WHITE_BOX = "budget gradients"
REFERENCE = "bidirectional"


@dataclass(frozen=True)
class ParetoSettings:
    """Settings of ``run_pareto``.

    Attributes:
        data, root, split: of ``open_dataset``; the samples must be labelled.
        model: a classifier, or a name that ``load_classifier`` takes.
        regions: a key of ``REGIONS``.
        count: R, about how many regions.
        fill: what hides regions while methods work, and in the curves.
        methods: keys of ``SEARCHES`` (with " 1:1" for balanced weights), "polished", "budget gradients" (the search by budget with
            them), or of ``SAMPLED``.
        budgets: evaluations of the search by budget and of polishing, ascending.
        sampled_budgets: those of ``SAMPLED``, each of which is a run of its own.
        samples: so many images, the first of a seeded permutation that the model gets right with enough confidence.
        confidence: least probability of the label.
        seed: of the images, and of methods that draw.
    """

    data: str
    root: str | None = None
    split: str = "test"
    model: str | Classifier = "zoo:cnn"
    regions: str = "grid"
    count: int = 64
    fill: str = "black"
    methods: tuple[str, ...] = ("budget", REFERENCE)
    budgets: tuple[int, ...] = BUDGETS
    sampled_budgets: tuple[int, ...] = SAMPLED_BUDGETS
    samples: int = 100
    confidence: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        known = [*SEARCHES, *(f"{name}{BALANCED_SUFFIX}" for name in SEARCHES), POLISHED, WHITE_BOX, *SAMPLED]
        if unknown := [name for name in self.methods if name not in known]:
            raise UserError(f"unknown methods {', '.join(unknown)}: expected some of {', '.join(known)}")
        if self.regions not in REGIONS:
            raise UserError(f"unknown regions {self.regions!r}: expected one of {', '.join(REGIONS)}")
        for budgets in (self.budgets, self.sampled_budgets):
            if not budgets or list(budgets) != sorted(set(budgets)) or budgets[0] < 1:
                raise UserError(f"budgets are {list(budgets)}: expected ascending numbers of images")
        for name, least in (("count", 2), ("samples", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{name} is {value!r}: expected a whole number of at least {least}")

    def budgets_of(self, method: str) -> tuple[int, ...]:
        """Budgets that the method is measured within; 0 alone for a search that cannot be told."""
        if method in SAMPLED:
            return self.sampled_budgets
        return self.budgets if method in ("budget", POLISHED, WHITE_BOX) else (0,)

    @property
    def partition(self) -> str:
        """What tables call the regions."""
        return f"{self.regions} {self.count}"


@dataclass(frozen=True)
class Point:
    """One explanation of one image.

    Attributes:
        method: its name.
        budget: what it was allowed; 0 for a search that cannot be told.
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
        model: name of the classifier.
        points: by sample id, in the order measured.
    """

    settings: ParetoSettings
    model: str
    points: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)
