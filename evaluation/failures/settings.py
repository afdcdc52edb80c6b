"""What is asked of the misclassified samples of a data set."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from attribution.errors import UserError
from attribution.fills import Fill
from attribution.model.classifier import Classifier
from attribution.provenance import plain_settings
from attribution.regions import REGIONS
from attribution.search import SEARCHES
from evaluation.metrics.protocol import Protocol
from evaluation.study.settings import check_fields

MOST_CLUSTERS = 8  # that are tried where the number is not given


@dataclass(frozen=True)
class FailureSettings:
    """Settings of ``run_failures``.

    Attributes:
        data, root, split: of ``open_dataset``; the samples must be labelled.
        model: a classifier, or a name that ``load_classifier`` takes.
        checkpoint, device, batch_size: of ``load_classifier``.
        samples: so many images are looked at, drawn by the seed; all when None.
        most: so many misclassified ones are explained, in the order drawn; all when None.
        seed: of the samples, the searches, the intervals and the clusters.
        fill: what hidden regions show.
        regions: a key of ``REGIONS``.
        region_options: further arguments of the region method.
        search: a key of ``SEARCHES``.
        pending: p of the bidirectional search.
        clusters: number of clusters of causes; None lets the silhouette decide between 2 and 8.
        min_confidence: of the predicted class, from which a sample that nothing makes right is suspected to be wrongly labelled.
    """

    data: str
    root: str | None = None
    split: str = "test"
    model: str | Classifier = "zoo:cnn"
    checkpoint: str | None = None
    device: str = "auto"
    batch_size: int | None = None
    samples: int | None = None
    most: int | None = 100
    seed: int = 0
    fill: Fill = "black"
    regions: str = "slico"
    region_options: Mapping[str, Any] = field(default_factory=dict)
    search: str = "bidirectional"
    pending: int = 8
    clusters: int | None = None
    min_confidence: float = 0.9

    def __post_init__(self) -> None:
        for name, known in (("regions", REGIONS), ("search", SEARCHES)):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} is {value!r}: expected one of {', '.join(known)}")
        if not isinstance(self.region_options, Mapping):
            raise UserError(f"region_options are {self.region_options!r}: expected names with values, such as count=49")
        taken = [name for name in inspect.signature(REGIONS[self.regions]).parameters if name != "image"]
        if unknown := [name for name in self.region_options if name not in taken]:
            raise UserError(f"region_options {', '.join(unknown)} are unknown: {self.regions} takes {', '.join(taken)}")
        if isinstance(self.fill, str) and self.fill == "linear":
            raise UserError("fill is 'linear': it fills curves only, searches need a colour, an image or another named fill")
        Protocol(fill=self.fill)
        for name, least in (("samples", 1), ("most", 1), ("seed", 0), ("pending", 1), ("clusters", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is None and name not in ("seed", "pending"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{name} is {value!r}: expected a whole number of at least {least}")
        confidence = self.min_confidence
        if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
            raise UserError(f"min_confidence is {confidence!r}: expected a probability, 0 to 1")

    def plain(self) -> dict[str, Any]:
        """The settings as JSON."""
        return plain_settings({f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> FailureSettings:
        """From plain values.

        Raises:
            UserError: an unknown field, or no data.
        """
        check_fields(cls, values)
        return cls(**values)
