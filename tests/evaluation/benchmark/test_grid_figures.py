from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import Tensor

from attribution.errors import UserError
from attribution.figures.style import Figure
from evaluation.benchmark.grid_figures import TARGET, bin_names, plot_aggregate, plot_examples, plot_localization, plot_sweep
from evaluation.grids.aggregate import Aggregate, aggregate, examples
from evaluation.grids.scores import positive_maps
from evaluation.study.style import FAMILY_COLOURS

FAMILIES = {"grad_cam": "cam", "saliency": "gradient", "random": "control", "occlusion": "perturbation"}
SCORES = {
    "input": {"saliency": np.array([0.2, 0.3, 0.4]), "random": np.array([0.25, 0.25]), "grad_cam": np.array([0.9, 1.0, 0.95, 0.05])},
    "final": {"saliency": np.array([0.5]), "random": np.array([0.6]), "grad_cam": np.array([0.1]), "occlusion": np.array([0.3])},
}


def some_maps(count: int, n: int = 2) -> Tensor:
    return torch.randn(count, 4 * n, 4 * n, generator=torch.Generator().manual_seed(0)) + 0.3


def some_aggregate(count: int = 100, n: int = 2, cell: int = 0) -> Aggregate:
    return aggregate(some_maps(count, n), cell, n, (8 * n, 8 * n))


def drawn_texts(figure: Figure) -> list[tuple[str, Any]]:
    """Every text that is drawn, with where it is, after the layout."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    hidden = {id(text) for ax in figure.axes for text in hidden_ticks(ax)}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in hidden]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in texts]


def hidden_ticks(ax: Axes) -> list[Text]:
    """Labels of axes that are off, and of ticks that are not drawn: beyond the limits, or named in a panel beside."""
    axes = ((ax.xaxis, ax.get_xlim(), 0, True), (ax.yaxis, ax.get_ylim(), 1, ax.yaxis.get_tick_params().get("labelleft", True)))
    found = []
    for axis, limits, which, named in axes:
        for text in axis.get_ticklabels():
            inside = min(limits) <= text.get_position()[which] <= max(limits)
            if not (ax.axison and named and inside):
                found.append(text)
    return found


def check_legible(figure: Figure) -> None:
    """No text leaves the page, none lies on another."""
    width, height = figure.bbox.width, figure.bbox.height
    found = drawn_texts(figure)
    for text, box in found:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, f"{text!r} is clipped"
    for i, (first, a) in enumerate(found):
        for second, b in found[:i]:
            meets = min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
            assert not meets, f"{first!r} lies on {second!r}"


def outline(ax: Axes) -> tuple[float, float, float, float]:
    (found,) = [p for p in ax.patches if isinstance(p, Rectangle) and to_hex(p.get_edgecolor()) == TARGET]
    return (*found.get_xy(), found.get_width(), found.get_height())


def test_methods_are_ranked_by_the_first_panel() -> None:
    figure = plot_localization(SCORES, FAMILIES, 2, "costs $5 and $6")
    first, second = figure.axes
    assert [t.get_text() for t in first.get_yticklabels()] == ["grad_cam", "saliency", "random", "occlusion"], "occlusion has none in it"
    assert first.get_ylim()[0] > first.get_ylim()[1], "the best on top"
    colours = [to_hex(t.get_color()) for t in first.get_yticklabels()]
    assert colours == [FAMILY_COLOURS[FAMILIES[m]] for m in ("grad_cam", "saliency", "random", "occlusion")]
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["input", "final"]
    assert "no values" in [t.get_text() for t in first.texts]
    assert "no values" not in [t.get_text() for t in second.texts]
    check_legible(figure)


def test_boxes_show_quartiles_and_means() -> None:
    first, second = plot_localization(SCORES, FAMILIES, 2).axes
    boxes = {round(p.get_y() + p.get_height() / 2): (p.get_x(), p.get_x() + p.get_width()) for p in first.patches}
    assert boxes[0] == pytest.approx(np.quantile(SCORES["input"]["grad_cam"], [0.25, 0.75]))
    assert boxes[1] == pytest.approx((0.25, 0.35))
    means = {float(line.get_ydata()[0]): float(line.get_xdata()[0]) for line in first.lines if line.get_marker() == "D"}
    assert means == pytest.approx({0: 0.725, 1: 0.3, 2: 0.25})
    assert {"0.72", "0.30", "0.25"} <= {t.get_text() for t in first.texts}
    ends = [float(x) for line in first.lines if line.get_ydata()[0] == line.get_ydata()[-1] == 0 for x in line.get_xdata()]
    assert min(ends) == pytest.approx(0.6875), "0.05 is an outlier, and those are not drawn"
    assert len(second.patches) == 4


@pytest.mark.parametrize("n", [2, 3])
def test_the_chance_level_is_drawn_and_named(n: int) -> None:
    for ax in plot_localization(SCORES, FAMILIES, n).axes:
        dashed = [line for line in ax.lines if line.is_dashed()]
        assert [line.get_xdata()[0] for line in dashed] == [1 / n**2]
        assert f"chance 1/{n * n}" in [t.get_text() for t in ax.texts]
        assert ax.get_xlim() == (0, 1)


def test_thirty_methods_in_three_panels_can_be_read() -> None:
    generator = np.random.default_rng(0)
    names = [f"a_method_with_a_long_name_{i}" for i in range(30)]
    scores = {panel: {name: generator.uniform(size=50) ** (i / 9 + 0.1) for i, name in enumerate(names)} for panel in ("a", "b", "c")}
    figure = plot_localization(scores, dict.fromkeys(names, "gradient"), 2, "title")
    check_legible(figure)
    assert max(figure.get_size_inches()) < 14
    assert min(t.get_fontsize() for t in figure.findobj(Text) if t.get_text().strip()) >= 7


def test_bins_are_named_by_their_edges() -> None:
    assert bin_names((0, 0.02, 0.05, 0.5, 0.95, 0.98, 1)) == ["best 2 %", "2-5 %", "5-50 %", "50-95 %", "95-98 %", "worst 2 %"]
    assert bin_names((0, 1 / 3, 1)) == ["best 33.3 %", "worst 66.7 %"]
    assert bin_names((0, 1)) == ["all"]


@pytest.mark.parametrize(("n", "cell", "corner"), [(2, 0, (-0.5, -0.5)), (2, 3, (7.5, 7.5)), (3, 1, (7.5, -0.5)), (3, 6, (-0.5, 15.5))])
def test_an_aggregate_shows_its_bins_on_one_scale(n: int, cell: int, corner: tuple[float, float]) -> None:
    found = some_aggregate(100, n, cell)
    figure = plot_aggregate({"saliency": found, "a $name": found}, n, cell, "title")
    panels = [ax for ax in figure.axes if ax.images]
    assert len(panels) == 12
    for ax, values in zip(panels[:6], found.maps, strict=True):
        torch.testing.assert_close(torch.from_numpy(np.asarray(ax.images[0].get_array())), (values / found.scale).clamp(0, 1))
        assert ax.images[0].get_clim() == (0, 1)
        assert outline(ax) == (*corner, 8, 8)
    assert [ax.get_title() for ax in panels[:6]] == bin_names(found.fractions)
    assert not any(ax.get_title() for ax in panels[6:]), "the same bins are named once"
    assert panels[0].get_ylabel() == f"saliency\nmean {found.scores.mean():.2f}"
    assert [ax.get_xlabel() for ax in panels[:6]] == [f"{found.scores[b].mean():.2f}" for b in found.bins]
    check_legible(figure)


def test_methods_with_other_bins_are_named_in_their_own_row() -> None:
    few, many = some_aggregate(7), some_aggregate(100)
    assert len(few.bins) < len(many.bins)
    figure = plot_aggregate({"costly": few, "cheap": many}, 2, 0)
    titles = [ax.get_title() for ax in figure.axes if ax.images]
    assert titles == [*bin_names(few.fractions), *bin_names(many.fractions)]
    check_legible(figure)


def test_maps_with_few_positive_pixels_are_shown_at_their_largest() -> None:
    maps = -torch.ones(10, 16, 16)
    maps[:, 3, 3] = 5
    sparse, none = (aggregate(values, 0, 2, (16, 16), (0, 0.5, 1)) for values in (maps, -maps.abs()))
    assert sparse.scale == none.scale == 0
    panels = [ax for ax in plot_aggregate({"sparse": sparse, "none": none}, 2, 0).axes if ax.images]
    shown = [np.asarray(ax.images[0].get_array()) for ax in panels]
    assert [values.max() for values in shown] == [1, 1, 0, 0]


@pytest.mark.parametrize("kind", ["uint8", "float", "function"])
def test_examples_stand_beside_their_images(kind: str) -> None:
    maps, cell = some_maps(24), 3
    found = aggregate(maps, cell, 2, (16, 16), (0, 0.125, 0.5, 1))
    pixels = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images: Any = {"uint8": pixels, "float": pixels / 255, "function": lambda index: pixels[index]}[kind]
    figure = plot_examples(found, maps, images, 2, cell, 4, "title")
    chosen = [int(i) for indices in examples(found, 4) for i in indices]
    assert len(chosen) == 3 + 4 + 4
    photos, panels = figure.axes[0::2], figure.axes[1::2]
    for index, photo, panel in zip(chosen, photos, panels, strict=True):
        expected = pixels[index].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(np.asarray(photo.images[0].get_array()), expected if kind != "float" else expected / 255, atol=1e-6)
        values = positive_maps(maps[index][None], (16, 16))[0]
        top = values.flatten().sort().values[int(256 * 0.01 * 99.5)]
        torch.testing.assert_close(torch.from_numpy(np.asarray(panel.images[0].get_array())), (values / top).clamp(0, 1))
        assert outline(photo) == outline(panel) == (7.5, 7.5, 8, 8)
        assert photo.get_xlabel() == f"grid {index}"
        assert panel.get_xlabel() == f"{found.scores[index]:.2f}"
    labels = [photo.get_ylabel() for photo in photos if photo.get_ylabel()]
    assert labels == ["best 12.5 %\n3 grids", "12.5-50 %\n9 grids", "worst 50 %\n12 grids"]
    check_legible(figure)


def test_a_sweep_shows_curves_intervals_and_chance() -> None:
    kernels = [129, 1, 33]  # in any order
    mean = np.array([0.8, 0.3, 0.6])
    scores = {"low": (kernels, mean - 0.2, mean - 0.25, mean - 0.15), "high_$": (kernels, mean, mean - 0.05, mean + 0.05)}
    figure = plot_sweep(scores, 3, "title")
    (ax,) = figure.axes
    curves = [line for line in ax.lines if not line.is_dashed()]
    assert [line.get_xdata().tolist() for line in curves] == [[1, 33, 129]] * 2
    assert curves[1].get_ydata().tolist() == [0.3, 0.6, 0.8]
    vertices = ax.collections[1].get_paths()[0].vertices
    assert vertices[vertices[:, 0] == 33][:, 1].min() == pytest.approx(0.55)
    assert vertices[vertices[:, 0] == 33][:, 1].max() == pytest.approx(0.65)
    assert [line.get_ydata()[0] for line in ax.lines if line.is_dashed()] == [1 / 9]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "33", "129"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["high_$", "low"], "in the order in which the curves end"
    check_legible(figure)


@pytest.mark.parametrize(
    ("scores", "families", "message"),
    [
        ({}, {}, "no scores to plot"),
        ({"input": {}}, {}, "no scores to plot"),
        ({"input": {"a": np.array([0.5])}}, {}, "the family of a is None"),
        ({"input": {"a": np.array([0.5])}}, {"a": "magic"}, "the family of a is 'magic': expected one of region search"),
        ({"input": {"a": np.array([1.5])}}, {"a": "cam"}, r"a \(input\) are not all in \[0, 1\]"),
        ({"input": {"a": np.array([np.nan])}}, {"a": "cam"}, r"not all in \[0, 1\]"),
        ({"input": {"a": np.array([])}}, {"a": "cam"}, "at least one"),
    ],
)
def test_scores_that_cannot_be_plotted(scores: Any, families: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plot_localization(scores, families, 2)


def test_other_input_errors() -> None:
    found = some_aggregate(10)
    with pytest.raises(UserError, match="no aggregates"):
        plot_aggregate({}, 2, 0)
    with pytest.raises(UserError, match="cells 0 to 3"):
        plot_aggregate({"a": found}, 2, 4)
    with pytest.raises(UserError, match="9 maps for an aggregate of 10"):
        plot_examples(found, some_maps(9), torch.zeros(10, 3, 16, 16), 2, 0)
    with pytest.raises(UserError, match="9 images for an aggregate of 10"):
        plot_examples(found, some_maps(10), torch.zeros(9, 3, 16, 16), 2, 0)
    with pytest.raises(UserError, match=r"the image is int64 \[3, 16, 16\]"):
        plot_examples(found, some_maps(10), torch.zeros(10, 3, 16, 16, dtype=torch.int64), 2, 0)
    with pytest.raises(UserError, match="no scores to plot"):
        plot_sweep({}, 2)
    with pytest.raises(UserError, match="the curve of a has shapes"):
        plot_sweep({"a": ([1, 3], np.ones(2), np.ones(2), np.ones(1))}, 2)
    with pytest.raises(UserError, match="the kernel sizes of a are"):
        plot_sweep({"a": ([0, 3], np.ones(2), np.ones(2), np.ones(2))}, 2)
