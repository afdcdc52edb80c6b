from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import classifier as small_classifier
from networks import photo, tiny_vit
from neuron_toys import SIDE, Naive, ToyTransformer, ranked, toy_classifier, toy_images, unchanged
from torch import Tensor

import attribution as at
from attribution.hooks import edited_inputs
from attribution.neurons import (
    NeuronDecoder,
    NeuronPath,
    PathFinder,
    activation_path,
    edited_probabilities,
    edited_probability,
    exemplars,
    find_neurons,
    influence_pattern_path,
    layer_gradient_path,
    mean_activations,
    neuron_path,
    pruned_probabilities,
)

STEPS = 4
TARGETS = [2, 0, 3]
EXACT_WINS = 17  # weights with which reranking finds other paths than the search


def finder(toy: ToyTransformer, count: int = 3, steps: int = STEPS, output: Any = "probability", **options: Any) -> PathFinder:
    return PathFinder(toy_classifier(toy, **options), toy_images(count), (TARGETS * 2)[:count], steps=steps, output=output)


def naives(toy: ToyTransformer, count: int = 3, steps: int = STEPS, output: str = "probability") -> list[Naive]:
    return [Naive(toy, x[None], target, steps, output) for x, target in zip(toy_images(count), (TARGETS * 2)[:count], strict=True)]


def check_path(found: NeuronPath, path: list[list[int]], naive: Naive, compat: bool = False) -> None:
    """Neurons, score, activations and gradients of the whole path."""
    score, activations, gradients = naive.joint_parts(path, compat)
    single = len(path[0]) == 1
    assert found.neurons.tolist() == ([units[0] for units in path] if single else path)
    assert found.score == pytest.approx(score, rel=1e-4, abs=1e-6)
    assert np.allclose(found.activations.reshape(len(path), -1), activations, rtol=1e-4, atol=1e-5)
    assert np.allclose(found.gradients.reshape(len(path), -1), gradients, rtol=1e-3, atol=1e-5)
    assert found.target_score == pytest.approx(float(naive.clean), abs=1e-5)


def check_candidates(found: NeuronPath, values: list[list[float]]) -> None:
    for layer, of_layer in enumerate(values):
        count = found.candidates.shape[1]
        assert found.candidates[layer].tolist() == ranked(of_layer)[:count]
        assert np.allclose(found.candidate_scores[layer], sorted(of_layer, reverse=True)[:count], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("output", ["probability", "logit"])
@pytest.mark.parametrize("pooled", [False, True])
def test_the_search_is_the_naive_loop(pooled: bool, output: str) -> None:
    toy = ToyTransformer(seed=1, pooled=pooled)
    for found, naive in zip(finder(toy, output=output).search(), naives(toy, output=output), strict=True):
        path, values = naive.search()
        check_path(found, path, naive)
        check_candidates(found, values)
        assert found.target == naive.target and found.method == "reference"


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("top", [1, 4])
def test_the_best_k_are_the_naive_loop(top: int, pooled: bool, compat: bool) -> None:
    toy = ToyTransformer(seed=2, pooled=pooled)
    for found, naive in zip(finder(toy, 1).search(top=top, compat=compat), naives(toy, 1), strict=True):
        path, values = naive.search(top, compat)
        check_path(found, path, naive, compat)
        check_candidates(found, values)
        assert found.neurons.shape == ((3,) if top == 1 else (3, top))


def test_compat_differs_and_one_neuron_has_no_last() -> None:
    """The reference's top-K code leaves neurons out of the sums; with one neuron a layer there is nothing to leave out."""
    paths = finder(ToyTransformer(seed=2))
    assert [p.score for p in paths.search(top=3)] != [p.score for p in paths.search(top=3, compat=True)]
    assert [p.score for p in paths.search()] == [p.score for p in paths.search(compat=True)]


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("activation", Naive.activation_values),
        ("influence_pattern", Naive.influence_values),
        ("layer_integrated_gradients", Naive.layer_gradient_values),
    ],
)
def test_other_paths_are_the_naive_loop(method: str, values: Callable[[Naive], list[list[float]]], pooled: bool) -> None:
    toy = ToyTransformer(seed=3, pooled=pooled)
    for found, naive in zip(getattr(finder(toy), method)(), naives(toy), strict=True):
        expected = values(naive)
        check_candidates(found, expected)
        check_path(found, [ranked(of_layer)[:1] for of_layer in expected], naive)
        assert found.method == method


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_joint_scores_of_any_units(data: Any) -> None:
    pooled, layers, top = data.draw(st.booleans()), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    compat, steps = data.draw(st.booleans()), data.draw(st.integers(1, 4))
    toy = ToyTransformer(seed=data.draw(st.integers(0, 3)), pooled=pooled)
    unit = st.lists(st.integers(0, 11), min_size=top, max_size=top, unique=True)
    path = data.draw(st.lists(unit, min_size=layers, max_size=layers))
    used, naive = finder(toy, 1, steps), naives(toy, 1, steps)[0]
    found = used.joint(torch.tensor([path]), compat=compat)
    assert found.tolist() == pytest.approx([naive.joint(path, compat)], rel=1e-3, abs=1e-6)


def test_joint_scores_of_several_paths_of_an_image() -> None:
    toy = ToyTransformer()
    used, each = finder(toy), naives(toy)
    paths, owners = [[1, 2, 3], [4, 5, 6], [1, 2, 7], [0, 11, 0]], [2, 0, 2, 1]
    expected = [each[owner].joint([[u] for u in path]) for path, owner in zip(paths, owners, strict=True)]
    assert used.joint(torch.tensor(paths), scored=owners).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("reranked", [3, 12])
def test_the_exact_mode_is_the_naive_loop(reranked: int, pooled: bool) -> None:
    """With all 12 units reranked this is brute force over each layer."""
    toy = ToyTransformer(seed=EXACT_WINS, pooled=pooled)
    for found, naive in zip(finder(toy, 2, steps=2).search("exact", reranked=reranked), naives(toy, 2, steps=2), strict=True):
        check_path(found, naive.exact(reranked), naive)
        assert found.method == "exact"


def test_candidates_of_the_exact_mode_are_by_their_joint_scores() -> None:
    """What was maximised in a layer: the true joint score of the path that ends in each candidate."""
    toy = ToyTransformer(seed=EXACT_WINS)
    kept = 0
    for found, naive in zip(finder(toy, 4, steps=2).search("exact", reranked=12), naives(toy, 4, steps=2), strict=True):
        path = [[unit] for unit in found.neurons.tolist()]
        if path == naive.search()[0]:
            continue
        kept += 1
        for layer in range(3):
            candidates, scores = found.candidates[layer].tolist(), found.candidate_scores[layer].tolist()
            expected = [naive.joint([*path[:layer], [unit]]) for unit in candidates]
            assert candidates[0] == path[layer][0]
            assert scores == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert kept


def test_the_exact_mode_is_never_worse() -> None:
    better = 0
    for seed in range(4):
        inputs = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        used = PathFinder(small_classifier(tiny_vit(seed, depth=3)), inputs, [0, 1, 2, 3, 4, 0, 1, 2], steps=4)
        reference, exact = used.search(), used.search("exact")
        assert all(e.score >= r.score for e, r in zip(exact, reference, strict=True))
        better += sum(e.score > r.score for e, r in zip(exact, reference, strict=True))
        again = used.joint(torch.stack([e.neurons for e in exact]))
        assert again.tolist() == pytest.approx([e.score for e in exact], rel=1e-4)
    assert better


def test_the_exact_mode_on_the_zoo(vit: at.Classifier, small_cat: Tensor) -> None:
    images = torch.cat([vit.inputs(small_cat), vit.inputs(small_cat.flip(2))])
    used = PathFinder(vit, images, [3, 5], steps=1)
    assert all(e.score >= r.score for e, r in zip(used.search("exact", reranked=3), used.search(), strict=True))


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_the_joint_score_of_a_linear_model(steps: int, pooled: bool) -> None:
    """A logit linear in the neurons has the same gradients at every step: the score is (sum w) (sum g), whatever m."""
    toy = ToyTransformer(linear=True, pooled=pooled, seed=5)
    used = finder(toy, output="logit", steps=steps)
    path = torch.tensor([[3, 1, 4], [0, 0, 11], [7, 2, 5]])
    found = used.joint(path)
    for image, target in enumerate(TARGETS):
        weights = sum(used.hidden[layer][image, :, unit] for layer, unit in enumerate(path[image]))
        effects = [toy.head.weight[target] @ toy.blocks[layer].mlp.fc2.weight[:, unit] for layer, unit in enumerate(path[image])]
        gradient = float(sum(effects).detach()) / used.layers.read
        assert float(found[image]) == pytest.approx(float(weights.mean()) * gradient, rel=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_single_neuron_is_integrated_gradients(layer: int) -> None:
    """Left Riemann sum of the probability along the neuron, everything else as it comes; many steps add up to what removing it does."""
    toy = ToyTransformer(seed=6)
    used = PathFinder(toy_classifier(toy), toy_images(2), [1, 2], steps=100, layers=only(toy, layer))
    units = torch.tensor([[4], [9]])
    found = used.joint(units)
    for image, target in enumerate([1, 2]):
        unit, total = int(units[image]), 0.0
        clean = float(used.hidden[0][image, 0, unit])
        for k in range(100):
            value = torch.tensor(k / 100 * clean, requires_grad=True)

            def put(i: int, hidden: Tensor, value: Tensor = value, unit: int = unit) -> Tensor:
                return hidden.index_fill(2, torch.tensor([unit]), 0) + value * torch.eye(12)[unit] if i == layer else hidden

            score = toy(toy_images(2)[image : image + 1], toy.at_tokens(put)).softmax(dim=1)[0, target]
            total += float(torch.autograd.grad(score, value)[0]) * clean / 100
        assert float(found[image]) == pytest.approx(total, rel=1e-3, abs=1e-6)
    edited = torch.full((2, 3), -1)
    edited[:, layer] = units[:, 0]
    removed = edited_probabilities(used.classifier, used.inputs, edited)[range(2), [1, 2]]
    assert torch.allclose(found, used.target_scores - removed, atol=3e-4)
    assert float((used.target_scores - removed).abs().max()) > 5e-3


def only(toy: ToyTransformer, layer: int) -> Any:
    """One layer of the toy, at the class token."""
    found = find_neurons(toy_classifier(toy))
    return type(found)(found.names[layer : layer + 1], found.modules[layer : layer + 1], found.width, (0,), found.tokens, found.grid)


def test_the_first_layer_of_the_search_is_complete() -> None:
    """Its values add up to the probability with the layer less the one without it, as the number of steps grows."""
    toy = ToyTransformer(width=6, hidden=8, seed=7)
    used = finder(toy, steps=200)
    removed = torch.stack([torch.arange(8), *[torch.full((8,), -1)] * 2]).expand(3, 3, 8)
    without = edited_probabilities(used.classifier, used.inputs, removed)[range(3), TARGETS]
    totals = torch.stack([path.candidate_scores[0].sum() for path in used.search()])
    assert torch.allclose(totals, used.target_scores - without, atol=5e-3)
    assert float((used.target_scores - without).abs().max()) > 0.02


def test_one_step_is_alpha_zero_only() -> None:
    """(sum w) times the gradients where the neurons are 0."""
    toy = ToyTransformer(seed=8)
    used = finder(toy, steps=1)
    found = used.joint(torch.tensor([[0, 1, 2]] * 3))
    for score, naive in zip(found.tolist(), naives(toy), strict=True):
        zeroed = {layer: naive.hidden[layer].clone().index_fill(1, torch.tensor([layer]), 0) for layer in range(3)}
        gradients = naive.gradients(zeroed)
        expected = sum(naive.hidden[i][0, i] for i in range(3)) * sum(gradients[i][0, i] for i in range(3))
        assert score == pytest.approx(float(expected), rel=1e-4, abs=1e-7)


def test_a_neuron_that_is_zero_brings_nothing() -> None:
    toy = ToyTransformer(seed=9)
    with torch.no_grad():
        for block in toy.blocks:
            block.mlp.fc1.weight[5] = 0
            block.mlp.fc1.bias[5] = 0
    assert finder(toy).joint(torch.full((3, 3), 5)).tolist() == [0, 0, 0]


BATCHED: tuple[Callable[[PathFinder], list[NeuronPath]], ...] = (
    PathFinder.search,
    lambda f: f.search("exact", reranked=2),
    lambda f: f.search(top=3),
    PathFinder.activation,
    PathFinder.influence_pattern,
    PathFinder.layer_integrated_gradients,
)


@pytest.mark.parametrize("pooled", [False, True])
def test_batches_change_nothing(pooled: bool) -> None:
    """Five images with targets of their own, in parts of any size, and each alone."""
    toy = ToyTransformer(depth=2, seed=10, pooled=pooled)
    inputs, targets = toy_images(5), [2, 0, 3, 1, 1]
    each = [PathFinder(toy_classifier(toy), inputs[i : i + 1], targets[i : i + 1], steps=2) for i in range(5)]
    expected = [[method(finder)[0] for finder in each] for method in BATCHED]
    for batch_size, place in [(size, place) for size in (1, 3, 64) for place in range(len(BATCHED))]:
        together = PathFinder(toy_classifier(toy, batch_size=batch_size), inputs, targets, steps=2)
        for found, alone in zip(BATCHED[place](together), expected[place], strict=True):
            assert torch.equal(found.neurons, alone.neurons) and torch.equal(found.candidates, alone.candidates)
            assert found.score == pytest.approx(alone.score, rel=1e-4, abs=1e-6)
            assert torch.allclose(found.gradients, alone.gradients, rtol=1e-3, atol=1e-5)
            assert torch.allclose(found.candidate_scores, alone.candidate_scores, rtol=1e-3, atol=1e-6)
            assert found.target_score == pytest.approx(alone.target_score, abs=1e-6)


def test_prototypes_in_small_batches() -> None:
    """A classifier on another's features, of which each has a batch size of its own."""
    toy = ToyTransformer(seed=11)
    matrix, rescaled = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), ToyTransformer(seed=11, classes=5)
    with torch.no_grad():
        rescaled.head.weight.copy_(1.5 * matrix)
        rescaled.head.bias.zero_()
        for name, parameter in toy.named_parameters():
            if not name.startswith("head"):
                rescaled.get_parameter(name).copy_(parameter)
    base = toy_classifier(toy)
    used = base.with_prototypes(matrix, 1.5)
    base.batch_size = 2
    expected = PathFinder(toy_classifier(rescaled), toy_images(3), [4, 0, 2], steps=3).search()
    for found, wanted in zip(PathFinder(used, toy_images(3), [4, 0, 2], steps=3).search(), expected, strict=True):
        assert torch.equal(found.neurons, wanted.neurons)
        assert found.score == pytest.approx(wanted.score, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("nearest", [1, 3, 11])
def test_random_paths(nearest: int, pooled: bool) -> None:
    used = finder(ToyTransformer(seed=12, pooled=pooled), 6, steps=1)
    like, seen = used.search(), set()
    neurons = torch.stack([path.neurons for path in like])
    for seed in range(12):
        drawn = used.random(neurons, range(6 * seed, 6 * seed + 6), nearest=nearest)
        for image, (path, own) in enumerate(zip(drawn, like, strict=True)):
            for layer in range(3):
                activations = used.hidden[layer][image].sum(dim=0).tolist()
                unit, taken = int(path.neurons[layer]), int(own.neurons[layer])
                others = sorted((u for u in range(12) if u != taken), key=lambda u: abs(activations[u] - activations[taken]))
                assert unit in others[:nearest]
                seen.add((image, layer, others.index(unit)))
                assert path.candidates[layer].tolist() == others[:nearest]
                apart = [-abs(activations[u] - activations[taken]) for u in others[:nearest]]
                assert np.allclose(path.candidate_scores[layer], apart, atol=1e-5)
            assert path.method == "random" and path.target == own.target
    assert len(seen) > 0.6 * 6 * 3 * nearest  # every place is drawn, in every layer


def test_random_paths_are_seeded() -> None:
    toy = ToyTransformer(seed=12)
    used = finder(toy, 6)
    like, seeds = torch.stack([path.neurons for path in used.search()]), [5, 6, 7, 8, 5, 0]
    drawn = [path.neurons.tolist() for path in used.random(like, seeds)]
    assert drawn == [path.neurons.tolist() for path in used.random(like, seeds)]
    assert drawn != [path.neurons.tolist() for path in used.random(like, [seed + 50 for seed in seeds])]
    alone = PathFinder(used.classifier, used.inputs[3:4], used.targets[3:4], steps=STEPS)
    assert alone.random(like[3:4], [8])[0].neurons.tolist() == drawn[3]
    scores = [path.score for path in used.random(like, seeds)]
    assert scores == pytest.approx(used.joint(torch.tensor(drawn)).tolist(), rel=1e-5)


def test_each_path_counts_what_it_took() -> None:
    """L m + m + 1 rows of a search; of an exact one those of both searches and the candidates of each layer."""
    toy, steps, layers = ToyTransformer(), 4, 3
    expected = {
        "search": (1 + layers * steps + steps, layers * steps + steps),
        "activation": (1 + steps, steps),
        "influence_pattern": (1 + 2 * steps, 2 * steps),
        "layer_integrated_gradients": (1 + layers * steps + steps, layers * steps + steps),
    }
    for method, (forwards, backwards) in expected.items():
        found = getattr(finder(toy, steps=steps), method)()
        assert [(p.forwards, p.backwards) for p in found] == [(forwards, backwards)] * 3, method
    exact = finder(toy, steps=steps).search("exact", reranked=5)[0]
    assert exact.backwards == 2 * (layers * steps + steps) + layers * 5 * steps


def test_the_rows_of_one_method_are_not_counted_for_the_next() -> None:
    used = finder(ToyTransformer(), steps=4)
    alone = finder(ToyTransformer(), steps=4).activation()[0]
    used.search()
    after = used.activation()[0]
    assert (after.forwards, after.backwards) == (alone.forwards, alone.backwards)


def test_the_rows_forwarded_are_those_counted() -> None:
    toy, rows = ToyTransformer(), 0
    used = toy_classifier(toy, batch_size=5)
    layers, inputs = find_neurons(used), toy_images(3)
    used.logits(inputs)

    def count(_module: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    handle = toy.register_forward_pre_hook(count)
    found = PathFinder(used, inputs, TARGETS, steps=4, layers=layers).search()[0]
    handle.remove()
    assert rows == 3 * found.forwards


# What is returned


def test_shares() -> None:
    """(1, 2, 5) / 8 and (3, -1, 2) / 4, averaged."""
    path = finder(ToyTransformer(), 1).search()[0]
    own = {**vars(path), "activations": torch.tensor([1.0, 2.0, 5.0]), "gradients": torch.tensor([3.0, -1.0, 2.0])}
    assert NeuronPath(**own).shares.tolist() == pytest.approx([(1 / 8 + 3 / 4) / 2, (2 / 8 - 1 / 4) / 2, (5 / 8 + 2 / 4) / 2])
    zero = NeuronPath(**{**own, "gradients": torch.tensor([1.0, -1.0, 0.0])})
    assert not zero.shares.isfinite().all()
    assert zero.plain()["shares"][0] is None
    json.dumps(zero.plain(), allow_nan=False)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("top", [1, 3])
def test_shares_sum_to_one(top: int, pooled: bool) -> None:
    for path in finder(ToyTransformer(pooled=pooled)).search(top=top):
        assert path.shares.shape == (3,) and float(path.shares.double().sum()) == pytest.approx(1, abs=1e-4)
        parts = [path.activations.reshape(3, -1).sum(dim=1), path.gradients.reshape(3, -1).sum(dim=1)]
        assert torch.allclose(path.shares, (parts[0] / parts[0].sum() + parts[1] / parts[1].sum()) / 2, atol=1e-4)


def test_the_score_is_its_parts() -> None:
    """Of one token: (sum activations / m) (sum gradients)."""
    for path in finder(ToyTransformer()).search(top=2):
        assert path.score == pytest.approx(float(path.activations.sum() / STEPS * path.gradients.sum()), rel=1e-4)


def test_plain_is_json() -> None:
    used = toy_classifier(ToyTransformer(), class_names=["a", "b", "c", "d"])
    path = neuron_path(toy_photo(), used, "c", steps=3, top=2)
    plain = json.loads(json.dumps(path.plain(), allow_nan=False))
    assert plain["neurons"] == path.neurons.tolist() and plain["target_name"] == path.target_name == "c"
    assert plain["score"] == path.score and plain["layers"] == list(path.layers) and plain["place"] == "class token"
    assert plain["shares"] == path.shares.tolist() and plain["candidates"] == path.candidates.tolist()
    settings_used = plain["provenance"]["settings"]
    assert settings_used == {
        "mode": "reference",
        "top": 2,
        "compat": False,
        "reranked": 8,
        "steps": 3,
        "output": "probability",
        "target": "c",
    }
    assert plain["provenance"]["model"] == "toy" and plain["provenance"]["weights_digest"] == used.weights_digest


def toy_photo(seed: int = 0) -> Tensor:
    return photo(SIDE, seed)


def test_the_functions_are_the_finder() -> None:
    used = toy_classifier(ToyTransformer(seed=13), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    inputs = used.inputs(toy_photo())
    for output in ("probability", "logit"):
        whole = PathFinder(used, inputs, [1], steps=3, output=output)
        pairs = [
            (neuron_path(toy_photo(), used, 1, "exact", 3, output=output, reranked=4), whole.search("exact", reranked=4)),
            (neuron_path(toy_photo(), used, 1, steps=3, output=output, top=2, compat=True), whole.search(top=2, compat=True)),
            (activation_path(toy_photo(), used, 1, steps=3, output=output), whole.activation()),
            (influence_pattern_path(toy_photo(), used, 1, 3, output=output), whole.influence_pattern()),
            (layer_gradient_path(toy_photo(), used, 1, 3, output=output), whole.layer_integrated_gradients()),
        ]
        for found, expected in pairs:
            assert torch.equal(found.neurons, expected[0].neurons) and found.method == expected[0].method
            assert found.score == pytest.approx(expected[0].score, rel=1e-5)
            assert found.provenance["settings"]["output"] == output


def test_the_predicted_class_is_explained_by_default() -> None:
    used = toy_classifier(ToyTransformer(seed=14), class_names=["a", "b", "c", "d"])
    for seed in range(4):
        logits = used.logits(used.inputs(toy_photo(seed)))[0]
        path = neuron_path(toy_photo(seed), used, steps=2)
        assert path.target == int(logits.argmax()) and path.class_names == ("a", "b", "c", "d")
        assert path.target_score == pytest.approx(float(logits.softmax(dim=0).max()), abs=1e-6)
        logit = neuron_path(toy_photo(seed), used, "b", steps=2, output="logit")
        assert logit.target == 1 and logit.target_score == pytest.approx(float(logits[1]), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"mode": "fast"}, "mode is 'fast': expected one of reference, exact, removal"),
        ({"output": "loss"}, "output is 'loss': expected one of probability, logit"),
        ({"top": 0}, "top is 0: expected a whole number from 1 to 12"),
        ({"top": 13}, "top is 13"),
        ({"top": True}, "top is True"),
        ({"top": 2, "mode": "exact"}, "top=2 with mode='exact'"),
        ({"reranked": 0}, "reranked is 0"),
        ({"target": 4}, "class index 4 is out of range"),
        ({"target": "dog"}, "has no class 'dog'"),
        ({"layers": ["fc2"]}, "no layer 'fc2'"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        neuron_path(toy_photo(), toy_classifier(ToyTransformer()), **options)


def test_errors_of_the_finder() -> None:
    used = finder(ToyTransformer())
    with pytest.raises(at.UserError, match="3 images and 2 targets"):
        PathFinder(used.classifier, used.inputs, [0, 1])
    for neurons in (torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, 4, dtype=torch.long)):
        with pytest.raises(at.UserError, match=r"expected \[3, 3\], a unit of each layer"):
            used.joint(neurons)
    like = torch.zeros(3, 3, dtype=torch.long)
    for wrong in (like[:2], like[:, :2], like[:, :, None]):
        with pytest.raises(at.UserError, match=r"expected a path for each image, int64 \[3, 3\]"):
            used.random(wrong, [0, 1, 2])
    with pytest.raises(at.UserError, match="2 seeds for 3 images"):
        used.random(like, [0, 1])
    for nearest in (0, 12):
        with pytest.raises(at.UserError, match=f"nearest is {nearest}: expected a whole number from 1 to 11"):
            used.random(like, [0, 1, 2], nearest=nearest)


def test_a_narrow_mlp_needs_no_settings() -> None:
    """Fewer hidden units than candidates are reported by default."""
    for mode in ("reference", "exact"):
        path = neuron_path(toy_photo(), toy_classifier(ToyTransformer(hidden=5)), steps=2, mode=mode)
        assert sorted(path.candidates[0].tolist()) == list(range(5))


@pytest.mark.parametrize("function", [neuron_path, activation_path, influence_pattern_path, layer_gradient_path])
def test_what_is_no_vision_transformer(function: Callable[..., NeuronPath], cnn: at.Classifier, small_cat: Tensor) -> None:
    with pytest.raises(at.NotApplicable, match="expected a vision transformer"):
        function(small_cat, cnn)


@pytest.mark.parametrize("function", [neuron_path, activation_path, influence_pattern_path, layer_gradient_path])
def test_the_classifier_may_still_come_first(function: Callable[..., NeuronPath]) -> None:
    used, picture = toy_classifier(ToyTransformer()), toy_photo()
    expected = function(picture, used, 1, steps=2)
    with pytest.warns(DeprecationWarning, match=rf"is now {function.__name__}\(image, classifier, \.\.\.\)"):
        found = function(used, picture, 1, steps=2)
    assert torch.equal(found.neurons, expected.neurons) and found.score == expected.score and found.target == 1


# The model is left as it was


def calls(used: at.Classifier) -> dict[str, Callable[[], Any]]:
    """Everything that runs the model. ``inputs`` are made outside, as a caller would."""
    inputs, layers = toy_images(2), find_neurons(used)
    paths = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def made() -> PathFinder:
        return PathFinder(used, inputs, [0, 1], steps=2, layers=layers)

    return {
        "find": lambda: find_neurons(used).positions,
        "reference": lambda: neuron_path(toy_photo(), used, steps=2).score,
        "exact": lambda: neuron_path(toy_photo(), used, 1, "exact", 2, reranked=2).score,
        "activation": lambda: activation_path(toy_photo(), used, steps=2).score,
        "influence": lambda: influence_pattern_path(toy_photo(), used, steps=2).score,
        "layer gradient": lambda: layer_gradient_path(toy_photo(), used, steps=2).score,
        "finder": lambda: [p.score for p in made().search()],
        "finder, influence": lambda: [p.score for p in made().influence_pattern()],
        "joint": lambda: made().joint(paths).tolist(),
        "edited": lambda: edited_probability(toy_photo(), used, [1, 2, 3], 0),
        "edited, batch": lambda: edited_probabilities(used, inputs, paths).tolist(),
        "pruned": lambda: pruned_probabilities(used, inputs, paths, 0.5).tolist(),
        "means": lambda: mean_activations(used, inputs).tolist(),
        "decoder": lambda: NeuronDecoder(used, "scaled", inputs=inputs).effects(2, [1]).tolist(),
        "agreement": lambda: NeuronDecoder(used).agreement(inputs, 2, [1]).tolist(),
        "exemplars": lambda: [e.activation for e in exemplars(used, [inputs], [(1, 3)])[0]],
    }


NAMES = list(calls(toy_classifier(ToyTransformer())))


def busy_toy() -> ToyTransformer:
    """In train mode but for a part, some parameters frozen, gradients there from before, a hook of the caller's."""
    toy = ToyTransformer(seed=15).train()
    toy.blocks[1].eval()
    toy.head.weight.requires_grad_(False)
    toy.blocks[0].mlp.fc2.weight.grad = torch.ones(8, 12)
    toy.blocks[0].mlp.fc2.register_forward_pre_hook(lambda _module, _args: None)
    return toy


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_left_as_it_was(name: str) -> None:
    toy = busy_toy()
    call = calls(toy_classifier(toy))[name]
    with unchanged(toy):
        call()


class Broken(RuntimeError):
    pass


class Fragile(ToyTransformer):
    """Raises in one of its forward passes."""

    def __init__(self, left: list[int]) -> None:
        super().__init__(seed=15)
        vars(self)["left"] = left

    def forward(self, x: Tensor, edit: Any = None) -> Tensor:
        found = super().forward(x, edit)
        self.left[0] -= 1
        if self.left[0] == 0:
            raise Broken
        return found


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_left_as_it_was_by_a_call_that_raises(name: str) -> None:
    """In each of its forward passes, one after the other, until the call is through."""
    left = [0]
    toy = Fragile(left).train()
    call = calls(toy_classifier(toy))[name]
    for broken in range(1, 200):
        left[0] = broken
        with unchanged(toy):
            try:
                call()
            except Broken:
                continue
        break
    assert broken > 1 and left[0] > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_mode_of_the_model_and_of_the_caller_does_not_matter(name: str) -> None:
    expected = calls(toy_classifier(ToyTransformer(seed=15)))[name]()
    for mode in (torch.no_grad, torch.inference_mode):
        toy = busy_toy()
        call = calls(toy_classifier(toy))[name]
        with unchanged(toy), mode():
            assert np.allclose(call(), expected, rtol=1e-5, atol=1e-7)


def test_dropout_does_not_matter() -> None:
    used = small_classifier(tiny_vit(drop_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5))
    expected = neuron_path(photo(16), used, 0, steps=3)
    used.module.train()
    with unchanged(used.module):
        found = neuron_path(photo(16), used, 0, steps=3)
    assert torch.equal(found.neurons, expected.neurons) and found.score == expected.score


def test_overridden_values_reach_the_head_tokens_only() -> None:
    toy = ToyTransformer(seed=16)
    used = toy_classifier(toy)
    layers, seen = find_neurons(used), {}
    values = torch.full((2, 1, 12), 7.0)

    def look(hidden: Tensor) -> Tensor:
        seen["hidden"] = hidden
        return hidden

    with layers.overridden({1: values}), edited_inputs({layers.modules[1]: look}):
        found = used.logits(toy_images(2))
    assert bool((seen["hidden"][:, :1] == 7).all()) and not bool((seen["hidden"][:, 1:] == 7).any())
    expected = toy(toy_images(2), toy.at_tokens(lambda layer, hidden: values if layer == 1 else hidden))
    assert torch.allclose(found, expected, atol=1e-6)


# What the public reference implementation computed


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden" / "neuronpath_golden.json").read_text())


@pytest.fixture(scope="module")
def arrays(shared: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "golden" / "neuronpath_arrays.npz"))


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def rows(request: Any) -> list[int]:
    """Which images: two of one class, or all."""
    return list(range(16)) if request.param == "all" else [0, 10]


@pytest.fixture(scope="module")
def images(golden: dict[str, Any], rows: list[int]) -> list[dict[str, Any]]:
    return [golden["images"][row] for row in rows]


@pytest.fixture(scope="module")
def golden_finder(vit: at.Classifier, images: list[dict[str, Any]], rows: list[int], arrays: dict[str, np.ndarray]) -> PathFinder:
    inputs = torch.cat([vit.inputs(pixels) for pixels in arrays["pixels"][rows]])
    return PathFinder(vit, inputs, [image["target"] for image in images])


@pytest.fixture(scope="module")
def golden_paths(golden_finder: PathFinder) -> dict[str, list[NeuronPath]]:
    return {
        "neuron_path": golden_finder.search(),
        "activation_path": golden_finder.activation(),
        "influence_path": golden_finder.influence_pattern(),
    }


def test_the_model_and_images_are_those_of_the_reference(
    golden: dict[str, Any], images: list[dict[str, Any]], golden_finder: PathFinder
) -> None:
    logits = golden_finder.classifier.logits(golden_finder.inputs)
    assert np.allclose(logits, [image["logits"] for image in images], atol=1e-4)
    assert golden_finder.steps == golden["meta"]["ig_total_step"] and golden["meta"]["layers"] == len(golden_finder.layers)


@pytest.mark.parametrize("name", ["neuron_path", "activation_path", "influence_path"])
def test_paths_of_the_reference(
    name: str, golden: dict[str, Any], images: list[dict[str, Any]], golden_paths: dict[str, list[NeuronPath]]
) -> None:
    for image, path in zip(images, golden_paths[name], strict=True):
        expected = image[name]
        assert path.neurons.tolist() == expected["path"], image["file"]
        assert path.score == pytest.approx(expected["score"], abs=1e-5)
        assert path.target_score == pytest.approx(image["target_probability"], abs=1e-5)
        for layer, candidates in enumerate(expected["candidates_per_layer"]):
            assert path.candidates[layer, : len(candidates)].tolist() == [unit for unit, _ in candidates]
            values = [value for _, value in candidates]
            assert np.allclose(path.candidate_scores[layer, : len(candidates)], values, rtol=0, atol=3e-4 * abs(values[0]))
    if len(images) == len(golden["images"]):
        mean = np.mean([path.score for path in golden_paths[name]])
        assert mean == pytest.approx(golden["means"][name]["score"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "key", "tolerance"),
    [("neuron_path", "ja", 3e-4), ("activation_path", "activations", 1e-4), ("influence_path", "influence_gradients", 1e-4)],
)
def test_values_of_the_reference(
    name: str, key: str, tolerance: float, rows: list[int], arrays: dict[str, np.ndarray], golden_paths: dict[str, list[NeuronPath]]
) -> None:
    """Those of the candidates, and that no larger one was left out."""
    for path, expected in zip(golden_paths[name], arrays[key][rows], strict=True):
        found = path.candidate_scores.numpy()
        allowed = tolerance * (1 if key == "activations" else np.abs(expected).max(axis=1, keepdims=True))
        assert np.all(np.abs(found - np.take_along_axis(expected, path.candidates.numpy(), axis=1)) <= allowed)
        assert np.all(np.abs(found - np.sort(expected, axis=1)[:, ::-1][:, : found.shape[1]]) <= allowed)


def test_activations_of_the_reference(golden_finder: PathFinder, rows: list[int], arrays: dict[str, np.ndarray]) -> None:
    hidden = torch.stack(golden_finder.hidden, dim=1)[:, :, 0]
    assert np.allclose(hidden, arrays["activations"][rows], atol=1e-4)


@pytest.mark.slow
def test_batches_of_the_reference(golden: dict[str, Any], vit: at.Classifier, arrays: dict[str, np.ndarray]) -> None:
    """Two images with the first one's label as target; the one path of a pair is the reference's own affair."""
    files = [image["file"] for image in golden["images"]]
    expected = golden["batching"]["mixed_class_pair"]
    inputs = torch.cat([vit.inputs(arrays["pixels"][files.index(name)]) for name in expected["files"]])
    mixed = PathFinder(vit, inputs, [expected["target_used_for_both"]] * 2)
    for found, paths, scores in [(mixed.search(), "paths", "scores"), (mixed.activation(), "activation_paths", "activation_scores")]:
        assert [path.neurons.tolist() for path in found] == expected[paths]
        assert [path.score for path in found] == pytest.approx(expected[scores], abs=1e-5)
    expected = golden["batching"]["influence_pattern_pair"]  # with paths of their own in ``test_paths_of_the_reference``
    own = [golden["images"][files.index(name)]["influence_path"]["path"] for name in expected["files"]]
    assert own == expected["paths_when_run_alone"] != expected["paths"]


def test_paths_say_in_words_what_they_are() -> None:
    path = replace(at.neuron_path(torch.rand(3, 32, 32), "zoo:vit", target=0, steps=1), method="exact")
    assert path.kind == "neuron path, mode exact"
    assert replace(path, method="influence_pattern").kind == "influence pattern path"


def test_a_path_is_printed_without_its_tensors(vit: at.Classifier, small_cat: Tensor) -> None:
    path = at.activation_path(small_cat, vit, "cat")
    shown = repr(path)
    assert shown.startswith("NeuronPath(activation path, cat ") and str(path.neurons.tolist()) in shown
    assert f"score {path.score:.4g}, {len(path.layers)} layers)" in shown and "tensor" not in shown
