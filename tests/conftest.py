"""What the tests share: threads, the demo photo, the two zoo classifiers, and the folder that may be absent."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attribution as at
from vision_attribution import main

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    """Two threads in all: each of two processes of pytest-xdist takes one."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(2, len(os.sched_getaffinity(0))) // processes))


@pytest.fixture(scope="session")
def cat() -> Tensor:
    """The demo photo, float32 [3, 300, 451]."""
    return at.load_image(at.demo_image_path())


@pytest.fixture(scope="session")
def small_cat(cat: Tensor) -> Tensor:
    """The demo photo shrunk to the zoo's size, float32 [3, 32, 32]."""
    return torch.nn.functional.interpolate(cat[None], size=(32, 32), mode="bilinear", antialias=True)[0].clamp(0, 1)


@pytest.fixture(scope="session")
def cnn() -> at.Classifier:
    return at.load_classifier("zoo:cnn", device="cpu")


@pytest.fixture(scope="session")
def vit() -> at.Classifier:
    return at.load_classifier("zoo:vit", device="cpu")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden values and data beside the checkout; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the folder with golden values (../shared) is not here")
    return SHARED


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["attribution", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
