"""What ``examine`` says of classifiers whose faults are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import classifier, photo, tiny_vit, vgg
from skimage import data
from torch import Tensor, nn

import attribution as at
from attribution import doctor
from attribution.doctor import Examination
from attribution.image import limit_size


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SECONDS_A_SPEED", 0.01)


@pytest.fixture(scope="module")
def photos(cat: Tensor) -> list[Any]:
    return [limit_size(at.load_image(each), 64) for each in (cat, data.astronaut(), data.coffee(), data.rocket())]


def warned(found: Examination, part: str) -> dict[str, str]:
    return {finding.what: finding.value for finding in found.warnings if finding.part == part}


def facts(found: Examination, part: str) -> dict[str, str]:
    return {finding.what: finding.value for finding in found.findings if finding.part == part}


def test_a_sound_classifier(vit: at.Classifier, photos: list[Any]) -> None:
    found = at.examine(photos, vit)
    assert {finding.part for finding in found.warnings} == {"fills"}  # black is a cat to it, see the model card
    assert facts(found, "inside") == {
        "head": "head, of 128 features",
        "layer of class activation maps": "blocks.5.norm1, tokens of 8x8",
        "tokens": "65 in 6 blocks, 1 before the patches; the head reads class tokens",
    }
    applying = facts(found, "methods")["apply"].split(", ")
    for name in at.METHODS:
        if name in applying:
            continue
        with pytest.raises(at.NotApplicable):
            at.attribute(photos[0], vit, name)
    assert {"transformer_attribution", "score_cam", "rise"} < set(applying) and "lrp" not in applying
    assert facts(found, "outputs")["scores"] == "10, read as logits of classes"
    assert found.plain()["findings"][0] == {"part": "model", "what": "device", "value": "cpu, float32", "warning": False}


def test_a_fill_that_is_a_class_of_its_own(vit: at.Classifier, photos: list[Any]) -> None:
    black = float(vit.probabilities(vit.inputs(torch.zeros(3, 32, 32)))[0].max())
    assert warned(at.examine(photos, vit), "fills")["black"].startswith(f"cat {black:.2f}, ") and black > 0.5


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"mean": 0.0, "std": 1 / 255}, "ImageNet's mean and std"),
        ({"mean": 0.0, "std": 1.0}, "ImageNet's mean and std"),
    ],
)
def test_wrong_preprocessing(vit: at.Classifier, photos: list[Any], wrong: dict[str, float], right: str) -> None:
    assert warned(at.examine(photos, vit), "preprocessing") == {}
    used = at.Classifier(vit.module, size=32, class_names=vit.class_names, interpolation="bicubic", **wrong)
    assert right in warned(at.examine(photos, used), "preprocessing")


def test_few_photos_say_nothing_of_preprocessing(cnn: at.Classifier, cat: Tensor) -> None:
    assert facts(at.examine([cat], cnn), "preprocessing")["other ways"] == "not judged: give at least 4 photos that differ"
    assert at.examine(None, cnn).plain()["findings"][-1]["part"] == "speed"


@pytest.mark.parametrize(
    ("change", "what", "value"),
    [
        (lambda m: nn.Sequential(m, nn.Softmax(1)), "softmax twice", "the softmax of probabilities"),
        (lambda m: nn.Sequential(m, Times(0.0)), "dead classes", "no score depends on the image"),
        (lambda m: nn.Sequential(m, Dead()), "dead classes", "2 of 5 have the same score for every image"),
        (lambda m: nn.Sequential(m, Times(1e5)), "saturated", "also for noise and plain ones"),
    ],
)
def test_faults_of_outputs(change: Any, what: str, value: str) -> None:
    images = [photo(16, seed) for seed in range(4)]
    sound, faulty = vgg(), change(vgg()).eval()
    assert set(warned(at.examine(images, classifier(sound)), "outputs")) == {"class names"}
    assert value in warned(at.examine(images, classifier(faulty)), "outputs")[what]


def test_two_softmaxes_inside() -> None:
    module = nn.Sequential(vgg(), Times(200.0), nn.Softmax(1))
    images = [photo(16, seed) for seed in range(4)]
    assert "softmax twice" not in warned(at.examine(images, at.Classifier(module.eval(), size=16)), "outputs")
    found = at.examine(images, at.Classifier(nn.Sequential(module, nn.Softmax(1)).eval(), size=16))
    assert facts(found, "outputs")["scores"] == "5, read as probabilities of classes" and "softmax twice" in warned(found, "outputs")


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Dead(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :3], torch.ones_like(x[:, :2])], dim=1)


def test_a_module_in_training_mode_stays_so() -> None:
    module = vgg().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = at.examine([photo(16)], classifier(module))
    assert "call eval() first" in warned(found, "model")["in training mode"]
    assert all(each.training for each in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_black_boxes_and_other_outputs() -> None:
    module = vgg()
    found = at.examine([photo(16)], at.Classifier(lambda x: module(x), size=16, scores="sigmoid"))
    assert facts(found, "model")["kind"].startswith("a function")
    assert facts(found, "outputs")["scores"] == "5, read as logits of labels"
    refused = facts(found, "methods")["do not apply"]
    assert "grad_cam" in refused and "rise" in facts(found, "methods")["apply"]


def test_findings_come_as_they_are_known_and_modes_of_containers_do_not_count() -> None:
    module = vgg().eval()
    module.training = True  # of the container alone, whose layers are all in evaluation mode
    heard: list[doctor.Finding] = []
    found = at.examine([photo(16)], classifier(module), found=heard.append)
    assert tuple(heard) == found.findings and warned(found, "model") == {}


def test_a_part_that_fails_is_a_warning() -> None:
    found = at.examine([photo(16)], at.Classifier(vgg(), size=16, class_names=["a", "b"]))
    assert "2 class names were given" in warned(found, "outputs")["failed"] and "methods" not in {each.part for each in found.findings}
    empty = at.examine([photo(16)], classifier(nn.Sequential(tiny_vit(), nn.Identity()).eval()))
    assert "failed" not in facts(empty, "inside")


def test_what_is_no_classifier(cat: Tensor) -> None:
    with pytest.raises(at.UserError, match="classifier is 'zoo:cnn': expected a Classifier"):
        at.examine([cat], "zoo:cnn")  # type: ignore[arg-type]
