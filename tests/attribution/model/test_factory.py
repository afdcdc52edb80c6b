"""Models that a user's own function makes, and what saved files say of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attribution as at
from attribution.model.source import parsed_options, parsed_size

SOURCE = """
import timm, torch
from torch import nn
import attribution as at

def module(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))

def classifier():
    return at.Classifier(module(), size=32, mean=0.5, std=0.25, class_names=["a", "b", "c"])

def of_timm():
    return timm.create_model("resnet10t", num_classes=5)

def broken():
    raise RuntimeError("the disk is full\\nsecond line")

def number():
    return 3
"""


SCALED = """
import attribution as at
from torch import nn

class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.scale * x.mean((2, 3))

def make(scale=1.0):
    return at.Classifier(Scaled(scale), size=8)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(SOURCE)
    return path


def test_a_classifier_of_a_file(file: Path, cat: Tensor) -> None:
    made = at.load_classifier(f"{file}:classifier", device="cpu", batch_size=3)
    assert (made.name, made.class_names, made.batch_size) == (f"{file}:classifier", ("a", "b", "c"), 3)
    assert made.preprocessing.size == (32, 32) and made.preprocessing.std == (0.25,) * 3
    assert at.load_classifier(f"{file}:classifier", device="cpu", class_names=list("xyz")).class_names == ("x", "y", "z")


def test_a_module_of_a_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "own_package").mkdir()
    (file.parent / "own_package" / "nets.py").write_text(SOURCE)
    monkeypatch.chdir(file.parent)
    made = at.load_classifier("own_package.nets:module", device="cpu", size=(24, 32), options={"width": 8})
    assert made.preprocessing.size == (24, 32) and made.module[0].out_channels == 8
    assert at.load_classifier(f"{file}:of_timm", device="cpu").preprocessing.size == (176, 176), "timm's own configuration"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("broken", {}, "models.py:broken raised RuntimeError: the disk is full$"),
        ("number", {}, "models.py:number returned int: expected an nn.Module, or an attribution.Classifier"),
        ("nothing", {}, "has no function 'nothing': expected one that returns a model; it has module, classifier, of_timm"),
        ("module", {}, "returned a bare Sequential, which has no input size: give --image-size"),
        ("module", {"options": {"depth": 3}}, "raised TypeError: .*unexpected keyword argument 'depth'"),
        ("classifier", {"size": 64}, r"returned a Classifier of \(32, 32\), but the image size wanted is \(64, 64\)"),
        ("classifier", {"scores": "sigmoid"}, "returned a Classifier, which has its own scores"),
    ],
)
def test_factories_that_are_refused(name: str, options: dict[str, Any], message: str, file: Path) -> None:
    with pytest.raises(at.UserError, match=message):
        at.load_classifier(f"{file}:{name}", device="cpu", **options)


def test_files_and_modules_that_do_not_exist(file: Path) -> None:
    with pytest.raises(at.UserError, match=r"none\.py: no such file"):
        at.load_classifier(f"{file.parent / 'none.py'}:module")
    with pytest.raises(at.UserError, match=r"unknown model 'no_such_package\.nets:module'"):
        at.load_classifier("no_such_package.nets:module")
    file.write_text("import no_such_package")
    with pytest.raises(at.UserError, match="raised ModuleNotFoundError: No module named 'no_such_package'"):
        at.load_classifier(f"{file}:module")


@pytest.mark.parametrize(("dtype", "within"), [(None, 0.0), (torch.float16, 1e-2)])
def test_a_saved_file_runs_no_factory_without_consent(dtype: torch.dtype | None, within: float, file: Path, cat: Tensor) -> None:
    made, path = at.load_classifier(f"{file}:classifier", device="cpu"), file.parent / "saved.safetensors"
    with torch.no_grad():
        made.module[-1].weight.mul_(3)
    at.save_classifier(made, path, dtype=dtype)
    with pytest.raises(at.UserError, match=r"was made by the factory .*, whose code would run: if you trust it, give --model"):
        at.load_classifier(path)
    again = at.load_classifier(f"{file}:module", device="cpu", checkpoint=path)
    assert again.preprocessing == made.preprocessing and again.class_names == made.class_names
    assert torch.allclose(again.logits(again.inputs(cat)), made.logits(made.inputs(cat)), atol=within)


def test_a_bare_module_is_saved_with_the_factory_that_makes_it(file: Path, cat: Tensor) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    own, path = at.Classifier(module, size=32, mean=0.4, class_names=list("abc")), file.parent / "own.safetensors"
    with pytest.raises(at.UserError, match="could not say how to build it: give factory="):
        at.save_classifier(own, path)
    with pytest.raises(at.UserError, match="makes ResNet with other weights than those of Sequential"):
        at.save_classifier(own, path, factory=f"{file}:of_timm")
    at.save_classifier(own, path, factory=f"{file}:module")
    again = at.load_classifier(f"{file}:module", device="cpu", checkpoint=path)
    assert torch.equal(again.logits(again.inputs(cat)), own.logits(own.inputs(cat)))


def test_prototypes_are_saved(cnn: at.Classifier, tmp_path: Path, cat: Tensor) -> None:
    matrix = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    made = cnn.with_prototypes(matrix, 5.0, True, class_names=["one", "two", "three"])
    at.save_classifier(made, tmp_path / "made.safetensors")
    again = at.load_classifier(tmp_path / "made.safetensors", device="cpu")
    assert again.class_names == made.class_names
    assert torch.allclose(again.logits(again.inputs(cat)), made.logits(made.inputs(cat)), atol=1e-6)


def test_the_command(file: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]) -> None:
    common = ["explain", "docs/photo.png", "--regions", "grid", "--region-count", 4, "--device", "cpu", "--out", tmp_path / "out"]
    given = ["--image-size", "32x48", "--model-option", "width=8", "--model", f"{file}:module"]
    code, out, err = run_command(*common, *given)
    assert code == 0 and "models.py:module" in out.replace("\n", ""), err
    code, _, err = run_command(*common, "--model", f"{file}:broken")
    assert code == 2 and err == f"error: {file}:broken raised RuntimeError: the disk is full\n"
    code, _, err = run_command(*common, "--model-option", "width", "--model", f"{file}:module")
    assert (
        code == 2 and err == "error: model option 'width' is not of the form key=value: expected options such as img_size=256, each once\n"
    )


def test_options_and_sizes_of_a_command_line() -> None:
    found = parsed_options(["a=3", "b=0.5", "c=True", "d=none", "e=avg", "f=__import__('os')"])
    assert found == {"a": 3, "b": 0.5, "c": True, "d": None, "e": "avg", "f": "__import__('os')"}
    assert type(found["a"]) is int
    assert (parsed_size(224), parsed_size("192x256")) == ((224, 224), (192, 256))
    for wrong in (["a=1", "a=2"], ["=3"], ["a="], ["a b=3"]):
        with pytest.raises(at.UserError, match="model option"):
            parsed_options(wrong)
    for size in ("0", "-3", "3x4x5", "x", "big", True):
        with pytest.raises(at.UserError, match="image size is"):
            parsed_size(size)


def test_a_factory_that_exits(tmp_path: Path) -> None:
    file = tmp_path / "leaving.py"
    file.write_text("import sys\n\n\ndef make():\n    sys.exit(0)\n")
    with pytest.raises(at.UserError, match="raised SystemExit: 0"):
        at.load_classifier(f"{file}:make", size=16)


def test_options_and_code_belong_to_what_numbers_depend_on(tmp_path: Path, cat: Tensor) -> None:
    """They may change the scores and no weight."""
    path, text = tmp_path / "scaled.py", SCALED
    path.write_text(text)
    found = [at.load_classifier(f"{path}:make", options=options).identity for options in ({}, {"scale": 9.0}, {})]
    path.write_text(text.replace("self.scale * x", "-x"))
    found.append(at.load_classifier(f"{path}:make").identity)
    assert found[0] == found[2] and len(set(found)) == 3
    pools = [
        at.load_classifier("timm:resnet10t", pretrained=False, options={"global_pool": pool}).identity.settings for pool in ("avg", "max")
    ]
    assert pools[0] != pools[1] and at.load_classifier("zoo:cnn").identity.settings == ()


def test_other_options_than_a_checkpoint_says(tmp_path: Path) -> None:
    torch.save(at.load_classifier("timm:resnet10t", pretrained=False, options={"num_classes": 4}).module.state_dict(), tmp_path / "four.pt")
    with pytest.raises(at.UserError, match="num_classes is 7, but the checkpoint has 4 classes"):
        at.load_classifier("timm:resnet10t", checkpoint=tmp_path / "four.pt", options={"num_classes": 7}, class_names="abcd")
