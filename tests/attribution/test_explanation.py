from __future__ import annotations

import io
import json
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from torch import Tensor

import attribution as at
from vision_attribution.explain import summary


def made(size: int = 6, seed: int = 0) -> at.Explanation:
    """An explanation with known numbers: a 6x8 image of three by two cells."""
    generator = torch.Generator().manual_seed(seed)
    image = (torch.rand(3, 6, 8, generator=generator) * 255).round() / 255
    regions = at.make_regions(image, "grid", rows=2, columns=3)
    return at.Explanation(
        image=image,
        target=1,
        class_names=("dog", "cat"),
        probabilities=torch.tensor([0.2, 0.8]),
        regions=regions,
        order=torch.randperm(size, generator=generator),
        insertion_scores=torch.tensor([0.1, 0.5, 0.45, 0.7, 0.9, 0.85, 0.8]),
        deletion_scores=torch.tensor([0.8, 0.4, 0.42, 0.3, 0.2, 0.2, 0.1]),
        evaluations=42,
        provenance={"model": "toy", "settings": {"fill": "black"}},
    )


def pixel_map(values: Tensor) -> at.Explanation:
    return replace(made(), regions=None, order=None, insertion_scores=None, deletion_scores=None, pixel_map=values)


def test_area_and_auc_are_exact() -> None:
    explanation = made()
    shares = [0.0]
    for region in explanation.order.tolist():
        shares.append(shares[-1] + float((explanation.regions.labels == region).sum()) / 48)
    assert explanation.area.tolist() == pytest.approx(shares)
    assert explanation.area[-1] == 1
    assert explanation.insertion_auc == pytest.approx(reference.trapezoid(shares, explanation.insertion_scores.tolist()))
    assert explanation.deletion_auc == pytest.approx(reference.trapezoid(shares, explanation.deletion_scores.tolist()))


def test_gain_map_equals_the_naive_loop() -> None:
    explanation = made()
    wanted = reference.gain_map(
        explanation.regions.labels,
        explanation.order.tolist(),
        explanation.insertion_scores.tolist(),
        explanation.deletion_scores.tolist(),
    )
    assert torch.allclose(explanation.to_pixels("gain"), wanted, atol=1e-6)
    assert torch.equal(explanation.heatmap, explanation.to_pixels("gain"))
    assert explanation.gains.tolist() == pytest.approx([0.8, -0.07, 0.37, 0.3, -0.05, 0.05], abs=1e-6)


def test_rank_map() -> None:
    explanation = made()
    ranks = explanation.to_pixels("rank")
    for position, region in enumerate(explanation.order.tolist()):
        assert torch.allclose(ranks[explanation.regions.labels == region], torch.tensor(1 - position / 6))


def test_black_pixels_have_the_value_of_their_region() -> None:
    """The published code leaves them at 0, which its shift turns into the maximum."""
    dark = replace(made(), image=torch.zeros(3, 6, 8))
    assert torch.equal(dark.heatmap, made().heatmap)


def test_more_than_255_regions_keep_their_ranks() -> None:
    image = torch.rand(3, 20, 20)
    regions = at.make_regions(image, "grid", count=400)
    scores = torch.linspace(0, 1, 401)
    many = replace(made(), image=image, regions=regions, order=torch.arange(400), insertion_scores=scores, deletion_scores=1 - scores)
    assert len(many.to_pixels("rank").unique()) == len(many.to_pixels("gain").unique()) == 400


def test_no_gain_anywhere_gives_an_empty_map() -> None:
    flat = replace(made(), insertion_scores=torch.full((7,), 0.5), deletion_scores=torch.full((7,), 0.5))
    assert torch.equal(flat.heatmap, torch.zeros(6, 8))


def test_regions_needed() -> None:
    explanation = made()
    assert [explanation.regions_needed(c) for c in (0.0, 0.1, 0.5, 0.6, 0.9, 0.95)] == [0, 0, 1, 3, 4, None]
    assert explanation.minimal_regions(0.6).tolist() == explanation.order[:3].tolist()
    assert explanation.minimal_regions(0.95) is None
    with pytest.raises(at.UserError, match=r"confidence is 1\.5"):
        explanation.regions_needed(1.5)


def test_informative_fill() -> None:
    assert not made().fill_is_informative
    assert replace(made(), insertion_scores=torch.full((7,), 0.5)).fill_is_informative


def test_a_method_s_map_has_no_order_until_it_is_ranked() -> None:
    values = torch.zeros(6, 8)
    values[3:, :2], values[:3, 5:] = 2.0, -1.0
    explanation = pixel_map(values)
    assert torch.equal(explanation.heatmap, values.clamp(min=0) / 2)
    for name in ("area", "insertion_auc", "deletion_auc", "gains"):
        with pytest.raises(at.UserError, match=r"regions|scores"):
            getattr(explanation, name)
    ranked = explanation.ranked_over(made().regions)
    means = [float(values[ranked.regions.labels == r].mean()) for r in range(6)]
    assert ranked.order.tolist() == sorted(range(6), key=lambda r: (-means[r], r))
    assert ranked.insertion_scores is None
    assert torch.equal(ranked.heatmap, ranked.to_pixels("rank"))
    with pytest.raises(at.UserError, match="same image"):
        explanation.ranked_over(torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("explanation", [made(), made(seed=3), pixel_map(torch.randn(6, 8)), pixel_map(torch.full((6, 8), torch.nan))])
def test_round_trip(explanation: at.Explanation, tmp_path: Path) -> None:
    explanation.save(tmp_path / "sub" / "e.npz")
    assert at.Explanation.load(tmp_path / "sub" / "e.npz") == explanation
    assert [file.name for file in (tmp_path / "sub").iterdir()] == ["e.npz"]


def test_round_trip_of_an_image_that_is_not_8_bit(tmp_path: Path) -> None:
    explanation = replace(made(), image=torch.rand(3, 6, 8))
    explanation.save(tmp_path / "e.npz")
    assert torch.equal(at.Explanation.load(tmp_path / "e.npz").image, explanation.image)


@pytest.mark.parametrize(
    "change",
    [
        {"target": 0},
        {"order": torch.arange(6).flip(0)},
        {"insertion_scores": torch.zeros(7)},
        {"evaluations": 1},
        {"provenance": {}},
        {"insertion_scores": None},
        {"class_names": ("a", "b")},
    ],
)
def test_inequality(change: dict) -> None:
    assert made() != replace(made(), **change)
    assert made() == made()
    assert made() != "an explanation"


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made().save(tmp_path / "e.npz")
    before = (tmp_path / "e.npz").read_bytes()

    def disk_full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", disk_full)
    with pytest.raises(at.UserError, match=r"No space left on device.*nothing was changed"):
        made(seed=1).save(tmp_path / "e.npz")
    assert (tmp_path / "e.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def with_header(path: Path, change: dict) -> bytes:
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    header = json.loads(str(arrays["header"]))
    header.update(change)
    buffer = io.BytesIO()
    np.savez(buffer, **{**arrays, "header": np.array(json.dumps(header))})
    return buffer.getvalue()


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "e.npz"
    with pytest.raises(at.UserError, match="no such file"):
        at.Explanation.load(path)
    path.write_bytes(b"")
    with pytest.raises(at.UserError, match="not a saved explanation"):
        at.Explanation.load(path)
    made().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(at.UserError, match="not a saved explanation, or is damaged"):
        at.Explanation.load(path)
    path.write_bytes(whole)
    for change, message in [({"format": 99}, "newer version"), ({"target": 7}, "do not fit"), ({"odd": 1}, "odd")]:
        (tmp_path / "changed.npz").write_bytes(with_header(path, change))
        with pytest.raises(at.UserError, match=message):
            at.Explanation.load(tmp_path / "changed.npz")
    np.savez(tmp_path / "pickled.npz", header=np.array([{"a": 1}], dtype=object))
    with pytest.raises(at.UserError, match="not a saved explanation"):
        at.Explanation.load(tmp_path / "pickled.npz")


def test_a_file_that_would_unpack_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made().save(tmp_path / "e.npz")
    monkeypatch.setattr("attribution.explanation._MAX_FILE_VALUES", 8)
    with pytest.raises(at.UserError, match="would unpack to"):
        at.Explanation.load(tmp_path / "e.npz")
    assert zipfile.is_zipfile(tmp_path / "e.npz")


def test_rich_display_is_a_picture() -> None:
    picture = Image.open(io.BytesIO(made()._repr_png_()))
    assert picture.format == "PNG"
    assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    assert "cat 0.800, 6 regions" in repr(made())


def test_every_damaged_byte_is_a_user_error_or_harmless(tmp_path: Path) -> None:
    made().save(tmp_path / "e.npz")
    whole = (tmp_path / "e.npz").read_bytes()
    positions = np.random.default_rng(0).integers(0, 8 * len(whole), 150)
    for position in positions.tolist():
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << (position % 8)
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with suppress(at.UserError):  # anything else that is raised fails the test
            loaded = at.Explanation.load(tmp_path / "damaged.npz")
            assert loaded == made() or loaded.provenance != made().provenance


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"insertion_scores": [0.1, float("nan"), 0.9, 0.7, 0.6]}, "its insertion scores are not all finite"),
        ({"deletion_scores": [float("inf")] * 5}, "its deletion scores are not all finite"),
        ({"probabilities": [float("nan")] * 3}, "its probabilities are not all finite"),
        ({"target": True}, "its parts do not fit together"),
        ({"target": 1.0}, "its parts do not fit together"),
        ({"evaluations": False}, "its parts do not fit together"),
        ({"class_names": [1, 2]}, "its parts do not fit together"),
        ({"regions": ["grid", "4"]}, "its parts do not fit together"),
    ],
    ids=str,
)
def test_values_that_no_explanation_has_are_refused_when_loaded(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "e.npz"
    made().save(path)
    arrays = dict(np.load(path))
    header = json.loads(str(arrays["header"]))
    for name, value in changes.items():
        if name in arrays:
            arrays[name] = np.resize(np.array(value, np.float32), arrays[name].shape)
        else:
            header[name] = value
    np.savez(path, **{**arrays, "header": np.array(json.dumps(header))})
    with pytest.raises(at.UserError, match=rf"e\.npz is not a saved explanation, or is damaged \({message}\)"):
        at.Explanation.load(path)


def test_a_header_that_claims_more_than_its_file_is_refused(tmp_path: Path) -> None:
    made().save(tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    with zipfile.ZipFile(tmp_path / "e.npz", "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array)
            data = buffer.getvalue()
            if name == "image":
                data = data.replace(b"(3, 6, 8)", b"(3,99999)")
            archive.writestr(f"{name}.npy", data)
    with pytest.raises(at.UserError, match="would unpack to"):
        at.Explanation.load(tmp_path / "e.npz")


@pytest.mark.parametrize("change", [{"order": torch.arange(6.0)}, {"image": torch.rand(1, 6, 8)}, {"insertion_scores": torch.zeros(3)}])
def test_arrays_of_the_wrong_kind_are_refused(change: dict, tmp_path: Path) -> None:
    replace(made(), **change).save(tmp_path / "e.npz")
    with pytest.raises(at.UserError, match="do not fit together"):
        at.Explanation.load(tmp_path / "e.npz")


@pytest.mark.parametrize("shift", [-5.0, 5.0])
@pytest.mark.parametrize("target", [None, 0])
def test_the_top_label_that_is_explained_where_none_is_predicted_is_noted(shift: float, target: int | None) -> None:
    used = at.Classifier(lambda x: x.mean((2, 3)) + torch.tensor([0.0, 1.0, 0.5]) + shift, size=8, scores="sigmoid")
    explanation = at.explain(torch.rand(3, 8, 8), used, target, regions="grid", region_options={"count": 4})
    noted = shift < 0 and target is None
    assert explanation.note == ("no label is above 0.5: the most probable is explained" if noted else "")
    assert ("the most probable is explained" in repr(explanation)) == noted
    assert summary(explanation).get("note", "") == explanation.note
    title = explanation.plot().axes[0].get_title()
    assert ("predicted no label, as none is above 0.5" in title.replace("\n", " ")) == (shift < 0)


def test_a_class_that_is_hardly_seen(cnn: at.Classifier, small_cat: Tensor) -> None:
    least = int(cnn.probabilities(cnn.inputs(small_cat))[0].argmin())
    cut = {"regions": "grid", "region_options": {"count": 4}}
    rare, seen = at.explain(small_cat, cnn, least, **cut), at.explain(small_cat, cnn, **cut)
    assert rare.is_hardly_seen and rare.note.startswith(f"the model hardly sees {rare.target_name!r} in this image, p = ")
    assert rare.note in repr(rare) and not seen.is_hardly_seen and seen.note == ""
    drawn = " ".join(text.get_text() for ax in rare.plot().axes for text in (ax.title, *ax.texts))
    assert "hardly sees the class" in " ".join(drawn.split()) and "try another" not in drawn
