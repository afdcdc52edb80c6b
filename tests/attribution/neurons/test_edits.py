from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import photo
from neuron_toys import SIDE, ToyTransformer, counting_toy, toy_classifier, toy_images
from torch import Tensor

import attribution as at
from attribution.neurons import EDITS, edited_probabilities, edited_probability, find_neurons, mean_activations, pruned_probabilities
from attribution.neurons.edits import mean_logit_changes

PATHS = torch.tensor([[1, 2, 3], [4, 4, 4], [11, 0, 5]])


def naive(toy: ToyTransformer, inputs: Tensor, neurons: Tensor, edit: str, factor: float = 2.0, means: Tensor | None = None) -> Tensor:
    """One image, one layer, one neuron after the other."""
    rows = []
    for x, path in zip(inputs, neurons.reshape(*neurons.shape[:2], -1), strict=True):

        def change(layer: int, hidden: Tensor, path: Tensor = path) -> Tensor:
            hidden = hidden.clone()
            for unit in {int(u) for u in path[layer] if u >= 0}:
                if edit == "remove":
                    hidden[:, :, unit] = 0
                elif edit == "enhance":
                    hidden[:, :, unit] *= factor
                else:
                    hidden[:, :, unit] = means[layer, unit]
            return hidden

        with torch.no_grad():
            rows.append(toy(x[None], toy.at_tokens(change)).softmax(dim=1)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_the_naive_loop(edit: Any, pooled: bool, batch_size: int) -> None:
    toy = ToyTransformer(seed=1, pooled=pooled)
    used, inputs = toy_classifier(toy, batch_size=batch_size), toy_images(3)
    means = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    found = edited_probabilities(used, inputs, PATHS, edit, means=means)
    assert torch.allclose(found, naive(toy, inputs, PATHS, edit, means=means), atol=1e-6)
    assert not torch.allclose(found, used.probabilities(inputs), atol=1e-3)
    assert torch.equal(used.probabilities(inputs), toy_classifier(toy, batch_size=batch_size).probabilities(inputs))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_edits_of_any_neurons(data: Any) -> None:
    toy = ToyTransformer(seed=2, pooled=data.draw(st.booleans()))
    count, top = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    values = data.draw(st.lists(st.integers(-1, 11), min_size=count * 3 * top, max_size=count * 3 * top))
    neurons, edit, factor = torch.tensor(values).view(count, 3, top), data.draw(st.sampled_from(EDITS)), data.draw(st.floats(-3, 3))
    used, means = toy_classifier(toy), torch.linspace(-1, 1, 36).view(3, 12)
    found = edited_probabilities(used, toy_images(count), neurons, edit, factor=factor, means=means)
    assert torch.allclose(found, naive(toy, toy_images(count), neurons, edit, factor, means), atol=1e-5)


def test_minus_one_edits_nothing() -> None:
    used, inputs = toy_classifier(ToyTransformer()), toy_images(2)
    clean = used.probabilities(inputs)
    for edit in EDITS:
        for neurons in (torch.full((2, 3), -1), torch.full((2, 3, 2), -1)):
            assert torch.equal(edited_probabilities(used, inputs, neurons, edit, means=torch.ones(3, 12)), clean)
    one = torch.tensor([[-1, 4, -1], [-1, -1, -1]])
    found = edited_probabilities(used, inputs, one)
    assert torch.equal(found[1], clean[1]) and not torch.allclose(found[0], clean[0], atol=1e-4)


def test_an_edit_of_zero_width_changes_nothing() -> None:
    """Neurons that are 0 already, and a factor of 1."""
    toy = ToyTransformer(seed=3)
    with torch.no_grad():
        for block in toy.blocks:
            block.mlp.fc1.weight[5] = 0
            block.mlp.fc1.bias[5] = 0
    used, inputs, fives = toy_classifier(toy), toy_images(2), torch.full((2, 3), 5)
    clean = used.probabilities(inputs)
    assert torch.equal(edited_probabilities(used, inputs, fives), clean)
    assert torch.equal(edited_probabilities(used, inputs, fives, "enhance", factor=100.0), clean)
    assert torch.equal(edited_probabilities(used, inputs, PATHS[:2], "enhance", factor=1.0), clean)
    assert torch.allclose(
        edited_probabilities(used, inputs, PATHS[:2], "enhance", factor=0.0), edited_probabilities(used, inputs, PATHS[:2])
    )


def test_enhance_multiplies_what_occurs_in_the_edited_run() -> None:
    """An earlier edit changes a later neuron; twice its clean value would give something else."""
    toy = ToyTransformer(seed=4)
    used, inputs = toy_classifier(toy), toy_images(3)
    layers = find_neurons(used)
    with layers.recorded() as hidden:
        used.logits(inputs)
    clean = {layer: layers.at_tokens(each).detach().clone() for layer, each in hidden.items()}

    def cached(layer: int, now: Tensor) -> Tensor:
        now = now.clone()
        for image, unit in enumerate(PATHS[:, layer]):
            now[image, :, unit] = 2 * clean[layer][image, :, unit]
        return now

    found = edited_probabilities(used, inputs, PATHS, "enhance", layers=layers)
    assert torch.allclose(found, naive(toy, inputs, PATHS, "enhance"), atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(found, toy(inputs, toy.at_tokens(cached)).softmax(dim=1), atol=1e-3)


def test_a_chain_by_hand() -> None:
    """Layer 0 writes its neuron to a dimension that layer 1 reads: doubling both quadruples what arrives, plus what was there."""
    toy = ToyTransformer(depth=2, width=4, hidden=2, classes=2, linear=True)
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.zero_()
        toy.blocks[0].mlp.fc1.bias[1] = 0.3  # a_0 = 0.3
        toy.blocks[0].mlp.fc2.weight[2, 1] = 1.0
        toy.blocks[1].mlp.fc1.weight[0, 2] = 2.0  # a_1 = 2 a_0
        toy.blocks[1].mlp.fc2.weight[3, 0] = 1.0
        toy.head.weight[1, 3] = 1.0
    used, image = toy_classifier(toy), toy_images(1)
    for neurons, edit, logit in [
        ([1, 0], "enhance", 2.4),
        ([1, -1], "enhance", 1.2),
        ([-1, 0], "enhance", 1.2),
        ([1, -1], "remove", 0),
        ([0, 1], "enhance", 0.6),
        ([1, 0], "mean", -0.5),
    ]:
        means = torch.tensor([[9.0, 1.0], [-0.5, 9.0]])
        p = edited_probabilities(used, image, torch.tensor([neurons]), edit, means=means)[0, 1]
        assert float(p) == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6), (neurons, edit)


def test_one_image() -> None:
    used = toy_classifier(ToyTransformer(seed=5), class_names=["a", "b", "c", "d"], mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    picture, means = photo(SIDE), torch.ones(3, 12)
    for neurons in ([1, 2, 3], np.array([1, 2, 3]), torch.tensor([[1, 7], [2, 2], [3, -1]]), [[1, 7], [2, 2], [3, -1]]):
        for edit in EDITS:
            batch = torch.as_tensor(np.asarray(neurons))[None]
            expected = edited_probabilities(used, used.inputs(picture), batch, edit, factor=3.0, means=means)
            found = edited_probability(used, picture, neurons, "c", edit, factor=3.0, means=means)
            assert isinstance(found, float) and found == pytest.approx(float(expected[0, 2]), abs=1e-7)
    path = at.neuron_path(used, picture, 1, steps=3)
    removed = edited_probability(used, picture, path.neurons, path.target)
    assert removed != pytest.approx(path.target_score, abs=1e-4)
    two = edited_probability(used, picture, [1, 2], 0, layers=["blocks.1.mlp.fc2", "blocks.2.mlp.fc2"])
    assert two == pytest.approx(edited_probability(used, picture, [-1, 1, 2], 0), abs=1e-7)


@pytest.mark.parametrize("pooled", [False, True])
def test_mean_activations(pooled: bool) -> None:
    toy = ToyTransformer(seed=6, pooled=pooled)
    inputs, seen = toy_images(5), []
    toy(inputs, toy.at_tokens(lambda _layer, hidden: seen.append(hidden.detach()) or hidden))
    expected = [[np.mean([[float(v) for v in tokens[:, unit]] for tokens in hidden]) for unit in range(12)] for hidden in seen]
    for batch_size in (2, 64):
        assert np.allclose(mean_activations(toy_classifier(toy, batch_size=batch_size), inputs), expected, atol=1e-5)


def test_the_mean_of_one_image_changes_nothing() -> None:
    used, inputs = toy_classifier(ToyTransformer(seed=6)), toy_images(1)
    means = mean_activations(used, inputs)
    found = edited_probabilities(used, inputs, PATHS[:1], "mean", means=means)
    assert torch.allclose(found, used.probabilities(inputs), atol=1e-6)


def test_mean_logit_changes() -> None:
    toy = ToyTransformer(seed=7, pooled=True)
    inputs = toy_images(5)
    changes, activations = mean_logit_changes(toy_classifier(toy, batch_size=2), inputs, 1, [4, 0])
    for unit, change in zip((4, 0), changes, strict=True):

        def removed(layer: int, hidden: Tensor, unit: int = unit) -> Tensor:
            return hidden.index_fill(2, torch.tensor([unit]), 0) if layer == 1 else hidden

        with torch.no_grad():
            assert torch.allclose(change, (toy(inputs, toy.at_tokens(removed)) - toy(inputs)).mean(dim=0), atol=1e-5)
    assert torch.allclose(activations, torch.as_tensor(mean_activations(toy_classifier(toy), inputs)[1, [4, 0]]), atol=1e-5)
    assert [len(found) for found in mean_logit_changes(toy_classifier(toy), inputs, 1, [])] == [0, 0]


# Pruning


def left(probabilities: Tensor) -> np.ndarray:
    """How many neurons of the counting toy were left."""
    return 100 * torch.logit(probabilities[:, 1].double()).numpy()


def test_all_others_are_removed() -> None:
    used = toy_classifier(counting_toy(50, 2))
    kept = torch.tensor([[[1, 2, 3], [7, 7, -1]], [[0, -1, -1], [-1, -1, -1]], [[1, 2, 3], [4, 5, 6]]])
    assert np.allclose(left(pruned_probabilities(used, toy_images(3), kept)), [3 + 1, 1, 6], atol=0.01)
    assert np.allclose(left(pruned_probabilities(used, toy_images(3), kept, depth=1)), [3 + 50, 1 + 50, 3 + 50], atol=0.01)
    assert np.allclose(left(pruned_probabilities(used, toy_images(3), kept, depth=0)), 100, atol=0.01)
    assert np.allclose(left(pruned_probabilities(used, toy_images(3), kept, 0.0)), 100, atol=0.01)


@pytest.mark.parametrize("pooled", [False, True])
def test_pruning_to_the_kept_is_the_naive_loop(pooled: bool) -> None:
    toy = ToyTransformer(seed=8, pooled=pooled)
    used, inputs = toy_classifier(toy), toy_images(3)
    assert torch.equal(pruned_probabilities(used, inputs, PATHS, 0.0), used.probabilities(inputs))
    for depth in (1, 2, 3):
        others = [[[u for u in range(12) if u != int(path[i])] if i < depth else [-1] * 11 for i in range(3)] for path in PATHS]
        found = pruned_probabilities(used, inputs, PATHS, depth=depth)
        assert torch.allclose(found, naive(toy, inputs, torch.tensor(others), "remove"), atol=1e-6)
    assert torch.equal(pruned_probabilities(used, inputs, PATHS), pruned_probabilities(used, inputs, PATHS, depth=3))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_removed(share: float) -> None:
    """Each other neuron is removed with this probability, drawn anew for each image and layer; those kept always stay."""
    used, count, hidden = toy_classifier(counting_toy(400, 2)), 40, 400
    kept = torch.arange(100).expand(count, 2, 100)
    gone = 2 * hidden - left(pruned_probabilities(used, toy_images(count), kept, share))
    free, spread = 2 * (hidden - 100), np.sqrt(2 * (hidden - 100) * share * (1 - share))
    assert abs(gone.mean() - share * free) < 5 * spread / np.sqrt(count)
    assert 0.5 * spread < gone.std() < 1.35 * spread  # were all images or layers alike, 0 or 1.41
    first = hidden - (left(pruned_probabilities(used, toy_images(count), kept, share, depth=1)) - hidden)
    assert abs(np.corrcoef(first, gone - first)[0, 1]) < 0.6


def test_draws_do_not_depend_on_batches() -> None:
    toy = ToyTransformer(seed=9)
    inputs, kept = toy_images(5), torch.cat([PATHS, PATHS[:2]])
    expected = pruned_probabilities(toy_classifier(toy), inputs, kept, 0.5, seed=3)
    for batch_size in (1, 2, 3):
        found = pruned_probabilities(toy_classifier(toy, batch_size=batch_size), inputs, kept, 0.5, seed=3)
        assert torch.allclose(found, expected, atol=1e-6)
    for row in range(5):
        alone = pruned_probabilities(toy_classifier(toy), inputs[row : row + 1], kept[row : row + 1], 0.5, seed=3 + row)
        assert torch.allclose(alone, expected[row : row + 1], atol=1e-6)
    assert not torch.allclose(pruned_probabilities(toy_classifier(toy), inputs, kept, 0.5, seed=4), expected, atol=1e-4)


# Errors


@pytest.mark.parametrize(
    "neurons",
    [
        torch.zeros(3, 3, dtype=torch.long),
        torch.zeros(2, 2, dtype=torch.long),
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2, 3, 1, 1, dtype=torch.long),
        torch.zeros(2, 3),
        torch.zeros(2, 3, dtype=torch.bool),
        torch.full((2, 3), 12),
        torch.full((2, 3), -2),
    ],
    ids=["images", "layers", "one axis", "four axes", "float", "bool", "too large", "too small"],
)
def test_bad_neurons(neurons: Tensor) -> None:
    used = toy_classifier(ToyTransformer())
    for call in (edited_probabilities, pruned_probabilities):
        with pytest.raises(at.UserError, match=r"expected whole numbers \[2, 3\] or \[2, 3, K\] from 0 to 11, or -1 for none"):
            call(used, toy_images(2), neurons)


def test_other_errors() -> None:
    used, inputs, neurons = toy_classifier(ToyTransformer()), toy_images(3), PATHS
    for edit, options, message in [
        ("double", {}, "unknown edit 'double': expected one of remove, enhance, mean"),
        ("mean", {}, "needs means: received nothing"),
        ("mean", {"means": torch.zeros(12, 3)}, r"needs means: received float32 \[12, 3\], expected float \[3, 12\]"),
    ]:
        with pytest.raises(at.UserError, match=message):
            edited_probabilities(used, inputs, neurons, edit, **options)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(at.UserError, match="expected 0 to 1"):
            pruned_probabilities(used, inputs, neurons, share)
    for depth in (-1, 4):
        with pytest.raises(at.UserError, match=f"depth is {depth}: expected 0 to 3 layers"):
            pruned_probabilities(used, inputs, neurons, depth=depth)
    for wrong in ([1, 2], [1, 2, 12], 3, [0.5, 1, 2]):
        with pytest.raises(at.UserError, match="expected whole numbers"):
            edited_probability(used, photo(SIDE), wrong, 0)
    with pytest.raises(at.UserError, match="out of range"):
        edited_probability(used, photo(SIDE), [1, 2, 3], 9)


def test_a_cnn_has_no_neurons_to_edit(cnn: at.Classifier, small_cat: Tensor) -> None:
    with pytest.raises(at.NotApplicable, match="expected a vision transformer"):
        edited_probability(cnn, small_cat, [0], 0)


# What the public reference implementation computed


@pytest.mark.parametrize("name", ["neuron_path", "activation_path", "influence_path"])
def test_manipulations_of_the_reference(name: str, shared: Path, vit: at.Classifier) -> None:
    golden = json.loads((shared / "golden" / "neuronpath_golden.json").read_text())
    pixels = np.load(shared / "golden" / "neuronpath_arrays.npz")["pixels"]
    inputs = torch.cat([vit.inputs(each) for each in pixels])
    targets = [image["target"] for image in golden["images"]]
    paths = torch.tensor([image[name]["path"] for image in golden["images"]])
    found: dict[str, np.ndarray] = {}
    for key, edit, neurons in [("removed", "remove", paths), ("doubled", "enhance", paths), ("original", "remove", paths * 0 - 1)]:
        found[key] = edited_probabilities(vit, inputs, neurons, edit)[range(16), targets].numpy()
        assert np.allclose(found[key], [image["manipulation"][name][key] for image in golden["images"]], atol=1e-5), key
    for key in ("removed", "doubled"):
        ratio = found[key] / found["original"]
        assert np.allclose(ratio, [image["manipulation"][name][f"{key}_over_original"] for image in golden["images"]], rtol=1e-4)
        assert ratio.mean() == pytest.approx(golden["means"][name][f"{key}_over_original"], rel=1e-4)
