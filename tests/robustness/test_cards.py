"""Model files of somebody else: a hostile card is refused by one line, and nothing large is built before."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import attribution as at
from attribution.errors import printable

Run = Callable[..., tuple[int, str, str]]
KEY = "vision-attribution"
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cards") / "model.safetensors"
    at.save_classifier(at.load_classifier("zoo:cnn", device="cpu"), path)
    return path


def card_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[KEY])


def with_card(saved: Path, to: Path, card: Any) -> Path:
    save_file(load_file(saved), to, metadata={KEY: card if isinstance(card, str) else json.dumps(card)})
    return to


def changed(card: dict[str, Any], where: tuple[str, ...], value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(card))
    inner = copy
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    return copy


CASES = [re.split(" => ", line, maxsplit=1) for line in (Path(__file__).parent / "cards.txt").read_text(encoding="utf-8").splitlines()]


def change(text: str) -> tuple[tuple[str, ...], Any]:
    """Where a line of ``cards.txt`` changes the card, and the value there."""
    where, value = text.split(" ", 1)
    return tuple(where.split(".")), DEEP if value == "DEEP" else json.loads(value)


@pytest.mark.parametrize(("text", "line"), CASES, ids=[text for text, _ in CASES])
def test_a_changed_card_is_read_or_refused(saved: Path, tmp_path: Path, text: str, line: str) -> None:
    """``cards.txt`` holds one change a line: the part of the card, its value, " => ", and how the refusal begins, or "read"."""
    path = with_card(saved, tmp_path / "model.safetensors", changed(card_of(saved), *change(text)))
    assert attempt(path).replace(str(path), "FILE").startswith("" if line == "read" else line)
    assert (attempt(path, forward=False) == "") == (line == "read")


def test_prototypes_that_cannot_be_used(tmp_path: Path, cnn: at.Classifier) -> None:
    path = tmp_path / "prototypes.safetensors"
    at.save_classifier(cnn.with_prototypes(torch.eye(10)), path)
    assert attempt(path) == ""
    card, tensors = card_of(path), load_file(path)
    for name, value in (("scale", "x"), ("scale", None), ("bias", []), ("kind", 5), ("kind", "x")):
        save_file(tensors, path, metadata={KEY: json.dumps(changed(card, ("prototypes", name), value))})
        assert attempt(path).startswith(f"{path} has prototypes that cannot be used")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '"x"', '{"model": 1}', "[" * 5000, '{"a":' * 5000, "\x00"])
def test_a_card_that_is_none_is_refused(saved: Path, tmp_path: Path, text: str) -> None:
    path = with_card(saved, tmp_path / "model.safetensors", text)
    with pytest.raises(at.UserError) as caught:
        at.load_classifier(str(path), device="cpu")
    assert len(printable(str(caught.value))) < 1500


def attempt(path: Path, forward: bool = True) -> str:
    """Load and forward a file, which may be refused by one line, but not break in another way; the refusal."""
    refusal = ""
    try:
        classifier = at.load_classifier(str(path), device="cpu")
        if forward:
            classifier.logits(torch.zeros(1, 3, *classifier.preprocessing.size))
    except at.UserError as error:
        refusal = str(error)
    assert "\n" not in refusal and len(refusal) < 2100
    return refusal


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
PLACES = [
    *(("settings", name) for name in ("size", "resized", "mean", "std", "resize", "interpolation", "channels", "rounding", "padding")),
    *(("settings", name) for name in ("head", "scores", "output", "channels_last", "forward_kwargs")),
    *((name,) for name in ("model", "class_names", "options", "config", "prototypes", "tower", "settings")),
]  # fmt: skip


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(PLACES), value=VALUES)
def test_no_value_of_a_card_breaks(saved: Path, tmp_path: Path, where: tuple[str, ...], value: Any) -> None:
    attempt(with_card(saved, tmp_path / "model.safetensors", changed(card_of(saved), where, value)))


def test_large_inputs_are_refused_unless_asked_for(saved: Path, tmp_path: Path) -> None:
    path = with_card(saved, tmp_path / "model.safetensors", changed(card_of(saved), ("settings", "size"), [4096, 64]))
    with pytest.raises(
        at.UserError, match=r"asks for inputs of 4096x64 pixels.*expected at most 1024; if you mean it, give size=\(4096, 64\)"
    ):
        at.load_classifier(str(path), device="cpu")
    assert at.load_classifier(str(path), device="cpu", size=(64, 64)).preprocessing.size == (64, 64)


def test_the_command_answers_by_one_line(run_command: Run, saved: Path, tmp_path: Path) -> None:
    for text, _ in CASES[:4]:
        path = with_card(saved, tmp_path / "model.safetensors", changed(card_of(saved), *change(text)))
        code, _, err = run_command("explain", "--model", path, "--out", tmp_path / "out")
        assert (code, err.count("\n"), err.startswith("error: ")) == (2, 1, True)
