"""Mistakes on the command line, as a table: each is answered by exit code 2 and one line, and leaves nothing behind.

``commands.txt`` holds one mistake a line: the command, " => ", and how the line begins. Files that it names are made here.
"""

from __future__ import annotations

import pickle
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

Run = Callable[..., tuple[int, str, str]]
CASES = [line.split(" => ") for line in (Path(__file__).parent / "commands.txt").read_text(encoding="utf-8").splitlines()]
TEXTS = {
    "file": "x",
    "text.png": "no image",
    "empty.png": "",
    "classes3.txt": "a\nb\nc\n",
    "empty.txt": "",
    "one.txt": "a cat\n",
    "nolabel.csv": "file,klass\nphoto.png,cat\n",
    "gone.csv": "path,label\nno.png,cat\n",
    "header.csv": "path,label\n",
    "emptylist.csv": "",
    "list.csv": "path,label\nphoto.png,cat\n",
    "range.csv": "path,label\nphoto.png,99\n",
    "unknown.csv": "path,label\nphoto.png,unicorn\n",
    "box.csv": "path,label,x0,y0,x1,y1\nphoto.png,cat,9,9,3,3\n",
    "boxtext.csv": "path,label,x0,y0,x1,y1\nphoto.png,cat,a,0,3,3\n",
    "mask.csv": "path,label,mask\nphoto.png,cat,no.png\n",
    "twice.csv": "path,label,label\nphoto.png,cat,dog\n",
    "wide.csv": "path,label\nphoto.png,cat,dog,cow\n",
    "raises.py": "def make():\n    raise RuntimeError('no weights here')\ndef nothing():\n    return 5\nx = 5\n",
    "broken.py": "def make(:\n",
    "hf/config.json": "{}",
    "hfp/config.json": '{"model_type": "vit"}',
    "hfp/pytorch_model.bin": "x",
    "not.npz": "no archive",
    "bad.pth": "nothing",
    "bad.toml": "fills = \n",
}
BYTES = {
    "latin.txt": "caf\xe9\n".encode("latin-1"),
    "utf16.csv": "path,label\nphoto.png,cat\n".encode("utf-16"),
    "bad.safetensors": bytes(20),
    "code.pth": pickle.dumps(print),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the commands name, most of them bad."""
    folder = tmp_path_factory.mktemp("commands")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for name in ("photo.png", "two/cat/a.png", "two/dog/b.png", "flat/a.png", "alien/unicorn/a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    (folder / "emptydir").mkdir()
    for name, data in {**{name: text.encode() for name, text in TEXTS.items()}, **BYTES}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:200])
    torch.save({"a": torch.zeros(1)}, folder / "other.pth")
    np.savez(folder / "other.npz", a=np.zeros(3))
    return folder


@pytest.mark.parametrize(("command", "line"), CASES, ids=[command for command, _ in CASES])
def test_one_line_and_nothing_left(
    run_command: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, line: str
) -> None:
    monkeypatch.chdir(place)
    out = tmp_path / "OUT"
    arguments = shlex.split(command)
    before = sorted(place.rglob("*"))
    code, printed, err = run_command(*arguments, *([] if "--out" in arguments or arguments[0] == "doctor" else ["--out", out]))
    errors = [each for each in err.splitlines() if not each.startswith("warning: ")]
    assert code == 2
    assert len(errors) == 1 and errors[0].replace(f"{tmp_path}/", "").replace(f"{place}/", "").startswith(f"error: {line}")
    assert sorted(place.rglob("*")) == before
    if "measurement" not in line and "grids of" not in line:  # failures of single images, and predictions, are kept
        assert (printed, out.exists()) == ("", False)
