"""Settings of the study of failures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attribution.errors import UserError
from attribution.fills import DEFAULT_FILL, FILLS, Fill
from attribution.model.classifier import Classifier
from attribution.model.zoo import DEFAULT_MODEL
from attribution.regions import REGIONS
from attribution.search import SEARCHES
from evaluation.metrics.protocol import Protocol
from evaluation.study.settings import MODEL_HELP, StudySettings, check_region_options, setting

MOST_CLUSTERS = 8  # most clusters that are tried if the number is not given


@dataclass(frozen=True, kw_only=True)
class FailureSettings(StudySettings):
    """Settings of ``run_failures``; every field is an option of ``attribution debug``. The images must be labelled."""

    model: str | Classifier = setting(DEFAULT_MODEL, short="-m", help=MODEL_HELP)
    samples: int | None = setting(None, short="-n", least=1, help="Number of images to look at, drawn by the seed. Default: all.")
    most: int | None = setting(100, least=0, help="Number of misclassified images to explain, in the order drawn; 0 for all.")
    fill: Fill = setting(
        DEFAULT_FILL, short="-f", help=f"What hides a region: {', '.join(FILLS)}, model_mean, drop, '#rrggbb' or an image file."
    )
    regions: str = setting("slico", short="-r", choices=REGIONS, help="How images are cut.")
    region_options: Mapping[str, Any] = setting(
        factory=dict,
        help="Further arguments of the region method.",
        keys={"count": (int, "About how many regions, at least 2. Default: the published 49 or 50.")},
    )
    search: str | None = setting(
        None, short="-s", choices=SEARCHES, help="How regions are ordered. Default: budget; bidirectional where its p is given."
    )
    pending: int | None = setting(None, least=1, help="p of the bidirectional search. Default: 8.")
    evaluations: int | None = setting(
        None,
        least=1,
        help="Images that search budget may forward for each of the two classes. Default: 8 for each region, 32 on small inputs.",
    )
    clusters: int | None = setting(
        None, least=1, help="Number of clusters of causes. Default: from 2 to 8, by silhouette, of those that leave no failure alone."
    )
    min_confidence: float = setting(
        0.9,
        least=0,
        most=1,
        help="An image that nothing makes right may be wrongly labelled where the predicted class has at least this probability.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_region_options(self.regions, self.region_options)
        if isinstance(self.fill, str) and self.fill == "linear":
            raise UserError("fill is 'linear': it fills curves only, searches need a colour, an image or another named fill")
        Protocol(fill=self.fill)
