"""Files that are no files, names that are no text, and texts that steer a terminal or a spreadsheet."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

import attribution as at
from attribution.errors import printable
from attribution.files import CannotWrite, check_folder, held_folder, read_file, read_text, short_name, slug
from evaluation.study.tables import csv_text

Run = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("nothing_hangs")
FAST = ("--model", "zoo:cnn", "--regions", "grid", "--region-count", "4", "--evaluations", "8")


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path / "pipe.png"


def photo(path: Path, image: Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(path)
    return path


NO_FILE = "it is a pipe, a device or a socket: expected a regular file"


def test_only_regular_files_of_a_bounded_size_are_read(pipe: Path, tmp_path: Path) -> None:
    for path in (pipe, "/dev/zero", "/dev/stdin" if not Path("/dev/stdin").is_file() else "/dev/null"):
        with pytest.raises(OSError, match=NO_FILE):
            read_file(path)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(tmp_path / "a.txt") == "one\ntwo\nthree\n"
    with pytest.raises(OSError, match="it has 18 bytes: expected at most 16"):
        read_file(tmp_path / "a.txt", 16)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    with pytest.raises(ValueError, match="null byte"):
        read_file("a\0b")
    with pytest.raises(at.UserError, match=NO_FILE):
        at.load_image(pipe)


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "PIPE", *FAST),
        ("explain", "/dev/zero", *FAST),
        ("explain", "PHOTO", *FAST, "--fill", "PIPE"),
        ("explain", "PHOTO", *FAST, "--heatmap", "PIPE"),
        ("explain", "PHOTO", *FAST, "--classes", "PIPE"),
        ("explain", "PHOTO", *FAST, "--classes", "/dev/zero"),
        ("explain", "PHOTO", "--model", "timm:resnet18", "--checkpoint", "PIPE"),
        ("explain", "PHOTO", "--model", "timm:resnet18", "--checkpoint", "/dev/zero"),
        ("explain", "PHOTO", "--model", "PIPE"),
        ("benchmark", "PIPE"),
        ("benchmark", "/dev/zero"),
        ("benchmark", "--data", "PIPE"),
        ("benchmark", "--data", "LIST", "--model", "zoo:cnn", "--methods", "saliency"),
        ("debug", "--data", "LIST", "--model", "zoo:cnn"),
        ("debug", "--data", "/dev/zero", "--model", "zoo:cnn"),
        ("neurons", "PIPE"),
        ("doctor", "PIPE", "--model", "zoo:cnn"),
    ],
    ids=" ".join,
)
def test_pipes_and_devices_are_refused_by_one_line(
    run_command: Run, pipe: Path, small_cat: Tensor, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text("path,label\npipe.png,cat\n", encoding="utf-8")
    named = {"PIPE": pipe, "PHOTO": photo(tmp_path / "photo.png", small_cat), "LIST": listed}
    out = [] if arguments[0] == "doctor" else ["--out", tmp_path / "out"]
    code, _, err = run_command(*(named.get(each, each) for each in arguments), *out)
    errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert code == 2
    assert len(errors) == 1 and errors[0].startswith("error: ")


def test_names_that_are_no_text_or_steer_the_terminal(run_command: Run, small_cat: Tensor, tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9.png"), "two\nlines.png", "red\x1b[31m.png", "right\u202eleft.png", "x" * 200 + ".png"]
    for name in names:
        photo(tmp_path / "photos" / name, small_cat)
    code, out, err = run_command("explain", tmp_path / "photos", *FAST, "--out", tmp_path / "out")
    assert code == 0, err
    assert not set(out + err) & {"\x1b", "\u202e"}
    for escaped in (r"two\nlines", r"red\x1b[31m", r"right\u202eleft", r"caf\udce9"):
        assert escaped in out
    assert len(list((tmp_path / "out").glob("*.npz"))) == len(names)
    code, _, err = run_command("explain", tmp_path / "photos" / "no\nsuch\x1b[31m.png", *FAST, "--out", tmp_path / "out")
    assert (code, err.count("\n"), "\x1b" in err) == (2, 1, False)


def test_class_names_of_any_text(run_command: Run, small_cat: Tensor, tmp_path: Path) -> None:
    """A separator of lines that Unicode knows, and editors do not, is a letter of a name."""
    names = ["a\u2028b", "=HYPERLINK(1)", "x" * 300, *map(str, range(7))]
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    image = photo(tmp_path / "photo.png", small_cat)
    code, _, err = run_command(
        "explain", image, *FAST, "--classes", tmp_path / "classes.txt", "--target", "x" * 300, "--out", tmp_path / "out"
    )
    assert code == 0, err
    saved = at.Explanation.load(next((tmp_path / "out").glob("*.npz")))
    assert saved.class_names == tuple(names) and saved.target == 2
    assert all(len(path.name.encode()) <= 255 for path in (tmp_path / "out").iterdir())


def test_texts_that_a_spreadsheet_takes_for_formulas() -> None:
    rows = [("=1+1", -0.5, "-0.25", "+cmd", "@x", "-x", "plain", "", None)]
    read = next(iter(csv.reader(io.StringIO(csv_text([], rows).split("\n", 1)[1]))))
    assert read == ["'=1+1", "-0.5", "-0.25", "'+cmd", "'@x", "'-x", "plain", "", ""]


def test_printable_and_short_names() -> None:
    assert printable("é 漢 a\tb\r\n\x1b[0m\u2028\udce9") == "é 漢 a\\tb\\r\\n\\x1b[0m\\u2028\\udce9"
    assert short_name("ordinary.png") == "ordinary.png"
    long, other = "é" * 200, "é" * 199 + "e"
    assert len(short_name(long).encode()) <= 100 and short_name(long) != short_name(other)
    assert len(slug("a/b" * 200)) <= 100 and "/" not in slug("a/b" * 200)


def test_a_folder_is_held_by_one_process(run_command: Run, small_cat: Tensor, tmp_path: Path) -> None:
    image, out = photo(tmp_path / "photo.png", small_cat), tmp_path / "deep" / "out"
    with held_folder(out):
        code, _, err = run_command("explain", image, *FAST, "--out", out)
        assert (code, err) == (2, f"error: {out} is in use by another process: wait for it, or choose another output folder\n")
    assert not out.exists(), "it stayed empty"
    assert run_command("explain", image, *FAST, "--out", out)[0] == 0
    assert len(list(out.iterdir())) == 3


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match=r"cannot write into .*/file/out \(.*/file is a file\): choose another output folder"):
        check_folder(tmp_path / "file" / "out")
    check_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if not os.access(closed, os.W_OK):  # the superuser may write everywhere
        with pytest.raises(CannotWrite, match="is closed to you"):
            check_folder(closed / "out")
