"""Checks of a user's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attribution as at
import evaluation as ev
from attribution.checks import check_choice, check_number, check_seed, check_whole, did_you_mean, is_number, is_whole
from attribution.errors import UserError


@pytest.mark.parametrize(
    ("value", "whole", "number"),
    [
        (3, True, True),
        (np.int64(3), True, True),
        (0.5, False, True),
        (np.float32(0.5), False, True),
        (True, False, False),
        ("3", False, False),
        (float("nan"), False, False),
        (float("inf"), False, False),
        (None, False, False),
        ([3], False, False),
    ],
)
def test_what_counts_as_a_number(value: Any, whole: bool, number: bool) -> None:
    assert (is_whole(value), is_number(value)) == (whole, number)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_whole("steps", 0, 1), "steps is 0: expected a whole number of at least 1"),
        (lambda: check_whole("steps", 9, 1, 8), "steps is 9: expected a whole number from 1 to 8"),
        (lambda: check_whole("steps", True, 1), "steps is True: expected a whole number of at least 1"),
        (lambda: check_whole("steps", "x", 1), "steps is 'x': expected a whole number of at least 1"),
        (lambda: check_whole("steps", np.zeros(3), 1), "steps is "),
        (lambda: check_number("share", 1.5, 0, 1), "share is 1.5: expected a number from 0 to 1"),
        (lambda: check_number("factor", float("nan"), 0), "factor is nan: expected a number of at least 0"),
        (lambda: check_choice("mode", "x", ("a", "b")), "mode is 'x': expected one of a, b"),
        (lambda: check_choice("mode", ["a"], ("a", "b")), "mode is ['a']: expected one of a, b"),
        (lambda: check_seed(-1), "seed is -1: expected a whole number from 0 to 2**63 - 1"),
        (lambda: check_seed(2**63), "expected a whole number from 0 to 2**63 - 1"),
    ],
)
def test_what_is_refused(check: Callable[[], None], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check()
    assert message in str(caught.value)


def test_what_passes() -> None:
    check_whole("steps", np.int32(8), 1, 8)
    check_number("share", 1, 0, 1)
    check_choice("mode", "b", ("a", "b"))
    check_seed(2**63 - 1)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("rollout", "; did you mean attention_rollout?"),
        ("GradCAM", "; did you mean grad_cam or grad_cam_plus_plus?"),
        ("saliancy", "; did you mean saliency?"),
        ("zzz", ""),
        ("", ""),
        (7, ""),
    ],
)
def test_names_that_were_meant(value: Any, meant: str) -> None:
    assert did_you_mean(value, ["saliency", "attention_rollout", "grad_cam", "grad_cam_plus_plus"]) == meant


def test_every_list_of_names_says_what_was_meant() -> None:
    image, classifier = torch.rand(3, 32, 32), at.load_classifier("zoo:cnn")
    for refused, meant in (
        (lambda: at.attribute(image, classifier, "rollout"), "attention_rollout"),
        (lambda: at.explain(image, classifier, regions="felsenszwalb"), "felzenszwalb"),
        (lambda: at.explain(image, classifier, search="bidirect"), "bidirectional"),
        (lambda: at.explain(image, classifier, fill="blurr"), "blur"),
        (lambda: at.explain(image, classifier, "airplene"), "airplane"),
        (lambda: at.explain(image, classifier, preset="lima_clip"), "lima"),
        (lambda: ev.BenchmarkSettings(methods=("grad-cam",)), "grad_cam"),
        (lambda: ev.BenchmarkSettings(metrics=("insertions",)), "insertion"),
    ):
        with pytest.raises(UserError, match=rf"; did you mean .*{meant}.*\?$"):
            refused()
