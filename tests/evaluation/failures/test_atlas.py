"""The atlas of failures: what is written, and what a reader does with it in a real browser."""

from __future__ import annotations

import base64
import inspect
import io
import json
import math
import re
import shlex
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import attribution as at
from attribution.failure import explain_failure
from evaluation.data.dataset import ImageDataset
from evaluation.failures.atlas import write_atlas
from evaluation.failures.pictures import MISTAKE, TRUTH, _heat, _nearest, _signed
from evaluation.failures.results import Failed, FailureResults
from evaluation.failures.settings import FailureSettings
from evaluation.failures.study import FAILURES
from evaluation.failures.summary import Cluster, FailureSummary, GroupRow, Pair, Shortcut, Suspect
from evaluation.statistics.intervals import Interval
from vision_attribution.one_failure import ONLY
from vision_attribution.studies import study_command

HOSTILE = "<script>alert(1)</script></script><!--&amp;\"'`${x}ü☃"
NAMES = (f"red {HOSTILE}", "green", "blue")
SIDE = 16
IDS = ("a/plain photo.png", f"{HOSTILE}.png", "-starts with a dash.png", "b/large $HOME.png", "c/never.png")


class Colours(nn.Module):
    """A logit for each colour: eight times its mean over the image."""

    def forward(self, x: Tensor) -> Tensor:
        return 8 * x.mean(dim=(2, 3))


def colours() -> at.Classifier:
    return at.Classifier(Colours(), size=SIDE, class_names=list(NAMES), scores="logits", name="colours", batch_size=64)


def cells(counts: tuple[int, int, int], values: tuple[float, float, float], seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    """An image of 4x4 cells, each red, green or blue."""
    kinds = np.random.default_rng(seed).permutation(np.repeat([0, 1, 2], counts))
    image = torch.zeros(3, *size)
    for place, kind in enumerate(kinds):
        rows, columns = (slice(at * side // 4, (at + 1) * side // 4) for at, side in zip(divmod(place, 4), size, strict=True))
        image[kind, rows, columns] = values[kind]
    return image


def interval(estimate: float, half: float = 0.1) -> Interval:
    return Interval(estimate, estimate - half, estimate + half, 0.95, "bca", 5)


NO_INTERVAL = Interval(0.3, math.nan, math.nan, 0.95, "bca", 1)


def made(folder: Path, **changed: Any) -> FailureSummary:
    """Five failures of a classifier of colours: four that hiding one green or red cell repairs, and one that nothing does."""
    classifier = colours()
    settings = FailureSettings(data="my photos/list.csv", model=classifier, regions="grid", region_options={"count": 16}, seed=3, **changed)
    images = [
        (cells((11, 5, 0), (0.4, 1.0, 0), 0), 0),
        (cells((11, 5, 0), (0.4, 1.0, 0), 1), 0),
        (cells((5, 11, 0), (1.0, 0.4, 0), 2), 1),
        (cells((11, 5, 0), (0.4, 1.0, 0), 3, (120, 320)), 0),
        (cells((0, 16, 0), (0, 1.0, 0), 4), 2),
    ]
    failures = []
    for index, (image, label) in enumerate(images):
        found = explain_failure(image, classifier, label, fill=settings.fill, regions="grid", region_options={"count": 16})
        path = folder / f"{index}.npz"
        found.truth.save(path)
        group = ("left", HOSTILE)[index % 2]
        failures.append(Failed(IDS[index], index, label, found.mistake.target, group, json.loads(json.dumps(found.plain())), path))
    dataset = ImageDataset("photos", NAMES, IDS, tuple(label for _, label in images), lambda index: images[index][0])
    results = FailureResults(
        settings, classifier, dataset, 40, 35, {0: 20, 1: 10, 2: 10}, {"left": (20, 3), HOSTILE: (20, 2)}, tuple(failures),
        ((f"{HOSTILE}-broken", "cannot be read"),), folder,
    )  # fmt: skip
    return FailureSummary(
        results,
        (
            Pair(0, 1, 3, 0.15, 3, interval(0.06), interval(0.07)),
            Pair(1, 0, 1, 0.1, 1, NO_INTERVAL, NO_INTERVAL),
            Pair(2, 1, 1, 0.1, 0, NO_INTERVAL, NO_INTERVAL),
        ),
        (Cluster(0, (IDS[0], IDS[1]), IDS[1], (0, 1), 2, 0.0004), Cluster(1, (IDS[2],), IDS[2], (1, 0), 1, math.nan)),
        {IDS[0]: 0, IDS[1]: 0, IDS[2]: 1, IDS[3]: -1, IDS[4]: -1},
        (Suspect(IDS[4], 2, 1, 0.99, f"no set of regions reaches {HOSTILE}"),),
        (Shortcut("area", "the lower left corner causes 2 of 5 failures", (IDS[0], IDS[3]), 0.01),),
        (
            GroupRow("left", 20, 3, interval(0.15), interval(0.06), 0.4, math.nan),
            GroupRow(HOSTILE, 20, 2, interval(0.1), NO_INTERVAL, 0.4, math.nan),
        ),
        {0.25: interval(0.6), 1.0: interval(0.7)},
        {"few regions": interval(0.8), "repaired": interval(0.8), "background": NO_INTERVAL},
    )


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> FailureSummary:
    return made(tmp_path_factory.mktemp("explanations"))


@pytest.fixture(scope="module")
def atlas(summary: FailureSummary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_atlas(summary, tmp_path_factory.mktemp("atlas") / "new folder")


class Parsed(HTMLParser):
    """Elements with their attributes, all text outside scripts and styles, and the embedded data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data, self._inside = "", "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._inside = {"script": f"script {dict(attributes).get('type')}", "style": "style"}.get(tag, "")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script application/json":
            self.data += data
        elif not self._inside:
            self.text += data

    def named(self, tag: str, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag and name in (attributes.get("class") or "").split()]


def test_one_file_holds_everything(atlas: Path, summary: FailureSummary) -> None:
    page = Parsed(atlas)
    assert atlas.name == "atlas.html" and [path.name for path in atlas.parent.iterdir()] == ["atlas.html"]
    assert atlas.stat().st_size < 300_000
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and "http" not in policy
    assert len(page.named("li", "tile")) == len(summary.results.failures) == 5
    addresses = [str(a[name]) for _, a in page.elements for name in ("src", "href", "action", "srcset") if name in a]
    assert addresses and all(address.startswith(("#", "data:image/")) for address in addresses)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    anchors = {address[1:] for address in addresses if address.startswith("#") and "=" not in address}
    assert anchors <= set(ids)
    labelled = {a[name] for _, a in page.elements for name in ("aria-labelledby", "for") if name in a}
    assert labelled <= set(ids)


def test_embedded_data_parse_back(atlas: Path, summary: FailureSummary) -> None:
    data = json.loads(Parsed(atlas).data)
    assert data["classes"] == {"0": NAMES[0], "1": NAMES[1], "2": NAMES[2]}
    for sample, failed in zip(data["samples"], summary.results.failures, strict=True):
        found, explanation = failed.found, failed.explanation()
        assert (sample["id"], sample["label"], sample["predicted"]) == (failed.sample, failed.label, failed.predicted)
        assert sample["text"] == found["text"]
        assert sample["orders"] == {"truth": found["truth_order"], "mistake": found["mistake_order"]}
        for name in ("shown", "hidden", "mistake_shown", "mistake_hidden"):
            kept = sample["curves"][name if name.startswith("mistake") else f"truth_{name}"]
            assert kept["true"] == pytest.approx(found["curves"][name]["true"], abs=6e-4)
            assert kept["predicted"] == pytest.approx(found["curves"][name]["predicted"], abs=6e-4)
            assert [bool(right) for right in kept["right"]] == found["curves"][name]["right"]
        assert explanation.regions is not None
        ids = np.frombuffer(zlib.decompress(base64.b64decode(sample["labels"])), "<u2").reshape(sample["height"], sample["width"])
        if max(ids.shape) == SIDE:
            assert (ids == explanation.regions.labels.numpy()).all()
        assert set(np.unique(ids)) == set(range(16)) and max(ids.shape) <= 256
        assert sample["fill"] == "#000000"


def test_peak_and_smallest_sets_are_those_of_the_explanation(atlas: Path, summary: FailureSummary) -> None:
    samples = json.loads(Parsed(atlas).data)["samples"]
    found = explain_failure(
        summary.results.dataset[0].image, summary.results.classifier, 0, regions="grid", region_options={"count": 16}
    )  # fmt: skip
    assert samples[0]["peak"] == found.peak
    assert found.cause is not None and samples[0]["sets"]["cause"]["regions"] == found.cause.regions.tolist()
    assert samples[0]["sets"]["cause"]["area"] == pytest.approx(1 / 16, abs=1e-4)  # one green cell of five
    assert samples[4]["sets"] == {"sufficient": None, "cause": None}  # nothing is blue


def test_heatmaps_are_those_of_both_explanations(summary: FailureSummary) -> None:
    found = explain_failure(
        summary.results.dataset[1].image, summary.results.classifier, 0, regions="grid", region_options={"count": 16}
    )  # fmt: skip
    regions = found.truth.regions
    assert regions is not None
    for towards, explanation in (("truth", found.truth), ("mistake", found.mistake)):
        values = torch.tensor(_heat(summary.results.failures[1].explanation(), found.plain(), towards))
        assert torch.allclose(values[regions.labels], explanation.heatmap, atol=1e-5)


def test_signed_map_is_orange_for_causes_and_blue_for_support() -> None:
    gray = Image.new("RGB", (3, 1), (100, 100, 100))
    pixels = np.asarray(_signed(gray, np.array([[1.0, 0.0, -1.0]]))).astype(float)[0]
    base = 255 * (0.25 + 0.75 * 100 / 255)
    for pixel, colour in ((pixels[0], TRUTH), (pixels[2], MISTAKE)):
        wanted = [0.2 * base + 0.8 * int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        assert pixel == pytest.approx(wanted, abs=1)
    assert pixels[1] == pytest.approx([base] * 3, abs=1)


def test_labels_shrink_by_their_centres() -> None:
    labels = np.arange(12).reshape(3, 4)
    assert _nearest(labels, (2, 1)).tolist() == [[5, 7]]  # centres (1, 1) and (3, 1) of 4x3, rounded down
    assert (_nearest(labels, (4, 3)) == labels).all()


def test_hostile_names_stay_text(atlas: Path) -> None:
    source, page = atlas.read_text(encoding="utf-8"), Parsed(atlas)
    assert "<script>alert" not in source
    assert [a.get("type") for tag, a in page.elements if tag == "script"] == ["application/json", None]
    assert page.text.count(NAMES[0]) >= 3 and f"{HOSTILE}-broken".replace("/", "") in page.text.replace("/", "")


def test_the_area_of_a_single_failure_has_no_interval(atlas: Path) -> None:
    rows = re.findall(r"<tr>.*?</tr>", atlas.read_text(encoding="utf-8"))
    pairs = [row for row in rows if "data-filter" in row and " of 1</td>" in row]
    cells = [re.findall(r"<td>([^<]*)</td>", row)[-2:] for row in pairs]
    assert len(cells) == 2 and all(re.fullmatch(r"\d+ %", area) for areas in cells for area in areas)
    assert "6 % [-4, 16]" in next(row for row in rows if "3 of 3" in row)


def test_bytes_are_the_same_again(atlas: Path, summary: FailureSummary, tmp_path: Path) -> None:
    assert write_atlas(summary, tmp_path).read_bytes() == atlas.read_bytes()
    assert "<h1>Mine</h1>" in write_atlas(summary, tmp_path, "Mine").read_text(encoding="utf-8")


def test_a_fill_that_is_a_picture_is_shown_as_one(tmp_path: Path) -> None:
    summary = made(tmp_path, fill="blur")
    fills = [sample["fill"] for sample in json.loads(Parsed(write_atlas(summary, tmp_path)).data)["samples"]]
    assert fills[0].startswith("data:image/png") and fills[3].startswith("data:image/jpeg")
    assert fills[4] == "#00ff00"  # the blur of one colour


def test_nothing_to_show_is_a_page_too(summary: FailureSummary, tmp_path: Path) -> None:
    empty = replace(summary.results, looked_at=0, right=0, failures=(), broken=())
    nothing = FailureSummary(empty, (), (), {}, (), (), (), {}, {})
    page = Parsed(write_atlas(nothing, tmp_path))
    assert "No failure was explained." in page.text and json.loads(page.data) == {"classes": {}, "samples": []}


def test_a_stored_explanation_that_is_gone_leaves_its_words(tmp_path: Path) -> None:
    summary = made(tmp_path)
    summary.results.failures[0].truth.unlink()
    page = Parsed(write_atlas(summary, tmp_path / "out"))
    sample = json.loads(page.data)["samples"][0]
    assert sample["labels"] is None and sample["text"] and len(page.named("li", "tile")) == 5


def command_of(summary: FailureSummary, folder: Path) -> str:
    """The command that the page shows for the first failure."""
    return str(json.loads(Parsed(write_atlas(summary, folder)).data)["samples"][0]["command"])


@pytest.mark.parametrize("sample", IDS)
def test_the_command_names_the_sample(summary: FailureSummary, tmp_path: Path, sample: str) -> None:
    settings = FailureSettings(
        data="my photos/list.csv", model="zoo:vit", fill="blur", region_options={"count": 64}, seed=7, samples=50, most=3, clusters=3,
        min_confidence=0.5, device="cpu", batch_size=8, workers=2,
    )  # fmt: skip
    first = replace(summary.results.failures[0], sample=sample, truth=Path("gone.npz"))
    shown = replace(summary, results=replace(summary.results, settings=settings, failures=(first,)), clusters=(), cluster_of={})
    words = [part for word in shlex.split(command_of(shown, tmp_path)) for part in word.split("=", 1) if part]
    assert words[:2] == ["attribution", "debug"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert {option[2:].replace("-", "_") for option in given} <= set(inspect.signature(study_command(FAILURES, [ONLY])).parameters)
    assert given == {
        "--data": "my photos/list.csv", "--model": "zoo:vit", "--seed": "7", "--fill": "blur", "--region-count": "64", "--only": sample
    }  # fmt: skip
    assert "cannot say" not in Parsed(tmp_path / "atlas.html").text


def test_what_a_command_cannot_say_is_said(atlas: Path, summary: FailureSummary) -> None:
    assert "The command cannot say all of the model of this run" in Parsed(atlas).text
    samples = json.loads(Parsed(atlas).data)["samples"]
    assert shlex.split(samples[1]["command"])[-1] == IDS[1] and "--model colours" in samples[0]["command"]


@pytest.mark.parametrize("fill", [(0.5, 0.25, 0.75), np.zeros((SIDE, SIDE, 3), dtype=np.uint8)])
def test_objects_of_python_are_left_out_of_the_command(summary: FailureSummary, tmp_path: Path, fill: Any) -> None:
    settings = FailureSettings(data="photos", fill=fill, regions="grid", region_options={"count": 9, "rows": 3})
    first = replace(summary.results.failures[0], truth=Path("gone.npz"))
    shown = replace(summary, results=replace(summary.results, settings=settings, failures=(first,)), clusters=(), cluster_of={})
    assert command_of(shown, tmp_path) == f"attribution debug --data photos --regions grid --region-count 9 --only {shlex.quote(IDS[0])}"
    assert "cannot say all of the fill and region options of this run" in Parsed(tmp_path / "atlas.html").text


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here to open the page in")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


Opener = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, atlas: Path) -> Iterator[Opener]:
    """Opens the atlas; in the end there was no message in the console, and no request but the one for the file."""
    contexts, messages, requests = [], [], []

    def call(fragment: str = "", path: Path = atlas, **options: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": {"width": 1366, "height": 900}, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("dialog", lambda dialog: messages.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri() + fragment)
        page.wait_for_selector("html[data-ready=yes]", state="attached")
        return page

    yield call
    for context in contexts:
        context.close()
    assert messages == []
    assert {url.partition("#")[0] for url in requests if not url.startswith("data:")} == {atlas.as_uri()}


def visible(page: Any) -> list[int]:
    return [int(tile.get_attribute("data-index")) for tile in page.query_selector_all(".tile:visible")]


def sample_of(page: Any) -> dict[str, Any]:
    samples = json.loads(page.text_content("#data"))["samples"]
    return next(sample for sample in samples if sample["id"] == page.text_content("#name"))


def drawn(page: Any, canvas: str) -> np.ndarray:
    """The pixels of a canvas, uint8 [h, w, 4]."""
    uri = page.evaluate("(id) => document.getElementById(id).toDataURL()", canvas)
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGBA"))


def wait_drawn(page: Any) -> None:
    page.wait_for_function("() => document.getElementById('detail').dataset.drawn === document.getElementById('name').textContent")


def address(page: Any) -> str:
    """The page's own, which ``page.url`` follows a moment later."""
    return str(page.evaluate("() => location.href"))


def scores(page: Any) -> tuple[float, float]:
    return float(page.inner_text("#true-score")), float(page.inner_text("#predicted-score"))


def test_filters_narrow_the_cards_and_the_address_follows(opened: Opener) -> None:
    page = opened()
    assert visible(page) == [0, 1, 2, 3, 4]
    page.select_option("[name=pair]", "0-1")
    assert visible(page) == [0, 1, 3] and page.inner_text("#count") == "3 of 5 failures"
    page.select_option("[name=group]", HOSTILE)
    assert visible(page) == [1, 3]
    page.select_option("[name=cluster]", "0")
    assert visible(page) == [1] and "pair=0-1" in address(page) and "cluster=0" in address(page) and "group=" in address(page)
    again = opened("#" + address(page).partition("#")[2])
    assert visible(again) == [1] and again.input_value("[name=group]") == HOSTILE
    page.go_back()
    page.wait_for_function("() => document.querySelectorAll('.tile:not([hidden])').length === 2")
    page.click("#reset")
    assert visible(page) == [0, 1, 2, 3, 4] and "=" not in address(page)


def test_text_search_takes_every_word(opened: Opener) -> None:
    page = opened()
    page.locator("[name=q]").press_sequentially("LARGE photo")
    assert visible(page) == [] and page.is_visible("#nothing")
    page.locator("[name=q]").fill("large red")
    assert visible(page) == [3] and "q=large+red" in address(page)
    assert page.input_value("[name=q]") == "large red"
    page.locator("[name=q]").fill("☃.PNG")
    assert visible(page) == [1]


def test_links_of_the_overview_filter(opened: Opener) -> None:
    page = opened("#pair=nonsense&cluster=77")
    assert visible(page) == [0, 1, 2, 3, 4]
    page.click("#shortcuts ~ .scroll a[data-filter]")
    assert visible(page) == [0, 3] and page.input_value("[name=list]") == "shortcut-0"
    assert page.evaluate("() => document.activeElement.id") == "failures"
    page.click("text=Suspected labels")
    page.click("#suspected ~ .scroll a[data-open]")
    wait_drawn(page)
    assert page.inner_text("#name") == IDS[4]


def test_the_slider_shows_the_curves(opened: Opener) -> None:
    page = opened()
    page.click(".tile >> nth=0")
    wait_drawn(page)
    sample = sample_of(page)
    assert page.evaluate("() => document.activeElement.id") == "step"
    assert int(page.input_value("#step")) == sample["peak"]
    seen = []
    for order, kept in (("truth", "shown"), ("truth", "hidden"), ("mistake", "shown"), ("mistake", "hidden")):
        page.check(f"[name=order][value={order}]")
        page.check(f"[name=kept][value={kept}]")
        curve = sample["curves"][f"{order}_{kept}"]
        for step in (0, 3, 9, 16):
            page.locator("#step").fill(str(step))
            assert scores(page) == (curve["true"][step], curve["predicted"][step])
            width = page.evaluate("() => document.getElementById('true-bar').style.width")
            assert float(width.removesuffix("%")) == pytest.approx(100 * curve["true"][step])
            live = page.text_content("#live")
            assert f"{step} of 16 regions {kept}" in live and f"{curve['predicted'][step]:.3f}" in live
            assert f"is {'right' if curve['right'][step] else 'wrong'}" in live
        seen.append(drawn(page, "curves").tobytes())
    assert len(set(seen)) == 4


def test_the_canvas_reveals_exactly_the_regions(opened: Opener) -> None:
    page = opened(f"#sample={IDS[0].replace(' ', '%20')}&k=0")
    wait_drawn(page)
    sample, image = sample_of(page), cells((11, 5, 0), (0.4, 1.0, 0), 0)
    labels = np.arange(SIDE)[:, None] // 4 * 4 + np.arange(SIDE) // 4
    for kept in ("shown", "hidden"):
        page.check(f"[name=kept][value={kept}]")
        for step in (0, 5, 16):
            page.locator("#step").fill(str(step))
            pixels = drawn(page, "reveal")
            zoom = len(pixels) // SIDE
            first = np.isin(labels, sample["orders"]["truth"][:step])
            wanted = np.where((first == (kept == "shown"))[..., None], (image * 255).round().permute(1, 2, 0).numpy(), 0)
            centres = pixels[2 * zoom :: 4 * zoom, 2 * zoom :: 4 * zoom, :3]  # outlines stay near the borders of the cells
            assert np.abs(centres.astype(int) - wanted[2::4, 2::4]).max() <= 1
    page.check("#faint")
    page.check("[name=kept][value=shown]")
    page.locator("#step").fill("0")
    assert drawn(page, "reveal")[..., :3].max() > 40


def test_maps_are_drawn_in_their_colours(opened: Opener) -> None:
    page = opened(f"#sample={IDS[0].replace(' ', '%20')}")
    wait_drawn(page)
    sample = sample_of(page)
    maps = {name: drawn(page, name).astype(int) for name in ("plain", "heat-truth", "heat-mistake", "signed")}
    assert len({pixels.tobytes() for pixels in maps.values()}) == 4
    zoom = len(maps["signed"]) // SIDE
    for region, value in enumerate(sample["signed"]):
        row, column = (4 * zoom * place + 2 * zoom for place in divmod(region, 4))
        red, _, blue, _ = maps["signed"][row, column]
        assert (blue > red) if value > 0.2 else (red > blue) if value < -0.2 else True
    assert {np.sign(value) for value in sample["signed"]} >= {-1, 1}
    assert page.get_attribute("#heat-truth", "aria-label") == f"heatmap towards {NAMES[0]}"


def test_buttons_jump_to_the_sets_and_the_peak(opened: Opener) -> None:
    page = opened()
    page.click(".tile >> nth=1")
    wait_drawn(page)
    sample = sample_of(page)
    for name, kept in (("sufficient", "shown"), ("cause", "hidden")):
        page.click(f"[data-set={name}]")
        found = sample["sets"][name]
        assert scores(page) == pytest.approx((found["true"], found["predicted"]), abs=6e-4)
        assert page.get_attribute(f"[data-set={name}]", "aria-pressed") == "true"
        assert f"{len(found['regions'])} of 16 regions {kept}" in page.inner_text("#where") and f"set={name}" in address(page)
    page.click("[data-peak]")
    curve = sample["curves"]["truth_shown"]
    assert scores(page) == (curve["true"][sample["peak"]], curve["predicted"][sample["peak"]])
    assert "set=" not in address(page)
    page.goto(address(page).partition("#")[0] + "#sample=c%2Fnever.png")
    wait_drawn(page)
    assert page.is_disabled("[data-set=cause]") and page.is_disabled("[data-set=sufficient]")


def test_a_linked_view_comes_back(opened: Opener) -> None:
    page = opened()
    page.click(".tile >> nth=2")
    wait_drawn(page)
    page.check("[name=order][value=mistake]")
    page.locator("#step").fill("6")
    page.wait_for_function("() => location.hash.includes('k=6')")
    again = opened("#" + address(page).partition("#")[2])
    wait_drawn(again)
    assert again.inner_text("#name") == IDS[2] and again.input_value("#step") == "6"
    assert again.is_checked("[name=order][value=mistake]") and scores(again) == scores(page)


def test_the_keyboard_is_enough(opened: Opener) -> None:
    page = opened("#pair=0-1")
    page.focus(".tile:visible a")
    page.keyboard.press("Enter")
    wait_drawn(page)
    sample = sample_of(page)
    start = sample["peak"]
    page.keyboard.press("ArrowLeft")
    assert page.input_value("#step") == str(start - 1)
    page.focus("#next")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.input_value("#step") == str(start + 1)
    assert scores(page)[0] == sample["curves"]["truth_shown"]["true"][start + 1]
    names = [page.inner_text("#name")]
    for key in "nnnp":
        page.keyboard.press(key)
        wait_drawn(page)
        names.append(page.inner_text("#name"))
    assert names == [IDS[0], IDS[1], IDS[3], IDS[3], IDS[1]]  # those of the pair only, and no further than the last
    assert page.inner_text("#place") == "2 of 3"
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id || document.activeElement.name"))
        outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.evaluate("() => document.activeElement === document.body")
    assert {"step", "previous", "next", "close", "copy", "command", "faint", "order", "kept"} <= reached
    page.keyboard.press("Escape")
    page.wait_for_function("() => !location.hash.includes('sample=')")  # the address follows a moment later
    assert not page.is_visible("#detail") and "sample=" not in address(page) and "pair=0-1" in address(page)
    page.wait_for_function("() => document.activeElement.dataset.open === '1'")


def test_a_click_on_the_curves_moves_the_slider(opened: Opener) -> None:
    page = opened()
    page.click(".tile >> nth=0")
    wait_drawn(page)
    box = page.locator("#curves").bounding_box()
    page.mouse.click(box["x"] + 40 + 0.5 * (box["width"] - 56), box["y"] + 50)
    assert page.input_value("#step") == "8"


def test_every_command_names_its_sample(opened: Opener) -> None:
    page = opened()
    for index, sample in enumerate(IDS):
        page.click(f".tile >> nth={index}")
        wait_drawn(page)
        words = shlex.split(page.text_content("#command"))
        assert words[:2] == ["attribution", "debug"] and words[-1].removeprefix("--only=") == sample
        page.click("#close")


@pytest.mark.parametrize("works", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_copy_button_copies_or_selects(opened: Opener, works: bool) -> None:
    page = opened()
    page.click(".tile >> nth=1")
    wait_drawn(page)
    clipboard = "{ writeText: async (text) => { window.copied = text; } }" if works else "undefined"
    page.evaluate(f"() => Object.defineProperty(navigator, 'clipboard', {{ value: {clipboard} }})")
    page.click("#copy")
    page.wait_for_function("() => document.getElementById('copied').textContent")
    assert page.inner_text("#copied").startswith("copied" if works else "selected")
    got = page.evaluate("() => window.copied" if works else "() => getSelection().toString()")
    assert got == page.text_content("#command")


def test_hostile_names_are_shown_as_they_are(opened: Opener) -> None:
    page = opened()
    assert NAMES[0] in page.inner_text(".tile >> nth=1") and IDS[1] in page.inner_text(".tile >> nth=1")
    page.click(".tile >> nth=1")
    wait_drawn(page)
    assert page.text_content("#name") == IDS[1] and page.text_content("#true-name") == NAMES[0]
    assert NAMES[0] in page.text_content("#text")
    assert page.evaluate("() => document.scripts.length") == 2


def test_a_sample_without_pictures_opens(opened: Opener, summary: FailureSummary, atlas: Path) -> None:
    first, *others = summary.results.failures
    results = replace(summary.results, failures=(replace(first, truth=Path("gone.npz")), *others))
    kept = atlas.read_bytes()
    try:
        page = opened(path=write_atlas(replace(summary, results=results), atlas.parent))
        page.click(".tile >> nth=0")
        wait_drawn(page)
        assert not page.is_visible("#reveal") and page.is_visible("#curves")
        page.locator("#step").fill("2")
        assert scores(page)[0] == sample_of(page)["curves"]["truth_shown"]["true"][2]
    finally:
        atlas.write_bytes(kept)


@pytest.mark.parametrize("width", [pytest.param(1366, marks=pytest.mark.slow), 420])
def test_nothing_is_wider_than_the_window(opened: Opener, width: int) -> None:
    page = opened(viewport={"width": width, "height": 900})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    page.click(".tile >> nth=1")
    wait_drawn(page)
    assert page.evaluate("() => document.getElementById('detail').scrollWidth") <= width


def test_light_and_dark(opened: Opener) -> None:
    page = opened(color_scheme="light")
    page.click(".tile >> nth=0")
    wait_drawn(page)
    backgrounds, curves = [], drawn(page, "curves")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        background = page.evaluate("() => getComputedStyle(document.getElementById('detail')).backgroundColor")
        backgrounds.append(sum(map(int, re.findall(r"\d+", background)[:3])))
    assert backgrounds[0] > 700 and backgrounds[1] < 100
    for _ in range(50):  # until the browser has told the page
        if (drawn(page, "curves") != curves).any():
            return
        page.wait_for_timeout(50)
    raise AssertionError("the curves kept the colours of the light mode")
