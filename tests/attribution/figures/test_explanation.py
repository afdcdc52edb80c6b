from __future__ import annotations

import io
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import attribution as at
from attribution.figures import style
from attribution.figures.explanation import chosen_prefix, plot_explanations
from attribution.figures.style import Figure, border_segments
from tests.attribution.test_explanation import made, pixel_map


def rendered(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=60)
    return np.asarray(plt.imread(io.BytesIO(buffer.getvalue())))


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def test_one_row_says_what_it_shows() -> None:
    figure = made().plot()
    photo, heat, regions, curves = titles(figure)
    assert photo == "toy: cat, p = 0.80"
    assert heat == "importance"
    assert regions == f"4 of 6 regions, {float(made().area[4]):.0%} of the image\ngive p = 0.90"
    assert curves == "most important first, fill black"
    legend = [text.get_text() for ax in figure.axes if ax.get_legend() for text in ax.get_legend().get_texts()]
    assert legend == [f"insertion, AUC {made().insertion_auc:.3f}", f"deletion, AUC {made().deletion_auc:.3f}"]


def test_the_curves_are_the_scores() -> None:
    curves = next(ax for ax in made().plot().axes if ax.get_legend())
    insertion, deletion = curves.get_lines()[:2]
    assert np.allclose(insertion.get_ydata(), made().insertion_scores)
    assert np.allclose(deletion.get_ydata(), made().deletion_scores)
    assert np.allclose(insertion.get_xdata(), made().area)


def test_the_chosen_prefix_is_numbered() -> None:
    explanation = made()
    assert chosen_prefix(explanation) == 4
    numbers = [text.get_text() for ax in explanation.plot().axes for text in ax.texts]
    assert numbers == ["1", "2", "3", "4"]


@pytest.mark.parametrize("signed", [False, True])
def test_what_the_crop_leaves_out_has_no_colour(signed: bool) -> None:
    explanation = pixel_map(torch.linspace(-1, 2, 48).view(6, 8)) if signed else made()
    whole = explanation.plot().axes[1].images[1].get_array()
    settings = {**explanation.provenance.get("settings", {}), "regions": {"crop": [1, 2, 5, 7]}}
    drawn = replace(explanation, provenance={**explanation.provenance, "settings": settings}).plot().axes[1].images[1].get_array()
    outside = np.ones((6, 8), dtype=bool)
    outside[1:5, 2:7] = False
    assert np.array_equal(np.isnan(np.ma.filled(drawn, np.nan)), outside)
    assert np.array_equal(np.asarray(drawn)[~outside], np.asarray(whole)[~outside])


def test_chosen_prefix_where_none_reaches_enough() -> None:
    explanation = replace(made(), probabilities=torch.tensor([0.0, 1.0]))
    assert chosen_prefix(explanation) == 4
    assert "give the highest p = 0.90" in " ".join(titles(explanation.plot()))


def test_a_fill_that_is_already_the_class_is_said() -> None:
    explanation = replace(made(), insertion_scores=torch.full((7,), 0.7))
    assert "the fill alone gives p = 0.70" in " ".join(titles(explanation.plot()))


def test_chosen_prefix_where_the_fill_is_enough_is_the_best_one() -> None:
    explanation = replace(made(), insertion_scores=torch.tensor([0.79, 0.8, 0.81, 0.9, 0.95, 0.85, 0.8]))
    assert chosen_prefix(explanation) == 4
    assert "give the highest p = 0.95" in " ".join(titles(explanation.plot()))


def test_another_predicted_class_is_said() -> None:
    assert "predicted dog, p = 0.70" in titles(replace(made(), probabilities=torch.tensor([0.7, 0.3])).plot())[0]


@pytest.mark.parametrize(
    ("values", "title"),
    [
        (torch.zeros(6, 8), "heatmap: constant"),
        (torch.ones(6, 8), "heatmap: constant"),
        (torch.linspace(-1, 2, 48).view(6, 8), "heatmap, signed"),
        (-torch.rand(6, 8) - 0.1, "heatmap, signed"),
        (torch.full((6, 8), torch.nan), "heatmap: constant (48 values not finite)"),
        (torch.rand(6, 8) * 1e-20, "importance"),
    ],
)
def test_signed_and_degenerate_maps(values: torch.Tensor, title: str) -> None:
    figure = pixel_map(values).plot()
    assert title in titles(figure)
    assert rendered(figure).std() > 0


def test_rows_of_different_kinds() -> None:
    figure = plot_explanations([made(), pixel_map(torch.rand(6, 8)), replace(made(), target=0)])
    assert sum(title == "importance" for title in titles(figure)) == 3
    assert rendered(figure).shape[0] > rendered(made().plot()).shape[0] * 2
    with pytest.raises(at.UserError, match="no explanations"):
        plot_explanations([])


ODD = ["Ba$$in", "$5 or $10", "a\nb", "tab\there", "<b>$\\frac{1}</b>", "[red]x[/red]", "кошка", "x" * 200, "", "\x07bell"]


@pytest.mark.parametrize("name", ODD)
def test_names_are_drawn_as_they_are_written(name: str) -> None:
    explanation = replace(made(), class_names=(name, name), provenance={"model": name, "settings": {"fill": name}})
    figure = explanation.plot()
    assert rendered(figure).std() > 0
    shown = " ".join(name.replace("\x07", " ").split())
    short = shown if len(shown) <= 48 else shown[:47] + "…"
    assert figure.axes[0].get_title().replace("\n", " ").startswith(f"{shown}: {short}, p = ".removeprefix(": "))
    assert figure.axes[3].get_ylabel() == f"p({short})"
    assert f"fill {shown}" in figure.axes[3].get_title().replace("\n", " ")
    assert not any(text.get_parse_math() for text in figure.findobj(Text) if text.get_text())


def test_letters_that_the_usual_font_lacks_come_from_another_or_the_index_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="no installed font has all letters of '日本語': figures show 'class 1'; install a font"):
        figure = replace(made(), class_names=("dog", "日本語")).plot()
    assert figure.axes[0].get_title().startswith("toy: class 1, p = ")
    rendered(figure)  # a letter that is drawn as a box is a warning of matplotlib, and an error here
    only_stix = "\u2a8a"
    monkeypatch.setattr(
        style, "_letters", lambda path: frozenset(map(ord, only_stix)) if "STIXGeneral.ttf" in path else frozenset(range(128))
    )
    figure = replace(made(), class_names=("dog", f"a {only_stix}")).plot()
    assert figure.axes[0].get_title().startswith(f"toy: a {only_stix}, p = ")
    assert figure.axes[0].title.get_fontfamily()[-1] == "STIXGeneral"
    with pytest.warns(UserWarning, match=r"letters of 'm🐶': figures show 'm\?'"):
        assert style.one_line("m🐶") == "m?"
    assert style.one_line("m\udcff.png") == "m .png"  # names of files need not be valid UTF-8


def test_no_global_state() -> None:
    made().plot()
    assert plt.get_fignums() == []


def test_border_segments_of_two_pixels() -> None:
    assert border_segments(np.array([[0, 1]])).tolist() == [[[0.5, -0.5], [0.5, 0.5]]]
    assert border_segments(np.array([[0], [1]])).tolist() == [[[-0.5, 0.5], [0.5, 0.5]]]
    assert len(border_segments(np.zeros((4, 4)))) == 0


def test_long_names_of_classes_stay_inside_the_figure() -> None:
    """Names of 1000 classes and of their models: no title is cut off at an edge or lies over another one."""
    names = ("American Staffordshire terrier", "soft-coated wheaten terrier")
    model = {"model": "timm:vit_base_patch16_clip_224.openai_ft_in12k_in1k"}
    explanation = replace(made(), class_names=names, probabilities=torch.tensor([0.3, 0.7]), provenance=model)
    explanation = replace(explanation, target=0)
    figure = plot_explanations([explanation, explanation])
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for ax in figure.axes for text in (ax.title, ax.yaxis.label) if text.get_text()]
    left, bottom, right, top = figure.bbox.extents
    assert all(box.x0 >= left and box.y0 >= bottom and box.x1 <= right and box.y1 <= top for box in boxes)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert f"{names[0]}, p = 0.30" in titles(figure)[0]
