"""The three settings of a grid of images. In each it is known which cells a head's logits can depend on.

With f = head(pool(features(x))), X a grid of n x n images and X_c its cell c (Rao, Boehle & Schiele, CVPR 2022, section 3.1):

GridPG   z   = head(pool(features(X)))             all heads see the whole grid
DiFull   z_c = f(X_c)                              head c sees its own cell only
DiPart   z_c = head(pool(features(X) in cell c))   head c sees its own cell of the final map, whose receptive fields cross the borders

Under DiFull the cells of other heads have no effect at all, so any attribution to them is wrong. The given classifier is not changed:
new functions call its modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from attribution.checks import check_choice, check_whole
from attribution.errors import NotApplicable
from attribution.model.classifier import Classifier
from attribution.network.maps import FeatureLayer
from attribution.network.resized import Resized, resized
from attribution.network.segments import Activation, Segment, module_of
from attribution.network.stages import at_grid, find_layer, grid_positions, last_growing_map, only_averages, only_pools
from evaluation.grids.scores import cell_slices

Setting = Literal["gridpg", "difull", "dipart"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
_WINDOW_VALUES = 2**26  # floats of the windows of a sliding head held at once


def heads_of(setting: str, n: int) -> tuple[int, ...]:
    """The cells whose heads are evaluated: all under GridPG, the first and the last, which are farthest apart, otherwise.

    Raises:
        UserError: no such setting, or n out of range.
    """
    check_choice("setting", setting, SETTINGS)
    check_whole("n", n, 2)
    return tuple(range(n * n)) if setting == "gridpg" else (0, n * n - 1)


class GridModel:
    """A classifier that looks at n x n grids of images of its own size, explained at one layer.

    Args:
        classifier: of single images; it is not changed.
        n: cells a side.
        layer: "input", "middle", "final" or the name of a module (see ``find_layer``).

    Attributes:
        layer: the layer, at the size of a cell; None for the input.
        size: (h, w) of a grid in pixels.
        structures: what methods found out about the network under each setting (``Task.structure``).

    Raises:
        NotApplicable: no such layer can be cut out of the model.
    """

    def __init__(self, classifier: Classifier, n: int = 2, layer: str = "final") -> None:
        heads_of("gridpg", n)
        self.classifier, self.n = classifier, n
        self.layer = find_layer(classifier, layer)
        height, width = classifier.preprocessing.size
        self.size = (n * height, n * width)
        self.cells = at_size(classifier, (height, width), classifier.module)
        self.structures: dict[tuple[str, bool], dict[Any, Any]] = {}

    def __repr__(self) -> str:
        return f"GridModel({self.classifier.name}, {self.n} x {self.n}, {'input' if self.layer is None else self.layer.name})"

    @cached_property
    def _resized(self) -> Resized:
        return resized(module_of(self.classifier), self.classifier.preprocessing.size, self.size)

    @cached_property
    def whole(self) -> Classifier:
        """The classifier at the size of a grid.

        Raises:
            NotApplicable: it takes no images of that size.
        """
        return at_size(self.classifier, self.size, self._resized.module)

    @property
    def interpolated(self) -> bool:
        """Whether position embeddings were interpolated for grids. The model was not trained with interpolated ones."""
        return self._resized.interpolated

    @cached_property
    def pooled_layer(self) -> FeatureLayer:
        """The last layer whose map grows with the image, at the size of a cell."""
        return last_growing_map(self.cells, self.whole)

    @cached_property
    def head_pools(self) -> bool:
        """Whether the head averages over the final map, so that it takes the map of a grid; otherwise it slides over that."""
        return only_pools(self.cells, self.whole, self.pooled_layer, self.n)

    @property
    def head_slides(self) -> bool:
        """Whether the head takes convolutional maps of the size of a cell only, and slides over that of a grid."""
        return not self.head_pools and self.pooled_layer.kind == "nchw"

    @cached_property
    def head_averages(self) -> bool:
        """Whether a head of fixed size only averages over its map, so that it takes the mean over the cells of a grid."""
        return only_averages(self.cells, self.pooled_layer)

    @cached_property
    def mean(self) -> nn.Module:
        """Averages the logits of a sliding head, or the maps for one that averages. A module, since relevance passes through modules."""
        return nn.AvgPool2d(self.n) if self.head_averages else nn.AdaptiveAvgPool2d(1)

    def require(self, setting: str) -> None:
        """Check, before anything is computed, that a setting is defined for the model.

        Raises:
            NotApplicable: it is not, with the reason.
        """
        heads_of(setting, self.n)
        if setting == "difull":
            return
        name, pools = self.classifier.name, self.head_pools
        if self.layer is not None and not self._grows(self.layer):
            raise NotApplicable(f"the map of {self.layer.name!r} of {name} does not grow with the image: choose a layer before, or difull")
        if pools or self.head_slides:
            return
        if setting == "dipart":
            raise NotApplicable(
                f"dipart is not defined for {name}: its head reads more than the mean over the positions of its final map "
                "(a class token, say), so that no part of the map can be cut out for it; use gridpg or difull"
            )
        if "" not in self._positions:
            raise NotApplicable(f"gridpg is not defined for {name}: it fails on a grid after {self.pooled_layer.name!r}; use difull")

    def defines(self, setting: str) -> bool:
        """Whether ``require`` lets a setting pass."""
        try:
            self.require(setting)
        except NotApplicable:
            return False
        return True

    def through(self, setting: str, cell: int) -> Callable[[Activation], Tensor]:
        """The head of a cell: logits [n, classes] from the explained activation of the grid, or of one cell under DiFull."""
        if setting == "difull":
            segment = self._segment("cell", None)
            return lambda given: segment(given).maps
        if setting == "gridpg" and not self.head_slides:
            segment = self._segment("grid", None)
            return lambda given: segment(given).maps
        features = self._segment("grid", self.pooled_layer)
        if setting == "gridpg":
            over_grid = self._over_grid
            return lambda given: over_grid(features(given).maps)
        own = self._of_cell
        return lambda given: own(features(given), cell)

    def together(self, cells: Sequence[int]) -> Callable[[Activation], Tensor]:
        """The head of GridPG and those of DiPart for some cells, in one pass over the grid: logits [n, 1 + len(cells), classes]."""
        features, own = self._segment("grid", self.pooled_layer), self._of_cell
        over_grid = (lambda final: self._whole_head(final).maps) if self.head_pools else (lambda final: self._over_grid(final.maps))

        def both(given: Activation) -> Tensor:
            final = features(given)
            return torch.stack([over_grid(final), *(own(final, cell) for cell in cells)], dim=1)

        return both

    @property
    def _of_cell(self) -> Callable[[Activation, int], Tensor]:
        """The head on its own cell of the final map. It is made now: passes that are needed only once must not run in a counted one."""
        head = self._head

        def logits(final: Activation, cell: int) -> Tensor:
            rows, columns = cell_slices(cell, self.n, *final.maps.shape[-2:])
            return head(Activation(final.maps[..., rows, columns], final.output)).maps

        return logits

    def activation(self, setting: str, inputs: Tensor) -> Activation:
        """The explained activation: the layer's output for the whole grid [1, C, h, w], or under DiFull for its cells [n n, C, h, w]."""
        alone = setting == "difull"
        given = Activation(split_cells(inputs, self.n) if alone else inputs)
        if self.layer is None:
            return given
        with torch.no_grad():
            return Segment(self.cells, None, self.layer)(given) if alone else Segment(self.whole, None, self._at_grid(self.layer))(given)

    @cached_property
    def _over_grid(self) -> Callable[[Tensor], Tensor]:
        """A head of the size of a cell as a function of the final map of a grid."""
        head, window, mean = self._head, self.pooled_layer.grid, self.mean

        def logits(maps: Tensor) -> Tensor:
            return head(Activation(maps)).maps

        return (lambda maps: logits(mean(maps))) if self.head_averages else (lambda maps: mean(_sliding(maps, window, logits)).flatten(1))

    @cached_property
    def _head(self) -> Segment:
        return Segment(self.cells, self.pooled_layer)

    @cached_property
    def _whole_head(self) -> Segment:
        return Segment(self.whole, self._at_grid(self.pooled_layer))

    @cached_property
    def _segments(self) -> dict[tuple[str, str | None], Segment]:
        return {}

    def _segment(self, size: Literal["cell", "grid"], stop: FeatureLayer | None) -> Segment:
        """The part of the network from the explained layer to another, or to the logits; made once."""
        key = (size, None if stop is None else stop.name)
        if key not in self._segments:
            at_cell = size == "cell"
            start, end = (self.layer, stop) if at_cell else (self._at_grid(self.layer), self._at_grid(stop))
            self._segments[key] = Segment(self.cells if at_cell else self.whole, start, end)
        return self._segments[key]

    @cached_property
    def _positions(self) -> dict[str, dict[str, int]]:
        return grid_positions(self.whole)

    def _grows(self, layer: FeatureLayer) -> bool:
        found = self._positions.get(layer.name, {}).get(layer.kind, 0) - layer.prefix
        return found == self.n**2 * math.prod(layer.grid)

    def _at_grid(self, layer: FeatureLayer | None) -> FeatureLayer | None:
        return None if layer is None else at_grid(layer, self.whole, self.n)


def at_size(classifier: Classifier, size: tuple[int, int], module: nn.Module | Callable[[Tensor], Tensor]) -> Classifier:
    """The same classifier for model inputs of another size, which are not resized, run by a module that takes that size."""
    runner, way = classifier.runner, replace(classifier.preprocessing, size=size, resize="squash", resized=None)
    runner.find_out(False)  # from images of its own size, before a head of fixed size gets larger ones
    same = {} if module is runner.module else {"module": module}
    return classifier.with_forward(classifier.forward.on(runner.changed(preprocessing=way, **same)), preprocessing=way)


def split_cells(grids: Tensor, n: int) -> Tensor:
    """[1, C, n h, n w] -> its cells row by row, [n n, C, h, w]."""
    rows, columns = grids.shape[-2] // n, grids.shape[-1] // n
    return grids[0].unflatten(1, (n, rows)).unflatten(3, (n, columns)).permute(1, 3, 0, 2, 4).flatten(0, 1)


def join_cells(cells: Tensor, n: int) -> Tensor:
    """The inverse: [n n, C, h, w] -> [1, C, n h, n w]."""
    return cells.unflatten(0, (n, n)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[None]


def _sliding(maps: Tensor, window: tuple[int, int], head: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits [n, classes, rows, columns] of a head of fixed size, slid over larger maps with stride 1 (as convolutions would)."""
    height, width = window
    windows = maps.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
    rows, columns = windows.shape[1:3]
    step = max(1, _WINDOW_VALUES // (maps.shape[1] * height * width * rows * columns))
    found = [head(part.flatten(0, 2)).unflatten(0, (len(part), rows, columns)) for part in windows.split(step)]
    return torch.cat(found).movedim(3, 1)
