"""explain: make an explanation by regions, an objective and a search. polish: improve the order of an explanation."""

from __future__ import annotations

import inspect
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attribution.checks import check_choice, check_number, check_seed, check_types, did_you_mean, is_whole
from attribution.dropping import follow_patches, masked_inputs
from attribution.errors import UserError, describe
from attribution.explanation import Explanation
from attribution.fills import DEFAULT_FILL, Fill, drops, recorded_fill, several_fills
from attribution.image import MAX_SIDE, ImageSource, limit_size, load_image
from attribution.masking import RegionInputs, as_seen, prefix_rows
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.objective import MeanObjective, ScoreWeights, SubmodularObjective
from attribution.presets import PRESETS
from attribution.priors import Prior, PriorMap, best_prior, prior_maps
from attribution.provenance import plain_settings, provenance
from attribution.regions import Regions, is_method, make_regions, several
from attribution.search import SEARCHES, Search
from attribution.search.contract import Objective, Progress

_SEARCHING = 0.97  # share of the time given that is over when the search ends; reading its result takes the rest


def explain(
    image: ImageSource,
    classifier: Classifier | str,
    target: int | str | None = None,
    *,
    regions: Any = None,
    search: str | Callable[[Objective], Any] | None = None,
    weights: ScoreWeights | None = None,
    fill: Fill = DEFAULT_FILL,
    pending: int | None = None,
    evaluations: int | None = None,
    seconds: float | None = None,
    prior: Prior | Sequence[Prior] | None = None,
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
        search: a key of ``SEARCHES`` (default "budget"), a ``Search``, or a callable from an objective to an order.
        weights: weights of the four scores. Default: those of the preset, else of the search: consistency 1 and collaboration 1 for
            "budget", with which the mean of F is Insertion - Deletion + 1; LiMA's for the others, consistency 20, collaboration 5,
            confidence 0.01.
        fill: what hidden regions show (see ``make_fill``); also "model_mean", the classifier's own mean colour; or several named
            fills such as "black+blur+mean": F and the trajectories are then means over them, and the images of each are counted; or
            "drop": the tokens of hidden patches leave a vision transformer's sequence (regions by name then follow its patches, see
            ``follow_patches``).
        pending: p of the bidirectional search, default 8; without search and preset it chooses this search.
        evaluations: N, the images that a search with a budget forwards at most. Default: 8 R for each fill, and 32 R on inputs of fewer
            than 128 x 128 pixels, where images are cheap. With ``seconds`` as many as there is time for.
        seconds: time for the whole call, for a search that looks at the clock ("budget"). It returns the best order found, which
            depends on the machine. After the search the curves need up to 2 R + 2 images: a time too short for them is exceeded.
        prior: where a search that takes one ("budget") begins, in place of forwarding R images: the name of an attribution method, such
            as "grad_cam", a heatmap [H, W], or an ``Explanation``, of this image or a similar one, such as the last frame of a film. Of
            several, the one whose prefixes score best. "auto" takes the first of grad_cam, transformer_attribution
            and integrated_gradients that applies to the model; a black box then begins without a prior. The images that a method
            forwards are counted, an image with its gradient as three.
        seed: of stochastic searches, 0 to 2^63 - 1.
        batch_size: most images forwarded at once; the classifier's own by default. In float32 it
            changes probabilities by less than 1e-5.
        preset: a key of ``PRESETS``; what is given beside it overrides it.
        region_options, search_options, objective_options: further arguments of the region method, the search and
            ``SubmodularObjective``.
        max_side: longer images are shrunk to this side before they are cut into regions; None for no limit. With a label map
            or masks the image keeps its size.
        progress: called by the search: with (images forwarded, N) where it has a budget, else with (regions placed, R).

    Returns:
        The order, its trajectories over all R + 1 prefixes and its provenance. ``evaluations`` counts the images that the
        search forwarded, plus one for each region where the effectiveness has a weight. The image itself and the prefixes of
        the trajectories are not counted.

    Raises:
        UserError: any input that does not fit, with what was received and what was expected.
    """
    started = time.perf_counter()
    plan = _resolved(preset, regions, search, weights, pending, region_options, objective_options)
    check_seed(seed)
    if seconds is not None:
        check_number("seconds", seconds, 0)
        if seconds == 0:
            raise UserError("seconds is 0: expected a positive time, such as 5")
    if isinstance(classifier, torch.nn.Module):
        raise UserError("a bare nn.Module has no input size: wrap it, at.Classifier(module, size=..., mean=..., std=..., class_names=...)")
    classifier = load_classifier(classifier)
    with classifier.forwarding(batch_size), classifier.folding():
        loaded, cut, photo_size = _cut(image, classifier, plan, fill, max_side)
        masked = [masked_inputs(classifier, loaded, cut.labels, each, photo_size) for each in several_fills(fill)]
        probabilities = classifier.probabilities(classifier.inputs(loaded))[0].cpu()
        wanted = int(probabilities.argmax()) if target is None else classifier.target_index(target)
        objective = _objective(masked, wanted, plan, fill)
        options = _search_options(plan, objective, math.prod(classifier.preprocessing.size), evaluations, seconds, search_options)
        begun: dict[str, Any] = {}
        counted = objective.evaluations
        if (begin := _prior(prior, plan, objective, loaded, classifier, cut, wanted, seed)) is not None:
            begun["prior"] = begin.over(cut)
            if options.get("evaluations") is not None:
                begun["evaluations"] = max(1, options["evaluations"] - begin.images - (objective.evaluations - counted))
        if seconds is not None:
            begun["seconds"] = max(0.0, _SEARCHING * seconds - (time.perf_counter() - started))
        order = _ordered(plan.search, objective, {**plan.search.taken(seed=seed, progress=progress), **options, **begun})
        insertion, deletion = _trajectories(objective, order)
    given: dict[str, Any] = {"target": target, "preset": preset, "seed": seed, "max_side": max_side}
    given |= {} if seconds is None else {"seconds": seconds}
    given |= {} if prior is None else {"prior": None if begin is None else begin.name}
    settings = _recorded(plan, cut, classifier, options, fill, given)
    return Explanation(
        image=loaded,
        target=wanted,
        class_names=classifier.class_names,
        probabilities=probabilities,
        regions=cut,
        order=order,
        insertion_scores=insertion,
        deletion_scores=deletion,
        evaluations=objective.evaluations + (0 if begin is None else begin.images),
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
    """Improve an order of regions by local search.

    The mean of F along the order never falls. With the default weights that is Insertion - Deletion under the fill given.

    Args:
        explanation: of any search, or a heatmap of any method. Where it has no order of these regions, its heatmap ranks them first.
        classifier: a ``Classifier``, or a name that ``load_classifier`` takes.
        regions: a label map int [H, W], bool masks or ``Regions`` of the explanation's image; its own by default.
        evaluations: N, images forwarded at most; as for ``explain`` by default.
        options: further arguments of ``explain``, such as fill, weights, seed, batch_size and progress. The fill is that of
            the explanation by default.

    Returns:
        An ``Explanation`` of the same image, target and regions.

    Raises:
        UserError: a heatmap without regions, or any input that does not fit.
    """
    if not isinstance(explanation, Explanation):
        raise UserError(f"explanation is {describe(explanation)}: expected an Explanation, as explain and attribute return it")
    options.setdefault("fill", recorded_fill(explanation.provenance.get("settings", {}).get("fill")) or DEFAULT_FILL)
    cut = explanation.regions if regions is None else make_regions(explanation.image, regions)
    if cut is not None and is_method(regions) and drops(options["fill"]):
        cut = follow_patches(classifier, cut)
    if cut is None:
        raise UserError("the explanation is a heatmap without regions: give regions=, such as a label map or at.make_regions(image)")
    for name in ("target", "search", "search_options", "region_options"):
        if name in options:
            raise UserError(f"polish takes no {name}: it keeps the target and the regions, and starts from the order of the explanation")
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


@dataclass(frozen=True)
class _Plan:
    """What ``explain`` is asked for: a preset, overridden by what is given beside it."""

    regions: Any
    search: Search
    search_name: str
    weights: ScoreWeights
    pending: int | str
    region_options: Mapping[str, Any]
    search_options: Mapping[str, Any]  # of the preset
    objective_options: Mapping[str, Any]


def _resolved(
    preset: str | None,
    regions: Any,
    search: Any,
    weights: ScoreWeights | None,
    pending: int | str | None,
    region_options: Mapping[str, Any] | None,
    objective_options: Mapping[str, Any] | None,
) -> _Plan:
    name = "default" if preset is None else preset
    check_choice("preset", name, PRESETS)
    chosen = PRESETS[name]
    regions = chosen.regions if regions is None else regions
    if regions is None:
        raise UserError(f"preset {preset!r} works on masks: give regions as bool masks [R, H, W]")
    search = search_meant(search, pending, name)
    entry = _entry(search)
    if weights is None:
        weights = entry.weights if name == "default" else chosen.weights
    if pending is not None and "pending" not in entry.options:
        called = search if isinstance(search, str) else entry.name
        raise UserError(f"pending is {pending!r}, but search {called} has no p: give search='bidirectional', or leave it out")
    if not isinstance(weights, ScoreWeights):
        raise UserError(f"weights are {describe(weights)}: expected ScoreWeights(consistency=..., collaboration=..., ...)")
    published = isinstance(regions, str) and regions == chosen.regions
    scoring = {**chosen.objective_options, **(objective_options or {})}
    keywords = [each.name for each in inspect.signature(SubmodularObjective).parameters.values() if each.kind is each.KEYWORD_ONLY]
    _check_options(scoring, keywords, "objective")
    return _Plan(
        regions=regions,
        search=entry,
        search_name=search if isinstance(search, str) else entry.name,
        weights=weights,
        pending=chosen.pending if pending is None else pending,
        region_options={**(chosen.region_options if published else {}), **(region_options or {})},
        search_options=chosen.search_options if search == chosen.search else {},
        objective_options=scoring,
    )


def search_meant(search: Any, pending: int | str | None, preset: str | None) -> Any:
    """The search that the arguments of ``explain`` mean: the one given, that of p where p alone is given, else that of the preset."""
    if search is not None:
        return search
    by_default = preset in (None, "default")
    return "bidirectional" if by_default and pending is not None else PRESETS[preset or "default"].search


def _entry(search: Any) -> Search:
    if isinstance(search, Search):
        return search
    if isinstance(search, str) and search in SEARCHES:
        entry = SEARCHES[search]
        if not isinstance(entry, Search):
            raise UserError(f"SEARCHES[{search!r}] is {describe(entry)}: expected a Search, such as Search(function)")
        return entry
    if isinstance(search, str) or not callable(search):
        raise UserError(
            f"search is {describe(search)}: expected one of {', '.join(SEARCHES)}, or a callable from an objective to an order"
            f"{did_you_mean(search, SEARCHES)}"
        )
    return Search(search)


def _cut(
    image: ImageSource, classifier: Classifier, plan: _Plan, fill: Fill, max_side: int | None
) -> tuple[Tensor, Regions, tuple[int, int]]:
    """The image [3, H, W] at the size at which it is cut, its regions as the model sees them, and the height and width of the original."""
    original = load_image(image).cpu()
    loaded = limit_size(original, max_side) if is_method(plan.regions) else original
    cut = make_regions(loaded, plan.regions, **plan.region_options)
    if drops(fill) and is_method(plan.regions):
        cut = follow_patches(classifier, cut)
    return loaded, as_seen(several(cut), classifier), (original.shape[1], original.shape[2])


def _objective(
    masked: Sequence[tuple[Classifier, RegionInputs]], target: int, plan: _Plan, fill: Fill
) -> SubmodularObjective | MeanObjective:
    """F under the fill, or its mean over several fills."""
    if drops(fill) and "confidence_classifier" in plan.objective_options:
        raise UserError("fill 'drop' takes tokens of one model away: it goes without a confidence_classifier, a second one")
    objectives = [SubmodularObjective(hiding, each, target, plan.weights, **plan.objective_options) for hiding, each in masked]
    return objectives[0] if len(objectives) == 1 else MeanObjective(objectives)


def _search_options(
    plan: _Plan,
    objective: SubmodularObjective | MeanObjective,
    pixels: int,
    evaluations: int | None,
    seconds: float | None,
    given: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Options of the search that the provenance records: those of the preset, then what is given."""
    pending = _pending(plan.pending, objective.size)
    options = plan.search.taken(pending=pending)
    options.update({key: min(value, objective.size) if key == "count" else value for key, value in plan.search_options.items()})
    options.update(given or {})
    if seconds is not None and "seconds" not in plan.search.options:
        raise UserError(f"seconds is {seconds!r}, but search {plan.search_name} has no clock: give search='budget', or leave it out")
    if evaluations is not None:
        options["evaluations"] = evaluations
    elif plan.search.default_budget is not None and seconds is None:
        options.setdefault("evaluations", plan.search.default_budget(objective, pixels))
    _check_options(options, plan.search.options, "search")
    check_types(f"search {plan.search_name}", plan.search.function, options)
    return options


def _prior(
    prior: Prior | Sequence[Prior] | None,
    plan: _Plan,
    objective: SubmodularObjective | MeanObjective,
    image: Tensor,
    classifier: Classifier,
    cut: Regions,
    target: int,
    seed: int,
) -> PriorMap | None:
    """What the search begins with, if anything."""
    if prior is None:
        return None
    if "prior" not in plan.search.options:
        raise UserError(f"a prior was given, but search {plan.search_name} takes none: give search='budget', or leave it out")
    found = prior_maps(prior, image, classifier, target, seed)
    return best_prior(found, cut, objective) if found else None


def _pending(value: int | str, size: int) -> int:
    """p of R regions: a number, or a share such as "15%", rounded up."""
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value):
        return max(1, math.ceil(float(value[:-1]) / 100 * size))
    if not is_whole(value) or int(value) < 1:
        raise UserError(f"pending is {value!r}: expected a whole number of at least 1, or a share such as '15%'")
    return int(value)


def _check_options(options: Mapping[str, Any], taken: Sequence[str], what: str) -> None:
    if unknown := [name for name in options if name not in taken]:
        budgets = "; the number of images is an option of search budget" if "evaluations" in unknown else ""
        raise UserError(f"{what} options {', '.join(unknown)} are unknown: expected {', '.join(taken) or 'none'}{budgets}")


def _ordered(search: Search, objective: SubmodularObjective | MeanObjective, options: Mapping[str, Any]) -> Tensor:
    """The order that a search finds: int64 [R]. Regions that it did not place follow by id."""
    found, size = search(objective, **options), objective.size
    try:
        order = torch.as_tensor(found).cpu().long()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"the search returned {describe(found)}: expected distinct region ids from 0 to {size - 1}") from None
    if order.ndim != 1 or len(order.unique()) != len(order) or not ((order >= 0) & (order < size)).all():
        raise UserError(f"the search returned {describe(order)}: expected distinct region ids from 0 to {size - 1}")
    missing = torch.ones(size, dtype=torch.bool)
    missing[order] = False
    return torch.cat([order, missing.nonzero()[:, 0]])


def _trajectories(objective: SubmodularObjective | MeanObjective, order: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of the target with the first k regions shown, and with them hidden, as means over the fills: [R + 1] each."""
    shown = prefix_rows(order)
    insertion, deletion = objective.target_probabilities(torch.cat([shown, ~shown])).split(len(shown))
    return insertion, deletion


def _recorded(
    plan: _Plan, cut: Regions, classifier: Classifier, options: Mapping[str, Any], fill: Fill, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings that the provenance holds."""
    notes = {**{name: value for name in ("note", "library") if (value := getattr(cut, name))}, **_cropped(cut)}
    return {
        "regions": {"method": cut.method, "requested": cut.requested, "actual": cut.count, **notes, **plain_settings(plan.region_options)},
        "search": plan.search_name,
        "search_options": plain_settings(options),
        "weights": vars(plan.weights),
        "objective_options": plain_settings(plan.objective_options),
        "fill": fill if isinstance(fill, str) else plain_settings({"fill": fill})["fill"],
        **given,
    }


def _cropped(cut: Regions) -> dict[str, Any]:
    """The part of the image that the model sees, and the number of regions outside it; nothing if it sees the whole image."""
    return {} if cut.seen is None else {"crop": list(cut.seen), "unseen": int((cut.area == 0).sum())}
