"""Folders and lists of a user's own images; the recipes are in test_recipes.py."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import attribution as at
from attribution.provenance import pixels_digest
from evaluation.data.dataset import ImageDataset
from evaluation.data.recipes import load_recipe, open_dataset
from evaluation.metrics.localization import box_mask
from vision_attribution.inputs import find_images

HEIGHT, WIDTH = 6, 8


def pixels(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def write_image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path, "png")
    return path


def write_list(folder: Path, text: str, name: str = "list.csv", images: tuple[str, ...] = ("a.png", "b.png", "c.png")) -> Path:
    for seed, image in enumerate(images):
        write_image(folder / image, seed)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def image_of(seed: int) -> Tensor:
    return at.load_image(pixels(seed))


def numbered(count: int, labels: tuple[int | None, ...] | None = None) -> ImageDataset:
    ids = tuple(f"{index}.png" for index in range(count))
    return ImageDataset("numbers", ("even", "odd"), ids, labels or tuple(i % 2 for i in range(count)), pixels)


def test_folder_with_one_folder_a_class(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for seed, name in enumerate(["dog/b.png", "cat/x/a.PNG", "cat/z.jpeg", "Bird/c.bmp"]):
        write_image(folder / name, seed)
    write_image(folder / ".trash" / "d.png")
    write_image(folder / "cat" / "._z.png")
    (folder / "cat" / "folder.png").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.txt").touch()
    dataset = open_dataset(folder)
    assert dataset.name == "mine"
    assert dataset.class_names == ("Bird", "cat", "dog")
    assert dataset.ids == ("Bird/c.bmp", "cat/x/a.PNG", "cat/z.jpeg", "dog/b.png")
    assert dataset.labels == (0, 1, 1, 2)
    for sample, seed in zip(dataset, (3, 1, 2, 0), strict=True):
        assert torch.equal(sample.image, image_of(seed))
        assert sample.mask is None
        assert sample.group is None


def test_folder_names_are_matched_to_class_names(tmp_path: Path) -> None:
    for name in ("dog", "CAT", "Cat"):
        write_image(tmp_path / name / "a.png")
    dataset = open_dataset(str(tmp_path), class_names=["bird", "dog", "CAT", "Cat"])
    assert dataset.class_names == ("bird", "dog", "CAT", "Cat")
    assert dict(zip(dataset.ids, dataset.labels, strict=True)) == {"dog/a.png": 1, "CAT/a.png": 2, "Cat/a.png": 3}, "exact first"
    assert open_dataset(tmp_path, class_names=["Dog", "cat"]).labels == (1, 1, 0), "then regardless of case"
    with pytest.raises(at.UserError, match=r"the class name 'CAT' stands for classes \[1, 2\]"):
        open_dataset(tmp_path, class_names=["dog", "cat", "Cat"])
    with pytest.raises(at.UserError, match=r"folders that are no class of class_names: CAT, Cat \(expected dog, fish\)"):
        open_dataset(tmp_path, class_names=["dog", "fish"])


def test_links_to_folders_and_files_are_followed_and_loops_end(tmp_path: Path) -> None:
    """As torchvision's ImageFolder reads them, but for loops, which it follows until the system refuses."""
    for name in ("elsewhere/dogs/d.png", "elsewhere/more/deep/m.png", "set/cat/a.png", "photo.png"):
        write_image(tmp_path / name)
    folder = tmp_path / "set"
    (folder / "dog").symlink_to(tmp_path / "elsewhere" / "dogs")
    (folder / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (folder / "cat" / "b.png").symlink_to(tmp_path / "photo.png")
    (folder / "cat" / "gone.png").symlink_to(tmp_path / "gone.png")
    theirs = torchvision.datasets.ImageFolder(folder).samples
    (tmp_path / "elsewhere" / "more" / "deep" / "up").symlink_to(folder)
    (folder / "cat" / "itself").symlink_to(folder / "cat")
    expected = ["cat/a.png", "cat/b.png", "cat/gone.png", "cat/more/deep/m.png", "dog/d.png"]
    dataset = open_dataset(folder)
    assert list(dataset.ids) == expected
    assert dataset.labels == (0, 0, 0, 0, 1)
    assert sorted(theirs) == [(str(folder / name), label) for name, label in zip(dataset.ids, dataset.labels, strict=True)]
    with pytest.raises(at.UserError, match=r"gone\.png: no such file"):
        dataset[2]
    assert [file.relative_to(folder).as_posix() for file in find_images([folder], tmp_path / "out")] == expected
    (folder / "bird").symlink_to(tmp_path / "not mounted")
    for read in (open_dataset, lambda path: list(find_images([path], tmp_path / "out"))):
        with pytest.raises(at.UserError, match=r"bird is a link to .*not mounted, which does not exist: mend the link, or remove it"):
            read(folder)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "cat" / "a.png")
    write_image(tmp_path / "dog" / "b.png")
    scandir = os.scandir

    def closed(path: str) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(at.UserError, match=r"dog cannot be listed \(Permission denied\): its images would be left out"):
        open_dataset(tmp_path)


def test_numbers_as_names_of_folders_are_class_indices_as_in_lists(tmp_path: Path) -> None:
    for name in ("0", "2", "11"):
        write_image(tmp_path / name / "a.png")
    names = [f"class {index}" for index in range(12)]
    with pytest.warns(UserWarning, match=r"read as class indices. torchvision's ImageFolder counts them as text"):
        dataset = open_dataset(tmp_path, class_names=names)
    assert dict(zip(dataset.ids, dataset.labels, strict=True)) == {"0/a.png": 0, "11/a.png": 11, "2/a.png": 2}
    assert open_dataset(tmp_path, class_names=["2", "11", "0"]).labels == (2, 1, 0)
    with pytest.raises(at.UserError, match=r"folders that are no class of class_names: 11 \(expected class 0"):
        open_dataset(tmp_path, class_names=names[:11])
    (tmp_path / "11" / "a.png").unlink()
    (tmp_path / "2").rename(tmp_path / "1")
    assert open_dataset(tmp_path, class_names=names).labels == (0, 1)  # both orders agree: no warning


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png", 1)
    write_image(tmp_path / "a.png", 0)
    (tmp_path / "notes").mkdir()
    dataset = open_dataset(tmp_path)
    assert dataset.ids == ("a.png", "b.png")
    assert dataset.labels == (None, None)
    assert dataset.class_names == ()
    assert [sample.label for sample in dataset] == [None, None]
    assert torch.equal(dataset[1].image, image_of(1))
    assert open_dataset(tmp_path, class_names=["cat", "dog"]).class_names == ("cat", "dog")


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(at.UserError, match="holds no images: expected one folder for each class, or images"):
        open_dataset(tmp_path)
    write_image(tmp_path / "cat" / "a.png")
    write_image(tmp_path / "loose.png")
    with pytest.raises(at.UserError, match=r"has images \(loose\.png\) beside folders of images"):
        open_dataset(tmp_path)


def test_a_recipe_needs_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "data" / "train" / "dog" / "a.png", 4)
    dataset = open_dataset("cifar10", root=tmp_path / "data", split="train")
    assert dataset.ids == ("train/dog/a.png",)
    assert dataset.labels == (5,)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(at.UserError, match="the data set 'cifar10' needs root"):
        open_dataset("cifar10")
    with pytest.raises(at.UserError, match="unknown data set 'data'"):
        open_dataset("data", root=tmp_path)
    with pytest.raises(at.UserError, match=r"nowhere: no such folder or list, and no data set of that name \(known: cifar10"):
        open_dataset("nowhere")


def test_a_recipe_in_terms_of_other_class_names(tmp_path: Path) -> None:
    write_image(tmp_path / "test" / "dog" / "a.png", 4)
    write_image(tmp_path / "test" / "cat" / "b.png", 5)
    dataset = open_dataset("cifar10", root=tmp_path, class_names=["Dog", "wolf", "cat"])
    assert dataset.class_names == ("Dog", "wolf", "cat")
    assert [(sample.id, sample.label) for sample in dataset] == [("test/cat/b.png", 2), ("test/dog/a.png", 0)]
    own = open_dataset("cifar10", root=tmp_path, class_names=load_recipe("cifar10").classes)
    assert own.labels == (3, 5)
    with pytest.raises(at.UserError, match=r"cifar10 has classes that class_names lack: cat \(expected dog, wolf\)"):
        open_dataset("cifar10", root=tmp_path, class_names=["dog", "wolf"])


def test_csv_list_with_everything(tmp_path: Path) -> None:
    inside = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    inside[2:4, 1] = (1, 255)
    Image.fromarray(inside).save(tmp_path / "mask.png")
    absolute = write_image(tmp_path / "elsewhere" / "d.png", 7)
    text = f"""path,label,mask,x0,y0,x1,y1,group
sub/a.png,cat,../lists/../mask.png,,,,,day 1
"b, with comma.png",DOG,,1,2,4.5,99,day 2

{absolute},,,,,,,
c.png,3,,,,,,day 1
"""
    images = ("sub/a.png", "b, with comma.png", "c.png")
    path = write_list(tmp_path / "lists", text, images=images)
    dataset = open_dataset(path, class_names=("bird", "cat", "dog", "3 legs"))
    assert dataset.name == "list"
    assert dataset.class_names == ("bird", "cat", "dog", "3 legs")
    assert dataset.ids == ("sub/a.png", "b, with comma.png", absolute.as_posix(), "c.png")
    assert dataset.labels == (1, 2, None, 3)
    assert dataset.groups == ("day 1", "day 2", None, "day 1")
    for sample, seed in zip(dataset, (0, 1, 7, 2), strict=True):
        assert torch.equal(sample.image, image_of(seed))
    masks = [sample.mask for sample in dataset]
    assert torch.equal(masks[0], torch.from_numpy(inside > 0))
    assert torch.equal(masks[1], box_mask((1, 2, 4.5, 99), HEIGHT, WIDTH))
    assert masks[1].sum() == 4 * 4
    assert masks[2] is None and masks[3] is None
    assert [sample.group for sample in dataset] == ["day 1", "day 2", None, "day 1"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "\ufeffPath, Label \r\na.png,cat\r\nmy b.png, dog\r\nc.png,\r\n"),
        ("list.tsv", "label\tpath\ncat\ta.png\ndog\tmy b.png\n\tc.png\n"),
        ("list.TXT", "path\tlabel\na.png\tcat\nmy b.png\tdog\nc.png\t\n"),
        ("list.txt", "\npath,label\n\na.png,cat\nmy b.png,dog\nc.png,\n"),
        ("list.txt", "a.png cat\n\n  my b.png\t dog\nc.png"),
    ],
    ids=["csv", "tsv", "tabs", "commas", "bare"],
)
def test_the_kinds_of_lists_say_the_same(name: str, text: str, tmp_path: Path) -> None:
    dataset = open_dataset(write_list(tmp_path, text, name, images=("a.png", "my b.png", "c.png")))
    assert dataset.ids == ("a.png", "my b.png", "c.png")
    assert dataset.class_names == ("cat", "dog")
    assert dataset.labels == (0, 1, None)
    assert dataset.read_mask is None and dataset.groups is None
    for seed, sample in enumerate(dataset):
        assert torch.equal(sample.image, image_of(seed))


def test_a_bare_list_of_paths_and_names_with_spaces(tmp_path: Path) -> None:
    images = ("a.png", "my cat.jpg.png", "path.png")
    plain = open_dataset(write_list(tmp_path, "path.png\nmy cat.jpg.png\na.png\n", "plain.txt", images))
    assert plain.ids == ("path.png", "my cat.jpg.png", "a.png")
    assert plain.labels == (None, None, None)
    named = open_dataset(write_list(tmp_path, "path.png tabby cat\na.png 1", "named.txt", images), class_names=["great dane", "Tabby Cat"])
    assert named.labels == (1, 1)


@pytest.mark.parametrize(
    ("labels", "class_names", "names", "expected"),
    [
        ("2,0,2", None, ("class 0", "class 1", "class 2"), (2, 0, 2)),
        ("b,a,b", None, ("a", "b"), (1, 0, 1)),
        ("b,0,B", ("a", "b"), ("a", "b"), (1, 0, 1)),
        ("1,0,1", ("1", "0"), ("1", "0"), (0, 1, 0)),
        (",,", None, (), (None, None, None)),
        (",1,", None, ("class 0", "class 1"), (None, 1, None)),
    ],
)
def test_labels_are_names_or_indices(labels: str, class_names: tuple | None, names: tuple, expected: tuple, tmp_path: Path) -> None:
    lines = [f"{image},{label}" for image, label in zip(("a.png", "b.png", "c.png"), labels.split(","), strict=True)]
    dataset = open_dataset(write_list(tmp_path, "\n".join(["path,label", *lines])), class_names=class_names)
    assert dataset.class_names == names
    assert dataset.labels == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list.csv lists no images"),
        ("path,label\n", "list.csv lists no images"),
        ("a.png,cat\n", "list.csv line 1: no column 'path' among 'a.png', 'cat': expected a header such as 'path,label'"),
        ("path,lable\na.png,cat", "list.csv line 1: unknown columns 'lable': expected some of path, label, labels, mask, x0"),
        ("path,label,path\n", "list.csv line 1: a column appears twice"),
        ("path,x0,y0,x1\n", "list.csv line 1: a box needs the four columns x0, y0, x1, y1"),
        ("path,label\na.png,cat\n\nb.png\n", r"list.csv line 4: 1 fields, but the header has 2 columns \(path, label\)"),
        ("path,label\n,cat\n", "list.csv line 2: the path is empty"),
        ('path,label\n"a\n.png",cat\nb.png,"c"at\n', "list.csv line 4: not a row of a table"),
        ("path,label\na.png,cat\nb.png,dog\n./x/../a.png,cat", r"list.csv line 4: x/\.\./a.png is already in list.csv line 2"),
        ("path,label\na.png,cat\nb.png,1\n", "list.csv line 2: the label 'cat' is a name, but list.csv line 3 has the index 1"),
        ("path,label\na.png,-1\n", "list.csv line 2: class index -1 is out of range: expected 0 to 99999"),
        ("path,label\na.png,1\nb.png," + "9" * 5000, r"list.csv line 3: class index 9+ \.\.\. 9+ is out of range"),
        ("path,x0,y0,x1,y1\na.png,1,2,3,\n", "list.csv line 2: the box is 1, 2, 3: expected the four numbers"),
        ("path,x0,y0,x1,y1\na.png,1,2,3,four\n", "list.csv line 2: the box is 1, 2, 3, four: expected the four numbers"),
        ("path,x0,y0,x1,y1\na.png,0,0,1,1\nb.png,4,2,3,9\n", "list.csv line 3: the box 4, 2, 3, 9 is empty or reversed"),
        ("path,x0,y0,x1,y1\na.png,0,0,nan,1\n", "list.csv line 2: the box 0, 0, nan, 1 is empty or reversed"),
        ("path,mask,x0,y0,x1,y1\na.png,m.png,0,0,1,1\n", "list.csv line 2: a mask and a box are given"),
    ],
)
def test_every_problem_names_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(at.UserError, match=message):
        open_dataset(write_list(tmp_path, text))


def test_labels_outside_the_class_names_name_their_line(tmp_path: Path) -> None:
    path = write_list(tmp_path, "path,label\na.png,cat\nb.png,cow\n")
    with pytest.raises(at.UserError, match=r"list.csv line 3: no class 'cow': expected an index below 2, or one of cat, dog"):
        open_dataset(path, class_names=["cat", "dog"])
    path = write_list(tmp_path, "a.png 1\n\nb.png 2\n", "list.txt")
    with pytest.raises(at.UserError, match=r"list\.txt line 3: no class '2'"):
        open_dataset(path, class_names=["cat", "dog"])
    path = write_list(tmp_path, "a.png Cat\n", "list.txt")
    with pytest.raises(at.UserError, match=r"list.txt line 1: the class name 'Cat' stands for classes \[0, 1\]"):
        open_dataset(path, class_names=["cat", "CAT"])
    path = write_list(tmp_path, "a.png cat\nb.pgn dog\n", "list.txt")
    with pytest.raises(at.UserError, match=r"list.txt line 2: 'b.pgn dog' is not 'path label'"):
        open_dataset(path)


def test_what_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(at.UserError, match=r"a\.png is not a list of images: expected \.csv, \.tsv, \.txt, or a folder"):
        open_dataset(write_image(tmp_path / "a.png"))
    (tmp_path / "list.csv").write_bytes("path\ngrün.png".encode("latin-1"))
    with pytest.raises(at.UserError, match=r"list\.csv cannot be read as UTF-8 text"):
        open_dataset(tmp_path / "list.csv")
    for names in ("cat", [], [1, 2]):
        with pytest.raises(at.UserError, match=r"class_names is .*: expected a sequence of names"):
            open_dataset(tmp_path, class_names=names)


def test_nothing_is_opened_before_its_sample_is_read(tmp_path: Path) -> None:
    path = write_list(tmp_path, "path,mask\na.png,\ndamaged.png,\nmissing.png,\nb.png,missing_mask.png\nc.png,damaged.png\n")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    dataset = open_dataset(path)
    assert torch.equal(dataset[0].image, image_of(0))
    with pytest.raises(at.UserError, match=r"^list.csv line 3: .*damaged\.png is a damaged image"):
        dataset[1]
    with pytest.raises(at.UserError, match=r"^list.csv line 4: .*missing\.png: no such file"):
        dataset[2]
    with pytest.raises(at.UserError, match=r"^list.csv line 5: .*missing_mask\.png: no such file"):
        dataset[3]
    with pytest.raises(at.UserError, match=r"^list.csv line 6: .*damaged\.png is a damaged image"):
        dataset[4]


def test_masks_and_boxes_that_do_not_fit_the_image(tmp_path: Path) -> None:
    Image.fromarray(np.full((HEIGHT, WIDTH + 1), 255, dtype=np.uint8)).save(tmp_path / "wide.png")
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)).save(tmp_path / "clear.png")
    path = write_list(tmp_path, "path,mask,x0,y0,x1,y1\na.png,wide.png,,,,\nb.png,clear.png,,,,\nc.png,,8,0,9,2\n")
    dataset = open_dataset(path)
    with pytest.raises(at.UserError, match=r"line 2: the mask .*wide\.png is bool \[6, 9\], the image is 8x6: expected bool \[6, 8\]"):
        dataset[0]
    with pytest.raises(at.UserError, match=r"line 3: the mask .*clear\.png has transparency, and a transparent pixel is neither"):
        dataset[1]
    with pytest.raises(at.UserError, match=r"line 4: box \(8, 0, 9, 2\) lies outside the image of 8x6 pixels"):
        dataset[2]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_masks_in_the_modes_people_save_them(mode: str, tmp_path: Path) -> None:
    inside = np.zeros((HEIGHT, WIDTH), dtype=bool)
    inside[1:3, 2:7] = True
    if mode == "P":
        picture = Image.frombytes("P", (WIDTH, HEIGHT), inside.astype(np.uint8).tobytes())
        picture.putpalette([0, 0, 0, 128, 0, 0])
    elif mode == "I;16":
        picture = Image.fromarray(inside.astype(np.uint16) * 300)
    else:
        picture = Image.fromarray(inside.astype(np.uint8) * 255).convert(mode)
    assert picture.mode == mode
    picture.save(tmp_path / "mask.png")
    dataset = open_dataset(write_list(tmp_path, "path,mask\na.png,mask.png\n"))
    assert torch.equal(dataset[0].mask, torch.from_numpy(inside))


def test_masks_may_be_arrays_or_tensors_or_boxes() -> None:
    inside = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 3 == 0
    given = [inside, torch.from_numpy(inside), (1, 1, 3, 3), [(1, 1, 3, 3), (0, 0, 1, 1)], None]
    dataset = ImageDataset("five", (), tuple("abcde"), (None,) * 5, pixels, read_mask=given.__getitem__)
    masks = [sample.mask for sample in dataset]
    assert torch.equal(masks[0], torch.from_numpy(inside)) and torch.equal(masks[1], masks[0])
    assert masks[2].nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert masks[3].sum() == 5 and masks[3][0, 0]
    assert masks[4] is None


def test_ids_are_unique_and_every_sample_has_its_fields() -> None:
    with pytest.raises(at.UserError, match="twins has the id 'b' more than once"):
        ImageDataset("twins", (), ("a", "b", "b"), (None,) * 3, pixels)
    with pytest.raises(at.UserError, match="short has 3 ids and 2 labels: give one for each"):
        ImageDataset("short", (), ("a", "b", "c"), (None,) * 2, pixels)
    with pytest.raises(at.UserError, match="short has 1 ids and 2 groups"):
        ImageDataset("short", (), ("a",), (None,), pixels, groups=("x", "y"))


def test_a_digest_is_that_of_the_pixels(tmp_path: Path) -> None:
    """Not that of the file's name, its bytes, the label or the mask."""
    dataset = open_dataset(write_list(tmp_path, "path,mask\na.png,missing.png\nb.png,\nc.png,\n"))
    assert [dataset.digest(index) for index in (0, 1)] == [pixels_digest(image_of(seed)) for seed in (0, 1)]
    assert torch.equal(dataset.image(0), image_of(0)), "the mask, which cannot be read, does not matter"
    before = dataset.digest(1)
    Image.fromarray(pixels(1)).save(tmp_path / "b.png", compress_level=0)
    assert dataset.digest(1) == before
    write_image(tmp_path / "b.png", seed=7)
    assert dataset.digest(1) == pixels_digest(image_of(7)) != before
    (tmp_path / "c.png").unlink()
    with pytest.raises(at.UserError, match=r"list.csv line 4: .*c.png: no such file"):
        dataset.digest(2)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 50), st.integers(0, 2**62))
def test_a_larger_choice_extends_a_smaller_one(size: int, count: int, more: int, seed: int) -> None:
    dataset = numbered(size)
    state = torch.get_rng_state()
    chosen = dataset.choose(count, seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(chosen)) == len(chosen) == min(count, size)
    assert set(chosen) <= set(range(size))
    assert dataset.choose(count + more, seed)[: len(chosen)] == chosen
    assert dataset.choose(None, seed)[: len(chosen)] == chosen
    assert sorted(dataset.choose(None, seed)) == list(range(size))


def test_choices_differ_by_seed_and_cover_the_set() -> None:
    dataset = numbered(30)
    assert dataset.choose(10) == dataset.choose(10, seed=0)
    assert len({dataset.choose(10, seed) for seed in range(20)}) == 20
    counts = np.bincount([index for seed in range(300) for index in dataset.choose(10, seed)], minlength=30)
    assert counts.min() > 60 and counts.max() < 140, "each of 30 is chosen in a third of 300 draws"


def test_labelled_samples_only() -> None:
    labels = tuple(None if index % 3 else 0 for index in range(20))
    dataset = numbered(20, labels)
    everything = dataset.choose(None, 4)
    assert dataset.choose(3, 4, labels_only=True) == tuple(index for index in everything if index % 3 == 0)[:3]
    assert set(dataset.choose(None, labels_only=True)) == set(range(0, 20, 3))
    with pytest.raises(at.UserError, match="numbers has no labels: expected one folder for each class, or a list with a column 'label'"):
        numbered(4, (None,) * 4).choose(2, labels_only=True)


@pytest.mark.parametrize("count", [0, -1, True, 2.0])
def test_bad_choices(count: object) -> None:
    with pytest.raises(at.UserError, match="expected a whole number of at least 1"):
        numbered(3).choose(count)
    for seed in (-1, 2**63, True, 0.5):
        with pytest.raises(at.UserError, match=f"seed is {seed}: expected a whole number from 0 to"):
            numbered(3).choose(1, seed=seed)  # type: ignore[arg-type]


def test_photos_of_installed_packages() -> None:
    photos = open_dataset("photos", class_names=["a", "b"])
    assert len(photos) == 8 and set(photos.labels) == {None}
    assert photos.class_names == ("a", "b")
    for sample in photos:
        assert sample.image.shape[0] == 3 and min(sample.image.shape[1:]) > 200
        assert sample.image.std() > 0.05


def test_several_labels_of_an_image(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,labels\na.png,cat|Dog\nb.png,\nc.png,2\n")
    dataset = open_dataset(tmp_path / "list.csv", class_names=("cat", "dog", "ship"))
    assert dataset.label_sets == ({0, 1}, set(), {2})
    assert dataset.labels == (None, None, None)
    (tmp_path / "names.csv").write_text("path,labels\na.png,cat|dog\nb.png,ant\n")
    assert open_dataset(tmp_path / "names.csv").class_names == ("ant", "cat", "dog")
    with pytest.raises(at.UserError, match=r"list\.csv line 2: no class 'Dog'"):
        open_dataset(tmp_path / "list.csv", class_names=("cat", "ant", "ship"))
    with pytest.raises(at.UserError, match="has several labels for an image: expected a column 'label'"):
        dataset.choose(None, labels_only=True)
