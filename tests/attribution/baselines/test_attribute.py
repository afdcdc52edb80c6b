from __future__ import annotations

import copy
import hashlib
import inspect
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from captum.attr._core.lime import get_exp_kernel_similarity_function
from networks import apart, classifier, photo, tiny_vit, vgg
from torch import Tensor, nn

import attribution as at
from attribution.baselines import METHOD_PRESETS, options
from attribution.baselines.attribute import METHODS, attribute
from attribution.baselines.method import Method
from attribution.baselines.smoothing import Smoothing, smoothed
from attribution.task import Output, Task, over_channels, seeded

CELLS = {"regions": "grid", "region_options": {"count": 6}}
QUICK: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"n_steps": 7},
    "smooth_grad": {"nt_samples": 7},
    "gradient_shap": {"n_samples": 7},
    "occlusion": {"sliding_window_shapes": 12, "strides": 7},
    "feature_ablation": CELLS,
    "shapley_value_sampling": {"n_samples": 2, **CELLS},
    "kernel_shap": {"n_samples": 20, **CELLS},
    "lime": {"n_samples": 20, **CELLS},
    "rise": {"samples": 14, "grid": 4},
    "hsic": {"samples": 14, "grid": 3},
    "sobol": {"designs": 4, "grid": 2},
}
TRANSFORMER = {"attention_rollout", "transformer_attribution", "grad_eclip", "attn_lrp"}
REFUSED = {
    "cnn": {"lrp", *TRANSFORMER},
    "vit": {"deep_lift", "guided_backprop", "deconvolution", "lrp", "guided_grad_cam"},
}
PAIRS = [(model, method) for model in REFUSED for method in METHODS]
RUNNING = [pair for pair in PAIRS if pair[1] not in REFUSED[pair[0]]]
BLACK_BOX = {name for name, m in METHODS.items() if m.family in ("perturbation", "control")}


FORWARD_ONLY = {*BLACK_BOX, "attention_rollout", "score_cam", "ablation_cam"}
BREAKING = [
    (model, method, backward)
    for model, method in [*RUNNING, ("vgg", "lrp"), ("vgg", "deep_lift"), ("vgg", "guided_grad_cam")]
    for backward in (False, True)
    if METHODS[method].family != "control" and not (backward and method in FORWARD_ONLY)
]


@pytest.fixture(scope="module")
def wide(cat: Tensor) -> Tensor:
    """[3, 40, 60], larger than the input and not square."""
    return torch.nn.functional.interpolate(cat[None], size=(40, 60), mode="bilinear", antialias=True)[0].clamp(0, 1)


@pytest.fixture(scope="module")
def models(cnn: at.Classifier, vit: at.Classifier) -> dict[str, at.Classifier]:
    """Copies, some submodules training and some parameters frozen, whose state must come back."""
    made = {"cnn": copy.deepcopy(cnn), "vit": copy.deepcopy(vit)}
    for each in made.values():
        children = list(each.module.modules())
        for module in children[::3]:
            module.training = True
        next(each.module.parameters()).requires_grad_(False)
    return made


def quick(image: Tensor, of: at.Classifier, method: str, **options: Any) -> at.Explanation:
    return attribute(image, of, method, **{**QUICK.get(method, {}), **options})


def state_of(module: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [
        (name, type(m).__name__, id(m), m.training, sorted(vars(m)), [len(getattr(m, kind)) for kind in hooks])
        for name, m in module.named_modules()
    ]
    weights = [
        (name, value.requires_grad, value.grad is None, hashlib.sha256(value.detach().numpy().tobytes()).hexdigest())
        for name, value in [*module.named_parameters(), *module.named_buffers()]
    ]
    return [modules, weights]


def generators() -> list[Any]:
    return [torch.random.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]  # noqa: NPY002


def check_contract(used: at.Classifier, method: str, wide: Tensor) -> None:
    """What every method must do, whatever the state of the model that it is given."""
    before, drawn, batch_size = state_of(used.module), generators(), used.batch_size
    explanation = quick(wide, used, method, target="cat", seed=5)
    assert state_of(used.module) == before
    assert generators() == drawn
    assert used.batch_size == batch_size
    assert explanation.pixel_map.dtype == torch.float32 and explanation.pixel_map.shape == (40, 60)
    assert explanation.pixel_map.isfinite().all()
    assert explanation.pixel_map.is_contiguous() and not explanation.pixel_map.requires_grad
    if method != "constant":
        assert explanation.pixel_map.std() > 0
    assert explanation.target_name == "cat" and explanation.regions is None
    assert (explanation.evaluations > 0) == (METHODS[method].family != "control")
    assert explanation.provenance["settings"]["method"] == method
    assert torch.equal(explanation.pixel_map, quick(wide, used, method, target=3, seed=5).pixel_map)
    other = quick(wide, used, method, target=3, seed=6).pixel_map
    assert torch.equal(explanation.pixel_map, other) != METHODS[method].stochastic


def check_batches(used: at.Classifier, method: str, image: Tensor, **options: Any) -> None:
    expected = quick(image, used, method, batch_size=1000, **options)
    for batch_size in (1, 3):
        found = quick(image, used, method, batch_size=batch_size, **options)
        assert apart(found.pixel_map, expected.pixel_map) < 1e-4
        assert found.evaluations == expected.evaluations


@pytest.mark.parametrize(("model", "method"), RUNNING)
def test_contract(model: str, method: str, models: dict[str, at.Classifier], wide: Tensor) -> None:
    check_contract(models[model], method, wide)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        pytest.param(*each, marks=pytest.mark.slow if each[0] == "vit" and METHODS[each[1]].family != "transformer" else ())
        for each in RUNNING
    ],
)
def test_the_batch_size_changes_nothing(model: str, method: str, models: dict[str, at.Classifier], small_cat: Tensor) -> None:
    slow = method in ("score_cam", "ablation_cam")  # a pass for every channel
    used, image = (classifier(tiny_vit()), photo(16)) if slow and model == "vit" else (models[model], small_cat)
    shallow = {"layer": "conv1"} if slow and model == "cnn" else {}
    check_batches(used, method, image, **shallow)


@pytest.mark.parametrize(("model", "method"), [pair for pair in PAIRS if pair not in RUNNING])
def test_refusals_name_method_model_and_reason(model: str, method: str, models: dict[str, at.Classifier], small_cat: Tensor) -> None:
    before = state_of(models[model].module)
    reason = {"cnn": "no attention|residual sums", "vit": "native_layer_norm.*gelu|gelu.*native_layer_norm"}[model]
    with pytest.raises(at.UserError, match=f"{method} does not apply to zoo:{model}: .*({reason})"):
        quick(small_cat, models[model], method)
    assert state_of(models[model].module) == before


class Broken(RuntimeError):
    pass


def fail_at(module: nn.Module, call: int, backward: bool) -> tuple[Any, list[int]]:
    """A hook that raises at the given call of a module, or in the backward pass through it."""
    calls = [0]

    def stop(*_: Any) -> None:
        raise Broken

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        calls[0] += 1
        if backward and output.requires_grad:
            output.register_hook(stop)
        elif calls[0] == call and not backward:
            stop()

    return module.register_forward_hook(hook), calls


@pytest.mark.parametrize(("model", "method", "backward"), BREAKING)
def test_an_exception_in_the_middle_leaves_no_trace(model: str, method: str, backward: bool, models: dict[str, at.Classifier]) -> None:
    used, image = (classifier(vgg()), photo(16)) if model == "vgg" else (models[model], photo(32))
    layer = {"layer": "conv1"} if method in ("score_cam", "ablation_cam") and model == "cnn" else {}
    place = list(used.module.children())[-1]
    quick(image, used, method, **layer)  # the classifier finds out some things once
    handle, calls = fail_at(place, -1, False)
    quick(image, used, method, batch_size=1000, **layer)
    handle.remove()
    before, drawn, batch_size = state_of(used.module), generators(), used.batch_size
    handle, _ = fail_at(place, calls[0], backward)
    with pytest.raises(Broken):
        quick(image, used, method, batch_size=1000, **layer)
    handle.remove()
    assert state_of(used.module) == before
    assert generators() == drawn
    assert used.batch_size == batch_size


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", sorted({*METHODS} - BLACK_BOX | {"kernel_shap"}))
def test_the_callers_gradient_mode_does_not_matter(method: str, mode: Callable[[], Any], models: dict[str, at.Classifier]) -> None:
    used = models["vit" if method in REFUSED["cnn"] else "cnn"] if method != "lrp" else classifier(vgg())
    image = photo(used.preprocessing.size[0])
    expected = quick(image, used, method).pixel_map
    with mode():
        found = quick(image, used, method).pixel_map
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_black_boxes(method: str, cnn: at.Classifier, small_cat: Tensor) -> None:
    way = cnn.preprocessing
    box = at.Classifier(lambda x: cnn.module(x).numpy(), size=32, mean=way.mean, std=way.std, class_names=cnn.class_names, name="box")
    if method in BLACK_BOX:
        assert apart(quick(small_cat, box, method).pixel_map, quick(small_cat, cnn, method).pixel_map) < 1e-5
    else:
        with pytest.raises(at.UserError, match=f"{method} .*box.*black box"):
            quick(small_cat, box, method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nonsense"}, "unknown method 'nonsense': expected one of saliency"),
        ({"method": 3}, "unknown method int"),
        ({"method": "saliency", "steps": 3}, "saliency takes no option steps: expected channels, abs, output"),
        ({"method": "random", "steps": 3}, "random takes no option steps: expected none"),
        ({"preset": "nonsense"}, "preset is 'nonsense': expected one of lima"),
        ({"method": "ablation_cam", "preset": "rao"}, "preset 'rao' has no settings for ablation_cam"),
        ({"target": "unicorn"}, "no class 'unicorn'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"fill": "nonsense"}, "nonsense"),
        ({"n_steps": 0}, "n_steps is 0"),
        ({"n_steps": 2.5}, "n_steps is 2.5"),
        ({"n_steps": True}, "n_steps is True"),
        ({"rule": "simpson"}, "rule is 'simpson': expected .*gausslegendre"),
        ({"channels": "median"}, "channels is 'median': expected .*sum"),
        ({"output": "odds"}, "output is 'odds': expected 'logit' or 'probability'"),
        ({"method": "saliency", "abs": "yes"}, "abs is 'yes'"),
        ({"method": "smooth_grad", "nt_samples": 0}, "nt_samples is 0"),
        ({"method": "smooth_grad", "nt_samples": 1, "nt_type": "vargrad"}, "nt_samples is 1"),
        ({"method": "smooth_grad", "stdevs": -1.0}, "stdevs is -1.0"),
        ({"method": "smooth_grad", "stdevs": "x"}, "stdevs is 'x'"),
        ({"method": "smooth_grad", "stdevs": float("nan")}, "stdevs is nan"),
        ({"method": "smooth_grad", "nt_type": "x"}, "nt_type is 'x'"),
        ({"method": "gradient_shap", "stdevs": -1.0}, "stdevs is -1.0"),
        ({"method": "grad_cam", "layer": "nonsense"}, "never calls a layer 'nonsense'.*fc"),
        ({"method": "grad_cam", "layer": 3}, "layer is 3"),
        ({"method": "grad_cam", "layer": nn.ReLU()}, "never calls a layer 'ReLU'"),
        ({"method": "grad_cam", "layer": "fc"}, "layer 'fc' of zoo:cnn returns float32 .*expected a map"),
        ({"method": "grad_cam_plus_plus", "spatial": "max"}, "spatial is 'max'"),
        ({"method": "score_cam", "weights": "x"}, "weights is 'x'"),
        ({"method": "occlusion", "sliding_window_shapes": 40}, "sliding_window_shapes is 40: expected a whole number from 1 to 32"),
        (
            {"method": "occlusion", "sliding_window_shapes": "a"},
            "shapes is 'a': expected a whole number, a list, a tuple or None",
        ),
        (
            {"method": "occlusion", "sliding_window_shapes": (1, 4, 4)},
            r"shapes is \(1, 4, 4\): expected .* at most \(3, 32, 32\)",
        ),
        ({"method": "occlusion", "sliding_window_shapes": 4, "strides": 5}, "strides is 5: expected a whole number from 1 to 4"),
        ({"method": "occlusion", "overlap": "max"}, "overlap is 'max'"),
        ({"method": "feature_ablation", "regions": "nonsense"}, "nonsense"),
        ({"method": "feature_ablation", "region_options": {"nonsense": 1}}, "nonsense"),
        ({"method": "feature_ablation", "region_options": 3}, "region_options is 3"),
        ({"method": "kernel_shap", "n_samples": 0}, "n_samples is 0"),
        ({"method": "lime", "interpretable_model": "tree"}, "interpretable_model is 'tree'"),
        ({"method": "lime", "kernel_width": 0}, "kernel_width is 0"),
        ({"method": "rise", "keep": 1.0}, "keep is 1.0"),
        ({"method": "rise", "grid": 0}, "grid is 0"),
        ({"method": "rise", "normalisation": "x"}, "normalisation is 'x'"),
        ({"method": "hsic", "design": "x"}, "design is 'x'"),
        ({"method": "hsic", "grid": 33}, "grid is 33.*32"),
        ({"method": "sobol", "perturbation": "x"}, "perturbation is 'x'"),
        ({"method": "sobol", "designs": 1}, "designs is 1"),
        ({"method": "center_prior", "width": 0}, "width is 0"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_user_errors(options: dict[str, Any], message: str, cnn: at.Classifier, small_cat: Tensor) -> None:
    with pytest.raises(at.UserError, match=message):
        attribute(small_cat, cnn, **options)


def test_bare_modules_are_refused(cnn: at.Classifier, small_cat: Tensor) -> None:
    with pytest.raises(at.UserError, match=r"bare nn\.Module"):
        attribute(small_cat, cnn.module)


@pytest.mark.parametrize(("preset", "method"), [(p, m) for p, methods in METHOD_PRESETS.items() for m in methods])
def test_presets_are_options_of_their_methods(preset: str, method: str, models: dict[str, at.Classifier], small_cat: Tensor) -> None:
    settings = METHOD_PRESETS[preset][method]
    assert set(settings) <= set(METHODS[method].options)
    costs = {"samples", "n_samples", "nt_samples", "designs", "n_steps", "sliding_window_shapes", "strides", "regions", "region_options"}
    cheap = {name: value for name, value in QUICK.get(method, {}).items() if name in costs}
    used = models["vit" if method in TRANSFORMER else "cnn"]
    by_name = attribute(small_cat, used, method, preset=preset, **cheap)
    assert torch.equal(by_name.pixel_map, attribute(small_cat, used, method, fill="model_mean", **{**settings, **cheap}).pixel_map)
    assert by_name.provenance["settings"]["preset"] == preset


def test_a_preset_is_not_the_default(cnn: at.Classifier, small_cat: Tensor) -> None:
    lima = attribute(small_cat, cnn, "integrated_gradients", preset="lima")
    assert lima.evaluations == 80
    assert attribute(small_cat, cnn, "integrated_gradients", preset="lima", n_steps=4).evaluations == 4
    assert attribute(small_cat, cnn, "integrated_gradients", preset="rao").evaluations == 20


@pytest.mark.parametrize("method", ["grad_cam", "kernel_shap", "smooth_grad"])
def test_objects_as_options_are_saved_and_loaded(method: str, cnn: at.Classifier, small_cat: Tensor, tmp_path: Path) -> None:
    labels = torch.arange(32).div(16, rounding_mode="floor").expand(32, 32)
    options = {
        "grad_cam": {"layer": cnn.module.layer3},
        "kernel_shap": {"regions": labels, "n_samples": 10},
        "smooth_grad": {"nt_samples": 2},
    }
    explanation = attribute(small_cat, cnn, method, **options[method])
    explanation.save(tmp_path / "map.npz")
    assert at.Explanation.load(tmp_path / "map.npz") == explanation


def test_a_map_ranks_regions_and_feeds_the_heatmap(cnn: at.Classifier, small_cat: Tensor) -> None:
    explanation = attribute(small_cat, cnn, "center_prior")
    assert explanation.heatmap.max() == 1
    ranked = explanation.ranked_over(at.make_regions(small_cat, "grid", rows=3, columns=3))
    assert int(ranked.order[0]) == 4
    assert set(ranked.order[-4:].tolist()) == {0, 2, 6, 8}


def test_center_prior_is_a_gaussian_in_shares_of_the_sides(cnn: at.Classifier) -> None:
    values = attribute(photo(21, width=41), cnn, "center_prior", width=0.2).pixel_map
    for y, x in ((10, 20), (0, 0), (4, 33)):
        expected = np.exp(-(((y / 20 - 0.5) ** 2) + (x / 40 - 0.5) ** 2) / (2 * 0.2**2))
        assert float(values[y, x]) == pytest.approx(expected, rel=1e-5)


def test_edge_filter_finds_the_edge_and_nothing_else(cnn: at.Classifier) -> None:
    image = torch.zeros(3, 20, 20)
    image[:, :, 10:] = 1
    values = attribute(image, cnn, "edge_filter").pixel_map
    assert values[:, 9:11].min() > 0.5 and values[:, :9].abs().max() == values[:, 11:].abs().max() == 0


def test_edge_filter_by_hand(cnn: at.Classifier) -> None:
    """The length of Sobel's two differences of the gray image over sqrt(2), each kernel divided by 4, borders reflected."""
    image = photo(9, width=12)
    gray = np.pad(image.double().mean(dim=0).numpy(), 1, mode="symmetric")
    expected = np.zeros((9, 12))
    for y in range(9):
        for x in range(12):
            patch, weights = gray[y : y + 3, x : x + 3], np.array([1, 2, 1]) / 4
            down, right = weights @ patch.T @ [1, 0, -1], weights @ patch @ [1, 0, -1]
            expected[y, x] = np.sqrt((down**2 + right**2) / 2)
    assert np.allclose(attribute(image, cnn, "edge_filter").pixel_map.numpy(), expected, atol=1e-6)


def test_random_and_constant_by_hand(cnn: at.Classifier) -> None:
    drawn = torch.rand(9, 12, generator=torch.Generator().manual_seed(4))
    assert torch.equal(attribute(photo(9, width=12), cnn, "random", seed=4).pixel_map, drawn)
    assert torch.equal(attribute(photo(9, width=12), cnn, "constant").pixel_map, torch.ones(9, 12))


def test_random_does_not_look_at_the_image(cnn: at.Classifier) -> None:
    first, second = (attribute(photo(12, seed), cnn, "random", seed=4).pixel_map for seed in (0, 1))
    assert torch.equal(first, second)
    assert first.unique().numel() == 144


@pytest.mark.parametrize(
    ("channels", "expected"),
    [("sum", -3.0), ("mean", -1.0), ("max", 1.0), ("absmax", -4.0), ("abs_sum", 5.0), ("abs_max", 4.0)],
)
def test_channels(channels: Any, expected: float) -> None:
    assert over_channels(torch.tensor([1.0, -4.0, 0.0]).view(3, 1, 1), channels).item() == expected


@pytest.mark.parametrize("raises", [False, True])
def test_seeded_puts_the_generators_back(raises: bool) -> None:
    before = generators()
    try:
        with seeded(2**40 + 1):
            first = torch.rand(3), np.random.rand(3)  # noqa: NPY002
            if raises:
                raise Broken
    except Broken:
        pass
    assert generators() == before
    with seeded(2**40 + 1):
        again = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    assert torch.equal(first[0], again[0]) and (first[1] == again[1]).all()


@pytest.mark.parametrize("method", ["smooth_grad", "integrated_gradients", "gradient_shap", "rise", "kernel_shap", "occlusion", "sobol"])
def test_no_more_rows_than_the_batch_size_at_once(method: str, small_cat: Tensor) -> None:
    used = at.load_classifier("zoo:cnn", device="cpu")
    rows: list[int] = []
    used.module.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    amount = {"smooth_grad": {"nt_samples": 64}, "integrated_gradients": {"n_steps": 10}, "gradient_shap": {"n_samples": 10}}
    explanation = quick(small_cat, used, method, batch_size=4, **amount.get(method, {}))
    rows = rows[2:]  # of the class explained
    assert max(rows) == 4
    assert sum(rows) >= explanation.evaluations > 4


@pytest.mark.parametrize("method", ["grad_cam", "ablation_cam", "deep_lift", "integrated_gradients", "kernel_shap", "smooth_grad"])
def test_prototypes(method: str, small_cat: Tensor) -> None:
    """A classifier on features equals the network with that head."""
    cnn = at.load_classifier("zoo:cnn", device="cpu")
    matrix = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    on_features = cnn.with_prototypes(matrix)
    replaced = copy.deepcopy(cnn.module)
    replaced.fc = nn.Linear(64, 4, bias=False)
    replaced.fc.weight.data.copy_(matrix)
    way = cnn.preprocessing
    whole = at.Classifier(replaced, size=32, mean=way.mean, std=way.std, scores="logits")
    cnn.batch_size = 1  # the classifier beneath has a batch size of its own
    found, expected = (quick(small_cat, c, method, target=1, batch_size=64) for c in (on_features, whole))
    assert apart(found.pixel_map, expected.pixel_map) < 5e-3  # points of a path at the kink of a ReLU fall on either side


def test_to_image_undoes_the_resize_and_the_crop() -> None:
    """A ramp over the image, preprocessed and mapped back, is the ramp wherever the input reaches."""
    ramp = torch.linspace(0, 1, 60).expand(3, 40, 60)
    for resize, size in (("squash", (20, 30)), ("short_side", (20, 20)), ("long_side", (24, 24))):
        way = at.Classifier(nn.Identity(), size=size, resize=resize).preprocessing
        back = way.to_image(way(ramp[None])[:, 0], 40, 60)[0]
        assert back.shape == (40, 60)
        margin = 13 if resize == "short_side" else 3
        assert (back - ramp[0])[3:-3, margin:-margin].abs().max() < 0.01
        if resize == "short_side":
            assert back[:, :8].abs().max() == back[:, -8:].abs().max() == 0


@pytest.mark.parametrize("resize", ["squash", "short_side", "long_side"])
def test_maps_lie_where_the_image_does(resize: Any) -> None:
    """A network that looks at one place of its input: the gradient lies there on the image, not beside it."""

    class Spot(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, :, 6:10, 4:6].sum(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3))], dim=1)

    used = at.Classifier(Spot(), size=16, resize=resize, scores="logits")
    values = attribute(photo(32, width=64), used, "saliency", target=0).pixel_map
    centre = (values.sum(0) * (torch.arange(64) + 0.5)).sum() / values.sum()
    middle = (values.sum(1) * (torch.arange(32) + 0.5)).sum() / values.sum()
    expected = {"squash": (20.0, 16.0), "short_side": (16 + 10.0, 16.0), "long_side": (20.0, 16.0)}
    assert (float(centre), float(middle)) == pytest.approx(expected[resize], abs=0.3)


def test_summaries_and_options_of_every_method() -> None:
    for name, method in METHODS.items():
        assert method.summary.endswith((".", ")", "signed.", "images.")) and len(method.summary) > 20, name
        assert method.domain in ("input", "image")
    assert METHODS["saliency"].options == ("channels", "abs", "output")


def test_a_wrapped_transformer_is_still_a_transformer() -> None:
    """Whether patches are pooled is read off the network inside, not off its wrapper."""
    pooled = tiny_vit(global_pool="avg", class_token=True)
    found = attribute(photo(16), classifier(pooled), "attention_rollout").pixel_map
    wrapped = attribute(photo(16), classifier(nn.Sequential(nn.Identity(), pooled)), "attention_rollout").pixel_map
    assert torch.equal(found, wrapped)


def test_smoothing_follows_the_method(cnn: at.Classifier, cat: Tensor) -> None:
    """The kernel counts pixels of the model input, so it grows with the photo."""
    plain = attribute(cat, cnn, "input_x_gradient").pixel_map
    smooth = attribute(cat, cnn, "input_x_gradient", smoothing={"kernel": 5, "sigma": 2.0})
    scale = cat.shape[2] / 32
    assert torch.equal(smooth.pixel_map, smoothed(plain, Smoothing(5, 2.0), scale))
    assert smooth.provenance["settings"]["smoothing"] == {"kernel": 5, "sigma": 2.0, "padding": "reflect"}
    assert smooth.pixel_map.std() < 0.8 * plain.std()
    with pytest.raises(at.UserError, match="kernel of a smoothing is 4"):
        attribute(cat, cnn, "input_x_gradient", smoothing=4)
    with pytest.raises(at.UserError, match="a smoothing has no size"):
        attribute(cat, cnn, "input_x_gradient", smoothing={"size": 4})


def test_former_names_of_options_work_for_one_version(cnn: at.Classifier, small_cat: Tensor) -> None:
    former: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "saliency": ({"absolute": False}, {"abs": False}),
        "integrated_gradients": ({"steps": 3}, {"n_steps": 3}),
        "smooth_grad": (
            {"samples": 3, "noise": 0.1, "kind": "smooth_grad_squared", "absolute": False},
            {"nt_samples": 3, "stdevs": 0.1, "nt_type": "smoothgrad_sq", "abs": False},
        ),
        "gradient_shap": ({"samples": 3, "noise": 0.1}, {"n_samples": 3, "stdevs": 0.1}),
        "guided_backprop": ({"absolute": False}, {"abs": False}),
        "deconvolution": ({"absolute": False}, {"abs": False}),
        "guided_grad_cam": ({"absolute": True}, {"abs": True}),
        "occlusion": ({"window": 16, "stride": 16}, {"sliding_window_shapes": 16, "strides": 16}),
        "shapley_value_sampling": ({"samples": 1, **CELLS}, {"n_samples": 1, **CELLS}),
        "kernel_shap": ({"samples": 9, **CELLS}, {"n_samples": 9, **CELLS}),
        "lime": (
            {"samples": 9, "model": "ridge", "distance": "euclidean", **CELLS},
            {"n_samples": 9, "interpretable_model": "ridge", "distance_mode": "euclidean", **CELLS},
        ),
    }
    assert former.keys() == options.FORMER.keys()
    for method, (old, new) in former.items():
        assert options.FORMER[method].keys() <= old.keys()
        with pytest.warns(DeprecationWarning, match=f"of {method} is now") as warned:
            found = attribute(small_cat, cnn, method, 3, **old)
        renamed = [f"option {name} of {method} is now {now}" for name, now in zip(old, new, strict=True) if name != now]
        assert [str(each.message) for each in warned if each.category is DeprecationWarning] == renamed
        assert all(each.filename == __file__ for each in warned), "the warning points at the caller"
        assert torch.equal(found.pixel_map, attribute(small_cat, cnn, method, 3, **new).pixel_map)
        assert found.provenance["settings"]["options"].keys() == new.keys()
    with pytest.raises(at.UserError, match=r"integrated_gradients was given steps and n_steps, .*give n_steps"):
        attribute(small_cat, cnn, steps=3, n_steps=4)


def test_options_of_captums_methods_have_captums_names() -> None:
    """Every option that Captum's own functions take, and no option of ours that means the same."""
    takes = {
        "saliency": [captum.attr.Saliency.attribute],
        "integrated_gradients": [captum.attr.IntegratedGradients.attribute],
        "smooth_grad": [captum.attr.NoiseTunnel.attribute, captum.attr.Saliency.attribute],
        "gradient_shap": [captum.attr.GradientShap.attribute],
        "occlusion": [captum.attr.Occlusion.attribute],
        "shapley_value_sampling": [captum.attr.ShapleyValueSampling.attribute],
        "kernel_shap": [captum.attr.KernelShap.attribute],
        "lime": [captum.attr.Lime.attribute, captum.attr.Lime.__init__, get_exp_kernel_similarity_function],
        "guided_grad_cam": [captum.attr.GuidedGradCam.__init__],
        "grad_cam": [captum.attr.LayerGradCam.__init__],
    }
    ours = {"channels", "output", "regions", "region_options", "overlap", "border", "alpha"} | {"rule"}  # Captum calls the rule method
    for method, functions in takes.items():
        known = {name for function in functions for name in inspect.signature(function).parameters}
        assert set(METHODS[method].options) - known - ours <= ({"abs"} if method == "guided_grad_cam" else set()), method


# --- the recipe of docs/extending.md: one function, one entry


def gradient_norm(task: Task, *, output: Output = "logit") -> Tensor:
    """The Euclidean length of the gradient at each pixel."""
    inputs = task.leaf()
    (gradient,) = torch.autograd.grad(task.scores(output)(inputs)[0, task.target], inputs)
    return gradient[0].norm(dim=0)


def test_the_recipe_of_a_method_keeps_the_contract(
    models: dict[str, at.Classifier],
    cnn: at.Classifier,
    wide: Tensor,
    small_cat: Tensor,
    run_command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METHODS, "gradient_norm", Method(gradient_norm, "gradient"))
    for used in models.values():
        check_contract(used, "gradient_norm", wide)
        check_batches(used, "gradient_norm", small_cat)
    inputs = cnn.inputs(small_cat).requires_grad_()
    (gradient,) = torch.autograd.grad(cnn.logits(inputs)[0, 3], inputs)
    expected = gradient[0].square().sum(dim=0).sqrt()
    assert apart(attribute(small_cat, cnn, "gradient_norm", 3).pixel_map, expected) < 1e-5
    box = at.Classifier(lambda x: cnn.module(x).numpy(), size=32, class_names=cnn.class_names, name="box")
    with pytest.raises(at.NotApplicable, match="gradient_norm does not apply to box: it is a black box"):
        attribute(small_cat, box, "gradient_norm")
    with pytest.raises(at.UserError, match="gradient_norm takes no option channels: expected output"):
        attribute(small_cat, cnn, "gradient_norm", channels="sum")
    assert METHODS["gradient_norm"].looks_inside and not METHODS["gradient_norm"].black_box
    code, out, _ = run_command("benchmark", "--list")
    assert code == 0 and "gradient_norm" in out and "Euclidean length" in " ".join(out.split())


@pytest.mark.parametrize("returned", [None, np.ones((32, 32)), torch.ones(1, 32, 32)], ids=["nothing", "array", "three axes"])
def test_a_method_that_returns_no_map_is_named(
    returned: Any, cnn: at.Classifier, small_cat: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(task: Task) -> Any:
        return returned

    monkeypatch.setitem(METHODS, "broken", Method(broken, "control"))
    with pytest.raises(at.UserError, match=r"broken returned .*: expected a map, a float tensor \[h, w\]"):
        attribute(small_cat, cnn, "broken")


def test_a_method_is_of_a_known_family_and_domain() -> None:
    with pytest.raises(at.UserError, match="family is 'colour': expected one of gradient, cam"):
        Method(gradient_norm, "colour")  # type: ignore[arg-type]
    with pytest.raises(at.UserError, match="domain is 'tokens': expected one of input, image"):
        Method(gradient_norm, "gradient", domain="tokens")  # type: ignore[arg-type]


def test_what_each_family_says_of_its_methods() -> None:
    inside = {name for name, method in METHODS.items() if method.looks_inside}
    boxes = {name for name, method in METHODS.items() if method.black_box}
    assert {"saliency", "lrp", "attn_lrp", "grad_eclip"} <= inside and {"rise", "lime", "random"} <= boxes
    assert not inside & boxes and set(METHODS) - inside - boxes == {name for name, method in METHODS.items() if method.family == "cam"}
