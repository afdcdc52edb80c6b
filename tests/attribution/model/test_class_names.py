"""Names of classes, and the class that a text means."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import attribution as at
from attribution.model.class_names import carried_names, imagenet_names, matching_class, timm_names
from attribution.model.loading import read_class_names

SMALL = "timm:resnet10t"
CATS = ("tabby", "tiger cat", "Egyptian cat", "catamaran", "Cardigan", "cardigan", "7")


def test_imagenet_names_are_short_and_each_once() -> None:
    names = imagenet_names()
    assert (len(names), len(set(names))) == (1000, 1000)
    assert (names[0], names[134], names[160], names[285], names[517]) == ("tench", "crane bird", "Afghan hound", "Egyptian cat", "crane")
    info = timm.data.ImageNetInfo("imagenet-1k")
    for index, name in enumerate(names):  # the classes are in timm's order: a name is a synonym, or the first word of one
        synonyms = info.index_to_description(index).split(", ")
        assert name in synonyms or name.split()[0] in [each.split()[0] for each in synonyms]


@pytest.mark.parametrize(("subset", "classes"), [("imagenet-12k", 11821), ("imagenet-21k-goog", 21843), ("imagenet-22k", 21841)])
def test_names_of_the_larger_sets(subset: str, classes: int) -> None:
    names, info = imagenet_names(subset), timm.data.ImageNetInfo(subset)
    assert (len(names), len(set(names))) == (classes, classes)
    assert all(name.startswith(info.index_to_description(index).split(", ")[0]) for index, name in enumerate(names))
    assert sum(name.endswith(")") for name in names) < classes / 10


def test_timm_models_have_the_names_of_their_number_of_classes() -> None:
    larger = timm.create_model("resnet10t", num_classes=11821)
    assert timm_names(larger) is None  # its published weights have 1000 classes, so these are a user's own
    larger.pretrained_cfg = {**larger.pretrained_cfg, "num_classes": 11821}
    assert timm_names(larger) == imagenet_names("imagenet-12k")
    own = timm.create_model("resnet10t", num_classes=3)
    own.pretrained_cfg = {"num_classes": 3, "label_names": ["n1", "n2", "n3"], "label_descriptions": {"n1": "ant, pismire", "n3": "bee"}}
    assert timm_names(own) == ("ant", "n2", "bee")
    own.pretrained_cfg = {"num_classes": 3}
    assert timm_names(own) is None


def test_no_known_model_says_class_160() -> None:
    for name in (SMALL, "torchvision:resnet18"):
        assert at.load_classifier(name, pretrained=False, device="cpu").class_names == imagenet_names()


CARRIED: dict[str, Any] = {
    "class_names": {"class_names": ["ant", "bee", "cow"]},
    "classes": {"classes": ("ant", "bee", "cow")},
    "array": {"classes": np.array(["ant", "bee", "cow"])},
    "class_to_idx": {"class_to_idx": {"cow": 2, "ant": 0, "bee": 1}},
    "idx_to_class": {"idx_to_class": {1: "bee", 0: "ant", 2: "cow"}},
    "id2label": {"config": {"id2label": {"0": "ant", "1": "bee", "2": "cow"}, "label2id": {"ant": 0, "bee": 1, "cow": 2}}},
    "Lightning": {"hyper_parameters": {"data": {"class_names": ["ant", "bee", "cow"]}}},
    "Namespace": {"args": argparse.Namespace(classes=["ant", "bee", "cow"])},
    "JSON": {"class_names": json.dumps(["ant", "bee", "cow"])},
}


@pytest.mark.parametrize("way", CARRIED)
def test_names_that_a_checkpoint_carries(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = timm.create_model("resnet10t", num_classes=3).state_dict()
    torch.save({"state_dict": state, "epoch": 3, **CARRIED[way]}, tmp_path / "weights.pt")
    given = {"checkpoint": tmp_path / "weights.pt", "device": "cpu"}
    assert at.load_classifier(SMALL, **given).class_names == ("ant", "bee", "cow")
    assert at.load_classifier(SMALL, **given, class_names="xyz").class_names == ("x", "y", "z")


def test_names_in_the_metadata_of_safetensors(tmp_path: Path) -> None:
    state = timm.create_model("resnet10t", num_classes=2).state_dict()
    save_file(state, tmp_path / "weights.safetensors", metadata={"format": "pt", "id2label": '{"0": "no", "1": "yes"}'})
    assert at.load_classifier(SMALL, checkpoint=tmp_path / "weights.safetensors", device="cpu").class_names == ("no", "yes")


@pytest.mark.parametrize(
    "loaded",
    [{}, {"classes": 3}, {"class_names": "ant"}, {"class_to_idx": {"ant": 0, "bee": 2}}, {"classes": [1, 2]}, {"id2label": {"a": "b"}}, 3],
)
def test_what_names_no_classes(loaded: Any) -> None:
    assert carried_names(loaded, 2, "file") is None


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        ({"classes": ["ant", "bee", "cow"]}, r"file has 3 names \(ant, bee, cow ...\) for 2 classes"),
        ({"classes": ["ant", "bee"], "args": {"class_names": ["cow", "dog"]}}, "file has 2 different lists for 2 classes"),
    ],
)
def test_names_that_do_not_fit_are_passed_over(loaded: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        assert carried_names(loaded, 2, "file") is None


def test_a_checkpoint_without_names_is_assumed_to_have_the_published_classes(tmp_path: Path) -> None:
    for name, module in ((SMALL, timm.create_model("resnet10t")), ("torchvision:squeezenet1_1", None)):
        if module is None:
            module = at.load_classifier(name, pretrained=False, device="cpu").module
        torch.save(module.state_dict(), tmp_path / "weights.pt")
        with pytest.warns(UserWarning, match=f"names no classes: its 1000 are given the names of the published {name}"):
            classifier = at.load_classifier(name, checkpoint=tmp_path / "weights.pt", device="cpu")
        assert classifier.class_names[285] == "Egyptian cat"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tabby", 0),
        ("TABBY", 0),
        ("egyptian", 2),
        ("Egyptian c", 2),
        ("tamar", 3),
        ("Cardigan", 4),
        ("cardigan", 5),
        ("CARDIGAN", [4, 5]),
        ("cat", [1, 2, 3]),
        ("7", 6),
        ("1", []),
        ("dog", []),
        ("", []),
        (" ", []),
    ],
)
def test_the_class_that_a_text_means(text: str, expected: int | list[int]) -> None:
    assert matching_class(text, CATS) == expected


def test_a_word_comes_before_the_inside_of_a_word() -> None:
    assert matching_class("cat", ("scatter", "tiger cat")) == 1
    assert matching_class("a (", ("b", "a (b)")) == 1  # no regular expression


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("CAT", r"class name 'CAT' stands for 3 classes of mine: tiger cat \(1\), Egyptian cat \(2\), catamaran \(3\); give more of"),
        ("CARDIGAN", r"stands for 2 classes of mine: Cardigan \(4\), cardigan \(5\); give the index"),
        ("tabbi", r"mine has no class 'tabbi': expected one of .*; did you mean tabby\?"),
        ("zebra", "mine has no class 'zebra': expected one of tabby, tiger cat"),
    ],
)
def test_targets_that_no_single_class_has(target: str, message: str) -> None:
    classifier = at.Classifier(torch.nn.Flatten(), size=2, class_names=CATS, name="mine")
    with pytest.raises(at.UserError, match=message):
        classifier.target_index(target)


def test_a_part_of_a_name_is_a_target_everywhere(cnn: at.Classifier, small_cat: torch.Tensor) -> None:
    explanation = at.explain(small_cat, cnn, "mobile", regions="grid", region_options={"count": 4})
    assert explanation.target_name == "automobile"
    assert at.attribute(small_cat, cnn, "saliency", "plane").target_name == "airplane"


def test_a_number_that_names_one_class_and_counts_another() -> None:
    classifier = at.Classifier(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.LazyLinear(4)), size=8)
    digits = classifier.with_forward(classifier.forward, class_names=["cat", "1", "0", "3"])
    assert digits.target_index("1") == digits.target_index(1) == 1 and digits.target_index(0) == 0
    with pytest.raises(at.UserError, match="class '0' is both the name of class 2 and the index of 'cat'"):
        digits.target_index("0")


@pytest.mark.parametrize(("text", "message"), [("", "is empty: expected one"), ("a\n\nb\n", "line 2 is empty")])
def test_files_of_class_names_with_empty_lines(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(at.UserError, match=message):
        read_class_names(path)
