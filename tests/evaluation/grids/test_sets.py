from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import attribution as at
from evaluation.data.dataset import ImageDataset
from evaluation.data.recipes import load_dataset
from evaluation.grids.confidences import label_confidences
from evaluation.grids.draw import choose_grids, make_grids
from evaluation.grids.sets import GridSet
from evaluation.study.records import open_log, read_log

NAMES = ("ant", "bee", "cow", "dog", "eel")
SIDE = 4

PROBE = 5  # images forwarded to find out what the module returns: two together, each alone, one again


class Painted(nn.Module):
    """Reads its answer off the image: red says the class (in fifths), green the probability of it; blue of 1 is not a number.

    Counts the images that it forwards, and stops with an exception after a number of them.
    """

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.forwarded = 0
        self.most = 10**9

    def forward(self, x: Tensor) -> Tensor:
        self.forwarded += len(x)
        if self.forwarded > self.most:
            raise KeyboardInterrupt
        red, green, blue = x[:, :, 0, 0].T
        answer = (red * 5).round().long().clamp(0, 4)
        of_answer = (green - self.shift).clamp(1e-6, 1)
        rows = ((1 - of_answer) / 4)[:, None].repeat(1, 5)
        rows[torch.arange(len(x)), answer] = of_answer
        return torch.where(blue[:, None] > 0.9, torch.nan, rows.log())


def painted(batch_size: int = 3, shift: float = 0.0, name: str = "painted", **options: Any) -> at.Classifier:
    return at.Classifier(Painted(shift), size=SIDE, class_names=NAMES, scores="logits", name=name, batch_size=batch_size, **options)


def picture(answer: int, confidence: float, blue: float = 0.0) -> Tensor:
    return torch.tensor([answer / 5, confidence, blue])[:, None, None].expand(3, SIDE, SIDE)


def painted_dataset(rows: list[tuple[int | None, int, float]], **options: Any) -> ImageDataset:
    """Samples of (label, predicted class, its probability)."""
    images = [picture(answer, confidence) for _, answer, confidence in rows]
    ids = tuple(f"{index:03d}.png" for index in range(len(rows)))
    return ImageDataset("painted", NAMES, ids, tuple(label for label, _, _ in rows), lambda index: images[index], **options)


def labelled(counts: list[int]) -> ImageDataset:
    """So many samples of each class, mixed; their images are never read."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    labels = [labels[i] for i in np.random.default_rng(len(labels)).permutation(len(labels))]
    names = tuple(f"c{label}" for label in range(len(counts)))
    return ImageDataset("labelled", names, tuple(f"i{i}" for i in range(len(labels))), tuple(labels), lambda index: 1 / 0)


# ---- confidences


def test_confidence_is_the_probability_of_the_label_where_it_is_predicted() -> None:
    dataset = painted_dataset([(0, 0, 0.9), (1, 1, 0.995), (2, 1, 0.995), (3, 3, 0.3), (4, 4, 1.0)])
    found = label_confidences(painted(), dataset, [4, 0, 2, 3, 1])
    assert found.values.dtype == np.float64
    assert found.values == pytest.approx([1.0, 0.9, 0.0, 0.3, 0.995], abs=1e-6)
    assert found.failures == ()


def test_the_preprocessing_is_that_of_the_classifier() -> None:
    """Images of another size and a normalisation: the same numbers as from classifier.inputs, image by image."""
    torch.manual_seed(0)
    classifier = at.Classifier(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 5)),
        size=SIDE,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25),
        resize="short_side",
        resized=(6, 6),
        batch_size=4,
    )
    images = [torch.rand(3, 5 + i, 9) for i in range(6)]
    labels = [int(classifier.logits(classifier.inputs(image)).argmax()) for image in images]
    dataset = ImageDataset("random", (), tuple("abcdef"), tuple(labels), lambda index: images[index])
    expected = [float(classifier.logits(classifier.inputs(image)).softmax(1).max()) for image in images]
    assert label_confidences(classifier, dataset, range(6)).values == pytest.approx(expected, abs=1e-6)


def test_images_that_cannot_be_read_or_judged_are_listed_and_the_others_go_on(tmp_path: Path) -> None:
    whole = painted_dataset([(label, label, 0.995) for label in (0, 1, 2, 3, 4, 0, 1)])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    odd: dict[int, Any] = {1: broken, 4: picture(0, 0.9, blue=1.0)}
    dataset = replace(whole, read=lambda index: odd.get(index, whole.read(index)), places=tuple(f"list.csv line {i + 2}" for i in range(7)))
    found = label_confidences(painted(), dataset, range(7))
    assert np.isnan(found.values).tolist() == [False, True, False, False, True, False, False]
    assert found.values[[0, 2, 3, 5, 6]] == pytest.approx(0.995, abs=1e-6)
    assert [name for name, _ in found.failures] == ["001.png", "004.png"]
    assert found.failures[0][1].startswith(f"list.csv line 3: {broken} is a damaged image")
    assert "painted returned nan for class 0" in found.failures[1][1]
    grids = choose_grids(dataset, [painted(), painted(name="again")], count=1)
    assert sorted(grids.failures) == list(found.failures), "each image once, with the reason of the first model"
    assert (grids.judged, grids.kept) == (7, 5)


def test_a_mask_that_cannot_be_read_is_no_failure() -> None:
    dataset = painted_dataset([(0, 0, 0.9)], read_mask=lambda index: np.ones((1, 1), dtype=bool))
    with pytest.raises(at.UserError, match="the mask is bool"):
        dataset[0]
    assert label_confidences(painted(), dataset, [0]).values == pytest.approx([0.9], abs=1e-6)


ROWS: list[tuple[int | None, int, float]] = [(i % 5, i % 5, 0.9 + 0.01 * (i % 10)) for i in range(20)]


def test_a_second_run_forwards_nothing(tmp_path: Path) -> None:
    dataset, progress = painted_dataset(ROWS), []
    with open_log(tmp_path / "log.jsonl") as log:
        first, again, other = painted(), painted(), painted(shift=0.05)
        values = label_confidences(first, dataset, range(20), log=log).values
        assert first.module.forwarded == PROBE + 20
        assert np.array_equal(label_confidences(again, dataset, range(20), log=log, progress=lambda *a: progress.append(a)).values, values)
        assert again.module.forwarded == 0
        assert progress == [(3, 20), (6, 20), (9, 20), (12, 20), (15, 20), (18, 20), (20, 20)]
        assert label_confidences(other, dataset, range(20), log=log).values == pytest.approx(values - 0.05, abs=1e-6)
        assert len(log.records) == 14
    relabelled = replace(dataset, labels=tuple((label or 0) // 4 for label in dataset.labels))
    with open_log(tmp_path / "log.jsonl") as log:
        changed = label_confidences(painted(), relabelled, range(20), log=log).values
    assert np.array_equal(changed, label_confidences(painted(), relabelled, range(20)).values)
    assert (changed > 0).tolist() == [i % 5 == 0 for i in range(20)]


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    dataset, path = painted_dataset(ROWS), tmp_path / "log.jsonl"
    killed, resumed = painted(), painted()
    killed.module.most = PROBE + 10
    with open_log(path) as log, pytest.raises(KeyboardInterrupt):
        label_confidences(killed, dataset, range(20), log=log)
    assert len(read_log(path)) == 3
    with open_log(path) as log:
        values = label_confidences(resumed, dataset, range(20), log=log).values
    assert resumed.module.forwarded == PROBE + 11
    assert np.array_equal(values, label_confidences(painted(), dataset, range(20)).values)


def test_a_mended_image_is_judged_and_the_others_are_not_forwarded_again(tmp_path: Path) -> None:
    dataset = painted_dataset(ROWS[:6])
    broken = replace(dataset, read=lambda index: b"" if index == 1 else dataset.read(index))
    with open_log(tmp_path / "log.jsonl") as log:
        before = label_confidences(painted(), broken, range(6), log=log)
        still, mended, last = painted(), painted(), painted()
        assert before.failures == (("001.png", "the image bytes is empty (0 bytes): give an image file"),)
        assert label_confidences(still, broken, range(6), log=log).failures == before.failures
        assert still.module.forwarded == 0
        found = label_confidences(mended, dataset, range(6), log=log)
        assert found.failures == () and mended.module.forwarded == PROBE + 1
        assert np.array_equal(found.values, label_confidences(painted(), dataset, range(6)).values)
        label_confidences(last, dataset, range(6), log=log)
        assert last.module.forwarded == 0


def painted_files(folder: Path, rows: list[tuple[int, int, float]]) -> ImageDataset:
    """``painted_dataset`` as PNG files, 000.png and so on."""
    for index, (_, answer, confidence) in enumerate(rows):
        write_painted(folder / f"{index:03d}.png", answer, confidence)
    memory = painted_dataset([*rows])
    return replace(memory, read=lambda index: folder / memory.ids[index])


def write_painted(path: Path, answer: int, confidence: float) -> None:
    pixels = (255 * picture(answer, confidence)).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)


def test_replaced_pixels_under_the_same_names_are_measured_again(tmp_path: Path) -> None:
    dataset = painted_files(tmp_path, [(i % 5, i % 5, 0.8) for i in range(7)])
    with open_log(tmp_path / "log.jsonl") as log:
        assert label_confidences(painted(), dataset, range(7), log=log).values == pytest.approx(0.8, abs=1e-6)
    write_painted(tmp_path / "001.png", 1, 0.4)
    write_painted(tmp_path / "005.png", 3, 1.0)  # another class than its label, 0
    changed, again = painted(), painted()
    with open_log(tmp_path / "log.jsonl") as log:
        found = label_confidences(changed, dataset, range(7), log=log)
    assert found.values == pytest.approx([0.8, 0.4, 0.8, 0.8, 0.8, 0, 0.8], abs=1e-6) and found.failures == ()
    assert changed.module.forwarded == PROBE + 2, "only the replaced images"
    with open_log(tmp_path / "log.jsonl") as log:
        assert np.array_equal(label_confidences(again, dataset, range(7), log=log).values, found.values)
    assert again.module.forwarded == 0


def test_a_lost_image_keeps_its_confidence_and_a_replaced_one_does_not(tmp_path: Path) -> None:
    dataset, again, back = painted_files(tmp_path, [(i % 5, i % 5, 0.8) for i in range(5)]), painted(), painted()
    with open_log(tmp_path / "log.jsonl") as log:
        values = label_confidences(painted(), dataset, range(5), log=log).values
        (tmp_path / "002.png").unlink()
        lost = label_confidences(again, dataset, range(5), log=log)
        assert again.module.forwarded == 0 and lost.failures == () and np.array_equal(lost.values, values)
        write_painted(tmp_path / "002.png", 2, 0.6)
        found = label_confidences(back, dataset, range(5), log=log)
    assert back.module.forwarded == PROBE + 1 and found.values[2] == pytest.approx(0.6, abs=1e-6)
    assert label_confidences(painted(), dataset, [2]).values == found.values[2]


def test_the_same_pixels_in_other_files_forward_nothing(tmp_path: Path) -> None:
    """What counts is the pixels, not the bytes or the time of a file."""
    dataset, moved, again = painted_files(tmp_path, [(i % 5, i % 5, 0.8) for i in range(5)]), tmp_path / "moved", painted()
    moved.mkdir()
    for name in dataset.ids:
        Image.open(tmp_path / name).save(moved / name, compress_level=0)
    with open_log(tmp_path / "log.jsonl") as log:
        values = label_confidences(painted(), dataset, range(5), log=log).values
        found = label_confidences(again, replace(dataset, read=lambda index: moved / dataset.ids[index]), range(5), log=log).values
    assert again.module.forwarded == 0 and np.array_equal(found, values)


def test_records_without_digests_are_measured_again(tmp_path: Path) -> None:
    """Version 0.1 wrote them: nobody knows which pixels they stand for."""
    dataset, again = painted_dataset(ROWS[:4]), painted()
    with open_log(tmp_path / "log.jsonl") as log:
        values = label_confidences(painted(), dataset, range(4), log=log).values
        for key, record in list(log.records.items()):
            log.append(key, {"model": record["model"], "data": record["data"], "values": [0.5] * len(record["values"])})
        assert np.array_equal(label_confidences(again, dataset, range(4), log=log).values, values)
    assert again.module.forwarded == PROBE + 4


@pytest.mark.parametrize(
    ("rows", "indices", "message"),
    [
        ([(0, 0, 0.9)], [1], "index 1 is out of range: painted has images 0 to 0"),
        ([(0, 0, 0.9)], [True], "index True is out of range"),
        ([(0, 0, 0.9), (None, 0, 0.9)], [0, 1], r"001.png has no label: choose labelled samples"),
        ([(7, 0, 0.9)], [0], "painted has the label 7, painted has classes 0 to 4: open the data with class_names=classifier.class_names"),
    ],
)
def test_what_cannot_be_judged_at_all(rows: list, indices: list, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        label_confidences(painted(), painted_dataset(rows), indices)


# ---- the draw


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(2, 3), repeat=st.booleans(), seed=st.integers(0, 2**63 - 1))
def test_every_draw_keeps_the_rules(data: st.DataObject, n: int, repeat: bool, seed: int) -> None:
    cells = n * n
    distinct = cells - repeat
    dataset = labelled(data.draw(st.lists(st.integers(0, 6), min_size=distinct - 1, max_size=distinct + 4)))
    total, generator = len(dataset), np.random.default_rng(seed % 2**32)
    confidences = [np.where(generator.random(total) < 0.2, generator.choice([0, 0.5, np.nan], total), 0.995) for _ in range(2)]
    with np.errstate(invalid="ignore"):
        sure = {i for i in range(total) if all(values[i] >= 0.99 for values in confidences)}
    options: dict[str, Any] = {"n": n, "seed": seed, "repeat_corners": repeat}
    possible = Counter(dataset.labels[i] for i in sure)
    if len(possible) < distinct or (repeat and max(possible.values()) < 2):
        with pytest.raises(at.UserError, match=f"grids of {n}x{n} asked for, 0 can be made"):
            make_grids(dataset, confidences, count=None, **options)
        return
    grids = make_grids(dataset, confidences, count=None, **options)
    used = grids.indices.flatten().tolist()
    assert len(set(used)) == len(used) == len(grids) * cells and set(used) <= sure
    assert (grids.judged, grids.kept) == (total, len(sure))
    for row, labels, names in zip(grids.indices.tolist(), grids.labels.tolist(), grids.ids, strict=True):
        assert [dataset.ids[i] for i in row] == list(names) and [dataset.labels[i] for i in row] == labels
        assert len(set(labels[:distinct])) == distinct
        assert labels[-1] == labels[0] or not repeat
    left = Counter(dataset.labels[i] for i in sure - set(used))
    assert len(left) < distinct or (repeat and max(left.values()) < 2), "another grid could have been made"

    count = data.draw(st.integers(1, len(grids)))
    fewer = make_grids(dataset, confidences, count=count, **options)
    assert fewer.ids == grids.ids[:count]
    order = generator.permutation(total)
    shuffled = make_grids(dataset, [values[order] for values in confidences[::-1]], order.tolist(), count=None, **options)
    assert shuffled == grids
    assert make_grids(dataset, [], sorted(sure), count=None, **options).ids == grids.ids
    with pytest.raises(at.UserError, match=rf"{len(grids) + 1} grids of {n}x{n} asked for, {len(grids)} can be made"):
        make_grids(dataset, confidences, count=len(grids) + 1, **options)


def chi_square(seen: Counter, outcomes: list[tuple[int, ...]], draws: int) -> float:
    assert set(seen) <= set(outcomes)
    expected = draws / len(outcomes)
    return sum((seen[outcome] - expected) ** 2 / expected for outcome in outcomes)


def test_all_tuples_of_classes_are_equally_likely() -> None:
    dataset, draws = labelled([1, 2, 1, 3, 1]), 1200
    seen = Counter(tuple(make_grids(dataset, [], range(8), count=1, seed=seed).labels[0].tolist()) for seed in range(draws))
    assert chi_square(seen, list(permutations(range(5), 4)), draws) < 173  # 119 degrees of freedom, 0.1 %


def test_repeated_corners_do_not_favour_classes_of_one_image() -> None:
    """As if whole tuples were redrawn until there are two images for the corners."""
    dataset, draws = labelled([1, 2, 1, 3]), 1200
    drawn = [make_grids(dataset, [], range(7), count=1, seed=seed, repeat_corners=True).labels[0].tolist() for seed in range(draws)]
    assert all(labels[0] == labels[-1] for labels in drawn)
    outcomes = [labels for labels in permutations(range(4), 3) if labels[0] in (1, 3)]
    assert chi_square(Counter(tuple(labels[:3]) for labels in drawn), outcomes, draws) < 31.3  # 11 degrees of freedom, 0.1 %


def test_images_of_a_class_are_equally_likely_and_the_global_generator_is_untouched() -> None:
    dataset, draws = labelled([4, 1, 1, 1]), 800
    torch.manual_seed(3)
    state = torch.get_rng_state()
    drawn = [make_grids(dataset, [], range(7), count=1, seed=seed) for seed in range(draws)]
    assert torch.equal(torch.get_rng_state(), state)
    seen = Counter((int(grids.indices[grids.labels == 0][0]),) for grids in drawn)
    outcomes = [(index,) for index in range(7) if dataset.labels[index] == 0]
    assert chi_square(seen, outcomes, draws) < 16.3  # 3 degrees of freedom, 0.1 %


def test_the_threshold_counts_itself_and_every_model() -> None:
    dataset = labelled([1, 1, 1, 1])
    enough, less = np.full(4, 0.99), np.array([1, 1, 1, np.nextafter(0.99, 0)])
    assert len(make_grids(dataset, [enough, enough], count=None)) == 1
    with pytest.raises(at.UserError, match="0 can be made"):
        make_grids(dataset, [enough, less], count=None)
    unlabelled = replace(dataset, labels=(*dataset.labels[:3], None))
    with pytest.raises(at.UserError, match="of 3 of 3 images, in 3 of 4 classes"):
        make_grids(unlabelled, [enough], count=None)


def test_too_few_images_says_what_limits() -> None:
    dataset = labelled([1, 9, 0, 5, 5, 2])
    confidences = np.ones(22)
    confidences[[i for i in range(22) if dataset.labels[i] == 5]] = (0.5, np.nan)
    with pytest.raises(at.UserError) as caught:
        make_grids(dataset, [confidences], count=3, failures=[("i4", "i4.png: no such file")])
    assert str(caught.value) == (
        "labelled: 3 grids of 2x2 asked for, 1 can be made with seed 0; every model is sure (confidence at least 0.99) of 20 of 22 images, "
        "in 4 of 6 classes, fewest first: c2 0, c5 0, c0 1, c3 5, c4 5, c1 9; a grid takes 4 images of 4 different classes, and no image "
        "is used twice; 1 could not be judged, the first: i4 (i4.png: no such file); lower the threshold, ask for at most 1, or "
        "give more images"
    )
    with pytest.raises(at.UserError, match=r"0 can be made .* 9 images of 8 different classes, one of them twice.* make smaller grids"):
        make_grids(dataset, [confidences], count=None, n=3, repeat_corners=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count is 0: expected a whole number of at least 1"),
        ({"count": 1.5}, "count is 1.5"),
        ({"count": True}, "count is True"),
        ({"n": 1}, "n is 1: expected a whole number of at least 2"),
        ({"threshold": 0}, "threshold is 0: expected a confidence above 0 and at most 1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"confidences": [np.ones(3)]}, r"confidences of model 0 are float64 \[3\]: expected float \[4\], one for each image judged"),
        ({"confidences": np.ones(4)}, r"confidences of model 0 are float64 \[\]"),
        ({"confidences": [np.ones(4), np.full(4, 7.0)]}, "confidences of model 1 are 7 to 7: expected probabilities"),
        ({"confidences": []}, "neither confidences nor indices were given"),
        ({"indices": [0, 1, 2, 4]}, "index 4 is out of range: labelled has images 0 to 3"),
        ({"indices": [0, 1, 2, 2]}, "indices hold 2 more than once"),
    ],
)
def test_settings_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        make_grids(labelled([1, 1, 1, 1]), options.pop("confidences", [np.ones(4)]), **{"count": 1, **options})


# ---- choosing


def many(per_class: int = 12) -> ImageDataset:
    generator = np.random.default_rng(0)
    rows = [(i % 5, i % 5 if generator.random() < 0.9 else (i + 1) % 5, float(generator.uniform(0.98, 1))) for i in range(5 * per_class)]
    return painted_dataset([*rows, (None, 0, 1.0)])


def test_every_model_is_sure_of_every_image_chosen() -> None:
    dataset, classifiers, progress = many(), [painted(), painted(shift=0.005, name="other")], []
    grids = choose_grids(dataset, classifiers, count=None, threshold=0.985, seed=3, split="val", progress=lambda *a: progress.append(a))
    for classifier in classifiers:
        values = label_confidences(classifier, dataset, grids.indices.flatten()).values
        assert values.min() >= 0.985
    everyone = [label_confidences(classifier, dataset, range(60)).values >= 0.985 for classifier in classifiers]
    assert grids.kept == int((everyone[0] & everyone[1]).sum()) < int(everyone[0].sum())
    assert (grids.judged, grids.pool, grids.split, grids.data, grids.class_names) == (60, None, "val", "painted", NAMES)
    assert grids.models == tuple({"name": c.name, "weights_digest": c.weights_digest} for c in classifiers)
    assert progress[0] == (3, 120) and progress[-1] == (120, 120) and len(progress) == 40
    fewer = choose_grids(dataset, classifiers[::-1], count=2, threshold=0.985, seed=3)
    assert fewer.ids == grids.ids[:2]
    assert choose_grids(dataset, classifiers, count=2, threshold=0.985, seed=4).ids != fewer.ids


def test_a_pool_is_the_start_of_the_seeded_permutation() -> None:
    dataset, classifier = many(), painted()
    grids = choose_grids(dataset, [classifier], count=None, pool=25, seed=1)
    assert classifier.module.forwarded == PROBE + 25
    assert set(grids.indices.flatten().tolist()) <= set(dataset.choose(25, 1, labels_only=True))
    assert (grids.pool, grids.judged) == (25, 25)
    with pytest.raises(at.UserError, match="no classifier was given"):
        choose_grids(dataset, [], count=1)


def test_a_killed_choice_goes_on_and_ends_alike(tmp_path: Path) -> None:
    dataset, killed = many(), painted()
    killed.module.most = PROBE + 28
    with open_log(tmp_path / "log.jsonl") as log, pytest.raises(KeyboardInterrupt):
        choose_grids(dataset, [killed], count=None, log=log)
    resumed = painted()
    with open_log(tmp_path / "log.jsonl") as log:
        found = choose_grids(dataset, [resumed], count=None, log=log)
    assert resumed.module.forwarded == PROBE + 60 - 27
    assert found == choose_grids(dataset, [painted()], count=None)


# ---- the image of a grid


def test_cells_are_put_side_by_side_row_by_row() -> None:
    dataset = painted_dataset([(label, label, 0.2 * label) for label in range(4)])
    grids = make_grids(dataset, [], range(4), count=1, seed=2)
    image = grids.image(dataset, 0, painted(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)))
    assert image.shape == (3, 2 * SIDE, 2 * SIDE) and image.dtype == torch.float32
    for cell, label in enumerate(grids.labels[0].tolist()):
        row, column = divmod(cell, 2)
        part = image[:, row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        assert torch.allclose(part, picture(label, 0.2 * label), atol=1e-6)


def test_cells_are_what_the_classifier_sees_of_each_image() -> None:
    """The input made of a cell is the input made of its image, also where a bicubic resize overshoots and is clipped."""
    torch.manual_seed(1)
    images = [torch.rand(3, 7 + i, 20).round() for i in range(4)]  # sharp edges
    dataset = ImageDataset("random", (), tuple("abcd"), tuple(range(4)), lambda index: images[index])
    grids = make_grids(dataset, [], range(4), count=1)
    way: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "resize": "short_side", "resized": (8, 8)}
    for interpolation in ("bilinear", "bicubic"):
        classifier = at.Classifier(Painted(), size=(6, 5), interpolation=interpolation, **way)
        image = grids.image(dataset, 0, classifier)
        assert image.shape == (3, 12, 10) and image.min() >= 0 and image.max() <= 1
        shown = torch.cat([at.Classifier(Painted(), size=(12, 10), **{**way, "resized": None}).inputs(image)], dim=0)[0]
        for cell, index in enumerate(grids.indices[0].tolist()):
            row, column = divmod(cell, 2)
            part, single = shown[:, row * 6 : row * 6 + 6, column * 5 : column * 5 + 5], classifier.inputs(images[index])[0]
            assert torch.allclose(part, single, atol=1e-5)


def test_the_data_may_be_reordered_but_not_changed() -> None:
    dataset = painted_dataset([(label, label, 0.2 * label) for label in range(4)])
    grids, classifier = make_grids(dataset, [], range(4), count=1), painted()
    image = grids.image(dataset, 0, classifier)
    turned = ImageDataset("turned", NAMES, ("new", *dataset.ids[::-1]), (None, *dataset.labels[::-1]), lambda i: dataset.read(4 - i))
    assert torch.equal(grids.image(turned, 0, classifier), image)
    assert torch.equal(grids.image(replace(dataset, labels=(None,) * 4), 0, classifier), image)
    with pytest.raises(
        at.UserError, match=r"painted has no image '003.png', which grid 0 needs: the data set has changed; draw the grids again"
    ):
        grids.image(replace(dataset, ids=(*dataset.ids[:3], "other")), 0, classifier)
    with pytest.raises(at.UserError, match=r"'003.png' has label 1 in painted and 3 in the grid set: open the data with the class names"):
        grids.image(replace(dataset, labels=(*dataset.labels[:3], 1)), 0, classifier)
    for index in (-1, 1):
        with pytest.raises(IndexError):
            grids.image(dataset, index, classifier)


# ---- files


def saved(tmp_path: Path) -> tuple[GridSet, Path]:
    dataset = replace(many(), ids=tuple(f"ü\u2028\udc80/{index}" for index in range(61)))
    grids = choose_grids(dataset, [painted()], count=3, repeat_corners=True, pool=50, split="test")
    grids.save(tmp_path / "deep" / "grids.json")
    return grids, tmp_path / "deep" / "grids.json"


def test_a_set_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    grids, path = saved(tmp_path)
    again = GridSet.load(path)
    assert again == grids and again.labels.dtype == again.indices.dtype == np.int64
    assert again.ids == grids.ids and again.models == grids.models and again.versions["torch"] == torch.__version__
    assert repr(again) == "GridSet(painted, 3 grids of 2x2, confidence 0.99 of painted)"
    assert again != replace(grids, seed=1) and again != "grids"
    assert len(again) == 3


def change(name: str, value: Any) -> Callable[[dict], None]:
    return lambda plain: plain.__setitem__(name, value(plain[name]) if callable(value) else value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plain: plain.pop("ids"), "'ids' is missing"),
        (change("format", 2), "has format 2, this library reads 1"),
        (change("format", "1"), "is not a grid set: expected a file that GridSet.save wrote"),
        (change("n", 1), "n is 1: expected a whole number of at least 2"),
        (change("n", 3), "a grid of 4 ids: expected 9, one for each of 3x3 cells"),
        (change("n", 2.0), "'n' is 2.0, expected a whole number"),
        (change("n", True), "'n' is true"),
        (change("threshold", float("nan")), "'threshold' is NaN, expected a number"),
        (change("threshold", "0.9"), "'threshold' is \"0.9\", expected a number"),
        (change("seed", -1), "'seed' is -1"),
        (change("repeat_corners", 0), "'repeat_corners' is 0, expected true or false"),
        (change("repeat_corners", False), "grid 0 has the labels .*: expected all different"),
        (change("class_names", ["ant", 2]), "'class_names' is .*expected a list of texts"),
        (change("class_names", ["ant"]), "labels hold 4, but there are 1 class names"),
        (change("models", [{"name": "a", "weights_digest": 3}]), "'models' is .*expected a list of objects"),
        (change("models", [["a"]]), "'models' is"),
        (change("ids", []), "'ids' is .., expected rows"),
        (change("ids", lambda rows: [rows[0], rows[0], rows[2]]), "the id .* occurs 2 times: expected each image once"),
        (change("ids", lambda rows: [*rows[:2], rows[2][:3]]), "'ids' is .*expected rows of texts, all of one length"),
        (change("ids", lambda rows: rows[:2]), r"labels are int64 \[3, 4\]: expected int64 \[2, 4\]"),
        (change("indices", lambda rows: [rows[0], rows[0], rows[2]]), "the index .* occurs 2 times"),
        (change("indices", lambda rows: [[-1, *rows[0][1:]], *rows[1:]]), "'indices' is"),
        (change("labels", lambda rows: [[2**63, *rows[0][1:]], *rows[1:]]), "'labels' is"),
        (change("labels", lambda rows: [[0.5, *rows[0][1:]], *rows[1:]]), "'labels' is"),
        (change("labels", lambda rows: [[0, 0, 1, 0], *rows[1:]]), "expected the first and last alike, all others different"),
        (change("pool", "all"), "'pool' is \"all\", expected a whole number or null"),
        (change("failures", [["a"]]), "'failures' is"),
        (change("versions", {"torch": 2}), "'versions' is"),
    ],
)
def test_hostile_files_are_refused_by_name(tmp_path: Path, edit: Callable[[dict], None], message: str) -> None:
    _, path = saved(tmp_path)
    plain = json.loads(path.read_text())
    edit(plain)
    path.write_text(json.dumps(plain))
    with pytest.raises(at.UserError, match=rf"(?s)grids\.json .*{message}"):
        GridSet.load(path)


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"\xff\xfe", b"[1]", b'{"format": ' + b"9" * 5000 + b"}", b"null"])
def test_files_that_are_no_grid_set(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "grids.json").write_bytes(data)
    with pytest.raises(at.UserError, match=r"grids\.json is not a grid set"):
        GridSet.load(tmp_path / "grids.json")


def test_a_cut_file_a_large_one_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = saved(tmp_path)
    with pytest.raises(at.UserError, match=r"none\.json cannot be read .*give a file that GridSet.save wrote"):
        GridSet.load(tmp_path / "none.json")
    monkeypatch.setattr("evaluation.grids.sets._MAX_FILE_BYTES", path.stat().st_size - 1)
    with pytest.raises(at.UserError, match=r"expected a file that GridSet\.save wrote"):
        GridSet.load(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(at.UserError, match="is not a grid set, or is damaged"):
        GridSet.load(path)


# ---- parity with the published values


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict:
    return json.loads((shared / "golden" / "grid_golden.json").read_text())


def golden_cells(shared: Path, golden: dict, name: str) -> tuple[ImageDataset, np.ndarray]:
    """The cells of the published grids as a data set, in their order, and the pixels of the grids."""
    with np.load(shared / "golden" / "grid_pixels.npz") as arrays:
        pixels = arrays[f"grids_{name}"]
    n, files = golden["grids"][name]["scale"], golden["grids"][name]["files"]
    cells = [grid[r * 32 : r * 32 + 32, c * 32 : c * 32 + 32] for grid in pixels for r in range(n) for c in range(n)]
    labels = tuple(label for row in golden["grids"][name]["labels"] for label in row)
    ids = tuple(file for row in files for file in row)
    return ImageDataset("golden", tuple(golden["meta"]["classes"]), ids, labels, lambda index: cells[index]), pixels


@pytest.mark.parametrize("name", ["2x2", "3x3"])
def test_published_grids_have_the_published_confidences_and_pixels(shared: Path, golden: dict, cnn: at.Classifier, name: str) -> None:
    dataset, pixels = golden_cells(shared, golden, name)
    published = golden["grids"][name]
    found = label_confidences(cnn, dataset, range(len(dataset)))
    assert found.values.min() >= golden["meta"]["confidence_threshold"] == 0.99
    assert np.allclose(found.values, np.array(published["confidence"]).flatten(), atol=1e-5)
    shape = (len(pixels), published["scale"] ** 2)
    grids = replace(
        make_grids(dataset, [found.values], count=1, n=published["scale"]),
        ids=tuple(map(tuple, published["files"])),
        labels=np.array(published["labels"]),
        indices=np.arange(len(dataset)).reshape(shape),
    )
    for index in range(len(grids)):
        assert np.abs(grids.image(dataset, index, cnn).permute(1, 2, 0).numpy() * 255 - pixels[index]).max() < 1e-3


@pytest.mark.slow
def test_published_pool_of_confident_images(shared: Path, golden: dict, cnn: at.Classifier) -> None:
    """Even-numbered files. JPEG decoders differ by a grey level, so a few images may fall on the other side of the threshold."""
    dataset = load_dataset("cifar10", shared / "data" / "cifar10")
    pool = golden["meta"]["pool"]
    even = [index for index, name in enumerate(dataset.ids) if int(Path(name).stem) % 2 == 0]
    assert len(even) == pool["images_in_split"]
    found = label_confidences(cnn, dataset, even)
    assert (found.values > 0).mean() == pytest.approx(pool["accuracy_on_split"], abs=1e-3)
    by_class = np.bincount([dataset.labels[even[i]] or 0 for i in np.flatnonzero(found.values >= 0.99)], minlength=10)
    assert np.abs(by_class - pool["confident_images_per_class"]).max() <= 2


def test_grids_of_a_recipe(shared: Path, cnn: at.Classifier, tmp_path: Path) -> None:
    dataset = load_dataset("cifar10", shared / "data" / "cifar10")
    grids = choose_grids(dataset, [cnn], count=2, pool=120, split="test")
    grids.save(tmp_path / "grids.json")
    again = GridSet.load(tmp_path / "grids.json")
    assert again == grids
    for names, labels in zip(again.ids, again.labels.tolist(), strict=True):
        assert [name.split("/")[1] for name in names] == [again.class_names[label] for label in labels]
    pixels = at.load_image(dataset.read(int(grids.indices[1, 3])))
    assert torch.allclose(again.image(dataset, 1, cnn)[:, 32:, 32:], pixels, atol=1e-6)
