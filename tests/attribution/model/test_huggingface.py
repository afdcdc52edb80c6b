"""Models of Hugging Face: image processors built from their classes, models with random weights; nothing is downloaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from torch import Tensor

import attribution as at
from attribution.model.huggingface import processor_settings
from attribution.model.preprocessing import Preprocessing

T = pytest.importorskip("transformers")
SIDE = 64


def photos() -> list[Image.Image]:
    """A photo in four shapes. Its contrast is raised until much of it is black or white, so that a bicubic resize overshoots."""
    cat = (4 * skimage.data.chelsea().astype(float) - 300).clip(0, 255).astype(np.uint8)
    landscape = Image.fromarray(cat)
    return [landscape, landscape.rotate(90, expand=True), landscape.crop((60, 40, 121, 80)), landscape.crop((50, 0, 300, 251))]


def gray_levels_apart(way: Preprocessing, pipeline: Callable[[Image.Image], Tensor]) -> float:
    """The largest difference of our preprocessing from another one, over the photos, in gray levels."""
    worst = 0.0
    for photo in photos():
        theirs = pipeline(photo).float()
        ours = way(torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255)[0]
        assert ours.shape == theirs.shape
        worst = max(worst, float(((ours - theirs).abs() * torch.tensor(way.std)[:, None, None]).max()) * 255)
    return worst


PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("ViT", "DeiT", "Beit", "Bit", "CLIP", "ConvNext", "EfficientNet", "Levit", "MobileNetV1", "MobileNetV2")),
    *((name, {}) for name in ("MobileViT", "PoolFormer", "Pvt", "Siglip", "Segformer", "DPT", "Flava")),
    ("ConvNext", {"size": {"shortest_edge": 224}}),
    ("ConvNext", {"size": {"shortest_edge": 288}, "crop_pct": 0.95}),
    ("MobileViT", {"size": {"shortest_edge": 288}, "crop_size": {"height": 256, "width": 256}}),
    ("MobileViT", {"do_flip_channel_order": False}),
    ("EfficientNet", {"size": {"height": 224, "width": 224}, "resample": 0, "include_top": False}),
    ("EfficientNet", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
    ("ViT", {"do_normalize": False}),
    ("ViT", {"do_normalize": False, "do_rescale": False}),
    ("ViT", {"size": {"height": 160, "width": 96}, "resample": 3}),
    ("CLIP", {"size": {"shortest_edge": 230}, "crop_size": {"height": 201, "width": 200}}),
    ("Bit", {"size": {"shortest_edge": 448}, "crop_size": {"height": 448, "width": 448}, "resample": 2}),
    ("DeiT", {"size": {"height": 438, "width": 438}, "crop_size": {"height": 384, "width": 384}}),
    ("PoolFormer", {"size": {"shortest_edge": 224}, "crop_pct": 0.95}),
    ("Levit", {"size": {"height": 224, "width": 224}}),
]


@pytest.mark.parametrize(("name", "options"), PROCESSORS, ids=[f"{name}-{number}" for number, (name, _) in enumerate(PROCESSORS)])
def test_inputs_equal_those_of_the_image_processor(name: str, options: dict[str, Any]) -> None:
    processor = getattr(T, f"{name}ImageProcessor")(**options)
    way = Preprocessing(**processor_settings(processor, name))
    apart = gray_levels_apart(way, lambda photo: torch.as_tensor(processor(photo, return_tensors="pt")["pixel_values"][0]))
    assert apart < 1.105, "gray levels; the processor rounds to 8 bits after each pass of a resize, ours does not"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ViT", {"do_resize": False}, "resizes not at all: expected a height and width"),
        ("CLIP", {"do_center_crop": False}, "keeps the proportions of a photo and does not crop it, so that inputs differ in size"),
        ("CLIP", {"size": {"shortest_edge": 64, "longest_edge": 80}}, "resizes to .*longest_edge"),
        ("ViT", {"resample": 1}, "cannot be repeated, as read as .* it differs by .* gray levels on a photo of"),
        ("ViT", {"image_std": [-0.5, 0.5, 0.5]}, "of white and .* of black: expected white above black"),
        ("Perceiver", {}, "cannot be repeated, as it makes an input"),
        ("VideoMAE", {}, r"it makes an input \[1, 3, 224, 224\] of a photo, not \[3, height, width\]"),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_the_cause(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        processor_settings(getattr(T, f"{name}ImageProcessor")(**options), "model")


def test_a_crop_that_is_not_centred_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison finds a shift of one pixel."""
    processor = T.CLIPImageProcessor(size={"shortest_edge": 96}, crop_size={"height": SIDE, "width": SIDE})
    crop = type(processor).center_crop
    monkeypatch.setattr(type(processor), "center_crop", lambda self, image, size, **more: crop(self, image.roll(1, -1), size, **more))
    with pytest.raises(at.UserError, match="gray levels"):
        processor_settings(processor, "model")


def config(**more: Any) -> Any:
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    return T.ViTConfig(**{**small, "image_size": SIDE, "patch_size": 16, "id2label": {0: "cat", 1: "dog", 2: "cat"}, **more})


def written(folder: Path, *, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A small classifier, written as users have them."""
    torch.manual_seed(0)
    module = T.ViTForImageClassification(config(**more)).eval()
    module.to(dtype).save_pretrained(folder)
    T.ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return module.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_folder_of_save_pretrained(dtype: torch.dtype, tmp_path: Path, cat: Tensor) -> None:
    module = written(tmp_path, dtype=dtype)
    classifier = at.load_classifier(tmp_path, device="cpu")
    assert classifier.class_names == ("cat", "dog", "cat (2)")
    assert classifier.runner.dtype == torch.float32
    inputs = classifier.inputs(cat)
    with torch.no_grad():
        assert torch.allclose(classifier.logits(inputs), module(inputs).logits, atol=1e-6)
    assert at.attribute(cat, classifier, "grad_eclip", 1).pixel_map.isfinite().all()


def test_several_right_labels_are_independent(tmp_path: Path) -> None:
    written(tmp_path, problem_type="multi_label_classification")
    assert at.load_classifier(tmp_path, device="cpu").outputs.independent


def test_another_image_size_interpolates_as_transformers_does(tmp_path: Path, cat: Tensor) -> None:
    module = written(tmp_path)
    classifier = at.load_classifier(tmp_path, device="cpu", size=96)
    inputs = classifier.inputs(cat)
    assert inputs.shape[-2:] == (96, 96)
    with torch.no_grad():
        assert torch.allclose(classifier.logits(inputs), module(inputs, interpolate_pos_encoding=True).logits, atol=1e-6)


def test_a_model_of_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cat: Tensor) -> None:
    hub = pytest.importorskip("huggingface_hub")
    cache, commit = tmp_path / "cache", "0" * 40
    folder = cache / "models--someone--small" / "snapshots" / commit
    (cache / "models--someone--small" / "refs").mkdir(parents=True)
    (cache / "models--someone--small" / "refs" / "main").write_text(commit)
    module = written(folder)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "snapshot_download", partial(hub.snapshot_download, cache_dir=cache))
    classifier = at.load_classifier("hf:someone/small", device="cpu")
    assert classifier.name == "hf:someone/small"
    inputs = classifier.inputs(cat)
    with torch.no_grad():
        assert torch.allclose(classifier.logits(inputs), module(inputs).logits, atol=1e-6)


def unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("no network")


def test_a_model_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    with pytest.raises(at.UserError, match="hf:someone/nothing could not be loaded, because the hub cannot be reached") as found:
        at.load_classifier("hf:someone/nothing", device="cpu")
    assert "\n" not in str(found.value)
    assert capfd.readouterr() == ("", "")
    assert not hub.constants.HF_HUB_OFFLINE
    monkeypatch.undo()
    with pytest.raises(at.UserError, match="is no id of the hub"):
        at.load_classifier("hf:no id//at all", device="cpu")


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    module = written(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(at.UserError, match=r"has pickled weights only \(pytorch_model.bin\).*use_safetensors=False\).save_pretrained"):
        at.load_classifier(tmp_path, device="cpu")


def test_code_of_a_model_is_never_run(tmp_path: Path) -> None:
    written(tmp_path)
    card = json.loads((tmp_path / "config.json").read_text())
    card |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForImageClassification": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(card))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'trap')!r}, 'w')\nraise SystemExit\n")
    with pytest.raises(at.UserError, match="it brings code of its own, which is not run"):
        at.load_classifier(tmp_path, device="cpu")
    assert not (tmp_path / "trap").exists()


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(at.UserError, match=r"has no config.json"):
        at.load_classifier(tmp_path, device="cpu")
    T.ViTModel(config()).save_pretrained(tmp_path / "backbone")
    with pytest.raises(at.UserError, match=r"lacks 2 weights of ViTForImageClassification .classifier.bias, classifier.weight.: expected"):
        at.load_classifier(tmp_path / "backbone", device="cpu")
    T.ViTForImageClassification(config()).save_pretrained(tmp_path / "bare")
    with pytest.raises(at.UserError, match=r"does not say how it prepares images \(no preprocessor_config.json\)"):
        at.load_classifier(tmp_path / "bare", device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": {"nothing": 1}}, "has no option 'nothing': expected fields of its configuration"),
        ({"options": {"image_size": 96}}, r"weights of another shape than its configuration says .*\[1, 17, 48\] in the file"),
        ({"checkpoint": "weights.pt"}, "does not take a checkpoint"),
    ],
)
def test_what_does_not_fit_a_folder(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(at.UserError, match=re.escape(str(tmp_path)) + ".*" + message):
        at.load_classifier(tmp_path, device="cpu", **options)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_saved_file_needs_neither_hub_nor_folder(dtype: torch.dtype | None, tmp_path: Path, cat: Tensor) -> None:
    written(tmp_path / "own", dtype=dtype or torch.float32)
    classifier = at.load_classifier(tmp_path / "own", device="cpu")
    at.save_classifier(classifier, tmp_path / "saved.safetensors", dtype=dtype)
    for path in (tmp_path / "own").iterdir():
        path.unlink()
    again = at.load_classifier(tmp_path / "saved.safetensors", device="cpu")
    assert again.class_names == classifier.class_names and again.preprocessing == classifier.preprocessing
    assert torch.equal(again.logits(again.inputs(cat)), classifier.logits(classifier.inputs(cat)))


def test_without_the_package_one_line_says_which_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(at.UserError, match=r"needs transformers .*: install it by pip install 'vision-attribution\[huggingface\]'"):
        at.load_classifier(tmp_path, device="cpu")


DAMAGE: list[tuple[str, dict[str, Any] | bytes | None, str]] = [
    ("config.json", None, "has no config.json"),
    ("config.json", b"", "not a valid JSON file"),
    ("config.json", b"\xff\xfe{}", "not a valid JSON file"),
    ("config.json", b"[]", "could not be loaded"),
    ("config.json", {"model_type": None}, "could not be loaded"),
    ("config.json", {"model_type": "bert"}, "has no image classifier in transformers"),
    ("config.json", {"hidden_size": "x"}, "could not be loaded"),
    ("config.json", {"patch_size": 0}, "could not be loaded"),
    ("config.json", {"hidden_act": "none of them"}, "could not be loaded"),
    ("config.json", {"id2label": ["a", "b", "c"]}, "could not be loaded"),
    ("config.json", {"id2label": {"0": "a", "7": "b"}}, "weights of another shape than its configuration says"),
    ("config.json", {"num_hidden_layers": 3}, "lacks 16 weights"),
    ("config.json", {"num_hidden_layers": 1}, "holds 16 weights that ViTForImageClassification does not use"),
    ("model.safetensors", b"", "could not be loaded"),
    ("model.safetensors", b"x" * 500, "could not be loaded"),
    ("preprocessor_config.json", b"", "does not say how it prepares images"),
    ("preprocessor_config.json", b"[]", "does not say how it prepares images"),
    ("preprocessor_config.json", {"size": "large"}, "does not say how it prepares images"),
    ("preprocessor_config.json", {"resample": "x"}, "does not say how it prepares images"),
    ("preprocessor_config.json", {"resample": 99}, "its own code fails"),
    ("preprocessor_config.json", {"image_mean": "x"}, "its own code fails"),
    ("preprocessor_config.json", {"image_mean": [0.5, 0.5]}, "its own code fails"),
    ("preprocessor_config.json", {"image_std": None}, "its own code fails"),
    ("preprocessor_config.json", {"rescale_factor": 0}, "its own code fails"),
    ("preprocessor_config.json", {"size": {"height": 0, "width": 0}}, "it resizes to 0 pixels, expected 1 to 4096"),
    ("preprocessor_config.json", {"size": {"height": 10**6, "width": 10**6}}, "it resizes to 1000000 pixels, expected 1 to 4096"),
]


@pytest.mark.parametrize(("name", "change", "message"), DAMAGE, ids=[f"{name}-{n}" for n, (name, _, _) in enumerate(DAMAGE)])
def test_damaged_folders_are_one_line(name: str, change: dict[str, Any] | bytes | None, message: str, tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change if isinstance(change, bytes) else json.dumps(json.loads(path.read_text()) | change).encode())
    with pytest.raises((at.UserError, UserWarning), match=message) as caught:  # warnings are errors here
        at.load_classifier(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
