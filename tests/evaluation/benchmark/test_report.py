"""The report: its numbers, its figures, what a browser makes of it, and what hostile names do to it."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from rich.console import Console

import evaluation as ev
from attribution.explanation import Explanation
from evaluation.benchmark.figures import MOST_CURVES, plot_agreement, plot_cost, plot_curves, plot_ranks, plot_scores, thumbnail
from evaluation.benchmark.gallery import chosen_images
from evaluation.benchmark.report import write_report
from evaluation.benchmark.results import Explained, Failure, Results, Score
from evaluation.benchmark.summary import AXIS, Summary, score_matrix
from evaluation.benchmark.terminal import print_summary
from evaluation.benchmark.wording import conclusions
from evaluation.metrics.registry import Measure
from evaluation.study.page import inline_svg
from evaluation.study.report import ReportFiles

HOSTILE = "<script>alert(1)</script>&\"'$x^$"
METHODS = ("bidirectional", "grad_cam", "rise", "random")
BLACK, BLUR = "regions, black, p", "regions, blur, p"
INSERTION, DELETION = Measure("insertion", BLACK, "higher"), Measure("deletion", BLACK, "lower")


def saved_map(path: Path, seed: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(16, 16, generator=generator) - (0.5 if signed else 0)
    image = torch.rand(3, 16, 16, generator=generator)
    Explanation(image, 0, ("cat", HOSTILE), torch.tensor([0.7, 0.3]), pixel_map=values, evaluations=7).save(path)


def synthetic(
    folder: Path,
    count: int = 14,
    methods: tuple[str, ...] = METHODS,
    models: tuple[str, ...] = ("m",),
    fills: tuple[str, ...] = ("black", "blur"),
) -> Results:
    """Results without a model: a method's insertion falls with its place in the list, and rises with it under another fill."""
    specs = [{"method": name.split("@")[0], "label": name} for name in methods]
    metrics = ["insertion", "deletion", "mu_fidelity"]
    settings = ev.make_settings({"data": "photos", "models": models, "methods": specs, "fills": fills, "seeds": 2, "metrics": metrics})
    samples = (f"{HOSTILE}.png", *(f"class/{index}.png" for index in range(1, count)))
    scores, explained = [], []
    line = np.linspace(0, 1, 5, dtype=np.float32)
    for model in models:
        for place, spec in enumerate(settings.methods):
            for seed in settings.seeds_of(spec):
                generator = np.random.default_rng([place, seed])
                for at, sample in enumerate(samples):
                    path = folder / f"{place}-{seed}-{at}.npz"
                    if not path.exists():
                        saved_map(path, 1000 * place + 100 * seed + at, signed=place % 2 == 1)
                        ends = {"insertion_area": line, "deletion_area": line}
                        np.savez(path.with_suffix(".curve.npz"), **ends, insertion=line / (1 + place), deletion=1 - line)
                    for measure, protocol in settings.measured():
                        base = (0.8 - 0.1 * place) if protocol.fill == "black" else 0.5 + 0.05 * place
                        value = base + generator.normal(0, 0.02)
                        if measure.metric == "deletion":
                            value = 1 - value
                        scores.append(Score(model, sample, spec.label, seed, measure, float(value), None))
                    curves = {p.label(): path.with_suffix(".curve.npz") for p in settings.protocols}
                    evaluations = (238, 1, 60, 0)[place % 4]
                    explained.append(Explained(model, sample, spec.label, seed, path, curves, evaluations, 0.9, False, False, 1, 0))
    failures = (
        Failure(models[0], "class/1.png", methods[1], 0, f"RuntimeError: {HOSTILE}"),
        Failure(models[0], "", "attention_rollout", 0, "it has no attention", refused=True),
    )
    facts = {"weights_digest": "0123abcd", "size": [16, 16], "class_names": ["cat", HOSTILE], "precision": "bfloat16"}
    names = dict.fromkeys(models, facts)
    return Results(settings, names, dict.fromkeys(models, samples), tuple(scores), tuple(explained), failures, folder)


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return ev.summarise(synthetic(tmp_path_factory.mktemp("explanations")))


@pytest.fixture(scope="module")
def files(summary: Summary, tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    return write_report(summary, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """One image only: no mean has an interval."""
    return ev.summarise(synthetic(tmp_path_factory.mktemp("one"), count=1, fills=("black",)))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are not about figures; they take most of the time."""
    monkeypatch.setattr("evaluation.benchmark.report._planned_figures", lambda summary: ())


class Page(HTMLParser):
    """Tables as lists of rows of texts, and every element with its attributes."""

    VOID = frozenset({"meta", "br", "img", "wbr", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == [], "elements are left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def page(files: ReportFiles) -> Page:
    return Page(files.html.read_text(encoding="utf-8"))


def board(page: Page) -> dict[str, list[str]]:
    """Rows of the first leaderboard by method."""
    at = [attributes for tag, attributes in page.elements if tag == "table"].index({"class": "board", "id": "board-1"})
    return {row[0].strip(): [re.sub(r"\s+", " ", cell).strip() for cell in row] for row in page.tables[at][2:]}


def test_the_page_needs_nothing_from_elsewhere(files: ReportFiles, page: Page) -> None:
    text = files.html.read_text(encoding="utf-8")
    assert "://" not in text
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert str(attributes.get("src", "data:image/png;base64,")).startswith("data:image/png;base64,")
        assert attributes.get("href", "#").startswith("#"), attributes
        assert not any(name.startswith("on") for name in attributes)


def test_names_from_files_are_text(files: ReportFiles, page: Page) -> None:
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert f"{HOSTILE}.png" in page.text  # sample
    assert f"RuntimeError: {HOSTILE}" in page.text  # reason
    assert f"label {HOSTILE}" in page.text  # class name
    assert "<script>alert" not in files.html.read_text(encoding="utf-8")


def test_hostile_labels_of_methods_and_models(tmp_path: Path) -> None:
    methods = ("bidirectional", "grad_cam")
    results = synthetic(tmp_path, 4, methods, (HOSTILE,), ("black",))
    spec = replace(results.settings.methods[1], label=f"_{HOSTILE}")
    settings = replace(results.settings, methods=(results.settings.methods[0], spec))
    rename = {"grad_cam": spec.label}
    scores = tuple(replace(s, method=rename.get(s.method, s.method)) for s in results.scores)
    explained = tuple(replace(e, method=rename.get(e.method, e.method)) for e in results.explained)
    found = write_report(ev.summarise(replace(results, settings=settings, scores=scores, explained=explained)), tmp_path / "out")
    page = Page(found.html.read_text(encoding="utf-8"))
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert f"_{HOSTILE}" in board(page)
    svg_texts = page.text.count(f"_{HOSTILE}")
    assert svg_texts > 8  # tables, gallery, and the labels of the figures
    assert all(path.parent == tmp_path / "out" / "figures" for path in found.figures)


def test_every_method_and_measure_is_in_the_leaderboard(summary: Summary, page: Page) -> None:
    rows = board(page)
    assert list(rows) == ["bidirectional", "grad_cam", "rise", "random"]
    headings = [a["data-measure"] for tag, a in page.elements if tag == "th" and "data-measure" in a]
    assert sorted(headings) == sorted(measure.label for measure in summary.measures)
    for at, label in enumerate(headings):
        measure = next(m for m in summary.measures if m.label == label)
        for entry in summary.column("m", measure):
            i = entry.interval
            expected = f"{entry.rank:g} {i.estimate:z.3f} {' '.join(entry.group)}[{i.low:z.3f}, {i.high:z.3f}]"
            assert rows[entry.method][3 + at] == expected
    assert [rows[m][2] for m in rows] == ["238", "1", "60", "0"]


def test_the_best_of_each_column_is_marked(summary: Summary, page: Page) -> None:
    marked = [float(str(a["data-value"])) for tag, a in page.elements if tag == "td" and "best" in str(a.get("class")).split()]
    headings = [a["data-measure"] for tag, a in page.elements if tag == "th" and "data-measure" in a]
    best = {m.label: summary.column("m", m)[0].interval.estimate for m in summary.measures}
    assert sorted(marked) == pytest.approx(sorted(best[str(label)] for label in headings), rel=1e-6)


def test_tables_say_what_their_headings_head(page: Page) -> None:
    heads = [a for tag, a in page.elements if tag == "th"]
    assert heads and all(a.get("scope") in ("row", "col", "colgroup") for a in heads)
    assert all(a.get("alt") is not None for tag, a in page.elements if tag == "img")
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    references = [str(a["href"]) for _, a in page.elements if "href" in a]
    assert len(references) > 100 and {reference.removeprefix("#") for reference in references} <= set(ids)


def test_failures_refusals_and_seeds_are_listed(page: Page) -> None:
    assert "it has no attention" in page.text and "attention_rollout" in page.text
    seeds = next(table for table in page.tables if table[0][:3] == ["method", "seeds", "correlation of maps"])
    assert [row[0] for row in seeds[1:]] == ["rise", "random"]
    assert all(row[1] == "2" and row[2].endswith("unstable") for row in seeds[1:])  # maps of independent noise


def test_conclusions_of_known_differences(summary: Summary) -> None:
    first, second = conclusions(summary, "m")
    assert first == f"Under protocol ({BLACK}), bidirectional leads insertion and deletion, separated from every other method."
    assert second == "Of all 5 columns, bidirectional leads 3 and random leads 2."


def test_too_few_images_are_said(tmp_path: Path) -> None:
    few = ev.summarise(synthetic(tmp_path, count=5, fills=("black",)))
    sentences = conclusions(few, "m")
    assert sentences[0].endswith("not separated from any other method.")
    assert "5 images cannot separate any two of 4 methods" in sentences[-1] and "is 0.38" in sentences[-1]  # 6 pairs x 2 / 2^5


def test_exceptions_are_named(summary: Summary) -> None:
    entries = tuple(replace(e, group=("a", "b")) if (e.method, e.measure) == ("rise", INSERTION) else e for e in summary.entries)
    first = conclusions(replace(summary, entries=entries), "m")[0]
    assert "insertion (separated from every other method except rise) and deletion (separated from every other method)." in first


def test_a_score_without_an_interval_is_not_printed(alone: Summary, tmp_path: Path, no_figures: None) -> None:
    files = write_report(alone, tmp_path)
    page = Page(files.html.read_text(encoding="utf-8"))
    for row in board(page).values():
        assert row[3:] == ["–"] * 3  # noqa: RUF001
    titles = [a.get("title") for tag, a in page.elements if tag == "td" and a.get("data-value") == ""]
    assert titles == ["a single image has no interval, so its score is not shown"] * 12
    assert "1 image: no mean has an interval, so nothing is concluded." in page.text
    console = Console(width=120, record=True, file=io.StringIO())
    print_summary(alone, console)
    printed = console.export_text()
    assert "bidirectional" in printed and not re.search(r"\d\.\d\d\d", printed)
    assert json.loads(files.json.read_text())["separations"] == []
    assert len(plot_cost(alone, "m").axes[0].lines) == 0


def test_bytes_are_the_same_again(summary: Summary, files: ReportFiles, tmp_path: Path) -> None:
    again = write_report(summary, tmp_path / "elsewhere")
    for first, second in ((files.html, again.html), (files.csv, again.csv), (files.json, again.json), (files.figures[0], again.figures[0])):
        assert first.read_bytes() == second.read_bytes()
    assert not [path for path in files.html.parent.rglob("*") if path.name.startswith(".")]


def test_csv_and_json_hold_the_numbers(summary: Summary, files: ReportFiles) -> None:
    with files.csv.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(summary.entries) == 20
    assert rows[0]["method"] == "bidirectional" and rows[0]["protocol"] == BLACK
    assert float(rows[0]["mean"]) == pytest.approx(score_matrix(summary.results, "m", INSERTION)["bidirectional"].mean(), rel=1e-5)
    found = json.loads(files.json.read_text(encoding="utf-8"))
    assert found["separations"][0] == {
        "model": "m", "metric": "insertion", "protocol": BLACK, "direction": "higher", "best": "bidirectional", "not_separated": []
    }  # fmt: skip
    assert found["agreements"][0]["tau"] == -1  # the other fill turns the ranking round
    assert found["models"]["m"] == {"weights_digest": "0123abcd", "size": [16, 16], "precision": "bfloat16"}
    assert "weights 0123abcd, computed in bfloat16" in files.html.read_text(encoding="utf-8")
    assert "captum" in found["versions"]
    assert found["failures"][0]["reason"] == f"RuntimeError: {HOSTILE}" and found["refused"][0]["method"] == "attention_rollout"


def line_of(figure: plt.Figure, axis: int, method: str) -> tuple[np.ndarray, np.ndarray]:
    line = next(each for each in figure.axes[axis].lines if each.get_gid() == method)
    return np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)


def test_curves_are_the_mean_curves(summary: Summary) -> None:
    figure = plot_curves(summary, "m", BLACK)
    for place, method in enumerate(METHODS):
        x, y = line_of(figure, 0, method)
        assert np.allclose(x, AXIS) and np.allclose(y, AXIS / (1 + place))
        assert np.allclose(line_of(figure, 1, method)[1], 1 - AXIS)
    widths = {line.get_gid(): line.get_linewidth() for line in figure.axes[0].lines}
    assert max(widths, key=lambda name: widths[name]) == "bidirectional"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(METHODS)


def test_only_the_best_curves_are_drawn_beside_controls_and_searches(tmp_path: Path) -> None:
    gradients = ("saliency", "input_x_gradient", "integrated_gradients", "deep_lift", "guided_backprop", "deconvolution", "lrp")
    others = (*gradients, "grad_cam", "layer_cam")
    many = ev.summarise(synthetic(tmp_path, 3, (*others, "greedy", "center_prior"), fills=("black",)))
    figure = plot_curves(many, "m", BLACK)
    drawn = {line.get_gid() for line in figure.axes[0].lines}
    assert drawn == {*others[:MOST_CURVES], "greedy", "center_prior"}
    assert figure.legends[0].get_title().get_text() == "10 of 11 methods"


def test_cost_stands_where_it_is_and_labels_stay_apart(summary: Summary) -> None:
    figure = plot_cost(summary, "m")
    column = {e.method: e.interval for e in summary.column("m", INSERTION)}
    for method, cost in zip(METHODS, (238, 1, 60, 0), strict=True):
        x, y = line_of(figure, 0, method)
        assert x.tolist() == [cost] and y[0] == pytest.approx(column[method].estimate)
    intervals = sorted(tuple(line.get_ydata()) for line in figure.axes[0].lines if line.get_gid() is None)
    assert np.allclose(intervals, sorted((i.low, i.high) for i in column.values()))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])


def test_labels_of_equal_costs_stay_apart(tmp_path: Path) -> None:
    methods = tuple(f"grad_cam@{index} with a long name" for index in range(12))
    results = synthetic(tmp_path, 3, methods, fills=("black",))
    results = replace(results, explained=tuple(replace(e, evaluations=1) for e in results.explained))
    figure = plot_cost(ev.summarise(results), "m")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])


def test_dots_are_the_images(summary: Summary) -> None:
    figure = plot_scores(summary, "m", DELETION)
    scores = score_matrix(summary.results, "m", DELETION)
    for method in METHODS:
        assert np.allclose(line_of(figure, 0, method)[0], scores[method])
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ticks == [e.method for e in summary.column("m", DELETION)]
    diamonds = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert diamonds == pytest.approx([scores[method].mean() for method in ticks])
    heights = [line_of(figure, 0, method)[1] - ticks.index(method) for method in METHODS]
    assert np.allclose(heights, heights[0])  # the same image at the same height


def test_matrices_of_agreement_and_ranks(summary: Summary) -> None:
    agreement = plot_agreement(summary, "m")
    assert [text.get_text() for text in agreement.axes[0].texts] == ["1.00", "-1.00", "-1.00", "1.00"]
    ranks = plot_ranks(summary, "m")
    assert [label.get_text() for label in ranks.axes[0].get_xticklabels()] == [BLACK, BLUR]
    cells = np.array([text.get_text() for text in ranks.axes[0].texts], dtype=float).reshape(4, 2)
    by_method = dict(zip([label.get_text() for label in ranks.axes[0].get_yticklabels()], cells.tolist(), strict=True))
    assert by_method == {"bidirectional": [1, 4], "grad_cam": [2, 3], "rise": [3, 2], "random": [4, 1]}


def test_an_inline_figure_takes_its_colours_from_the_page(summary: Summary) -> None:
    figure = plot_scores(summary, "m", INSERTION)
    svg = inline_svg(figure)
    assert svg.startswith("<svg viewBox=") and svg.endswith("</svg>")
    assert "var(--region-search)" in svg and "var(--ink)" in svg and "#d04a02" not in svg
    assert svg.count("<use ") >= 4 * 14  # every dot is still there
    assert len(svg) < 60_000


def test_a_thumbnail_shows_the_map(tmp_path: Path) -> None:
    image = torch.full((3, 16, 16), 0.5)
    values = torch.zeros(16, 16)
    values[2, 3] = 1
    plain = Explanation(image, 0, ("cat",), torch.ones(1), pixel_map=values)
    pixels = np.asarray(thumbnail(plain)).astype(int)
    assert pixels.shape == (16, 16, 3) and pixels[2, 3].sum() > pixels[0, 0].sum()
    assert (pixels.reshape(-1, 3) == pixels[0, 0]).all(axis=1).sum() == 255
    values[5, 5] = -1
    signed = np.asarray(thumbnail(replace(plain, pixel_map=values))).astype(int)
    assert signed[2, 3, 0] > signed[2, 3, 2] and signed[5, 5, 2] > signed[5, 5, 0]  # red for, blue against
    constant = np.asarray(thumbnail(replace(plain, pixel_map=torch.ones(16, 16))))
    assert (constant == constant[0, 0]).all() and constant[0, 0].tolist() == [159, 159, 159]  # gray 0.25 + 0.75 / 2
    spot = torch.zeros(16, 16)
    spot[2, 3] = 1
    raised = np.asarray(thumbnail(replace(plain, pixel_map=spot + 9))).astype(int)
    assert (raised == pixels).all()  # an offset, such as RISE's, changes nothing
    large = replace(plain, image=torch.rand(3, 300, 200), pixel_map=torch.rand(300, 200))
    assert thumbnail(large).size == (64, 96)


def test_gallery_images_by_rule() -> None:
    leader = np.array([0.1, 0.9, 0.5, np.nan, 0.3, 0.7])
    other = np.array([0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    assert chosen_images({"a": leader, "b": other}, "a", "higher", 3) == [1, 2, 0]
    assert chosen_images({"a": leader, "b": other}, "a", "lower", 3) == [0, 2, 1]
    assert chosen_images({"a": leader, "b": other}, "a", "higher", 4) == [1, 2, 0, 3]  # 3 leads the mean of both
    assert sorted(chosen_images({"a": leader, "b": other}, "a", "higher", 8)) == list(range(6))
    assert chosen_images({}, "a", "higher") == []


def test_missing_explanations_leave_a_gap(tmp_path: Path, no_figures: None) -> None:
    results = synthetic(tmp_path, 3, ("bidirectional", "grad_cam"), fills=("black",))
    for explained in results.explained[:3]:
        explained.path.unlink()
    page = Page(write_report(ev.summarise(results), tmp_path / "out").html.read_text(encoding="utf-8"))
    assert sum("none" in str(a.get("class")).split() for _, a in page.elements) == 3 + 3  # gallery and the method's card


@pytest.mark.parametrize("width", [120, 80])
def test_terminal_tables_fit(summary: Summary, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    print_summary(summary, console)
    printed = console.export_text()
    assert max(map(len, printed.splitlines())) <= width
    best = summary.column("m", INSERTION)[0].interval
    assert f"1. {best.estimate:.3f} a" in printed and f"[{best.low:.3f}, {best.high:.3f}]" in printed
    assert "insertion ↑" in printed and "deletion ↓" in printed and BLUR in printed
    assert "random *" in printed and "not told apart" in printed and "attention" in printed
    for line in printed.splitlines():
        assert "…" not in line


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here to open the page in")
    return found


def opened(folder: Path, *arguments: str) -> str:
    quiet = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={folder}"]
    command += ["--window-size=1366,900", "--hide-scrollbars", "--virtual-time-budget=3000", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return result.stdout


def test_a_browser_sorts_the_tables(files: ReportFiles, tmp_path: Path) -> None:
    dom = opened(tmp_path, "--dump-dom", f"{files.html.as_uri()}#sort=board-1,2,descending")
    root = re.search(r"<html[^>]*>", dom)
    assert root is not None and 'data-ready="yes"' in root[0]
    widths = dict(re.findall(r'data-(scroll|client)-width="(\d+)"', root[0]))
    assert int(widths["scroll"]) <= int(widths["client"]) <= 1366
    table = dom[dom.index('id="board-1"') :]
    assert re.findall(r'<th scope="row" data-value="(\w+)"', table)[:4] == ["bidirectional", "rise", "grad_cam", "random"]
    assert re.search(r'data-column="2"[^>]*aria-sort="descending"', table)


def test_a_browser_shows_the_page_light_and_dark(files: ReportFiles, tmp_path: Path) -> None:
    shown = {}
    for scheme, number in (("light", 1), ("dark", 0)):
        path = tmp_path / f"{scheme}.png"
        opened(tmp_path / "profile", f"--blink-settings=preferredColorScheme={number}", f"--screenshot={path}", files.html.as_uri())
        with Image.open(path) as image:
            shown[scheme] = np.asarray(image.convert("L")).astype(float)
    assert shown["light"].shape == shown["dark"].shape == (900, 1366)
    assert shown["light"].mean() > 220 and shown["dark"].mean() < 60
    assert min(pixels.std() for pixels in shown.values()) > 10
