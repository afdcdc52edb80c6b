"""The gallery of a report: the same images under all methods, and the best, median and worst image of each method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from attribution.errors import UserError
from attribution.explanation import Explanation
from evaluation.benchmark.results import Explained
from evaluation.benchmark.summary import Summary, score_matrix
from evaluation.benchmark.wording import ARROWS
from evaluation.metrics.registry import METRICS, metric_title
from evaluation.study.page import image_of, picture, shrunk
from evaluation.study.style import THUMBNAIL

GALLERY_IMAGES = 8


class Gallery:
    """Thumbnails of a model: the same images under all methods, and the best, median and worst image of each method.

    Attributes:
        model, methods: best method first.
        title, captions: of the measure that ranks the images, and of those below each map.
        rows, cards: what the page shows of each image, and of each method.
    """

    def __init__(self, summary: Summary, model: str) -> None:
        results = summary.results
        self.model, self.methods, self.results = model, summary.methods(model), results
        self.explained = {(m, sample): each for m in self.methods for sample, each in results.explained_of(model, m).items()}
        measure = summary.first_of_images(model)
        assert measure is not None, f"{model} has no scores of images"
        self.measure = measure
        self.scores = score_matrix(results, model, self.measure)
        wanted = self.measure.protocol if METRICS[self.measure.metric].curve else summary.first_protocol(model)
        both = [m for m in summary.measures if m.metric in ("insertion", "deletion") and m.protocol == wanted]
        self.captioned = [(m, score_matrix(results, model, m)) for m in (both or [self.measure])]
        self._made: dict[tuple[str, str], dict[str, Any]] = {}

        samples = results.samples[model]
        self.title = metric_title(measure.metric) + (f" ({measure.protocol})" if measure.protocol else "")
        self.captions = " / ".join(f"{metric_title(m.metric)} {ARROWS[m.direction]}" for m, _ in self.captioned)
        self.rows = [self._row(samples[index]) for index in chosen_images(self.scores, self.methods[0], measure.direction)]
        self.cards = [card for card in map(self._card, self.methods) if card["places"]]

    def _row(self, sample: str) -> dict[str, Any]:
        known = next(self.explained[method, sample] for method in self.methods if (method, sample) in self.explained)
        names = self.results.models[self.model]["class_names"]
        loaded = _loaded(known)
        return {
            "sample": sample,
            "photo": None if loaded is None else picture(photo_thumbnail(loaded)),
            "target": names[known.target],
            "label": None if known.label is None or known.label == known.target else names[known.label],
            "confidence": f"{known.confidence:.2f}",
            "cells": [{**self._thumbnail(method, sample), "caption": self._caption(method, sample)} for method in self.methods],
        }

    def _card(self, method: str) -> dict[str, Any]:
        samples = self.results.samples[self.model]
        ranking = _ranking(self.scores.get(method, np.empty(0)), self.measure.direction)
        places = [("best", 0), ("median", len(ranking) // 2), ("worst", len(ranking) - 1)] if len(ranking) > 2 else []
        return {
            "method": method,
            "places": [
                {
                    **self._thumbnail(method, samples[ranking[at]]),
                    "place": place,
                    "sample": samples[ranking[at]],
                    "score": f"{self.scores[method][ranking[at]]:.3f}",
                }
                for place, at in places
            ],
        }

    def _thumbnail(self, method: str, sample: str) -> dict[str, Any]:
        if (method, sample) not in self._made:
            explained = self.explained.get((method, sample))
            loaded = None if explained is None else _loaded(explained)
            drawn = None if loaded is None else picture(thumbnail(loaded))
            layer = "" if loaded is None or "layer" not in loaded.provenance else f", layer {loaded.provenance['layer']}"
            self._made[method, sample] = {"picture": drawn, "alt": f"{method} on {sample}{layer}"}
        return self._made[method, sample]

    def _caption(self, method: str, sample: str) -> str:
        index = self.results.samples[self.model].index(sample)
        found = [matrix[method][index] if method in matrix else math.nan for _, matrix in self.captioned]
        return " / ".join(f"{value:.2f}" if math.isfinite(value) else "–" for value in found)  # noqa: RUF001


def chosen_images(scores: Mapping[str, np.ndarray], leader: str, direction: str, count: int = GALLERY_IMAGES) -> list[int]:
    """Choose the images of the gallery: the leader's best, median and worst, then evenly spaced ones by the mean over all methods.

    Args:
        scores: float [N] by method, NaN where there is none.
        leader: method whose ranking of the images gives the first three and the order of all.
        direction: "higher" or "lower" is better.
        count: largest number of images.

    Returns:
        Distinct indices of the N images, the leader's best first.
    """
    if not scores:
        return []
    stacked = np.stack(list(scores.values()))
    known = np.isfinite(stacked)
    means = np.where(known.any(axis=0), np.where(known, stacked, 0).sum(axis=0) / known.sum(axis=0).clip(1), np.nan)
    own = _ranking(scores.get(leader, means), direction)
    overall = _ranking(means, direction)
    first = [own[0], own[len(own) // 2], own[-1]] if len(own) else []
    spread = [overall[at] for at in np.linspace(0, len(overall) - 1, min(count, len(overall))).round().astype(int)]
    # an evenly spaced image may be among the first three; others of the ranking then fill the row
    kept = list(dict.fromkeys([*first, *spread, *overall]))[:count]
    place = {index: at for at, index in enumerate([*own, *overall]) if index in kept}
    place.update({index: at for at, index in enumerate(own)})
    return sorted(kept, key=lambda index: place[index])


def _ranking(values: np.ndarray, direction: str) -> list[int]:
    """Indices of the finite values, best first, ties by index."""
    known = np.flatnonzero(np.isfinite(values))
    keys = values[known] if direction == "lower" else -values[known]
    return [int(index) for index in known[np.argsort(keys, kind="stable")]]


def _loaded(explained: Explained) -> Explanation | None:
    """The stored explanation; None where its file is gone, as after moving the report alone."""
    try:
        return Explanation.load(explained.path)
    except UserError:
        return None


def thumbnail(explanation: Explanation) -> Image.Image:
    """Draw the map over the gray photo, its longer side at most ``THUMBNAIL`` pixels, in the colours of ``draw_heatmap``.

    The colours of a map without negative values run from its least to its largest value. Maps such as RISE's, whose least value is
    far above 0, would otherwise be bright everywhere.
    """
    signed = explanation.pixel_map if explanation.order is None else None
    values = (explanation.heatmap if signed is None else signed).detach().cpu().numpy().astype(float)
    values = np.where(np.isfinite(values), values, 0.0)
    gray = explanation.image.detach().cpu().numpy().clip(0, 1).mean(axis=0)
    pixels = (0.25 + 0.75 * gray)[:, :, None].repeat(3, axis=2)
    top = float(np.abs(values).max())
    if top > 0 and np.ptp(values) > 0:
        name, low, alpha = ("RdBu_r", -top, 0.65) if values.min() < 0 else ("inferno", float(values.min()), 0.6)
        colours = matplotlib.colormaps[name]((values - low) / (top - low))[:, :, :3]
        pixels = (1 - alpha) * pixels + alpha * colours
    return shrunk(image_of(pixels), THUMBNAIL)


def photo_thumbnail(explanation: Explanation) -> Image.Image:
    """Draw the photo, its longer side at most ``THUMBNAIL`` pixels."""
    return shrunk(image_of(explanation.image.detach().cpu().permute(1, 2, 0).numpy()), THUMBNAIL)
