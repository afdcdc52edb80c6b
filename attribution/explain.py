"""explain: regions, objective, search and trajectories composed into one explanation."""

from __future__ import annotations

import inspect
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attribution.dropping import follow_patches, masked_inputs
from attribution.errors import UserError, describe
from attribution.explanation import Explanation
from attribution.fills import Fill, drops, several_fills
from attribution.image import MAX_SIDE, ImageSource, limit_size, load_image
from attribution.masking import prefix_probabilities
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.objective import MeanObjective, ScoreWeights, SubmodularObjective
from attribution.presets import BALANCED, PRESETS, Preset
from attribution.provenance import plain_settings, provenance
from attribution.regions import is_method, make_regions
from attribution.search import SEARCHES
from attribution.search.budget import default_budget
from attribution.search.contract import Objective, Progress


def explain(
    image: ImageSource,
    classifier: Classifier | str,
    target: int | str | None = None,
    *,
    regions: Any = None,
    search: str | Callable[[Objective], Any] | None = None,
    weights: ScoreWeights | None = None,
    fill: Fill = "black",
    pending: int | None = None,
    evaluations: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    preset: str | None = None,
    region_options: Mapping[str, Any] | None = None,
    search_options: Mapping[str, Any] | None = None,
    objective_options: Mapping[str, Any] | None = None,
    max_side: int | None = MAX_SIDE,
    progress: Progress | None = None,
) -> Explanation:
    """Order the regions of an image by how much a classifier's decision rests on them.

    Args:
        image: whatever ``load_image`` takes.
        classifier: a ``Classifier`` (wrap your own module or callable in one), or a name that ``load_classifier`` takes.
        target: class to explain, index or name; the predicted class by default.
        regions: a key of ``REGIONS`` (default "slico"), a callable, an int label map [H, W], bool masks [R, H, W] or
            ``Regions``.
        search: a key of ``SEARCHES`` (default "bidirectional"), or a callable from an objective to an order.
        weights: of the four scores; default LiMA's, consistency 20, collaboration 5, confidence 0.01, effectiveness 0. Search
            "budget" takes 1, 1, 0, 0 by default: what it then raises is Insertion - Deletion.
        fill: what hidden regions show (see ``make_fill``); also "model_mean", the classifier's own mean colour; or several named
            fills such as "black+blur+mean": F and the trajectories are then means over them, each counted as images of its own; or
            "drop": the tokens of hidden patches leave a vision transformer's sequence (regions by name then follow its patches, see
            ``follow_patches``).
        pending: p of the bidirectional search, default 8.
        evaluations: N, images that search "budget" may forward; 16 R by default, for each of several fills.
        seed: of searches that draw.
        batch_size: most images forwarded at once; the classifier's own by default. In float32 it
            changes probabilities by less than 1e-5.
        preset: a key of ``PRESETS``; what is given beside it overrides it.
        region_options, search_options, objective_options: further arguments of the region method, the search and
            ``SubmodularObjective``.
        max_side: longer images are shrunk to this side before they are cut into regions; None for no limit. With a label map
            or masks the image keeps its size.
        progress: called with (regions placed, R); by search "budget" with (images forwarded, N).

    Returns:
        The order, its trajectories over all R + 1 prefixes and its provenance. ``evaluations`` counts the images that the
        search forwarded: the formulas of each search, plus one for each region where the effectiveness has a weight. The
        image itself and the prefixes of the trajectories are not counted.

    Raises:
        UserError: any input that does not fit, with what was received and what was expected.
    """
    started = time.perf_counter()
    chosen = _preset(preset)
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}: expected 0 to 2**63 - 1")
    if isinstance(classifier, torch.nn.Module):
        raise UserError("a bare nn.Module has no input size: wrap it, at.Classifier(module, size=..., mean=..., std=..., class_names=...)")
    classifier = load_classifier(classifier)
    regions = chosen.regions if regions is None else regions
    search = chosen.search if search is None else search
    if weights is None:
        weights = BALANCED if search == "budget" and preset is None else chosen.weights
    if not isinstance(weights, ScoreWeights):
        raise UserError(f"weights are {describe(weights)}: expected ScoreWeights(consistency=..., collaboration=..., ...)")
    if regions is None:
        raise UserError(f"preset {preset!r} works on masks: give regions as bool masks [R, H, W]")
    with classifier.forwarding(batch_size):
        loaded = original = load_image(image).cpu()
        if is_method(regions):
            loaded = limit_size(loaded, max_side)
        published = isinstance(regions, str) and regions == chosen.regions
        options = {**(chosen.region_options if published else {}), **(region_options or {})}
        cut = make_regions(loaded, regions, **options)
        if drops(fill) and is_method(regions):
            cut = follow_patches(classifier, cut)
        photo_size = (original.shape[1], original.shape[2])
        masked = [masked_inputs(classifier, loaded, cut.labels, each, photo_size) for each in several_fills(fill)]
        probabilities = classifier.probabilities(classifier.inputs(loaded))[0].cpu()
        wanted = int(probabilities.argmax()) if target is None else classifier.target_index(target)

        scoring = {**chosen.objective_options, **(objective_options or {})}
        _check_options(SubmodularObjective, scoring, "objective")
        if drops(fill) and "confidence_classifier" in scoring:
            raise UserError("fill 'drop' takes tokens of one model away: it goes without a confidence_classifier, a second one")
        objectives = [SubmodularObjective(hiding, each, wanted, weights, **scoring) for hiding, each in masked]
        objective = objectives[0] if len(objectives) == 1 else MeanObjective(objectives)
        p = _pending(chosen.pending if pending is None else pending, cut.count)
        offered = {"pending": p, "seed": seed, "progress": progress}
        theirs = chosen.search_options if search == chosen.search else {}
        searching = {key: min(value, cut.count) if key == "count" else value for key, value in theirs.items()}
        searching.update(search_options or {})
        if evaluations is not None:
            searching["evaluations"] = evaluations
        if search == "budget":
            searching.setdefault("evaluations", default_budget(objective))
        order = _run_search(search, objective, offered, searching)
        along = [prefix_probabilities(hiding, each, order, wanted) for hiding, each in masked]
        insertion, deletion = (torch.stack(scores).mean(dim=0) for scores in zip(*along, strict=True))

    settings = {
        "regions": {"method": cut.method, "requested": cut.requested, "actual": cut.count, **plain_settings(options)},
        "search": search if isinstance(search, str) else getattr(search, "__name__", type(search).__name__),
        "search_options": plain_settings({**({"pending": p} if search == "bidirectional" else {}), **searching}),
        "weights": vars(weights),
        "objective_options": plain_settings(scoring),
        "fill": fill if isinstance(fill, str) else plain_settings({"fill": fill})["fill"],
        "target": target,
        "preset": preset,
        "seed": seed,
        "max_side": max_side,
    }
    return Explanation(
        image=loaded,
        target=wanted,
        class_names=classifier.class_names,
        probabilities=probabilities,
        regions=cut,
        order=order,
        insertion_scores=insertion,
        deletion_scores=deletion,
        evaluations=objective.evaluations,
        provenance=provenance(classifier, settings, started),
    )


def polish(
    explanation: Explanation,
    classifier: Classifier | str,
    *,
    regions: Any = None,
    evaluations: int | None = None,
    **options: Any,
) -> Explanation:
    """A better order of the same regions, by local search from the one that is there.

    The mean of F along the order never falls: with the default weights that is Insertion - Deletion under the fill given.

    Args:
        explanation: of any search, or a heatmap of any method; its regions are ordered by it first where it has no order of them.
        classifier: a ``Classifier``, or a name that ``load_classifier`` takes.
        regions: a label map int [H, W], bool masks or ``Regions`` of the explanation's image; its own by default.
        evaluations: N, images forwarded at most; 16 R by default.
        options: further arguments of ``explain``: fill, weights, seed, batch_size, progress, ...

    Raises:
        UserError: a heatmap without regions, or any input that does not fit.
    """
    cut = explanation.regions if regions is None else make_regions(explanation.image, regions)
    if cut is not None and is_method(regions) and drops(options.get("fill", "black")):
        cut = follow_patches(classifier, cut)
    if cut is None:
        raise UserError("the explanation is a heatmap without regions: give regions=, such as a label map or at.make_regions(image)")
    for name in ("target", "search", "search_options", "region_options"):
        if name in options:
            raise UserError(f"polish takes no {name}: it keeps the target and the regions, and searches from the order that is there")
    own = explanation.order is not None and explanation.regions is not None and torch.equal(explanation.regions.labels, cut.labels)
    start = (explanation if own else explanation.ranked_over(cut)).order
    assert start is not None
    return explain(
        explanation.image,
        classifier,
        explanation.target,
        regions=cut,
        search="budget",
        search_options={"start": start.tolist()},
        evaluations=evaluations,
        **options,
    )


def _preset(name: str | None) -> Preset:
    name = "default" if name is None else name
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _pending(value: int | str, size: int) -> int:
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value):
        return max(1, math.ceil(float(value[:-1]) / 100 * size))
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"pending is {value}: expected a whole number of at least 1, or a share such as '15%'")
    return value


def _run_search(search: Any, objective: SubmodularObjective | MeanObjective, offered: dict[str, Any], given: dict[str, Any]) -> Tensor:
    """Offered arguments reach the searches that take them; given ones must be taken."""
    if isinstance(search, str):
        if search not in SEARCHES:
            raise UserError(f"unknown search {search!r}: expected one of {', '.join(SEARCHES)}, or a callable")
        search = SEARCHES[search]
    if not callable(search):
        raise UserError(f"search is {describe(search)}: expected one of {', '.join(SEARCHES)}, or a callable from an objective to an order")
    _check_options(search, given, "search")
    parameters = inspect.signature(search).parameters
    arguments = {name: value for name, value in offered.items() if name in parameters and name not in given}
    found = torch.as_tensor(search(objective, **arguments, **given)).cpu().long()
    return _complete(found, objective.size)


def _check_options(function: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    taken = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = [name for name in options if name not in taken]
    if unknown:
        raise UserError(f"{what} options {', '.join(unknown)} are unknown: expected {', '.join(taken) or 'none'}")


def _complete(order: Tensor, size: int) -> Tensor:
    """A search may stop early; the regions it did not place follow by id."""
    valid = order.ndim == 1 and len(order.unique()) == len(order) and bool(((order >= 0) & (order < size)).all())
    if not valid:
        raise UserError(f"the search returned {describe(order)}: expected distinct region ids from 0 to {size - 1}")
    missing = torch.ones(size, dtype=torch.bool)
    missing[order] = False
    return torch.cat([order, missing.nonzero()[:, 0]])
