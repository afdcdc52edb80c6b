"""scripts/train_pets.py on a few small photos: both ways of training, resuming, and a file that loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import attribution as at
from evaluation.data.recipes import load_recipe

NAMES = load_recipe("pets").classes


@pytest.fixture(scope="module")
def script(script_named: Callable[[str], ModuleType]) -> ModuleType:
    return script_named("train_pets")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each breed is a colour: three train photos and one test photo."""
    root = tmp_path_factory.mktemp("pets")
    base, rng = root / "oxford-iiit-pet", np.random.default_rng(0)
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    colours = rng.integers(30, 226, (len(NAMES), 3))
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for label, colour in enumerate(colours):
        for index in range(4):
            name = f"{NAMES[label].replace(' ', '_')}_{index}"
            pixels = (colour + rng.integers(-20, 21, (40, 40, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(base / "images" / f"{name}.jpg", quality=95)
            lines["test" if index == 3 else "trainval"].append(f"{name} {label + 1} 1 1")
    for split, each in lines.items():
        (base / "annotations" / f"{split}.txt").write_text("\n".join(each) + "\n")
    return root


Trained = Callable[..., tuple[int, str]]


@pytest.fixture
def trained(called: Callable[..., tuple[int, str]]) -> Trained:
    return lambda script, photos, out, *options: called(script, str(photos), "--out", str(out), "--no-pretrained", *options)


HEAD = ("--model", "timm:test_efficientnet")
BLOCKS = ("--model", "timm:test_vit", "--blocks", "2", "--epochs", "4")


@pytest.mark.parametrize(("options", "stopped"), [(HEAD, "logistic"), (BLOCKS, "_thinned")], ids=["head", "blocks"])
def test_interrupted_training_ends_with_the_same_weights(
    options: tuple[str, ...],
    stopped: str,
    script: ModuleType,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: Trained,
) -> None:
    code, printed = trained(script, photos, tmp_path / "whole.safetensors", *options)
    assert code == 0, printed
    function, calls = getattr(script, stopped), 0

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(script, stopped, interrupted)
    code, printed = trained(script, photos, tmp_path / "parts.safetensors", *options)
    assert (code, "run the same command again" in printed) == (130, True)
    assert not (tmp_path / "parts.safetensors").exists()
    monkeypatch.setattr(script, "features_of", None)  # the features of the first run are found again
    assert trained(script, photos, tmp_path / "parts.safetensors", *options)[0] == 0
    whole, parts = (load_file(tmp_path / f"{run}.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{run}.{end}" for run in ("parts", "whole") for end in ("json", "safetensors")
    ]


def test_the_file_is_the_classifier_whose_accuracy_was_recorded(script: ModuleType, photos: Path, tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "pets.safetensors"
    code, printed = trained(script, photos, out, *HEAD)
    record = json.loads(out.with_suffix(".json").read_text())
    classifier = at.load_classifier(out)
    assert classifier.class_names == NAMES
    right = [classifier.predicted(classifier.probabilities(classifier.inputs(path))[0]) for path in _test_photos(photos)]
    assert record["top1"] == np.mean([list(found) == [label] for label, found in enumerate(right)])
    assert record["top1"] > 0.5  # colours are easy to tell apart, chance is 1 in 37
    assert (code, f"top-1 {record['top1']:.1%}" in printed) == (0, True)


def _test_photos(photos: Path) -> list[Path]:
    return [photos / "oxford-iiit-pet" / "images" / f"{name.replace(' ', '_')}_3.jpg" for name in NAMES]


def test_only_the_last_blocks_are_trained(script: ModuleType, photos: Path, tmp_path: Path, trained: Trained) -> None:
    out = tmp_path / "vit.safetensors"
    assert trained(script, photos, out, *BLOCKS)[0] == 0
    torch.manual_seed(0)
    before, after = at.load_classifier("timm:test_vit", pretrained=False).module.state_dict(), load_file(out)
    depth = 1 + max(int(name.split(".")[1]) for name in before if name.startswith("blocks."))
    trained_names = (f"blocks.{depth - 2}.", f"blocks.{depth - 1}.", "norm.", "fc_norm.", "head.")
    for name, value in before.items():
        if not name.startswith("head."):
            same = torch.equal(value.half(), after[name])
            assert same != (name.startswith(trained_names) and name.endswith("weight")) or name.endswith("bias"), name


def test_the_logistic_regression_is_at_the_minimum_of_its_loss(script: ModuleType) -> None:
    """The gradient of mean cross entropy + penalty / 2 |w|^2 over standardised features is zero, and the bias is not penalised."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 5, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 2.0, 1.0]) + labels[:, None] + 3
    weight, bias = script.logistic(features, labels, 0.01)
    x = features.double()
    mean, std = x.mean(dim=0), x.std(dim=0, unbiased=False)
    own = (weight.double() * std).requires_grad_()
    free = (bias.double() + weight.double() @ mean).requires_grad_()
    loss = torch.nn.functional.cross_entropy((x - mean) / std @ own.T + free, labels) + 0.005 * own.square().sum()
    for gradient in torch.autograd.grad(loss, [own, free]):
        assert gradient.abs().max() < 1e-4


def test_dropped_tokens_are_patches(script: ModuleType) -> None:
    tokens = torch.arange(12.0).reshape(1, 12, 1).expand(50, 12, 2)
    kept = script._thinned(tokens, 2, 0.3, torch.Generator().manual_seed(0))
    assert kept.shape == (50, 9, 2)
    assert torch.equal(kept[:, :2], tokens[:, :2])
    assert all(len(set(row.tolist())) == 7 and row.min() >= 2 for row in kept[:, 2:, 0])
    assert len({tuple(sorted(row.tolist())) for row in kept[:, :, 0]}) > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "zoo:cnn"), "zoo:cnn is no model of timm: expected timm:NAME or zoo:imagenet"),
        (("--model", "timm:test_efficientnet", "--blocks", "1"), "is no vision transformer of timm: leave --blocks out"),
        (("--model", "timm:test_vit", "--blocks", "99"), "--blocks is 99: timm:test_vit has"),
        (("--model", "timm:test_efficientnet", "--limit", "20"), "of 37 breeds are among the train photos"),
    ],
)
def test_what_cannot_be_trained(
    options: tuple[str, ...], message: str, script: ModuleType, photos: Path, tmp_path: Path, trained: Trained
) -> None:
    code, printed = trained(script, photos, tmp_path / "a.safetensors", *options)
    assert code == 2
    assert message in printed
    assert not (tmp_path / "a.safetensors").exists()


def test_no_data_other_settings_and_names(script: ModuleType, photos: Path, tmp_path: Path, trained: Trained) -> None:
    code, printed = trained(script, tmp_path, tmp_path / "a.safetensors")
    assert (code, "no Oxford-IIIT Pet trainval images below" in printed) == (2, True)
    assert trained(script, photos, tmp_path / "a.pt")[0] == 2
    (tmp_path / "b.work").mkdir()
    (tmp_path / "b.work" / "settings.json").write_text('{"seed": 7}')
    code, printed = trained(script, photos, tmp_path / "b.safetensors", *HEAD)
    assert (code, "give another --out, or remove it" in printed) == (2, True)
