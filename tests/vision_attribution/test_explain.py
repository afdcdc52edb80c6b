from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import attribution as at
from vision_attribution import explain as explaining
from vision_attribution.inputs import distinct_stems

FAST = ["--model", "zoo:cnn", "--regions", "grid", "--region-count", "9"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run_command: Run) -> Run:
    return run_command


@pytest.fixture
def photo(tmp_path: Path, small_cat: Tensor) -> Path:
    path = tmp_path / "photos" / "cat.png"
    path.parent.mkdir()
    Image.fromarray((small_cat * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)
    return path


def test_the_demo(run: Run, tmp_path: Path) -> None:
    code, out, err = run("explain", "--region-count", 6, "--evaluations", 12, "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "zoo:imagenet" in out
    files = [f"{name}{end}" for name in ("chelsea", "coffee") for end in ("-zoo-imagenet.json", "-zoo-imagenet.npz", "-zoo-imagenet.png")]
    assert sorted(f.name for f in tmp_path.iterdir()) == files
    records = [json.loads((tmp_path / f"{name}-zoo-imagenet.json").read_text()) for name in ("chelsea", "coffee")]
    assert [record["target"] for record in records] == ["tiger cat", "espresso"]
    assert [record["confidence"] for record in records] == pytest.approx([0.399, 0.945], abs=0.01)
    assert all(record["evaluations"] <= 12 and record["provenance"]["settings"]["search"] == "budget" for record in records)
    assert np.asarray(Image.open(tmp_path / "coffee-zoo-imagenet.png")).std() > 20


def test_the_demo_of_another_model_and_search(run: Run, tmp_path: Path) -> None:
    given = ["--model", "zoo:cnn", "--regions", "grid", "--region-count", 4, "--search", "greedy"]
    assert run("explain", *given, "--out", tmp_path)[0] == 0
    record = json.loads((tmp_path / "chelsea-zoo-cnn.json").read_text())
    assert (record["target"], record["provenance"]["settings"]["search"]) == ("cat", "greedy")
    assert record["confidence"] == pytest.approx(0.858, abs=0.005)


def test_the_default_model_knows_1000_classes(run: Run, photo: Path, tmp_path: Path) -> None:
    given = ["--regions", "grid", "--region-count", 2, "--out", tmp_path]
    assert run("explain", photo, *given, "--target", "EGYPTIAN")[0] == 0
    assert json.loads((tmp_path / "cat-egyptian-zoo-imagenet.json").read_text())["target"] == "Egyptian cat"
    code, _, err = run("explain", photo, *given, "--target", "cat")
    assert (code, "class name 'cat' stands for 6 classes of zoo:imagenet: tiger cat (282), Persian cat (283)" in err) == (2, True)
    code, _, err = run("explain", photo, *given, "--target", "Egyptain cat")
    assert (code, "zoo:imagenet has no class 'Egyptain cat': expected one of" in err and "did you mean Egyptian cat?" in err) == (2, True)


def test_outputs_agree_with_the_library(run: Run, photo: Path, tmp_path: Path, cnn: at.Classifier) -> None:
    out = tmp_path / "out"
    options = ["--target", "dog", "--fill", "blur", "--weights", "consistency=1, collaboration=2", "--search", "greedy", "--seed", 3]
    assert run("explain", photo, *FAST, *options, "--out", out)[0] == 0
    saved = at.Explanation.load(out / "cat-dog-zoo-cnn.npz")
    weights = at.ScoreWeights(1, 2, 0, 0)
    direct = at.explain(photo, cnn, "dog", regions="grid", region_options={"count": 9}, fill="blur", weights=weights, search="greedy")
    assert torch.equal(saved.order, direct.order)
    assert torch.allclose(saved.insertion_scores, direct.insertion_scores, atol=1e-6)
    record = json.loads((out / "cat-dog-zoo-cnn.json").read_text())
    assert record["order"] == direct.order.tolist()
    assert record["regions_needed"] == {f"{s:.0%}": direct.regions_needed(s * direct.confidence) for s in (0.5, 0.8, 0.95)}
    assert record["insertion_auc"] == pytest.approx(direct.insertion_auc, abs=1e-6)
    assert record["evaluations"] == 90
    assert record["provenance"]["settings"]["fill"] == "blur"
    assert record["provenance"]["settings"]["seed"] == 3


def test_the_fill_of_the_default_search_is_the_mean_colour_and_of_published_ones_black(run: Run, photo: Path, tmp_path: Path) -> None:
    ways = {"mean": [], "black": ["--search", "greedy"], "blur": ["--fill", "blur"]}
    for fill, way in ways.items():
        assert run("explain", photo, *FAST, *way, "--out", tmp_path / fill)[0] == 0
        assert json.loads((tmp_path / fill / "cat-zoo-cnn.json").read_text())["provenance"]["settings"]["fill"] == fill
    for way in (["--preset", "published"], ["--pending", "4"]):
        out = tmp_path / way[0]
        assert run("explain", photo, *FAST, *way, "--out", out)[0] == 0
        assert json.loads((out / "cat-zoo-cnn.json").read_text())["provenance"]["settings"]["fill"] == "black"


def test_the_table(run: Run, photo: Path, tmp_path: Path) -> None:
    _, out, _ = run("explain", photo, *FAST, "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "cat-zoo-cnn.json").read_text())
    row = next(line for line in out.splitlines() if line.strip().startswith("cat.png")).split()
    needed = ["never" if n is None else str(n) for n in record["regions_needed"].values()]
    assert row[1:4] == ["zoo:cnn", "cat", f"{record['confidence']:.3f}"]
    assert row[4:] == [
        "9/9",
        *needed,
        f"{record['insertion_auc']:.3f}",
        f"{record['deletion_auc']:.3f}",
        str(record["evaluations"]),
        f"{record['provenance']['seconds']:.1f}",
    ]


def test_folders_equal_names_and_a_broken_image(run: Run, photo: Path, tmp_path: Path) -> None:
    other = photo.parent / "more" / "cat.png"
    other.parent.mkdir()
    other.write_bytes(photo.read_bytes())
    (photo.parent / "broken.jpg").write_bytes(b"not an image")
    (photo.parent / "notes.txt").write_text("ignored")
    out = tmp_path / "out"
    code, printed, err = run("explain", photo.parent, *FAST, "--out", out)
    assert code == 2
    assert "broken.jpg is not an image" in err
    assert err.splitlines()[-1] == "error: 1 of 3 images could not be explained (see above)"
    assert printed.count("cat.png") >= 2
    assert sorted(f.name for f in out.glob("*.png")) == ["cat-zoo-cnn.png", "more-cat-zoo-cnn.png"]
    assert not list(out.glob(".*"))


def test_finished_images_are_kept(run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = ["explain", photo, *FAST, "--out", out]
    run(*arguments)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    calls: list[object] = []
    original = explaining.explain_image
    monkeypatch.setattr(explaining, "explain_image", lambda *a, **k: calls.append(a) or original(*a, **k))
    assert run(*arguments)[0] == 0
    assert (calls, {f.name: f.read_bytes() for f in out.iterdir()}) == ([], before)
    for change in (["--fill", "white"], ["--overwrite"], ["--target", "dog"]):
        calls.clear()
        run(*arguments, *change)
        assert len(calls) == 1, change
    assert {path.name for path in out.glob("*.png")} == {"cat-zoo-cnn.png", "cat-dog-zoo-cnn.png"}  # another class overwrites nothing
    (out / "cat-dog-zoo-cnn.npz").write_bytes(b"half written")
    calls.clear()
    run(*arguments, "--target", "dog")
    assert len(calls) == 1


def test_interruption_keeps_what_is_finished(run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = photo.parent / "dog.png"
    second.write_bytes(photo.read_bytes())
    original = explaining.explain_image

    def interrupted(path: Path, *arguments: object, **options: object) -> at.Explanation:
        if path == second:
            raise KeyboardInterrupt
        return original(path, *arguments, **options)

    monkeypatch.setattr(explaining, "explain_image", interrupted)
    code, _, err = run("explain", photo.parent, *FAST, "--out", tmp_path / "out")
    assert code == 130
    assert "finished images are kept" in err
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["cat-zoo-cnn.json", "cat-zoo-cnn.npz", "cat-zoo-cnn.png"]


@pytest.mark.slow
def test_killed_at_any_moment(photo: Path, tmp_path: Path) -> None:
    for index in range(3):
        (photo.parent / f"{index}.png").write_bytes(photo.read_bytes())
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vision_attribution", "explain", str(photo.parent), *FAST, "--out", str(out)]
    for delay in (4.0, 6.0, 8.0):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for record in out.glob("[!.]*.json"):
            at.Explanation.load(record.with_suffix(".npz"))
            json.loads(record.read_text())
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert len(list(out.glob("[!.]*.json"))) == len(list(out.glob("[!.]*.png"))) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "nowhere.jpg: no such file or folder"),
        (["EMPTY"], "holds no images"),
        (["--model", "zoo:rnn"], "unknown zoo model 'rnn': expected one of cnn, imagenet, vit"),
        (["--model", "resnet18"], "unknown model 'resnet18'"),
        (["--model", "timm:resnet1"], "timm has no model 'resnet1'"),
        (["--model", "timm:resnet10t", "--checkpoint", "missing.safetensors"], "no such checkpoint file"),
        (["--target", "unicorn"], "zoo:cnn has no class 'unicorn': expected one of airplane"),
        (["--weights", "consistency"], "consistency is '', expected a number"),
        (["--weights", "speed=1"], "unknown score 'speed'"),
        (["--weights", "consistency=0"], "all four weights are 0"),
        (["--regions", "voronoi"], "regions is 'voronoi': expected one of slico"),
        (["--search", "magic"], "search is 'magic': expected one of bidirectional"),
        (["--preset", "best"], "preset is 'best': expected one of default"),
        (["--fill", "pink"], "unknown fill 'pink'"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--regions", "saliency_patches"], "needs a heatmap"),
        (["--heatmap", "missing.npz"], "missing.npz: no such file"),
        (["--classes", "missing.txt"], "missing.txt cannot be read"),
        (["--region-count", "5000"], "count is 5000: expected a whole number from 1 to"),
        (["--regions", "quickshift", "--preset", "smdl-cub-wrong-sam", "--out", "FILE/x"], "cannot write"),
    ],
)
def test_one_line_and_exit_code_2(run: Run, photo: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": str(tmp_path / "empty"), "FILE/x": str(photo / "x")}
    given = [names.get(a, a) for a in arguments]
    image = [] if given[0].startswith("nowhere") or given[0] == names["EMPTY"] else [photo]
    out = [] if "--out" in given else ["--out", tmp_path / "out"]
    model = [] if "--model" in given else ["--model", "zoo:cnn"]
    code, printed, err = run("explain", *image, *given, *model, *out)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert printed == ""
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_numbers_out_of_range_are_usage_errors(run: Run) -> None:
    code, _, err = run("explain", "--batch-size", "0")
    assert code == 2
    assert err == "error: batch_size is 0: expected a whole number of at least 1\n"


def test_class_names_and_checkpoint(run: Run, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(f"kind {i}" for i in range(10)) + "\n")
    code, out, _ = run("explain", photo, *FAST, "--classes", tmp_path / "names.txt", "--out", tmp_path / "out")
    assert code == 0
    assert "kind 3" in out
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    code, _, err = run("explain", photo, *FAST, "--classes", tmp_path / "names.txt", "--out", tmp_path / "out")
    assert (code, "2 class names were given" in err) == (2, True)


def test_saliency_patches_from_a_saved_explanation(run: Run, photo: Path, tmp_path: Path) -> None:
    run("explain", photo, *FAST, "--out", tmp_path / "out")
    prior = tmp_path / "out" / "cat-zoo-cnn.npz"
    arguments = ["explain", photo, "--model", "zoo:cnn", "--preset", "smdl-cub", "--heatmap", prior, "--out", tmp_path / "patches"]
    assert run(*arguments)[0] == 0
    assert at.Explanation.load(tmp_path / "patches" / "cat-zoo-cnn.npz").regions.count == 25


def test_help_names_everything(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("--help")
    assert (code, "explain" in out) == (0, True)
    code, out, _ = run("explain", "--help")
    assert code == 0
    options = ("--model", "--target", "--regions", "--search", "--weights", "--preset", "--fill", "--out", "--device")
    for name in (*options, *at.REGIONS, *at.SEARCHES, *at.FILLS, *at.PRESETS):
        assert name in out, name
    assert run("--version")[1].strip() == f"attribution {at.__version__}"
    code, out, err = run()
    assert ("Usage" in out, err) == (True, "")


def test_the_output_folder_is_not_read_as_images(run: Run, photo: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert run("explain", photo.parent, *FAST, "--out", photo.parent / "out")[0] == 0
    assert sorted(f.name for f in (photo.parent / "out").glob("*.png")) == ["cat-zoo-cnn.png"]


def test_a_model_given_twice(run: Run, photo: Path, tmp_path: Path, cnn: at.Classifier) -> None:
    assert "zoo:cnn was given twice" in run("explain", photo, "-m", "zoo:cnn", "-m", "zoo:cnn", "--out", tmp_path / "out")[2]
    at.save_classifier(cnn, tmp_path / "tuned.safetensors")
    assert run("explain", photo, *FAST, "-m", tmp_path / "tuned.safetensors", "--out", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").glob("*.npz"))) == 2


def test_names_of_many_equal_stems() -> None:
    paths = [Path("a/x.png"), Path("a/x.jpg"), Path("b/x.png"), Path("b/x.jpg"), Path("b/x.gif")]
    assert distinct_stems(paths) == ["x", "a-x", "b-x", "b-x-2", "b-x-3"]


def test_a_run_that_dies_before_its_figure_leaves_none_of_other_settings(
    run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run("explain", photo, *FAST, "--out", out)
    before = (out / "cat-zoo-cnn.png").read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(explaining, "plot_explanations", lambda explanations: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("explain", photo, *FAST, "--fill", "white", "--out", out)
    assert run("explain", photo, *FAST, "--fill", "white", "--out", out)[0] == 0
    assert (out / "cat-zoo-cnn.png").read_bytes() != before


def test_figures_of_several_models_in_one_folder(run: Run, photo: Path, tmp_path: Path) -> None:
    """One model overwrites no figure of another, and a figure of several shows those that were asked for."""
    out = tmp_path / "out"
    small = ("explain", photo, "--regions", "grid", "--region-count", 2, "--out", out)
    for models in (["-m", "zoo:cnn"], ["-m", "zoo:vit"], ["-m", "zoo:cnn", "-m", "zoo:vit"]):
        assert run(*small, *models)[0] == 0
    assert sorted(f.name for f in out.glob("*.png")) == ["cat-zoo-cnn.png", "cat-zoo-vit.png", "cat.png"]
    before = (out / "cat.png").read_bytes()
    assert run(*small, "-m", "zoo:vit", "-m", "zoo:cnn")[0] == 0
    assert (out / "cat.png").read_bytes() != before
    assert run(*small, "-m", "zoo:cnn", "-m", "zoo:vit")[0] == 0
    assert (out / "cat.png").read_bytes() == before
