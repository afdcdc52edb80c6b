"""Model files of somebody else: a hostile card is refused by one line, and nothing large is built before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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


CHANGES: list[tuple[tuple[str, ...], Any]] = [
    *(((("settings", "size"), value)) for value in ("32", None, [], [32], [32, 32, 32], ["a", "b"], 0, -1, 1.5, True, 10**9, {})),
    (("settings", "size"), [32, 10**9]),
    *(((("settings", "resized"), value)) for value in (10**9, "32", [1], DEEP)),
    *(((("settings", "mean"), value)) for value in ("x", None, [], [1], [[0, 0, 0]], ["a", "b", "c"], [1e400, 0, 0])),
    *(((("settings", "std"), value)) for value in ([0, 0, 0], [-1, 1, 1], None)),
    *(((("settings", name), value)) for name in ("resize", "interpolation", "channels", "rounding", "padding") for value in (5, "x", [])),
    *(((("settings", name), value)) for name in ("head", "scores", "output") for value in (5, "x", [], {})),
    (("settings", "forward_kwargs"), {"mask": "x"}),
    (("settings", "channels_last"), "yes"),
    (("settings", "unknown"), 1),
    *((("model",), value) for value in ("", "x", "zoo:none", "timm:none", "timm:../../x", "file.py:make", "os:system", "hf:/etc", 5, None)),
    *((("class_names",), value) for value in (None, 5, "cat", [1], ["a"], ["a\nb"] * 10, DEEP)),
    *((("options",), value) for value in (5, {"checkpoint_path": "/etc/passwd"}, {"pretrained": True}, {"x": 1})),
    *((("config",), value) for value in (5, [], {"auto_map": {"x": "y"}})),
    *((("prototypes",), value) for value in (5, {}, {"scale": "x"})),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_changed_card_is_read_or_refused(saved: Path, tmp_path: Path, number: int) -> None:
    where, value = CHANGES[number]
    attempt(with_card(saved, tmp_path / "model.safetensors", changed(card_of(saved), where, value)))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '"x"', '{"model": 1}', "[" * 5000, '{"a":' * 5000, "\x00"])
def test_a_card_that_is_none_is_refused(saved: Path, tmp_path: Path, text: str) -> None:
    path = with_card(saved, tmp_path / "model.safetensors", text)
    with pytest.raises(at.UserError) as caught:
        at.load_classifier(str(path), device="cpu")
    assert len(printable(str(caught.value))) < 1500


def attempt(path: Path) -> None:
    """Load a file, which may be refused by one line, but not break in another way."""
    refusal = ""
    try:
        at.load_classifier(str(path), device="cpu")
    except at.UserError as error:
        refusal = str(error)
    assert "\n" not in refusal and len(refusal) < 2000


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
    for where, value in CHANGES[:4]:
        path = with_card(saved, tmp_path / "model.safetensors", changed(card_of(saved), where, value))
        code, _, err = run_command("explain", "--model", path, "--out", tmp_path / "out")
        assert (code, err.count("\n"), err.startswith("error: ")) == (2, 1, True)
