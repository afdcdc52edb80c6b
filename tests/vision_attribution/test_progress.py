"""Progress without a terminal, where bars do not show."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from vision_attribution import progress
from vision_attribution.progress import Bar


def test_a_line_from_time_to_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_EVERY", 0.02)
    with Bar(unit="image") as bar:
        bar(0, 4, "a.png")
        time.sleep(0.1)
        bar(2, 4, "b.png")
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "0 of 4 images: a.png"
    assert re.fullmatch(r"2 of 4 images, [\d.e-]+ (a second|s each), 0 s left: b\.png", lines[-1])
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("elapsed", "done", "text"),
    [
        (10.0, 5, "photo: 5 of 9 images, 2 s each, 8 s left"),
        (1.0, 4, "photo: 4 of 9 images, 4 a second, 1 s left"),
        (1e4, 1, "photo: 1 of 9 images, 1e+04 s each, 22 h 13 min left"),
        (3e2, 1, "photo: 1 of 9 images, 300 s each, 40 min left"),
    ],
)
def test_rate_and_remaining_time(elapsed: float, done: int, text: str) -> None:
    bar = Bar("photo", unit="image")
    bar(0, 9)
    bar(done, 9)
    assert bar._counted is not None and bar._line(bar._counted[0] + elapsed) == text


def test_what_was_kept_does_not_count_for_the_rate() -> None:
    bar = Bar(unit="image")
    bar(90, 100)
    bar(92, 100)
    assert bar._counted is not None and bar._line(bar._counted[0] + 4.0) == "92 of 100 images, 2 s each, 16 s left"


def test_an_interrupted_job_ends_at_once() -> None:
    """The thread that writes lines keeps no process alive."""
    code = "from vision_attribution.progress import Bar\nwith Bar() as bar:\n    raise KeyboardInterrupt"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode != 0 and "KeyboardInterrupt" in found.stderr
