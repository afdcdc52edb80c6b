from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import attribution as at
from attribution.model import zoo
from evaluation.data.dataset import ImageDataset
from evaluation.data.recipes import LAYOUTS, load_dataset, load_recipe, recipe_names

CLASSES = load_recipe("cifar10").classes
PIXELS = np.random.default_rng(0).integers(0, 256, (10, 2, 32, 32, 3)).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_folder(root: Path, split: str = "test") -> Path:
    for label, class_name in enumerate(CLASSES):
        (root / split / class_name).mkdir(parents=True)
        for index in (1, 0):
            (root / split / class_name / f"{index:04d}.png").write_bytes(png(PIXELS[label, index]))
    (root / split / "readme.txt").write_text("not an image")
    return root / split


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def members(prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{CLASSES[label]}/{index:04d}.png": png(PIXELS[label, index]) for label in range(9, -1, -1) for index in (0, 1)}


def write_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small batches in torchvision's layout, whose MD5 sums torchvision is told to expect."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(labels: list[int], index: int) -> dict:
        return {"data": PIXELS[labels, index].transpose(0, 3, 1, 2).reshape(len(labels), -1), "labels": labels}

    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [[f"data_batch_{i}", write(f"data_batch_{i}", batch([i, 0], 1))] for i in (1, 2)])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", write("test_batch", batch([7, 3, 9], 0))]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": write("batches.meta", {"label_names": list(CLASSES)})}
    monkeypatch.setattr(cifar, "meta", meta)
    return folder


def assert_holds_all_pixels(dataset: ImageDataset) -> None:
    assert dataset.name == "cifar10"
    assert dataset.class_names == CLASSES
    assert dataset.ids == tuple(f"test/{name}/{index:04d}.png" for name in CLASSES for index in (0, 1))
    assert dataset.labels == tuple(label for label in range(10) for _ in (0, 1))
    assert len(dataset) == 20
    for sample, pixels in zip(dataset, PIXELS.reshape(20, 32, 32, 3), strict=True):
        assert torch.equal(sample.image, at.load_image(pixels))
    assert dataset[7].id == "test/cat/0001.png"
    assert dataset[7].label == 3


def test_the_recipe_names_the_zoo_classes_and_known_layouts() -> None:
    recipe = load_recipe("cifar10")
    assert recipe.classes == zoo.CLASS_NAMES
    assert recipe.splits == {"train": 50_000, "test": 10_000}
    assert recipe.image_size == (zoo.INPUT_SIZE, zoo.INPUT_SIZE)
    assert {layout["kind"] for name in recipe_names() for layout in load_recipe(name).layouts} == set(LAYOUTS)


def test_folder(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert_holds_all_pixels(load_dataset("cifar10", tmp_path))
    assert_holds_all_pixels(load_dataset("cifar10", str(tmp_path), split="test"))


@pytest.mark.parametrize("prefix", ["", "./", "test/", "./test/"])
def test_tar(prefix: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "test.tar", {f"{prefix}readme.txt": b"not an image", **members(prefix)})
    assert_holds_all_pixels(load_dataset("cifar10", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["test.tar"]


def test_the_last_member_of_a_name_counts_as_in_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "test.tar", {"cat/0000.png": png(PIXELS[3, 0])})
    write_tar(path, {"cat/0000.png": png(PIXELS[3, 1])}, mode="a")
    dataset = load_dataset("cifar10", tmp_path)
    assert dataset.ids == ("test/cat/0000.png",)
    assert torch.equal(dataset[0].image, at.load_image(PIXELS[3, 1]))


def test_splits_are_kept_apart(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_tar(tmp_path / "train.tar", {"dog/a.png": png(PIXELS[5, 0])})
    train = load_dataset("cifar10", tmp_path, split="train")
    assert train.ids == ("train/dog/a.png",)
    assert train.labels == (5,)
    assert len(load_dataset("cifar10", tmp_path, split="test")) == 20


def test_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_batches(tmp_path, monkeypatch)
    test = load_dataset("cifar10", tmp_path, split="test")
    assert test.ids == ("test/00000", "test/00001", "test/00002")
    assert test.labels == (7, 3, 9)
    for sample in test:
        assert torch.equal(sample.image, at.load_image(PIXELS[sample.label, 0]))
    train = load_dataset("cifar10", tmp_path, split="train")
    assert train.labels == (1, 0, 2, 0)
    assert torch.equal(train[2].image, at.load_image(PIXELS[2, 1]))


class Trap:
    """Unpickling one creates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["test_batch", "data_batch_2", "batches.meta"])
def test_a_batch_other_than_torchvisions_is_refused_and_not_unpickled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_batches(tmp_path, monkeypatch)
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(
        at.UserError, match=r"cifar-10-batches-py is not what torchvision wrote \(.*corrupted.*get it again with: python -c"
    ):
        load_dataset("cifar10", tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_the_same_index_rules_as_a_sequence(tmp_path: Path) -> None:
    write_tar(tmp_path / "test.tar", {"cat/0.png": png(PIXELS[3, 0])})
    dataset = load_dataset("cifar10", tmp_path)
    for index in (1, -1):
        with pytest.raises(IndexError):
            dataset[index]


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(at.UserError, match="unknown data set 'cifar': expected one of cifar10"):
        load_dataset("cifar", tmp_path)
    with pytest.raises(at.UserError, match=r"unknown data set '\.\./cifar10'"):
        load_dataset("../cifar10", tmp_path)
    with pytest.raises(at.UserError, match="CIFAR-10 has no split 'val': expected one of train, test"):
        load_dataset("cifar10", tmp_path, split="val")


@pytest.mark.parametrize("root", ["", "missing"])
def test_no_layout_below_the_root(root: str, tmp_path: Path) -> None:
    message = r"no CIFAR-10 test images below .*: looked for test\.tar, test, cifar-10-batches-py; get them with: python -c"
    with pytest.raises(at.UserError, match=message):
        load_dataset("cifar10", tmp_path / root)


def test_foreign_class_folders(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "zebra").mkdir()
    (folder / "zebra" / "0.JPG").write_bytes(b"")
    (folder / "loose.png").write_bytes(b"")
    with pytest.raises(at.UserError, match=r"test has folders that are no class of CIFAR-10: loose\.png, zebra"):
        load_dataset("cifar10", tmp_path)


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "notes.txt").touch()
    with pytest.raises(at.UserError, match=r"test holds no images: expected one folder for each class \(airplane, .*truck\)"):
        load_dataset("cifar10", tmp_path)
    write_tar(tmp_path / "train.tar", {"cat/notes.txt": b""})
    with pytest.raises(at.UserError, match=r"train\.tar holds no images"):
        load_dataset("cifar10", tmp_path, split="train")


@pytest.mark.parametrize("damage", ["garbage", "compressed", "truncated", "empty", "folder"])
def test_damaged_tar(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "test.tar"
    write_tar(path, members(), mode="w:gz" if damage == "compressed" else "w")
    if damage == "garbage":
        path.write_bytes(b"no tar file " * 100)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-12_000])
    if damage == "empty":
        path.write_bytes(b"")
    if damage == "folder":
        path.unlink()
        path.mkdir()
    with pytest.raises(at.UserError, match=r"test\.tar is not a readable uncompressed tar file \(.+\): unpack it, or create it again"):
        load_dataset("cifar10", tmp_path)


def test_a_damaged_image_is_reported_when_it_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "test.tar", {"cat/0.png": png(PIXELS[3, 0])[:500], "cat/1.png": png(PIXELS[3, 1])})
    dataset = load_dataset("cifar10", tmp_path)
    assert torch.equal(dataset[1].image, at.load_image(PIXELS[3, 1]))
    with pytest.raises(at.UserError, match="is a damaged image"):
        dataset[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil.png", r"no class of CIFAR-10: \.\."),
        ("/{parent}/evil.png", "no class of CIFAR-10"),
        ("cat/link.png", "holds no images"),
        ("cat/../../evil.png", None),
    ],
)
def test_no_member_is_ever_written_to_disk(name: str, message: str | None, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    data = png(PIXELS[3, 0])
    entry = tarfile.TarInfo(name.format(parent=tmp_path))
    if name == "cat/link.png":
        entry.type, entry.linkname = tarfile.SYMTYPE, "../../evil.png"
    else:
        entry.size = len(data)
    with tarfile.open(root / "test.tar", "w") as archive:
        archive.addfile(entry, io.BytesIO(data))
    if message is None:
        assert torch.equal(load_dataset("cifar10", root)[0].image, at.load_image(PIXELS[3, 0]))
    else:
        with pytest.raises(at.UserError, match=message):
            load_dataset("cifar10", root)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["root", "root/test.tar"]


def write_pets(root: Path) -> Path:
    """Two photos in the layout of torchvision's OxfordIIITPet, the first with a trimap."""
    (root / "images").mkdir(parents=True)
    (root / "annotations" / "trimaps").mkdir(parents=True)
    for name in ("Bengal_7", "pug_10"):
        Image.fromarray(np.full((3, 4, 3), len(name), np.uint8)).save(root / "images" / f"{name}.jpg")
    Image.fromarray(np.array([[1, 1, 3, 2], [1, 3, 2, 2], [2, 2, 2, 2]], np.uint8)).save(root / "annotations" / "trimaps" / "Bengal_7.png")
    (root / "annotations" / "test.txt").write_text("Bengal_7 6 1 2\npug_10 26 2 17\n")
    return root


@pytest.mark.parametrize("folder", ["oxford-iiit-pet", "."])
def test_pets_with_their_masks(folder: str, tmp_path: Path) -> None:
    write_pets(tmp_path / "data" / folder)
    dataset = load_dataset("pets", tmp_path / "data")
    assert dataset.ids == ("Bengal_7", "pug_10")
    assert [dataset.class_names[label] for label in dataset.labels] == ["Bengal", "Pug"]
    first, second = dataset
    assert first.mask.tolist() == [[True, True, True, False], [True, True, False, False], [False] * 4]  # the border belongs to the animal
    assert second.mask is None
    assert torch.equal(second.image, at.load_image(tmp_path / "data" / folder / "images" / "pug_10.jpg"))


def test_pets_are_as_torchvision_lists_them(tmp_path: Path) -> None:
    """The same photos, labels and names of classes as its own reader, which names only the classes that it finds."""
    root = write_pets(tmp_path / "oxford-iiit-pet")
    names = load_recipe("pets").classes
    (root / "annotations" / "test.txt").write_text("".join(f"{name.replace(' ', '_')}_1 {k} 1 1\n" for k, name in enumerate(names, 1)))
    theirs, ours = torchvision.datasets.OxfordIIITPet(tmp_path, split="test"), load_dataset("pets", tmp_path)
    assert tuple(theirs.classes) == ours.class_names
    assert tuple(theirs._labels) == ours.labels
    assert [path.stem for path in theirs._images] == list(ours.ids)


@pytest.mark.parametrize(
    ("lines", "pixel", "message"),
    [
        ("Bengal_7 38 1 2", 1, "test.txt line 1: 'Bengal_7 38 1 2': expected NAME LABEL SPECIES BREED, a label from 1 to 37"),
        ("Bengal_7 0 1 2", 1, "line 1"),
        ("Bengal_7", 1, "line 1"),
        ("../Bengal_7 6 1 2", 1, "line 1"),
        ("Bengal_7 6 1 2", 9, "is no trimap"),
    ],
)
def test_damaged_pets(lines: str, pixel: int, message: str, tmp_path: Path) -> None:
    root = write_pets(tmp_path)
    (root / "annotations" / "test.txt").write_text(lines + "\n")
    Image.fromarray(np.full((3, 4), pixel, np.uint8)).save(root / "annotations" / "trimaps" / "Bengal_7.png")
    with pytest.raises(at.UserError, match=message):
        load_dataset("pets", tmp_path)[0]
