"""scripts/train_zoo.py on a handful of images: it runs, resumes exactly, and writes weights that load."""

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
from attribution.model import zoo


@pytest.fixture(scope="module")
def train_zoo(script_named: Callable[[str], ModuleType]) -> ModuleType:
    return script_named("train_zoo")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cifar10")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for class_name in zoo.CLASS_NAMES:
            (root / split / class_name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / class_name / f"{index:04d}.png")
    return root


Trained = Callable[..., tuple[int, str]]


@pytest.fixture
def trained(called: Callable[..., tuple[int, str]]) -> Trained:
    return lambda script, images, out: called(script, str(images), "--out", str(out), "--cnn-epochs", "3", "--vit-epochs", "3")


def test_interrupted_training_ends_with_the_same_weights(
    train_zoo: ModuleType, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained
) -> None:
    monkeypatch.setattr(train_zoo, "CHECKPOINT_SECONDS", 0.0)
    code, printed = trained(train_zoo, images, tmp_path / "whole")
    assert code == 0, printed
    update, updates = train_zoo.update, 0

    def interrupted(*arguments: object, **options: object) -> None:
        nonlocal updates
        updates += 1
        if updates in (3, 6):
            raise KeyboardInterrupt
        update(*arguments, **options)

    monkeypatch.setattr(train_zoo, "update", interrupted)
    for _ in range(2):
        code, printed = trained(train_zoo, images, tmp_path / "parts")
        assert (code, "continue from the last checkpoint" in printed) == (130, True)
    assert trained(train_zoo, images, tmp_path / "parts")[0] == 0
    for name in ("cnn", "vit"):
        whole, parts = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "parts"))
        assert whole.keys() == parts.keys() == zoo.load_zoo_module(name).state_dict().keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
        record = json.loads((tmp_path / "whole" / f"{name}.json").read_text())
        assert len(record["accuracy_by_epoch"]) == record["epochs"] == 3
        at.load_classifier(f"zoo:{name}", checkpoint=tmp_path / "whole" / f"{name}.safetensors")
    assert not list((tmp_path / "parts").glob(".*"))


def test_settings_of_a_checkpoint_must_agree(train_zoo: ModuleType, images: Path, tmp_path: Path, trained: Trained) -> None:
    tmp_path.joinpath("cnn.checkpoint.pt").parent.mkdir(exist_ok=True)
    torch.save({"settings": {"epochs": 9}}, tmp_path / "cnn.checkpoint.pt")
    code, printed = trained(train_zoo, images, tmp_path)
    assert code == 2
    assert "give another --out" in printed


def test_no_data(train_zoo: ModuleType, tmp_path: Path, trained: Trained) -> None:
    code, printed = trained(train_zoo, tmp_path, tmp_path / "out")
    assert code == 2
    assert "no CIFAR-10 train images below" in printed


def test_first_look_of_every_head_is_a_neighbour(train_zoo: ModuleType) -> None:
    """The position part of query and key must make each head of block 0 prefer its own neighbour among all patches."""
    torch.manual_seed(0)
    student = zoo.build_vit()
    train_zoo.initialise_vit(student, torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8))
    position = student.pos_embed[0, 1:, :32]
    weight = student.blocks[0].attn.qkv.weight
    for head, (dy, dx) in enumerate([(-1, 0), (1, 0), (0, -1), (0, 1)]):
        query = position @ weight[32 * head : 32 * head + 32, :32].T
        key = position @ weight[128 + 32 * head : 160 + 32 * head, :32].T
        for y, x in ((3, 3), (4, 5)):
            best = int((key @ query[8 * y + x]).argmax())
            assert divmod(best, 8) == (y + dy, x + dx)


def test_augmentation_keeps_pixels_and_is_seeded(train_zoo: ModuleType) -> None:
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    crops = [train_zoo.augment(images, 24, 0, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*crops)
    whole = train_zoo.normalise(images)
    for crop, image in zip(crops[0], whole, strict=True):
        windows = [image[:, t : t + 24, left : left + 24] for t in range(9) for left in range(9)]
        assert any(torch.equal(crop, w) or torch.equal(crop, w.flip(2)) for w in windows)
