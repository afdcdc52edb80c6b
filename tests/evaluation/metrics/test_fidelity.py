from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn

import attribution as at
from evaluation.metrics.fidelity import attribution_values, infidelity, mu_fidelity, sensitivity, to_input

SIZE = 14


class Linear(nn.Module):
    """Two classes; the logit of the first is sum(weight * input)."""

    def __init__(self, size: int = SIZE, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed)) / size)

    def forward(self, inputs: Tensor) -> Tensor:
        first = (inputs * self.weight).sum(dim=(1, 2, 3))
        return torch.stack([first, torch.zeros_like(first)], dim=1)


def linear_classifier(**settings: Any) -> at.Classifier:
    return at.Classifier(Linear(), size=SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), **settings)


def random_image(seed: int = 1, size: int = SIZE) -> Tensor:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))


def contributions(classifier: at.Classifier, image: Tensor) -> Tensor:
    """weight * input summed over the channels: what hiding a pixel under the mean colour costs the first logit."""
    return (classifier.inputs(image)[0] * classifier.module.weight).sum(dim=0).detach()


def explanation_of(image: Tensor, values: Tensor) -> at.Explanation:
    return at.Explanation(image, target=0, class_names=("a", "b"), probabilities=torch.tensor([0.5, 0.5]), pixel_map=values)


def naive_mu_fidelity(classifier: at.Classifier, image: Tensor, values: Tensor, samples: int, grid: int, drop: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    dropped = torch.rand(samples, grid * grid, generator=generator) < drop
    whole = classifier.probabilities(classifier.inputs(image))[0, 0].item()
    mean = torch.tensor(classifier.preprocessing.mean)
    drops, worths = [], []
    for row in dropped:
        shown, worth = image.clone(), 0.0
        for y in range(image.shape[1]):
            for x in range(image.shape[2]):
                if row[(y * grid // image.shape[1]) * grid + x * grid // image.shape[2]]:
                    shown[:, y, x] = mean
                    worth += values[y, x].item()
        drops.append(whole - classifier.probabilities(classifier.inputs(shown))[0, 0].item())
        worths.append(worth)
    return float(spearmanr(drops, worths).statistic)


def test_true_contributions_of_a_linear_model_are_perfectly_faithful() -> None:
    classifier, image = linear_classifier(), random_image()
    true = contributions(classifier, image)
    for output in ("logit", "probability"):  # the probability rises with the logit, so the ranks agree
        found = [mu_fidelity(classifier, image, sign * true, 0, output=output) for sign in (1, -1)]
        assert found == pytest.approx([1, -1])
    assert mu_fidelity(classifier, image, true, "class 1", output="probability") == pytest.approx(-1)
    assert infidelity(classifier, image, true, 0, output="logit") == pytest.approx(0, abs=1e-10)
    assert infidelity(classifier, image, true - 0.1, 0, output="logit") > 1e-3


def test_other_fills_have_other_true_contributions() -> None:
    classifier, image = linear_classifier(), random_image()
    weight = classifier.module.weight.detach() / torch.tensor(classifier.preprocessing.std)[:, None, None]
    for fill, hidden in (("black", torch.zeros_like(image)), ("white", torch.ones_like(image))):
        true = ((image - hidden) * weight).sum(dim=0)
        assert mu_fidelity(classifier, image, true, 0, fill=fill, output="logit") == pytest.approx(1)
        assert infidelity(classifier, image, true, 0, fill=fill, output="logit") == pytest.approx(0, abs=1e-10)
        assert mu_fidelity(classifier, image, contributions(classifier, image), 0, fill=fill, output="logit") < 0.99


@settings(max_examples=15, deadline=None)
@given(st.integers(5, 17), st.integers(5, 17), st.integers(2, 5), st.floats(0.1, 0.9), st.integers(0, 2**16))
def test_mu_fidelity_equals_a_naive_loop(height: int, width: int, grid: int, drop: float, seed: int) -> None:
    classifier = linear_classifier(batch_size=5)
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, height, width, generator=generator)
    values = torch.randn(height, width, generator=generator)
    found = mu_fidelity(classifier, image, values, 0, samples=12, grid=grid, drop=drop, seed=seed)
    assert found == pytest.approx(naive_mu_fidelity(classifier, image, values, 12, grid, drop, seed), abs=1e-6)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_mu_fidelity_of_the_zoo_equals_a_naive_loop(name: str, small_cat: Tensor, request: pytest.FixtureRequest) -> None:
    classifier = request.getfixturevalue(name)
    values = small_cat.sum(dim=0)
    expected = naive_mu_fidelity(classifier, small_cat, values, 16, 7, 0.2, 3)
    assert mu_fidelity(classifier, small_cat, values, 0, samples=16, seed=3) == pytest.approx(
        expected, abs=0.01
    )  # near ties may change places


def test_correlations_that_do_not_exist_are_zero() -> None:
    classifier, image = linear_classifier(), random_image()
    true = contributions(classifier, image)
    for constant in (0.0, 1.0):
        assert mu_fidelity(classifier, image, torch.zeros(SIZE, SIZE), 0) == 0
        assert mu_fidelity(classifier, image, true, 0, drop=constant) == 0
    assert mu_fidelity(classifier, image, true, 0, fill=image) == 0, "hiding changes nothing"
    blind = at.Classifier(lambda inputs: inputs.new_zeros(len(inputs), 2), size=SIZE)
    assert mu_fidelity(blind, image, true, 0) == 0
    faint = at.Classifier(lambda inputs: torch.stack([5 + 1e-9 * inputs.sum((1, 2, 3)), inputs[:, 0, 0, 0] * 0], 1), size=SIZE)
    assert mu_fidelity(faint, image, true, 0, output="logit") == 0


def test_a_probability_of_zero_is_the_lowest_logit() -> None:
    def certain(inputs: Tensor) -> Tensor:
        lit = (inputs[:, 0, :2, :2].mean((1, 2)) > 0.5).float()
        return torch.stack([lit, 1 - lit], dim=1)

    classifier, image = at.Classifier(certain, size=SIZE), torch.ones(3, SIZE, SIZE)
    corner = torch.zeros(SIZE, SIZE)
    corner[:2, :2] = 1
    assert mu_fidelity(classifier, image, corner, 0, output="logit", fill="black") == pytest.approx(1)
    assert math.isfinite(infidelity(classifier, image, corner, 0, output="logit", fill="black"))


def test_random_maps_are_near_zero_on_average() -> None:
    classifier, image = linear_classifier(), random_image()
    generator = torch.Generator().manual_seed(0)
    found = [mu_fidelity(classifier, image, torch.randn(SIZE, SIZE, generator=generator), 0, seed=seed) for seed in range(200)]
    assert abs(np.mean(found)) < 4 * np.std(found) / math.sqrt(200)
    assert np.std(found) == pytest.approx(1 / math.sqrt(31), abs=0.05), "as of the ranks of 32 independent pairs"


def test_the_seed_fixes_the_numbers_and_the_global_generator_stays(cnn: at.Classifier, small_cat: Tensor) -> None:
    values = small_cat.mean(dim=0)
    noisy: Callable[[Tensor], Tensor] = lambda image: image.mean(dim=0) + torch.rand(32, 32)  # noqa: E731
    measures = [
        lambda seed: mu_fidelity(cnn, small_cat, values, 3, seed=seed),
        lambda seed: infidelity(cnn, small_cat, values, 3, seed=seed),
        lambda seed: sensitivity(noisy, small_cat, seed=seed),
    ]
    for measure in measures:
        torch.manual_seed(11)
        state = torch.get_rng_state()
        first = measure(5)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(7)
        assert measure(5) == first
        assert measure(6) != first


def test_a_classifier_stays_as_it_was(small_cat: Tensor) -> None:
    classifier = at.Classifier(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3 * 32 * 32, 2)), size=32)
    classifier.module.train()
    digest = classifier.weights_digest
    mu_fidelity(classifier, small_cat, small_cat[0], 0)
    infidelity(classifier, small_cat, small_cat[0], 0)
    assert all(module.training for module in classifier.module.modules())
    assert all(parameter.grad is None for parameter in classifier.module.parameters())
    assert classifier.weights_digest == digest


def random_squares(samples: int, side: int, most: int, seed: int) -> Tensor:
    """The squares of ``infidelity``, one pixel after the other: float [samples, side, side]."""
    draws = torch.rand(samples, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    squares = torch.zeros(samples, side, side)
    for square, (size, down, right) in zip(squares, draws.tolist(), strict=True):
        edge = math.floor(size * most) + 1
        top, left = math.floor(down * (side - edge + 1)), math.floor(right * (side - edge + 1))
        for y in range(top, top + edge):
            for x in range(left, left + edge):
                square[y, x] = 1
    return squares


@pytest.mark.parametrize("samples", [10, 64])
def test_infidelity_is_captums_with_the_same_squares(samples: int, cnn: at.Classifier, small_cat: Tensor) -> None:
    values = small_cat.mean(dim=0) - 0.4
    squares = random_squares(samples, 32, 10, seed=2)[:, None].expand(-1, 3, -1, -1)
    expected = captum_infidelity(
        lambda inputs: cnn.probabilities(inputs),
        lambda inputs: (squares, inputs * (1 - squares)),
        cnn.inputs(small_cat),
        values.expand(1, 3, 32, 32) / 3,
        target=3,
        n_perturb_samples=samples,
        normalize=True,
    )
    assert infidelity(cnn, small_cat, values, 3, samples=samples, seed=2) == pytest.approx(float(expected), rel=1e-4)


def test_infidelity_by_least_squares() -> None:
    classifier, image = linear_classifier(), random_image()
    true, values = contributions(classifier, image), random_image(5).sum(dim=0)
    squares = random_squares(64, SIZE, 4, seed=0).double()
    drops, worths = (squares * true).sum(dim=(1, 2)), (squares * values).sum(dim=(1, 2))
    factor = (drops @ worths) / (worths @ worths)
    expected = ((factor * worths - drops) ** 2).mean()
    found = infidelity(classifier, image, values, 0, output="logit")
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert infidelity(classifier, image, -3 * values, 0, output="logit") == pytest.approx(found), "unit and sign do not matter"
    zeros = infidelity(classifier, image, torch.zeros(SIZE, SIZE), 0, output="logit")
    assert zeros == pytest.approx(float((drops**2).mean()), rel=1e-5)
    assert found <= zeros


def test_one_square_of_one_pixel() -> None:
    classifier, image = linear_classifier(), random_image()
    squares = random_squares(20, SIZE, 1, seed=0)
    assert torch.equal(squares.sum(dim=(1, 2)), torch.ones(20))
    drops = (squares * contributions(classifier, image)).sum(dim=(1, 2))
    found = infidelity(classifier, image, torch.zeros(SIZE, SIZE), 0, samples=20, square=0.01, output="logit")
    assert found == pytest.approx(float((drops**2).mean()), rel=1e-4)


@pytest.mark.parametrize(
    "way",
    [
        {"size": (6, 9), "interpolation": "bicubic"},
        {"size": 8, "resize": "short_side", "resized": (10, 10)},
        {"size": 12, "resize": "long_side"},
        {"size": 7, "interpolation": "nearest"},
    ],
)
def test_a_map_reaches_the_input_as_a_gray_image_would(way: dict) -> None:
    values = torch.rand(11, 20, generator=torch.Generator().manual_seed(0))
    plain = at.Classifier(lambda inputs: inputs.mean((2, 3)), **way)
    normalised = at.Classifier(lambda inputs: inputs.mean((2, 3)), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), **way)
    expected = plain.inputs(values.expand(3, -1, -1))[0]
    for channel in expected:
        assert torch.equal(to_input(plain, values), channel)
    assert torch.equal(to_input(normalised, values), expected[0]), "normalisation does not apply to a map"


def test_a_map_of_the_inputs_size_stays_bit_for_bit() -> None:
    values = torch.randn(SIZE, SIZE)
    assert torch.equal(to_input(linear_classifier(), values), values)


def test_infidelity_judges_a_large_map_at_the_models_resolution() -> None:
    classifier = linear_classifier(interpolation="nearest")
    small = random_image()
    large = small.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
    true = contributions(classifier, small).repeat_interleave(3, dim=0).repeat_interleave(3, dim=1)
    assert infidelity(classifier, large, true, 0, output="logit") == pytest.approx(0, abs=1e-10)
    assert infidelity(classifier, large, true.T, 0, output="logit") > 1e-3


def test_sensitivity_is_captums() -> None:
    image = random_image()

    def scaled(one: Tensor) -> Tensor:
        return (one**2).sum(dim=0)

    noise = torch.rand(10, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    perturbed = (image + 0.05 * (2 * noise - 1)).clamp(0, 1)
    ours = sensitivity(scaled, image, radius=0.05, seed=4)
    by_hand = max(float((scaled(one) - scaled(image)).norm() / scaled(image).norm()) for one in perturbed)

    def scaled_batch(images: Tensor | tuple[Tensor, ...]) -> tuple[Tensor]:
        return ((torch.cat(tuple(images)).reshape(-1, 3, SIZE, SIZE) ** 2).sum(dim=1),)

    captums = sensitivity_max(scaled_batch, image[None], lambda _: perturbed)
    assert ours == pytest.approx(by_hand, rel=1e-5)
    assert ours == pytest.approx(float(captums), rel=1e-5)


def test_sensitivity_in_closed_form() -> None:
    image = torch.full((3, 4, 4), 0.5)
    assert sensitivity(lambda one: torch.ones(4, 4), image) == 0
    found = sensitivity(lambda one: one.mean(dim=0), image, radius=0.1, samples=20)
    assert 0 < found <= 0.1 / 0.5
    scale = sensitivity(lambda one: 7 * one.mean(dim=0), image, radius=0.1, samples=20)
    assert scale == pytest.approx(found, rel=1e-5), "relative to the norm of the map"
    assert sensitivity(lambda one: one.mean(dim=0), image, radius=0.2, samples=20) == pytest.approx(2 * found, rel=1e-4)
    assert sensitivity(lambda one: one.mean(dim=0), image, radius=0.1, samples=3) <= found, "the maximum of fewer"


def test_perturbed_images_are_images_and_gradients_flow() -> None:
    classifier, image = linear_classifier(), random_image().round()
    seen = []

    def gradient(one: Tensor) -> at.Explanation:
        seen.append(one.clone())
        inputs = classifier.inputs(one).requires_grad_()
        (found,) = torch.autograd.grad(classifier.probabilities(inputs)[0, 0], inputs)
        return explanation_of(one, found[0].sum(dim=0))

    assert sensitivity(gradient, image, radius=0.3, samples=4) > 0
    assert len(seen) == 5 and torch.equal(seen[0], image)
    assert all(one.min() >= 0 and one.max() <= 1 and 0 < (one - image).abs().max() <= 0.3 + 1e-6 for one in seen[1:])


def test_attribution_values_are_signed_where_the_method_is(small_cat: Tensor, cnn: at.Classifier) -> None:
    signed = torch.randn(5, 6)
    assert torch.equal(attribution_values(explanation_of(torch.zeros(3, 5, 6), signed)), signed)
    assert attribution_values(signed.double().requires_grad_()).dtype == torch.float32
    searched = at.explain(small_cat, cnn, regions="grid", region_options={"count": 9})
    assert torch.equal(attribution_values(searched), searched.heatmap)
    for bad in (math.nan, math.inf):
        broken = signed.clone()
        broken[1, 1] = bad
        with pytest.raises(at.UserError, match="1 of the 30 values of the map are not finite"):
            attribution_values(explanation_of(torch.zeros(3, 5, 6), broken))


def test_bad_settings() -> None:
    classifier, image = linear_classifier(), random_image()
    values = torch.randn(SIZE, SIZE)
    cases: list[tuple[Callable[..., float], dict[str, Any], str]] = [
        (mu_fidelity, {"samples": 1}, "samples is 1: expected a whole number of at least 2"),
        (mu_fidelity, {"grid": 0}, "grid is 0: expected a whole number of at least 1"),
        (mu_fidelity, {"grid": 15}, "a grid of 15x15 cells does not fit an image of 14x14 pixels"),
        (mu_fidelity, {"drop": 1.5}, r"drop is 1.5: expected a probability"),
        (mu_fidelity, {"drop": math.nan}, r"drop is nan: expected a probability"),
        (mu_fidelity, {"output": "score"}, "output='score': expected 'probability' or 'logit'"),
        (mu_fidelity, {"seed": -1}, "seed is -1"),
        (infidelity, {"samples": 0}, "samples is 0: expected a whole number of at least 1"),
        (infidelity, {"square": 0}, "square is 0: expected a share"),
        (infidelity, {"output": "margin"}, "output='margin'"),
    ]
    for measure, options, message in cases:
        with pytest.raises(at.UserError, match=message):
            measure(classifier, image, values, 0, **options)
    for measure in (mu_fidelity, infidelity):
        with pytest.raises(at.UserError, match="the map is 14x13, the image 14x14: give the image at the resolution of the map"):
            measure(classifier, image, values[1:], 0)
        with pytest.raises(at.UserError, match="no class 'dog'"):
            measure(classifier, image, values, "dog")
    with pytest.raises(at.UserError, match="radius is 0"):
        sensitivity(lambda one: one[0], image, radius=0)
    with pytest.raises(at.UserError, match="samples is True"):
        sensitivity(lambda one: one[0], image, samples=True)
    with pytest.raises(at.UserError, match="the map is 14x3, the image 14x14"):
        sensitivity(lambda one: one[0, :3], image)
    with pytest.raises(at.UserError, match=r"the map is float32 \[3, 14, 14\]: expected an explanation, or a tensor of floats \[H, W\]"):
        sensitivity(lambda one: one, image)
