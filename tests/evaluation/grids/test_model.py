"""The three settings against what they mean, written out for networks of every kind; what is remembered; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grid_networks import (
    CLASSES,
    SIDE,
    FixedPooling,
    Kind,
    Pooled,
    Vgg,
    class_token_vit,
    classifier,
    cut,
    drawn,
    grid,
    kinds,
    normalised,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import apart
from torch import Tensor, nn

import attribution as at
from attribution.errors import NotApplicable, UserError
from attribution.network.segments import Activation
from attribution.network.stages import stages
from attribution.task import Task
from evaluation.grids.localize import GridMethod, grid_maps, head_map
from evaluation.grids.model import SETTINGS, GridModel, at_size, heads_of, join_cells, split_cells
from evaluation.grids.view import GridView, Head, Memo, fingerprints
from tests.attribution.network.test_resized import torchvision_swin
from tests.attribution.network.test_stages import Skipping, small_swin, state

KINDS = kinds()
INNER = {"residual": ("stem", "last")}  # of the others, all their stages


def layers_of(name: str) -> tuple[str, ...]:
    used = classifier(KINDS[name].module)
    return ("input", *INNER.get(name, tuple(layer.name for layer in stages(used))))


def given_to(view: GridView, setting: str, cell: int) -> Activation:
    """What a head gets: the whole activation, under DiFull that of its own cell."""
    found = view.activation(setting)
    if setting != "difull":
        return found
    return Activation(found.maps[cell : cell + 1], None if found.output is None else found.output[cell : cell + 1])


# --- the settings ---


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", KINDS)
def test_logits_of_every_setting(name: str, n: int) -> None:
    """From the input and from every layer, each head's logits are those of the definition."""
    kind, image = KINDS[name], grid(n)[0]
    inputs = normalised(image)[None]
    before = state(kind.module)
    for layer in layers_of(name):
        model = GridModel(classifier(kind.module), n, layer)
        view = GridView(model, image)
        assert apart(view.inputs, inputs) < 1e-6
        for setting in SETTINGS:
            model.require(setting)
            for cell in heads_of(setting, n):
                expected = kind.logits(setting, inputs, cell, n)
                found = model.through(setting, cell)(given_to(view, setting, cell))
                assert apart(found, expected) < 1e-5, (layer, setting, cell)
    assert state(kind.module) == before and all(p.grad is None for p in kind.module.parameters())


def test_heads() -> None:
    assert heads_of("gridpg", 3) == tuple(range(9))
    assert heads_of("difull", 3) == heads_of("dipart", 3) == (0, 8)
    with pytest.raises(UserError, match="setting is 'diwhole': expected one of gridpg, difull, dipart"):
        heads_of("diwhole", 2)
    for n in (1, 0, -2, 2.0, True, "2"):
        with pytest.raises(UserError, match=r"n is .*: expected a whole number of at least 2"):
            heads_of("gridpg", n)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_every_setting(name: str) -> None:
    """grid_maps("saliency") against autograd through the definition, at the input and at a layer inside."""
    kind, n, image = KINDS[name], 2, grid()[0]
    inputs, labels = normalised(image)[None], [[3, 1, 0, 4]]
    inner = layers_of(name)[1]
    for setting in SETTINGS:
        found = {
            layer: grid_maps(classifier(kind.module), image[None], labels, n, setting, layer, "saliency")[0] for layer in ("input", inner)
        }
        for index, cell in enumerate(heads_of(setting, n)):
            x = inputs.clone().requires_grad_()
            score = kind.logits(setting, x, cell, n)[0, labels[0][cell]]
            (gradient,) = torch.autograd.grad(score, x)
            assert apart(found["input"][index], gradient[0].abs().sum(dim=0)) < 1e-5, (setting, cell)
        if setting != "difull":  # the layer sees the grid, so that the gradient there is part of the same graph
            for index, cell in enumerate(heads_of(setting, n)):
                expected = gradient_at(kind, inner, setting, inputs, cell, n, labels[0][cell])
                assert apart(found[inner][index], expected) < 1e-5, (setting, cell)


def gradient_at(kind: Kind, layer: str, setting: str, inputs: Tensor, cell: int, n: int, target: int) -> Tensor:
    """Sum over the channels of the gradient's magnitude at a layer, from a hook on the module itself."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()  # what follows may overwrite it

    handle = kind.module.get_submodule(layer).register_forward_hook(keep)
    try:
        score = kind.logits(setting, inputs.clone().requires_grad_(), cell, n)[0, target]
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[-1])
    if gradient.ndim == 3:  # tokens after one prefix token
        side = round((gradient.shape[1] - 1) ** 0.5)
        return gradient[0, 1:].abs().sum(dim=1).view(side, side)
    return gradient[0].abs().sum(dim=2 if kind is KINDS["channels last"] else 0)


@pytest.mark.parametrize("name", ["pooled", "vgg", "tokens"])
def test_gradients_under_difull_are_those_of_the_cell_alone(name: str) -> None:
    kind, n, image = KINDS[name], 2, grid()[0]
    inputs, labels = normalised(image)[None], [[3, 1, 0, 4]]
    for layer in layers_of(name)[1:]:
        found = grid_maps(classifier(kind.module), image[None], labels, n, "difull", layer, "saliency")[0]
        for index, cell in enumerate((0, 3)):
            expected = gradient_at(kind, layer, "difull", cut(inputs, cell, n), 0, 1, labels[0][cell])
            assert apart(cut(found[index], cell, n), expected) < 1e-5
            others = [cut(found[index], other, n) for other in range(4) if other != cell]
            assert all(float(other.abs().max()) == 0 for other in others)


def test_a_head_of_fixed_size_slides_over_the_grid() -> None:
    """Every window by hand: 5 x 5 of 4 x 4 positions on a map of 8 x 8."""
    kind, image = KINDS["flat"], grid()[0]
    view = GridView(GridModel(classifier(kind.module), 2, "input"), image)
    maps = kind.final(view.inputs)
    windows = [kind.head(maps[:, :, y : y + 4, x : x + 4]) for y in range(5) for x in range(5)]
    found = view.model.through("gridpg", 0)(view.activation("gridpg"))
    assert apart(found, torch.stack(windows).mean(dim=0)) < 1e-5


def test_the_adaptive_pooling_of_a_grid_is_another_function() -> None:
    """Why the head slides: the network itself would shrink the grid's map to that of a cell."""
    kind, image = KINDS["vgg"], grid()[0]
    view = GridView(GridModel(classifier(kind.module), 2, "input"), image)
    found = view.model.through("gridpg", 0)(view.activation("gridpg"))
    assert apart(found, kind.module(view.inputs)) > 0.01


def test_a_global_average_of_fixed_size_is_a_global_average_of_the_grid() -> None:
    kind = KINDS["fixed pooling"]
    with pytest.raises(RuntimeError):
        kind.module(torch.zeros(1, 3, 32, 32))
    model = GridModel(classifier(kind.module), 2, "final")
    assert not model.head_pools and model.head_averages
    view = GridView(model, grid()[0])
    assert apart(model.through("gridpg", 0)(view.activation("gridpg")), kind.module.fc(kind.final(view.inputs).mean(dim=(2, 3)))) < 1e-5


@pytest.mark.parametrize("build", [Pooled, Vgg, FixedPooling])
def test_cells_that_are_not_square(build: type[nn.Module]) -> None:
    side, n = (16, 32) if build is Pooled else (16, 16), 2
    module = drawn(build())
    view = GridView(GridModel(classifier(module, side), n, "final"), grid(n, side)[0])
    height, width = view.maps("gridpg").shape[-2:]
    assert width * side[0] == height * side[1]
    inputs = normalised(grid(n, side)[0])[None]
    for cell in (0, 3):
        alone = view.model.through("difull", cell)(given_to(view, "difull", cell))
        assert apart(alone, module(cut(inputs, cell, n))) < 1e-5
        part = view.model.through("dipart", cell)(view.activation("dipart"))
        assert apart(part, module.head(cut(module.features(inputs), cell, n))) < 1e-5


def test_many_rows_at_once() -> None:
    """Masked maps come in batches: each row is what it is alone."""
    for name in ("vgg", "tokens", "residual"):
        model = GridModel(classifier(KINDS[name].module), 2, layers_of(name)[1])
        view = GridView(model, grid()[0])
        for setting in SETTINGS:
            given, through = given_to(view, setting, 3), model.through(setting, 3)
            masks = (torch.rand(5, 1, *given.maps.shape[-2:], generator=torch.Generator().manual_seed(0)) < 0.5).float()
            together = through(Activation(masks * given.maps, given.output))
            alone = torch.cat([through(Activation(mask * given.maps, given.output)) for mask in masks.split(1)])
            assert apart(together, alone) < 1e-5


def test_a_network_that_views_its_input() -> None:
    """Cells are cut out of the grid: what the network gets is laid out as an image of its own."""

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3 * SIDE * SIDE, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.view(len(x), -1))

    used = classifier(drawn(Viewing()))
    weight = used.module.fc.weight.detach().view(CLASSES, 3, SIDE, SIDE)
    inputs = normalised(grid()[0])
    for method in ("saliency", "grad_cam", "occlusion"):
        found = grid_maps(used, grid(), [[0, 1, 2, 3]], 2, "difull", "input", method)[0, 1]
        expected = torch.zeros(2 * SIDE, 2 * SIDE)
        if method == "saliency":
            expected[SIDE:, SIDE:] = weight[3].abs().sum(dim=0)
            assert apart(found, expected) < 1e-5
        if method == "grad_cam":
            assert apart(found, torch.einsum("c,chw->hw", weight[3].mean(dim=(1, 2)) / 4, inputs).relu()) < 1e-5


def test_the_pieces_of_a_grid() -> None:
    grids = torch.arange(2 * 6 * 9, dtype=torch.float32).view(1, 2, 6, 9)
    cells = split_cells(grids, 3)
    assert cells.shape == (9, 2, 2, 3)
    for cell in range(9):
        assert torch.equal(cells[cell], cut(grids, cell, 3)[0])
    assert torch.equal(join_cells(cells, 3), grids)


@given(n=st.integers(2, 4), height=st.integers(1, 4), width=st.integers(1, 4), channels=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_join_is_the_inverse_of_split(n: int, height: int, width: int, channels: int) -> None:
    grids = torch.rand(1, channels, n * height, n * width)
    assert torch.equal(join_cells(split_cells(grids, n), n), grids)


# --- what scores come from ---


class Wrapped(nn.Module):
    """A network whose output is packed in another way."""

    def __init__(self, inner: nn.Module, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.pack = inner, pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.inner(x))


class WithLogits:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


PACKS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, None),
    "dict": lambda y: {"logits": y, "other": None},
    "object": WithLogits,
}


@pytest.mark.parametrize("name", ["pooled", "vgg", "tokens"])
@pytest.mark.parametrize("pack", PACKS)
def test_packed_outputs(name: str, pack: str) -> None:
    kind, image = KINDS[name], grid()[0]
    inputs = normalised(image)[None]
    for layer in ("input", "middle"):
        model = GridModel(classifier(Wrapped(kind.module, PACKS[pack]).eval()), 2, layer)
        view = GridView(model, image)
        for setting in SETTINGS:
            found = model.through(setting, 3)(given_to(view, setting, 3))
            assert apart(found, kind.logits(setting, inputs, 3, 2)) < 1e-5


@pytest.mark.parametrize("name", ["pooled", "tokens"])
def test_probabilities(name: str) -> None:
    """A module with a softmax at its end: logits up to a constant, in every setting."""
    kind, image = KINDS[name], grid()[0]
    inputs = normalised(image)[None]
    for scores in ("probabilities", "auto"):
        used = classifier(Wrapped(kind.module, lambda y: y.softmax(dim=1)).eval(), scores=scores)
        for layer in ("input", "middle", "final"):
            model = GridModel(used, 2, layer)
            view = GridView(model, image)
            for setting in SETTINGS:
                found = model.through(setting, 3)(given_to(view, setting, 3))
                assert apart(found, kind.logits(setting, inputs, 3, 2).log_softmax(dim=1)) < 1e-4


@pytest.mark.parametrize("name", ["pooled", "tokens", "vgg"])
def test_prototypes(name: str) -> None:
    """CLIP-like logits: 5 cosines of the pooled features, in every setting and from every layer."""
    kind, image = KINDS[name], grid()[0]
    inputs = normalised(image)[None]
    last = [m for m in kind.module.modules() if isinstance(m, nn.Linear)][-1]
    matrix = torch.randn(3, last.in_features, generator=torch.Generator().manual_seed(0))
    used = classifier(kind.module, batch_size=3).with_prototypes(matrix, scale=5.0, normalize=True)

    def prototypes(maps: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = last.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
        kind.head(maps)
        handle.remove()
        return 5 * F.normalize(kept[-1], dim=1) @ F.normalize(matrix, dim=1).T

    def sliding(maps: Tensor) -> Tensor:
        rows = range(maps.shape[2] - 3)
        return torch.stack([prototypes(maps[:, :, y : y + 4, x : x + 4]) for y in rows for x in rows]).mean(dim=0)

    own = Kind(kind.module, kind.final, prototypes, sliding if name == "vgg" else prototypes)
    for layer in ("input", "middle", "final"):
        model = GridModel(used, 2, layer)
        view = GridView(model, image)
        for setting in SETTINGS:
            found = model.through(setting, 3)(given_to(view, setting, 3))
            assert apart(found, own.logits(setting, inputs, 3, 2)) < 1e-4, (layer, setting)
    assert used.batch_size == 3


@pytest.mark.parametrize("method", ["deep_lift", "ablation_cam"])
def test_prototypes_of_another_size_than_the_batch(method: str) -> None:
    """Batches of one image, methods that need two rows together, windows of a sliding head: the same maps."""
    matrix = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    for setting in SETTINGS:
        found = []
        for rows in (1, 50):
            used = classifier(drawn(Vgg(), 3), batch_size=rows, head="classifier.3").with_prototypes(matrix)
            found.append(grid_maps(used, grid(), [[0, 1, 2, 3]], 2, setting, "middle", method))
        assert apart(found[0], found[1]) < 1e-4 and float(found[1].abs().max()) > 0


def test_a_black_box_under_difull() -> None:
    """Any callable can be explained at the input, by methods that only ask for scores."""
    kind, image = KINDS["pooled"], grid()
    calls: list[int] = []

    def box(x: Tensor) -> Any:
        calls.append(len(x))
        return kind.module(x).detach().numpy()

    open_, closed = classifier(kind.module), classifier(box, class_names=[str(i) for i in range(CLASSES)])
    labels = [[0, 1, 2, 3]]
    for method in (
        GridMethod("occlusion", {"sliding_window_shapes": 8, "strides": 8}),
        GridMethod("rise", {"samples": 20}),
        GridMethod("greedy", regions="grid"),
    ):
        pair = [grid_maps(each, image, labels, 2, "difull", "input", method) for each in (open_, closed)]
        assert apart(pair[1], pair[0]) < 1e-5
    assert calls
    for method in ("saliency", "grad_cam", "smooth_grad", "deep_lift", "attention_rollout", "score_cam"):
        with pytest.raises(NotApplicable, match="black box"):
            grid_maps(closed, image, labels, 2, "difull", "input", method)
    for setting, layer in (("gridpg", "input"), ("dipart", "input"), ("difull", "final")):
        with pytest.raises(NotApplicable, match="black box: only difull at the layer 'input' is defined"):
            grid_maps(closed, image, labels, 2, setting, layer, "occlusion")


# --- what is refused ---


def test_dipart_of_a_class_token(vit: at.Classifier) -> None:
    for used in (vit, at.Classifier(class_token_vit(), size=16, scores="logits", name="class token")):
        model = GridModel(used, 2, "final")
        model.require("difull")
        model.require("gridpg")
        assert model.interpolated
        with pytest.raises(NotApplicable, match=r"dipart is not defined for .*: its head reads more than the mean over the positions"):
            model.require("dipart")
        assert [setting for setting in SETTINGS if model.defines(setting)] == ["gridpg", "difull"]


def test_windows_that_a_grid_does_not_fit() -> None:
    """At 24 pixels the second stage has 3 x 3 positions and pads its window of 4; the grid has 6 x 6, which other windows would cut."""
    fitting = GridModel(at.Classifier(small_swin(), size=32, scores="logits", name="swin"), 2, "final")
    assert all(fitting.defines(setting) for setting in SETTINGS)
    odd = GridModel(at.Classifier(torchvision_swin(window=4), size=24, scores="logits", name="swin"), 2, "input")
    for setting in ("gridpg", "dipart"):
        with pytest.raises(NotApplicable, match=r"cannot take a grid of 48x48 .*: use DiFull"):
            odd.require(setting)
    odd.require("difull")


def test_a_layer_that_does_not_grow_with_the_image() -> None:
    """Behind the adaptive pooling of VGG every image has the same map."""
    used = classifier(KINDS["vgg"].module)
    model = GridModel(used, 2, "avgpool")
    model.require("difull")
    for setting in ("gridpg", "dipart"):
        with pytest.raises(NotApplicable, match="the map of 'avgpool' of toy does not grow with the image"):
            model.require(setting)
    found = grid_maps(used, grid(), [[0, 1, 2, 3]], 2, "difull", "avgpool", "saliency")
    assert found.shape == (1, 2, 8, 8)


@pytest.mark.parametrize("layer", ["input", "early"])
def test_a_network_without_one_final_map(layer: str) -> None:
    used = classifier(drawn(Skipping()))
    model = GridModel(used, 2, layer)
    model.require("difull")
    for setting in ("gridpg", "dipart"):
        with pytest.raises(NotApplicable, match="depend on more than its last map"):
            model.require(setting)


def test_a_network_of_tokens_with_a_head_of_fixed_size() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.norm, self.fc = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8), nn.Linear(8 * 16, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(self.patches(x).flatten(2).transpose(1, 2)).flatten(1))

    model = GridModel(classifier(drawn(Flat())), 2, "norm")
    with pytest.raises(NotApplicable, match="gridpg is not defined for toy: it fails on a grid after 'norm'"):
        model.require("gridpg")
    with pytest.raises(NotApplicable, match="dipart is not defined"):
        model.require("dipart")
    model.require("difull")


def test_strides_that_do_not_divide_the_cell() -> None:
    used = classifier(drawn(Pooled()), 10)
    for setting in ("gridpg", "dipart"):
        with pytest.raises(NotApplicable, match="positions for a cell and"):
            GridModel(used, 2, "input").require(setting)
    GridModel(used, 2, "final").require("difull")


# --- what is remembered ---


def test_memo_computes_each_distinct_row_once() -> None:
    seen: list[Tensor] = []

    def double(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows * 2

    memo = Memo(double)
    rows = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    rows[4] = rows[1]
    assert torch.equal(memo(rows), rows * 2)
    assert torch.equal(memo(rows.flip(0)), rows.flip(0) * 2)
    assert sum(map(len, seen)) == 5
    assert torch.equal(memo(torch.cat([rows[:2], rows[:2] + 1])), torch.cat([rows[:2] * 2, rows[:2] * 2 + 2]))
    assert [len(each) for each in seen] == [5, 2]


def test_fingerprints_tell_rows_apart() -> None:
    """Rows that differ in one value by one bit, in the order of two values, or in a sign, have other fingerprints; equal rows the same."""
    row = torch.rand(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    others = [row.clone() for _ in range(60)]
    for index in range(50):
        value = others[index].view(-1)
        value[index] = torch.nextafter(value[index], torch.tensor(2.0))
    others[50][0, 0, 0, :2] = row[0, 0, 0, :2].flip(0)
    others[51] *= -1
    others[52][0, 0] = 0
    others[53][0, 1] = 0
    rows = torch.cat([row, *others[:54]])
    found = fingerprints(rows)
    assert found.dtype == torch.int64 and found.shape == (55, 2)
    for column in range(2):
        assert len(found[:, column].unique()) == 55
    assert torch.equal(fingerprints(rows.double()), found) and torch.equal(fingerprints(rows[7:9]), found[7:9])


class Counted(nn.Module):
    """A network that counts the rows that reach it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return self.inner(x)


def forwarded(module: nn.Module, run: Callable[[at.Classifier], Any], **options: Any) -> tuple[int, Any]:
    counted = Counted(module).eval()
    used = classifier(counted, **options)
    result = run(used)
    return counted.rows, result


class Forgetful(Memo):
    """Computes everything."""

    def __call__(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return self.function(rows)


METHODS_WITH_MEMORY: list[GridMethod] = [
    GridMethod("rise", {"samples": 24, "grid": 4}),
    GridMethod("occlusion", {"sliding_window_shapes": 8, "strides": 4}),
    GridMethod("score_cam"),
    GridMethod("ablation_cam"),
    GridMethod("kernel_shap", {"n_samples": 20}, regions="grid", region_options={"count": 8}),
    GridMethod("bidirectional", regions="grid", region_options={"count": 8}),
]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(each, id=each.method, marks=() if each.method in ("rise", "occlusion") else pytest.mark.slow)
        for each in METHODS_WITH_MEMORY
    ],
)
def test_what_is_remembered_changes_no_map(method: GridMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    used, image, labels = classifier(KINDS["vgg"].module), grid(), [[0, 1, 2, 3]]
    cases = [(setting, layer) for setting in SETTINGS for layer in ("input", "final")]
    found = [grid_maps(used, image, labels, 2, setting, layer, method) for setting, layer in cases]
    monkeypatch.setattr("evaluation.grids.view.Memo", Forgetful)
    for (setting, layer), values in zip(cases, found, strict=True):
        assert apart(values, grid_maps(used, image, labels, 2, setting, layer, method)) < 1e-4, (setting, layer)


def test_masked_grids_are_forwarded_once_for_all_heads() -> None:
    """RISE under GridPG: four heads, one pass for each of its masks."""
    labels = [[0, 1, 2, 3]]
    rows = {}
    for samples in (10, 110):
        method = GridMethod("rise", {"samples": samples, "grid": 4, "keep": 0.5})
        rows[samples], maps = forwarded(drawn(Pooled(), 1), lambda used, m=method: grid_maps(used, grid(), labels, 2, "gridpg", "input", m))
        assert all(not torch.equal(maps[0, 0], maps[0, index]) for index in (1, 2, 3))
    assert rows[110] - rows[10] == 100


def test_windows_outside_the_cell_are_not_forwarded() -> None:
    """Occlusion under DiFull: 16 of the 49 windows reach the cell of a head, which is forwarded once more as it is."""
    method = GridMethod("occlusion", {"sliding_window_shapes": 8, "strides": 4, "border": "inside"})
    module = drawn(Pooled(), 1)
    least, _ = forwarded(module, lambda used: grid_maps(used, grid(), [[0, 1, 2, 3]], 2, "difull", "input", GridMethod("constant")))
    rows, _ = forwarded(module, lambda used: grid_maps(used, grid(), [[0, 1, 2, 3]], 2, "difull", "input", method))
    starts = range(0, 25, 4)
    reaching = sum(y < 16 and x < 16 for y in starts for x in starts)
    assert reaching == 16
    assert rows - least == 2 * (reaching + 1)


def test_gridpg_and_dipart_share_their_passes() -> None:
    module, labels = drawn(Pooled(), 1), [0, 1, 2, 3]
    method = GridMethod("rise", {"samples": 30, "grid": 4})

    def run(used: at.Classifier, shown: tuple[str, ...], asked: tuple[str, ...]) -> list[Tensor]:
        view = GridView(GridModel(used, 2, "input"), grid()[0], shown)
        return [head_map(view, setting, cell, labels, method).values for setting in asked for cell in heads_of(setting, 2)]

    both = ("gridpg", "dipart")
    one, alone = forwarded(module, lambda used: run(used, ("gridpg",), ("gridpg",)))
    other, alone_too = forwarded(module, lambda used: run(used, ("dipart",), ("dipart",)))
    rows, shared = forwarded(module, lambda used: run(used, both, both))
    assert rows < one + other - 25
    for first, second in zip([*alone, *alone_too], shared, strict=True):
        assert apart(second, first) < 1e-5


@pytest.mark.parametrize("shown", [SETTINGS, pytest.param(("gridpg",), marks=pytest.mark.slow)])
def test_what_is_remembered_is_what_gradients_see(shown: tuple[str, ...], vit: at.Classifier) -> None:
    """The two ways to a head's logits, with gradients and without, for every kind of network and whatever settings share a view."""
    kinds_of = {name: classifier(KINDS[name].module) for name in ("pooled", "vgg", "fixed pooling", "residual", "tokens")}
    kinds_of["class token"] = vit
    for name, used in kinds_of.items():
        image = grid(side=used.preprocessing.size[0])[0]
        for layer in ("input", "last" if name == "residual" else "middle"):
            model = GridModel(used, 2, layer)
            view = GridView(model, image, shown)
            for setting in filter(model.defines, shown):
                for cell in heads_of(setting, 2):
                    task = view.task(setting, cell, 1)
                    rows = torch.cat([task.inputs, task.inputs * 0.5, task.baseline])
                    without = task.classifier.logits(rows)
                    with_gradients = task.classifier.logits(rows.clone().requires_grad_())
                    assert with_gradients.requires_grad and not without.requires_grad
                    assert apart(without, with_gradients) < 1e-5, (name, layer, setting, cell)


def test_methods_that_look_inside_are_not_answered_from_memory() -> None:
    """Guided backpropagation counts the ReLUs that run, in every head, also after others have asked for the same logits."""
    view = GridView(GridModel(classifier(drawn(Pooled(), 1)), 2, "input"), grid()[0])
    called: list[str] = []
    for inside in (False, True, True):
        task = view.task("gridpg", 1, 0, inside=inside)
        for _ in range(2):
            called.clear()
            handle = view.model.whole.module.features[1].register_forward_hook(lambda *_: called.append("relu"))
            task.classifier.logits(task.inputs)
            handle.remove()
        assert bool(called) == inside


# --- what methods are given ---


def test_tasks(cnn: at.Classifier) -> None:
    image = grid(side=32)[0]
    for layer, channels, side in (("input", 3, 32), ("middle", 32, 16), ("final", 64, 8)):
        view = GridView(GridModel(cnn, 2, layer), image)
        for setting in SETTINGS:
            task: Task = view.task(setting, 3, 5, seed=4)
            assert task.inputs.shape == (1, channels, 2 * side, 2 * side) and task.target == 5 and task.seed == 4
            assert torch.equal(task.inputs, view.maps(setting)) and float(task.baseline.abs().max()) == 0
            assert task.classifier.class_names == cnn.class_names and task.classifier.num_classes == 10
            assert task.classifier.preprocessing.shape == task.inputs.shape[1:]
            assert apart(task.classifier.preprocessing(task.image[None]), task.inputs) < 1e-5
            assert float(task.classifier.preprocessing(task.fill[None]).abs().max()) < 1e-6
            assert task.classifier.name == ("zoo:cnn" if layer == "input" else f"zoo:cnn after {view.model.layer.name}")  # type: ignore[union-attr]
        alone = view.task("difull", 3, 5, alone=True)
        assert torch.equal(alone.inputs, cut(view.maps("difull"), 3, 2))
        whole = view.task("difull", 3, 5)
        assert apart(alone.classifier.logits(alone.inputs), whole.classifier.logits(whole.inputs)) < 1e-6
    layer_of_cams = view.explained_layer(whole)
    head = whole.classifier.module
    assert isinstance(head, Head) and layer_of_cams.module is head.explained and layer_of_cams.grid == (16, 16)


def test_the_classifier_is_left_alone() -> None:
    """Resizing of images, names and batch size are the classifier's own; its cells are model inputs as they are."""
    module = drawn(Pooled(), 1)
    used = classifier(module, resize="short_side", resized=(20, 20), batch_size=7, class_names=list("abcde"))
    before = (used.preprocessing, used.batch_size, used.module, state(module))
    view = GridView(GridModel(used, 2, "input"), grid()[0])
    found = view.model.through("difull", 3)(given_to(view, "difull", 3))
    assert apart(found, module(cut(normalised(grid()[0])[None], 3, 2))) < 1e-5
    assert before == (used.preprocessing, used.batch_size, used.module, state(module))
    assert repr(view.model) == "GridModel(toy, 2 x 2, input)"


def test_at_size() -> None:
    module, other = drawn(Pooled(), 1), drawn(Pooled(), 2)
    used = classifier(module, batch_size=5)
    assert len(used.heads) == 1
    larger = at_size(used, (32, 48), module)
    assert larger.preprocessing.size == (32, 48) and used.preprocessing.size == (SIDE, SIDE)
    assert larger.heads is used.heads and at_size(used, (32, 48), other).heads[0] is other.fc
    assert larger.logits(torch.zeros(1, 3, 32, 48)).shape == (1, CLASSES)
