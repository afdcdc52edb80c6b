"""Settings of every kind of wrong type: one line each that says what was received, and never a traceback."""

from __future__ import annotations

import datetime
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attribution as at
from attribution.errors import printable
from evaluation.studies import STUDIES
from evaluation.study.settings import StudySettings, settings_of

Run = Callable[..., tuple[int, str, str]]
KINDS: list[type[StudySettings]] = [study.settings for study in STUDIES.values()]
FIELDS = [(kind, name) for kind in KINDS for name in settings_of(kind)]
WRONG: list[Any] = [
    *(5, -1, 0, 1.5, math.nan, math.inf, 10**20, -(10**20), True, "", "a\nb", "\x1b[31mred", "é" * 300, "/dev/zero"),
    *([], [5], [[1]], ["a", ["b"]], [{}], {}, {"a": 1}, {"count": "x"}, {"count": [1]}, ["black", "black"], [True], [10**20], [None]),
    *({"method": 5}, [{"method": 5}], [{"method": "grad_cam", "options": "x"}], [{"method": "grad_cam", "preset": ["a"]}]),
    *([{"method": "rise", "label": 5}], [{"method": "budget", "options": {"evaluations": "x"}}]),
    [{"method": "budget", "options": {"fill": 5}}],
    *(datetime.date(2020, 1, 1), datetime.time(1)),
]  # fmt: skip


def made(kind: type[StudySettings], name: str, value: Any) -> None:
    """Make settings with a value, which may be refused by one line, but not break in another way."""
    refusal = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen = kind.make({"data": "photos", name: value}, "study.toml")
        chosen.plain()
        chosen.command_line("study")
    except at.UserError as error:
        refusal = str(error)
    assert not refusal or "expected" in refusal or name[:-1] in refusal
    assert len(printable(refusal)) < 3000


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{kind.__name__}-{name}" for kind, name in FIELDS])
def test_no_value_of_a_field_breaks_a_study(kind: type[StudySettings], name: str) -> None:
    for value in WRONG:
        made(kind, name, value)


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(), st.sampled_from(["black", "rise"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["method", "label", "preset", "options", "count"]), inner),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(field=st.sampled_from(FIELDS), value=PLAIN)
def test_no_value_at_all_breaks_a_study(field: tuple[type[StudySettings], str], value: Any) -> None:
    made(*field, value)


@pytest.mark.parametrize(
    ("command", "text", "line"),
    [
        ("benchmark", "fills = 5", "fills is int: expected a list"),
        ("benchmark", "methods = [5]", "a method is 5: expected a name, or a table with method, label, preset and options"),
        ("benchmark", '[[methods]]\nmethod = "rise"\npreset = ["a"]', "unknown preset ['a'] of rise: expected one of"),
        ("benchmark", '[[methods]]\nmethod = "rise"\noptions = "x"', "the options of rise are 'x': expected names with values"),
        (
            "benchmark",
            '[[methods]]\nmethod = "budget"\noptions = {evaluations = "x"}',
            "budget: evaluations is 'x': expected a whole number",
        ),
        ("benchmark", '[[methods]]\nmethod = "budget"\noptions = {image = "x"}', "budget: explain takes no image here: expected some of"),
        ("benchmark", '[[methods]]\nmethod = "budget"\noptions = {fill = 5}', "fill is int: expected one of black"),
        ("benchmark", 'method_fill = "pink"', "unknown fill 'pink': expected one of"),
        ("benchmark", 'method_fill = "linear"', "method_fill is 'linear': it fills curves only"),
        ("benchmark", 'confidence = "high"', "confidence is 'high': expected a number from 0 to 1"),
        ("benchmark", "data = 5", "data is int: expected text"),
        ("benchmark", 'batch_size = "x"', "batch_size is 'x': expected a whole number of at least 1"),
        ("benchmark", "seeds = 100000000000000000000", "seeds is 100000000000000000000: expected a whole number from 1 to 10000"),
        ("benchmark", "seed = 9223372036854775807\nseeds = 2", "seeds is 2: with seed 9223372036854775807 expected at most 1"),
        ("benchmark", "workers = 5000", "workers is 5000: expected a whole number from 1 to 1024"),
        ("benchmark", 'repeat_corners = "no"', "repeat_corners is 'no': expected true or false"),
        ("benchmark", "models = [[1]]", "models is list: expected text or a Classifier"),
        ("benchmark", "layers = [[[1]]]", "layers is list: expected text"),
        ("benchmark", "region_options = 3", "region_options is int: expected names with values, such as count=49"),
        ("benchmark", "colour = 1", "has unknown settings colour: expected some of batch_size"),
        ("benchmark", "fills = ", "cannot be read as TOML"),
        ("benchmark", "fills = " + "[" * 100_000, "cannot be read as TOML"),
        ("pareto", "models = [{}]", "models is dict: expected text or a Classifier"),
        ("pareto", 'budgets = "x"', "budgets is 'x': expected a whole number of at least 1"),
        ("pareto", "budgets = [5, 3]", "budgets are [5, 3]: expected ascending numbers of images"),
        ("pareto", 'partitions = ["grid"]', "partition is 'grid': expected one of"),
        ("pareto", "sampled_budgets = []", "budgets are []: expected ascending numbers of images"),
        ("pareto", "methods = []", "methods are none: expected at least one, each once"),
        ("pareto", 'fill = "drop"', "fill is 'drop', which is no image"),
        ("debug", "most = -1", "most is -1: expected a whole number of at least 0"),
        ("debug", "image_size = [1, 2]", "image_size is list: expected a whole number or text"),
        ("neurons", "kept = [0]", "kept is 0: expected a whole number of at least 1"),
        ("neurons", "shares = [2.0]", "shares is 2.0: expected a number from 0 to 1"),
    ],
)
def test_one_line_and_exit_code_2(run_command: Run, tmp_path: Path, command: str, text: str, line: str) -> None:
    file, photos = tmp_path / "study.toml", "" if text.startswith("data") else 'data = "photos"\n'
    file.write_text(f"{photos}{text}\n", encoding="utf-8")
    code, out, err = run_command(command, *["--config"] * (command == "neurons"), file, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and line in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
