"""One grid as a grid model sees it. What was computed once is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from attribution.fills import make_fill
from attribution.model.classifier import Classifier
from attribution.model.forwarding import ModuleForward
from attribution.model.outputs import Outputs
from attribution.model.preprocessing import Preprocessing
from attribution.network.maps import FeatureLayer
from attribution.network.segments import Activation
from attribution.task import Task
from evaluation.grids.model import SETTINGS, GridModel, heads_of, join_cells, split_cells
from evaluation.grids.scores import cell_slices


class Head(nn.Module):
    """One head of a setting as a module from the explained maps [n, C, h, w] to logits [n, classes].

    Attributes:
        network: the classifier's module, for methods that look inside.
        explained: passes the maps on; class activation maps take it as their layer.
        mean: what GridPG adds to a network whose head slides.
    """

    explained: nn.Identity

    def __init__(
        self, network: nn.Module, logits: Callable[[Tensor], Tensor], remembered: Callable[[Tensor], Tensor], mean: nn.Module | None
    ) -> None:
        super().__init__()
        self.network, self.mean = network, mean
        vars(self)["explained"] = nn.Identity()  # no submodule, for which methods that know kinds of layers would need a rule
        self._logits, self._remembered = logits, remembered

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.explained(maps)
        return self._logits(maps) if torch.is_grad_enabled() and maps.requires_grad else self._remembered(maps)


class GridView:
    """One grid under one ``GridModel``: it gives attribution methods a task for each head.

    Logits without gradients are remembered: most perturbation methods ask for the same masked maps once for every head, and a mask
    that leaves a cell as it was does not change the logits of its head.

    Args:
        model: classifier, n and layer.
        grid: float32 [3, n h, n w] in [0, 1].
        settings: those that will be asked for; GridPG and DiPart share passes if both are among them.

    Attributes:
        partitions: label maps of the grid at the layer, by how they were made; methods on regions share them.
    """

    def __init__(self, model: GridModel, grid: Tensor, settings: Sequence[str] = SETTINGS) -> None:
        self.model, self.grid, self.settings = model, grid, tuple(settings)
        way = model.classifier.preprocessing
        self.preprocessing = Preprocessing(model.size, way.mean, way.std, channels=way.channels)
        self.inputs = self.preprocessing(grid[None].to(model.classifier.device))
        self.partitions: dict[str, Tensor] = {}
        self._found: dict[str, tuple[Tensor, int]] = {}
        self._activations: dict[bool, Activation] = {}
        self._memos: dict[int | None, Memo] = {}

    def activation(self, setting: str) -> Activation:
        """See ``GridModel.activation``; computed once."""
        alone = setting == "difull"
        if alone not in self._activations:
            self._activations[alone] = self.model.activation(setting, self.inputs)
        return self._activations[alone]

    def maps(self, setting: str) -> Tensor:
        """The explained maps of the whole grid, [1, C, h, w]; under DiFull those of the cells side by side."""
        maps = self.activation(setting).maps
        return join_cells(maps, self.model.n) if setting == "difull" else maps

    def task(self, setting: str, cell: int, target: int, seed: int = 0, alone: bool = False, inside: bool = False) -> Task:
        """What a method is given to explain a head.

        Args:
            setting: see the docstring of this module.
            cell: of the head.
            target: class index.
            seed: of stochastic methods.
            alone: under DiFull, the cell without the rest of the grid, on which nothing of its head depends.
            inside: the method looks at the modules while they run, so that they must run for all logits.
        """
        given = self.activation(setting)
        maps = given.maps[cell : cell + 1] if alone else self.maps(setting)
        network = (self.model.classifier if setting == "difull" else self.model.whole).module
        logits = self._logits(setting, cell, alone)
        remembered = logits if inside else self._remembered(setting, cell, alone)
        mean = self.model.mean if setting == "gridpg" and self.model.head_slides else None
        head = Head(network, logits, remembered, mean) if isinstance(network, nn.Module) else remembered
        classifier = self._classifier(head, maps)
        image, fill = maps[0].cpu(), torch.zeros_like(maps[0]).cpu()
        if self.model.layer is None:
            image = split_cells(self.grid[None], self.model.n)[cell] if alone else self.grid
            fill = make_fill(image, self.model.classifier.preprocessing.mean_colour)
        structure = self.model.structures.setdefault((setting, alone), {})
        return Task(classifier, image, fill, target, maps, torch.zeros_like(maps), seed, structure)

    def once(self, key: str | None, compute: Callable[[], tuple[Tensor, int]]) -> tuple[Tensor, int]:
        """A map or order with its evaluations, computed once for each key: smoothing it in another way does not compute it again."""
        if key is None:
            return compute()
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]

    def explained_layer(self, task: Task) -> FeatureLayer:
        """The explained maps as a layer, for class activation maps."""
        head = task.module
        assert isinstance(head, Head)
        return FeatureLayer("explained", head.explained, "nchw", task.size)

    def _classifier(self, head: Head | Callable[[Tensor], Tensor], maps: Tensor) -> Classifier:
        """A classifier of maps; at the input, of images."""
        cell, layer, size = self.model.classifier, self.model.layer, (maps.shape[2], maps.shape[3])
        name = cell.name if layer is None else f"{cell.name} after {layer.name}"
        rows = cell.batch_size if size == cell.preprocessing.size else max(1, cell.batch_size // self.model.n**2)
        channels = maps.shape[1]
        plain = Preprocessing(size, (0.0,) * channels, (1.0,) * channels)
        way = plain if layer is not None else replace(self.preprocessing, size=size)
        outputs = Outputs(cell.num_classes, "softmax")
        forward = ModuleForward(head, way, name=name, batch_size=rows, outputs=outputs)
        return cell.with_forward(forward, preprocessing=way, name=name, class_names=cell.class_names)

    def _logits(self, setting: str, cell: int, alone: bool) -> Callable[[Tensor], Tensor]:
        given, through = self.activation(setting), self.model.through(setting, cell)
        output = given.output
        if setting == "difull" and output is not None:
            output = output[cell : cell + 1]
        if alone or setting != "difull":
            return lambda maps: through(Activation(maps, output))
        rows, columns = cell_slices(cell, self.model.n, *self.maps(setting).shape[-2:])
        return lambda maps: through(Activation(maps[..., rows, columns], output))

    def _remembered(self, setting: str, cell: int, alone: bool) -> Callable[[Tensor], Tensor]:
        if setting == "difull":
            logits = self._logits(setting, cell, alone=True)
            memo = self._memos.setdefault(cell, Memo(lambda maps: logits(maps)[:, None]))
            rows, columns = cell_slices(cell, self.model.n, *self.maps(setting).shape[-2:])
            return lambda maps: memo(maps if alone else maps[..., rows, columns])[:, 0]
        if not {"gridpg", "dipart"} <= set(self.settings) or not self.model.defines("dipart"):
            logits = self._logits(setting, cell, alone=False)
            memo = self._memos.setdefault(-1 - cell if setting == "dipart" else None, Memo(lambda maps: logits(maps)[:, None]))
            return lambda maps: memo(maps)[:, 0]
        cells, output = heads_of("dipart", self.model.n), self.activation(setting).output
        together = self.model.together(cells)
        memo = self._memos.setdefault(None, Memo(lambda maps: together(Activation(maps, output))))
        place = 0 if setting == "gridpg" else 1 + cells.index(cell)
        return lambda maps: memo(maps)[:, place]


class Memo:
    """A function of rows that computes each distinct row once: [n, ...] -> [n, ...]."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self._known: dict[tuple[int, int], Tensor] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        keys = [(first, second) for first, second in fingerprints(rows).tolist()]
        new = {key: index for index, key in enumerate(keys) if key not in self._known}
        if new:
            with torch.no_grad():
                found = self.function(rows[list(new.values())])
            self._known.update(zip(new, found, strict=True))
        return torch.stack([self._known[key] for key in keys])


def fingerprints(rows: Tensor) -> Tensor:
    """Two 64-bit hashes of the bits of each row, int64 [n, 2]: sums of 32-bit words times fixed random odd numbers, modulo 2^64."""
    words = rows.detach().float().contiguous().flatten(1).view(torch.int32).long()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (2, words.shape[1]), generator=generator).to(words.device) * 2 + 1
    return torch.stack([(words * factor).sum(dim=1) for factor in factors], dim=1)
