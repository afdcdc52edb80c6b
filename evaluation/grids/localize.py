"""Attribution methods in the grid settings: one map for every head, and the share of it that lies in the cell of its class."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribution.baselines import METHOD_PRESETS
from attribution.baselines.attribute import METHODS, run_method
from attribution.baselines.options import check_options, current_names, option_names
from attribution.baselines.smoothing import Smoothing, smoothed
from attribution.checks import LARGEST_SEED, check_choice, check_whole, did_you_mean
from attribution.errors import NotApplicable, UserError, describe
from attribution.explanation import Explanation
from attribution.masking import MaskedInputs, prefix_probabilities
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.objective import ScoreWeights, SubmodularObjective
from attribution.regions import REGIONS, Regions, make_regions
from attribution.search import SEARCHES
from attribution.task import Task
from evaluation.grids.model import GridModel, heads_of, join_cells, split_cells
from evaluation.grids.scores import cell_slices, localization_scores
from evaluation.grids.view import GridView

REGION_COUNT = 49  # about how many regions a whole grid gets
_SHIPPED = {"rise": {"samples": 1000}}  # the configuration that Rao et al. ran, where it is not the preset's
_COARSE = {"occlusion": {"sliding_window_shapes": 5, "strides": 2}}  # and at layers other than the input


@dataclass(frozen=True)
class GridMethod:
    """A method as the grid settings run it.

    Attributes:
        method: key of ``METHODS``, or of ``SEARCHES`` for a region search.
        options: of the method. A search takes ``weights``, ``pending``, its own options, and ``show``, the map that is made of its order:
            "gain" or "rank" (see ``Explanation.to_pixels``), or "first". With "first", as many regions as the cell holds are 1, from the
            front of the order, and all others 0; the score is then the share of these regions that lies in the cell.
        published: start from the settings of Rao et al. where they ran the method.
        smoothing: of the map before it is judged; None for no smoothing.
        regions, region_options: how each cell is cut, for methods on regions; ``count`` is for the whole grid.
        compat: quirks of the reference code: Score-CAM weights the last head's channels by the first head's logits.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    published: bool = True
    smoothing: Smoothing | None = None
    regions: str = "slico"
    region_options: Mapping[str, Any] = field(default_factory=dict)
    compat: bool = False

    def __post_init__(self) -> None:
        names = (*SEARCHES, *METHODS)
        if self.method not in names:
            raise UserError(f"unknown method {self.method!r}: expected one of {', '.join(names)}{did_you_mean(self.method, names)}")
        if self.method in METHODS:
            object.__setattr__(self, "options", current_names(self.method, self.options, stacklevel=4))
            check_options(self.method, METHODS[self.method].function, self.options)
            return
        known = {"weights", "pending", "show", *option_names(SEARCHES[self.method])}
        if unknown := sorted(set(self.options) - known):
            raise UserError(f"{self.method} takes no option {', '.join(unknown)}: expected {', '.join(sorted(known))}")

    def settings(self, at_input: bool) -> dict[str, Any]:
        """The options at a layer, published ones first."""
        if self.method in SEARCHES or not self.published:
            return dict(self.options)
        published = {**METHOD_PRESETS["rao"].get(self.method, {}), **_SHIPPED.get(self.method, {})}
        return {**published, **({} if at_input else _COARSE.get(self.method, {})), **self.options}


def grid_localization(
    classifier: Classifier | str,
    grids: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[Sequence[int]],
    n: int = 2,
    setting: str = "difull",
    layer: str = "final",
    method: str = "integrated_gradients",
    *,
    smoothing: Smoothing | int | None = None,
    published: bool = True,
    seed: int = 0,
    compat: bool = False,
    regions: str = "slico",
    region_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Tensor:
    """Measure how much of a method's attribution lies in the cell of the class explained, for grids of images.

    The score of a map is the share of its positive part inside the cell, after bilinear interpolation to the grid; 0 for an
    empty map. Chance is 1 / n^2. Logits are explained.

    Rao, Boehle & Schiele, "Towards Better Understanding Attribution Methods", CVPR 2022.

    Args:
        classifier: of single images, or a name that ``load_classifier`` takes. It is not altered.
        grids: uint8 [G, n h, n w, 3] RGB, or float [G, 3, n h, n w] in [0, 1]; (h, w) is the classifier's input size.
        labels: int [G, n^2], the class of each cell, row by row.
        n: cells a side.
        setting: "gridpg", "difull" or "dipart" (see ``GridModel``).
        layer: "input", "middle", "final", or the name of a module whose output is explained.
        method: key of ``METHODS``, or of ``SEARCHES`` for a region search.
        smoothing: of the signed map before it is judged, or the size of its Gaussian kernel in pixels of the grid (S-IxG, S-IntGrad).
        published: start from the settings of the paper where it has the method, such as 20 steps of integrated gradients; otherwise
            from the defaults of ``METHODS``. All methods use zero as fill, which is the mean colour at the input.
        seed: of stochastic methods; grid g draws with seed + g.
        compat: see ``GridMethod``.
        regions, region_options: how each cell is cut, for methods on regions.
        progress: called with (grids done, grids).
        options: of the method.

    Returns:
        float32 [G, heads]: all n^2 cells for GridPG, the first and the last otherwise.

    Raises:
        UserError: input that does not fit.
        NotApplicable: a setting, layer or method that is not defined for the model, with the reason.
    """
    spec = GridMethod(method, options, published, Smoothing.parse(smoothing), regions, dict(region_options or {}), compat)
    maps = grid_maps(classifier, grids, labels, n, setting, layer, spec, seed=seed, progress=progress)
    heads = heads_of(setting, n)
    scores = localization_scores(maps.flatten(0, 1), list(heads) * len(maps), n, grid_size(grids))
    return scores.view(len(maps), len(heads))


def grid_maps(
    classifier: Classifier | str,
    grids: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[Sequence[int]],
    n: int = 2,
    setting: str = "difull",
    layer: str = "final",
    method: GridMethod | str = "integrated_gradients",
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The maps that ``grid_localization`` judges: float32 [G, heads, h', w'], signed, at the resolution of the layer."""
    with torch.inference_mode(False):  # whatever the caller's mode: gradients are needed
        classifier = load_classifier(classifier)
        images, classes = _checked(classifier, grids, labels, n)
        spec = method if isinstance(method, GridMethod) else GridMethod(method)
        check_whole("seed", seed, 0, LARGEST_SEED - len(images))  # grid g draws with seed + g
        heads = heads_of(setting, n)
        model = GridModel(classifier, n, layer)
        model.require(setting)
        found = []
        for index, (image, row) in enumerate(zip(images, classes, strict=True)):
            view = GridView(model, image, (setting,))
            found.append(torch.stack([head_map(view, setting, cell, row, spec, seed + index).values for cell in heads]))
            if progress is not None:
                progress(index + 1, len(images))
        return torch.stack(found)


@dataclass(frozen=True, eq=False)
class HeadMap:
    """The map of a method for one head.

    Attributes:
        values: float32 [h', w'] at the resolution of the layer, signed; smoothed where that was asked for.
        evaluations: masked maps or images whose logits the method asked for; several heads may share their passes.
    """

    values: Tensor
    evaluations: int


def head_map(view: GridView, setting: str, cell: int, classes: Sequence[int], spec: GridMethod, seed: int = 0) -> HeadMap:
    """Explain one head of a grid by a method.

    Args:
        view: the grid at a layer.
        setting: "gridpg", "difull" or "dipart".
        cell: of the head.
        classes: the class of each cell; that of the head's is explained.
        spec: the method.
        seed: of stochastic methods.
    """
    n = view.model.n
    is_search = spec.method in SEARCHES
    inside = not is_search and METHODS[spec.method].looks_inside
    alone = inside and setting == "difull"
    head = 0 if spec.compat and spec.method == "score_cam" and setting != "gridpg" else cell
    task = view.task(setting, head, int(classes[cell]), seed, alone, inside)
    key = _key(setting, cell, head, classes[cell], seed, spec)
    if is_search:
        values, evaluations = _searched(view, task, spec, cell, key)
    else:
        values, evaluations = view.once(key, lambda: (_attributed(view, task, spec), task.evaluations))
    if alone:
        rows, columns = cell_slices(cell, n, n * task.size[0], n * task.size[1])
        pasted = torch.zeros(n * task.size[0], n * task.size[1])
        pasted[rows, columns] = values
        values = pasted
    if spec.smoothing is not None:
        values = smoothed(values, spec.smoothing, values.shape[-1] / view.model.size[1])
    return HeadMap(values, evaluations)


def _attributed(view: GridView, task: Task, spec: GridMethod) -> Tensor:
    method = METHODS[spec.method]
    options = spec.settings(view.model.layer is None)
    if method.family == "cam":
        options.setdefault("layer", view.explained_layer(task))
    if "regions" in method.options:
        options.setdefault("regions", _labels(view, task, spec))
    if "grid" in method.options and "grid" not in spec.options:
        usual = options.get("grid", inspect.signature(method.function).parameters["grid"].default)
        options["grid"] = min(usual, *task.size)  # a coarse mask has no more cells a side than the layer has positions
    try:
        return run_method(method, task, options)
    except NotApplicable:
        if spec.method != "guided_grad_cam" or "layer" in options:
            raise
        return run_method(method, task, {**options, "layer": view.explained_layer(task)})  # no map follows: the layer is the explained one


def _searched(view: GridView, task: Task, spec: GridMethod, cell: int, key: str | None) -> tuple[Tensor, int]:
    """Run a region search over the explained maps, with regions hidden by zero: the map of its order, and its evaluations."""
    options = dict(spec.options)
    weights, pending = options.pop("weights", ScoreWeights()), options.pop("pending", 8)
    shown = options.pop("show", "gain")
    check_choice("show", shown, ("gain", "rank", "first"))
    labels = _labels(view, task, spec)
    masked = MaskedInputs(task.classifier, task.image, labels, task.fill)
    options.update(SEARCHES[spec.method].taken(pending=pending))

    def search() -> tuple[Tensor, int]:
        objective = SubmodularObjective(task.classifier, masked, task.target, weights)
        return torch.as_tensor(SEARCHES[spec.method](objective, **options)).cpu().long(), objective.evaluations

    order, evaluations = view.once(key, search)
    if shown == "first":
        rows, columns = cell_slices(cell, view.model.n, *task.size)
        first = order[: len(labels[rows, columns].unique())]
        return torch.isin(labels, first).float(), evaluations
    insertion, deletion = prefix_probabilities(task.classifier, masked, order, task.target)
    probabilities = task.classifier.probabilities(task.inputs)[0].detach().cpu()
    regions = Regions(labels, "given", len(order))
    made = Explanation(task.image, task.target, task.classifier.class_names, probabilities, regions, order, insertion, deletion)
    return made.to_pixels(shown), evaluations


def _key(setting: str, cell: int, head: int, target: int, seed: int, spec: GridMethod) -> str | None:
    """All that a map depends on before it is smoothed, or an order before it is shown; None where an option is no plain value."""
    options = {name: value for name, value in spec.options.items() if name != "show"}
    if not all(isinstance(value, str | int | float | ScoreWeights | None) for value in options.values()):
        return None
    cut = (spec.regions, sorted(spec.region_options.items()))
    return repr((setting, cell, head, target, seed, spec.method, sorted(options.items()), spec.published, cut))


def _labels(view: GridView, task: Task, spec: GridMethod) -> Tensor:
    """Cut every cell on its own, so that no region lies in two of them: a label map at the resolution of the layer."""
    n = view.model.n
    options = dict(spec.region_options)
    takes = inspect.signature(REGIONS[spec.regions]).parameters if spec.regions in REGIONS else {}
    if "count" in takes and not {"region_size", "rows", "columns"} & set(options):
        options.setdefault("count", REGION_COUNT)
    if isinstance(options.get("count"), int):
        options["count"] = max(2, math.ceil(options["count"] / n**2))
    key = repr((spec.regions, options, task.size))
    if key not in view.partitions:
        parts = [make_regions(cell, spec.regions, **options).labels for cell in split_cells(view.grid[None], n)]
        first = torch.tensor([0, *(int(labels.max()) + 1 for labels in parts)]).cumsum(0)
        labels = join_cells(torch.stack([labels + offset for labels, offset in zip(parts, first, strict=False)])[:, None], n)
        at_layer = torch.nn.functional.interpolate(labels.double(), size=task.size, mode="nearest-exact")[0, 0]
        view.partitions[key] = at_layer.unique(return_inverse=True)[1]  # a region smaller than a position of the layer may be gone
    return view.partitions[key]


def grid_size(grids: Any) -> tuple[int, int]:
    """(height, width) of grids [G, H, W, 3] or [G, 3, H, W]."""
    shape = tuple(grids.shape)
    return (shape[1], shape[2]) if shape[-1] == 3 and shape[1] != 3 else (shape[2], shape[3])


def _checked(classifier: Classifier, grids: Any, labels: Any, n: int) -> tuple[Tensor, list[list[int]]]:
    heads_of("gridpg", n)
    height, width = classifier.preprocessing.size
    wanted = f"uint8 [G, {n * height}, {n * width}, 3] or float [G, 3, {n * height}, {n * width}] in [0, 1]"
    numbers = isinstance(grids, np.ndarray) and grids.dtype.kind in "fu"
    images = torch.from_numpy(np.ascontiguousarray(grids)) if numbers else grids
    if isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4 and images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2).float() / 255
    fits = isinstance(images, Tensor) and images.is_floating_point() and images.shape[1:] == (3, n * height, n * width) and len(images)
    if not fits or not bool(((images >= 0) & (images <= 1)).all()):
        raise UserError(f"grids are {describe(grids)}: expected {wanted} for {n} x {n} cells of {classifier.name}")
    classes = _class_table(labels, (len(images), n * n))
    if not bool(((classes >= 0) & (classes < classifier.num_classes)).all()):
        found = f"{int(classes.min())} to {int(classes.max())}"
        raise UserError(f"labels run from {found}: {classifier.name} has classes 0 to {classifier.num_classes - 1}")
    return images.float().cpu(), classes.tolist()


def _class_table(labels: Any, shape: tuple[int, int]) -> np.ndarray:
    try:
        classes = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    except ValueError:  # rows of different lengths
        classes = np.empty(0, dtype=object)
    if classes.dtype.kind not in "iu" or classes.shape != shape:
        received = describe(labels) if classes.dtype.kind == "O" else describe(classes)
        raise UserError(f"labels are {received}: expected whole numbers {list(shape)}, the class of each cell")
    return classes
