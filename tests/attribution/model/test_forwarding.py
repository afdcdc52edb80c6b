"""Forwards that are plugged into a classifier: what they share, what they change, and calls from several threads."""

from __future__ import annotations

import copy
import random
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import captum.attr
import numpy as np
import pytest
import timm
import torch
from networks import apart, photo, vgg
from PIL import Image
from torch import Tensor, nn

import attribution as at
from attribution.baselines.attribute import METHODS
from attribution.model import digest
from attribution.model.forwarding import ModuleForward, Relay
from attribution.model.outputs import Outputs


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def small(**settings: Any) -> at.Classifier:
    torch.manual_seed(0)
    return at.Classifier(nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3, 4)), size=8, name="small", **settings)


@dataclass(frozen=True, eq=False)
class Times(Relay):
    """Multiplies the scores of another forward."""

    factor: float

    def __call__(self, inputs: Tensor, want_features: bool) -> tuple[Tensor, Tensor]:
        scores, features = self.base(inputs, want_features)
        return self.factor * scores, features


def test_another_forward_shares_all_else() -> None:
    plain, inputs = small(class_names=list("abcd"), batch_size=5), rand(3, 3, 8, 8)
    made = plain.with_forward(Times(plain.forward, -2.0))
    assert torch.equal(made.logits(inputs), -2 * plain.logits(inputs))
    assert torch.equal(made.probabilities(inputs), (-2 * plain.logits(inputs)).softmax(dim=1))
    assert torch.equal(made.features(inputs), plain.features(inputs))
    assert (made.name, made.class_names, made.preprocessing) == ("small", tuple("abcd"), plain.preprocessing)
    assert made.weights_digest == plain.weights_digest and made.heads is plain.heads and made.module is plain.module
    made.batch_size, plain.precision = 2, "bfloat16"
    assert plain.batch_size == 2 and made.precision == "bfloat16"


def test_scores_of_another_forward_are_checked() -> None:
    plain = small()
    with pytest.raises(at.UserError, match="small returned nan for class 0 of image 0 in a batch of 1"):
        plain.with_forward(Times(plain.forward, torch.nan)).logits(rand(1, 3, 8, 8))


def test_a_forward_on_another_runner_leaves_the_first_as_it_was() -> None:
    plain, inputs = small(batch_size=5), rand(3, 3, 8, 8)
    prototypes = plain.with_prototypes(torch.eye(3), scale=2.0)
    twice = prototypes.with_forward(Times(prototypes.forward, 2.0))
    moved = twice.with_forward(twice.forward.on(plain.runner.changed(batch_size=1)))
    assert moved.batch_size == 1 and twice.batch_size == plain.batch_size == 5
    assert torch.allclose(moved.logits(inputs), 4 * inputs.mean((2, 3))) and moved.num_classes == 3
    assert isinstance(plain.forward, ModuleForward) and moved.runner is not plain.runner


def test_a_changed_runner_keeps_what_it_found_out_and_finds_the_heads_of_another_module() -> None:
    plain = small()
    plain.find_out(True)
    calls: list[int] = []
    handle = plain.module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    copied = plain.runner.changed(batch_size=3)
    copied.find_out(True)
    handle.remove()
    assert calls == [] and copied.heads is plain.heads
    other = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3, 4))
    assert plain.runner.changed(module=other).heads == [other[2]] and plain.heads == [plain.module[2]]


def test_known_outputs_need_no_forward_pass() -> None:
    calls: list[int] = []
    plain = small()
    runner = ModuleForward(lambda x: calls.append(len(x)) or x.mean((2, 3)), plain.preprocessing, name="box", outputs=Outputs(3, "logits"))
    made = plain.with_forward(runner, name="box")
    assert made.num_classes == 3 and made.name == "box" and calls == []
    assert torch.equal(made.logits(rand(2, 3, 8, 8)), rand(2, 3, 8, 8).mean((2, 3))) and calls == [2]


class Writes(nn.Module):
    """Normalises the tensor that it is given, in place, before the network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.sub_(0.3).mul_(2.0))


class Normalises(Writes):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x - 0.3) * 2.0)


SHORT = {"rise": {"samples": 30}, "hsic": {"samples": 30}, "sobol": {"designs": 2, "grid": 3}, "smooth_grad": {"nt_samples": 5}}
SHORT |= {name: {"n_samples": 30} for name in ("kernel_shap", "lime")} | {"shapley_value_sampling": {"n_samples": 1, "regions": "grid"}}
SHORT |= {"occlusion": {"sliding_window_shapes": 4, "strides": 4}, "feature_ablation": {"regions": "grid", "region_options": {"count": 9}}}
SHORT |= {"gradient_shap": {"n_samples": 5}, "integrated_gradients": {"n_steps": 5}}
FITTING = [name for name, entry in METHODS.items() if entry.family not in ("transformer", "control") and name != "lrp"]  # no functions


@pytest.mark.parametrize("method", FITTING)
def test_a_module_that_writes_into_its_input(method: str) -> None:
    writes, reads = (at.Classifier(kind(vgg()), size=16, scores="logits", batch_size=7) for kind in (Writes, Normalises))
    found, expected = (at.attribute(photo(16), used, method, 0, **SHORT.get(method, {})).pixel_map for used in (writes, reads))
    assert torch.equal(found, expected) and expected.abs().max() > 0


def test_a_function_that_writes_into_its_input_only_sometimes() -> None:
    def scores(x: Any) -> Any:
        array = x.numpy()
        array[array.mean(axis=(1, 2, 3)) > 0.55] -= 0.5  # which no image of the first pass is
        return array.mean(axis=(2, 3))

    used, inputs = at.Classifier(scores, size=8, scores="softmax"), rand(3, 3, 8, 8) + 0.1
    kept = inputs.clone()
    assert torch.equal(used.logits(inputs), used.logits(inputs)) and torch.equal(inputs, kept)


class Centred(nn.Module):
    """Normalises by the statistics of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(dim=(0, 2, 3), keepdim=True)) / (x.std(dim=(0, 2, 3), keepdim=True) + 0.1)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4, track_running_stats=False), Centred()], ids=["batch_norm", "by_hand"])
def test_scores_that_depend_on_the_rest_of_the_batch(layer: nn.Module) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(36, 5)).eval()
    used, inputs = at.Classifier(module, size=16, scores="logits", batch_size=4), rand(6, 3, 16, 16)
    with pytest.warns(UserWarning, match="depend on the other images of a batch"):
        found = used.logits(inputs)
    with torch.no_grad():
        alone = torch.cat([module(row[None]) for row in inputs])
        assert not torch.allclose(module(inputs), alone, atol=1e-2)
    assert torch.equal(found, alone)
    map_ = at.attribute(photo(16), used, "occlusion", 1).pixel_map
    assert torch.equal(map_, at.attribute(photo(16), at.Classifier(module, size=16, batch_size=1), "occlusion", 1).pixel_map)


class Dropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.3)


def test_scores_that_depend_on_chance() -> None:
    module = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), Dropped(), nn.Linear(48, 5))
    with pytest.raises(at.UserError, match=r"Sequential returned scores that differ by .* draws random numbers in evaluation mode"):
        at.explain(photo(16), at.Classifier(module, size=16, scores="logits"))


def conv_of(after: Any) -> nn.Module:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return after(self.body(x), self.head)

    return Net().eval()


def masked_class(logits: Tensor, value: float) -> Tensor:
    return torch.cat([logits, logits.new_full((len(logits), 1), value)], dim=1)


DROPPED: dict[str, Any] = {
    "masked by -1e9": lambda f, head: masked_class(20 * head(nn.functional.dropout(f, 0.5)), -1e9),
    "masked by -inf": lambda f, head: masked_class(20 * head(nn.functional.dropout(f, 0.5)), -torch.inf),
    "an offset": lambda f, head: 1000 + 5 * head(nn.functional.dropout(f, 0.5)),
}


@pytest.mark.parametrize("name", DROPPED)
def test_chance_is_seen_beside_masked_classes_and_offsets(name: str) -> None:
    with pytest.raises(at.UserError, match="draws random numbers in evaluation mode"):
        at.Classifier(conv_of(DROPPED[name]), size=16, scores="logits").logits(rand(2, 3, 16, 16))


def test_chance_is_seen_in_half_precision() -> None:
    module = conv_of(lambda f, head: head(nn.functional.dropout(f, 0.5))).to(torch.float16)
    with pytest.raises(at.UserError, match="draws random numbers in evaluation mode"):
        at.Classifier(module, size=16, scores="logits").logits(rand(2, 3, 16, 16))


def test_a_state_that_every_call_changes() -> None:
    seen: list[int] = []

    def drifting(f: Tensor, head: nn.Module) -> Tensor:
        seen.append(len(f))
        return head(f) * (1 + 0.05 * len(seen))

    with pytest.raises(at.UserError, match="or keeps a state that each call changes"):
        at.Classifier(conv_of(drifting), size=16, scores="logits").logits(rand(2, 3, 16, 16))


def test_statistics_of_a_batch_that_takes_no_single_image() -> None:
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    used = at.Classifier(conv_of(lambda f, head: head(norm(f))), size=16, scores="logits")
    with pytest.raises(at.UserError, match="depend on the other images of a batch, and it takes no single image"):
        used.logits(rand(2, 3, 16, 16))


@pytest.mark.parametrize(
    "after",
    [
        lambda f, head: 1e-9 * head(f),
        lambda f, head: 1 + 1e-9 * head(f),
        lambda f, head: 1e30 * head(f),
        lambda f, head: masked_class(head(f), -torch.inf),
        lambda f, head: masked_class(head(f), -1e4),
        lambda f, head: head(f)[:, :2],
        lambda f, head: 0 * head(f),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_false_alarm(after: Any, dtype: torch.dtype) -> None:
    used = at.Classifier(conv_of(after).to(dtype), size=16, scores="logits")
    used.find_out(want_features=False)
    assert used.runner.fixed_batch is None


def test_features_are_those_before_a_head_that_works_in_place() -> None:
    module = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))
    inputs = rand(3, 3, 8, 8)
    with torch.no_grad():
        expected = module[2](inputs.mean((2, 3)))
    assert expected.min() < 0
    assert torch.allclose(at.Classifier(module, size=8, head="3").features(inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_modules_in_another_precision(dtype: torch.dtype) -> None:
    plain, other = (at.Classifier(vgg().to(kind), size=16, scores="logits") for kind in (torch.float32, dtype))
    inputs = plain.inputs(photo(16))
    close = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float64: 1e-5}[dtype]
    assert other.logits(inputs).dtype == other.features(inputs).dtype == torch.float32
    assert apart(other.logits(inputs), other.module(inputs.to(dtype))) < 1e-6
    assert apart(other.features(inputs), plain.features(inputs)) < close
    if dtype == torch.float16:  # it divides by differences that are too small
        with pytest.raises(
            at.UserError, match="deep_lift leaves the range of float16, in which Sequential computes: give the module in float32"
        ):
            at.attribute(photo(16), other, "deep_lift", 0)
    for method in ("saliency", "layer_cam", "smooth_grad", "ablation_cam", "score_cam"):
        found, expected = (at.attribute(photo(16), used, method, 0, **SHORT.get(method, {})).pixel_map for used in (other, plain))
        assert found.dtype == torch.float32
        assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.95


class Rows(nn.Module):
    """A head that was written for a batch of one size."""

    def __init__(self, rows: int = 1) -> None:
        super().__init__()
        self.body, self.head, self.rows = vgg()[:-1], vgg()[-1], rows
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.head(self.body(x).view(self.rows, 128))


@pytest.mark.parametrize("given", [{}, {"batch_size": 1}, {"batch_size": 8}])
def test_modules_that_take_one_image_at_a_time(given: dict[str, int]) -> None:
    used, plain = at.Classifier(Rows(), size=16, **given), at.Classifier(vgg(), size=16, batch_size=1)
    inputs = rand(5, 3, 16, 16)
    assert torch.equal(used.logits(inputs), plain.logits(inputs)) and used.batch_size == 1
    wanted = None if given == {"batch_size": 1} else 9
    for method in ("rise", "smooth_grad", "ablation_cam", "occlusion"):
        found, expected = (at.attribute(photo(16), each, method, 0, batch_size=wanted, **SHORT.get(method, {})) for each in (used, plain))
        assert apart(found.pixel_map, expected.pixel_map) < 1e-4
    if wanted is None:
        assert set(used.module.seen) == {1}  # it was never tried with more
    with pytest.raises(at.NotApplicable, match="Rows takes one image at a time, and this method 2"):
        at.attribute(photo(16), used, "deep_lift")


@pytest.mark.parametrize("given", [{}, {"batch_size": 1}, {"batch_size": 64}])
@pytest.mark.parametrize("rows", [2, 3, 4, 9, 32])
def test_modules_that_take_one_number_of_images(rows: int, given: dict[str, int]) -> None:
    used, plain = at.Classifier(Rows(rows), size=16, **given), at.Classifier(vgg(), size=16)
    inputs = rand(7, 3, 16, 16)
    assert torch.allclose(used.logits(inputs), plain.logits(inputs), atol=1e-5) and used.batch_size == rows
    used.module.seen.clear()
    for method in ("occlusion", "saliency", "integrated_gradients", "smooth_grad"):
        found, expected = (at.attribute(photo(16), each, method, 0, **SHORT.get(method, {})).pixel_map for each in (used, plain))
        assert apart(found, expected) < 1e-4
    cells = at.make_regions(photo(16), "grid", count=9)
    found, expected = (at.explain(photo(16), each, 0, regions=cells) for each in (used, plain))
    assert torch.equal(found.order, expected.order) and torch.allclose(found.insertion_scores, expected.insertion_scores, atol=1e-5)
    assert set(used.module.seen) == {rows}
    with pytest.raises(at.NotApplicable, match=f"grad_cam does not apply to Rows: .* as it takes {rows} images at once, neither more nor"):
        at.attribute(photo(16), used, "grad_cam")
    with pytest.raises(at.UserError, match=f"shows no features, as it takes {rows} images at once"):
        used.features(inputs)


def test_an_exported_module_of_four_images() -> None:
    used = at.Classifier(torch.export.export(vgg(), (rand(4, 3, 16, 16),)).module(), size=16)
    inputs = rand(6, 3, 16, 16)
    assert torch.allclose(used.logits(inputs), vgg()(inputs), atol=1e-5) and used.batch_size == 4


def test_a_module_whose_images_meet_in_a_batch_is_not_filled_up() -> None:
    """With three images or more it runs, but their scores change places when the images do not."""

    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) > 2, "expected a clip of 3 frames"
            return x.mean((2, 3)) + torch.arange(len(x))[:, None]

    with pytest.raises(at.UserError, match=r"Mixing fails on float32 \[2, 3, 8, 8\] \(AssertionError: expected a clip of 3 frames\)"):
        at.Classifier(Mixing(), size=8).logits(rand(2, 3, 8, 8))


def test_an_argument_that_takes_no_images_is_named() -> None:
    class TextFirst(nn.Module):
        def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
            return pixel_values.mean((2, 3))

    with pytest.raises(
        at.UserError, match=r"TextFirst fails on .*AttributeError: .*; the images are given as 'input_ids', its first argument"
    ):
        at.Classifier(TextFirst(), size=8).logits(rand(2, 3, 8, 8))


def test_a_module_that_fails_is_named_with_what_it_was_given() -> None:
    with pytest.raises(
        at.UserError, match=r"Sequential fails on float32 \[2, 3, 16, 16\] \(RuntimeError: .*1 channels.*check size, channels"
    ):
        at.explain(photo(16), at.Classifier(nn.Sequential(nn.Conv2d(1, 4, 3)), size=16))


def test_a_number_of_classes_that_changes() -> None:
    used = at.Classifier(lambda x: x.mean((2, 3))[:, : 3 if x.mean() < 0.6 else 2], size=8)
    with pytest.raises(at.UserError, match="function returned 2 scores for an image, but 3 for the first one"):
        used.logits(torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(9, 3, 8, 8)]))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = vgg()

    def forward(self, x: Tensor, factor: Tensor, shift: float) -> Tensor:
        return self.net(x) * factor + shift


def test_further_arguments_of_the_forward() -> None:
    factor = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    used = at.Classifier(Scaled(), size=16, scores="logits", forward_kwargs={"factor": factor, "shift": 2.0})
    inputs = rand(3, 3, 16, 16)
    assert torch.allclose(used.logits(inputs), vgg()(inputs) * factor + 2, atol=1e-5)
    cam = at.attribute(photo(16), used, "grad_cam", 1).pixel_map
    assert apart(cam, 2 * at.attribute(photo(16), at.Classifier(vgg(), size=16, scores="logits"), "grad_cam", 1).pixel_map) < 1e-5
    others = [{"factor": factor, "shift": 3.0}, {"factor": factor + 1, "shift": 2.0}]
    digests = {at.Classifier(used.module, size=16, forward_kwargs=each).weights_digest for each in [*others, used.runner.forward_kwargs]}
    assert len(digests) == 3


def gray_net(channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 3)).eval()


@pytest.mark.parametrize("channels", ["L", "BGR", "RGBA"])
def test_channels_of_the_model_input(channels: str) -> None:
    """Against the image converted by Pillow or by hand, region by region and pixel by pixel."""
    picture = Image.fromarray((photo(12) * 255).byte().permute(1, 2, 0).numpy())
    converted = np.asarray(picture.convert("RGB" if channels == "BGR" else channels), dtype=np.float32).reshape(12, 12, -1) / 255
    expected = torch.from_numpy(converted[:, :, ::-1].copy() if channels == "BGR" else converted).permute(2, 0, 1)
    count = len(expected)
    mean, std = tuple(0.1 * n for n in range(1, count + 1)), tuple(0.2 * n for n in range(1, count + 1))
    net = gray_net(count)
    used = at.Classifier(net, size=12, mean=mean, std=std, channels=channels)
    mean_map, std_map = (torch.tensor(values)[:, None, None] for values in (mean, std))
    rounding = 0.6 / 255 / min(std)  # Pillow's gray is a whole number
    assert (used.inputs(picture)[0] - (expected - mean_map) / std_map).abs().max() < (rounding if channels == "L" else 1e-5)
    assert used.inputs(at.make_fill(photo(12), used.preprocessing.mean_colour))[0][: min(count, 3)].abs().max() < 1e-5
    explained = at.explain(picture, used, 1, regions="grid", region_options={"count": 9}, fill="white")
    first = torch.isin(explained.regions.labels, explained.order[:4])
    shown = torch.where(first, at.load_image(picture), 1.0)
    assert float(explained.insertion_scores[4]) == pytest.approx(float(used.probabilities(used.inputs(shown))[0, 1]), abs=1e-5)
    for method in ("saliency", "occlusion", "rise", "integrated_gradients"):
        assert at.attribute(picture, used, method, 1, **SHORT.get(method, {})).pixel_map.abs().max() > 0


def test_a_gray_photo_for_a_gray_model() -> None:
    gray, net = rand(1, 28, 28), gray_net(1)
    used = at.Classifier(net, size=28, mean=[0.13], std=[0.31])
    inputs = ((gray - 0.13) / 0.31)[None]
    assert torch.allclose(used.inputs(gray), inputs, atol=1e-5) and torch.allclose(used.logits(used.inputs(gray)), net(inputs), atol=1e-5)
    expected = captum.attr.InputXGradient(net).attribute(inputs.requires_grad_(), target=1)[0, 0]
    assert apart(at.attribute(gray, used, "input_x_gradient", 1).pixel_map, expected) < 1e-4


ignore_jit = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")


def opaque(kind: str, path: Path) -> nn.Module:
    net = vgg()
    if kind == "exported":
        return torch.export.export(net, (rand(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    if kind == "traced":
        return torch.jit.trace(net, rand(1, 3, 16, 16))
    made = torch.jit.script(net)
    if kind == "loaded":
        torch.jit.save(made, path / "net.ts")
        return torch.jit.load(path / "net.ts")
    return torch.jit.freeze(made) if kind == "frozen" else nn.DataParallel(made) if kind == "wrapped" else made


@ignore_jit
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["scripted", "traced", "frozen", "loaded", "wrapped", "exported"])
def test_modules_whose_layers_are_out_of_sight(kind: str, tmp_path: Path) -> None:
    plain, used = (at.Classifier(module, size=16, scores="logits", batch_size=5) for module in (vgg(), opaque(kind, tmp_path)))
    for method in ("saliency", "integrated_gradients", "smooth_grad", "gradient_shap", "occlusion", "rise", "lime"):
        found, expected = (at.attribute(photo(16), each, method, 1, **SHORT.get(method, {})).pixel_map for each in (used, plain))
        assert apart(found, expected) < 1e-3
    for method in ("grad_cam", "deep_lift", "guided_backprop", "attention_rollout", "score_cam"):
        with pytest.raises(at.NotApplicable, match=rf"{method} does not apply .* as (TorchScript|torch.export) .* or a region search$"):
            at.attribute(photo(16), used, method)
    with pytest.raises(at.UserError, match=r"shows no features, as (TorchScript|torch.export)"):
        used.features(used.inputs(photo(16)))


@ignore_jit
def test_the_digest_of_a_frozen_module_is_that_of_its_constants() -> None:
    frozen = [at.Classifier(torch.jit.freeze(torch.jit.script(vgg(seed))), size=16).weights_digest for seed in (0, 0, 1)]
    assert frozen[0] == frozen[1] != frozen[2]


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
    "ignore:.*autograd kernel was not:UserWarning",
    "ignore:the scores of Sequential depend on the other images:UserWarning",  # quantised by the largest value of a batch
)
def test_a_module_that_stops_gradients() -> None:
    net = vgg()
    packed = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    for module in (packed, nn.Sequential(vgg(), Detached())):
        used = at.Classifier(module, size=16, scores="logits")
        for method in ("saliency", "integrated_gradients", "grad_cam"):
            with pytest.raises(at.NotApplicable, match="Sequential passes no gradient from its scores to its input"):
                at.attribute(photo(16), used, method)
        assert at.attribute(photo(16), used, "occlusion", 1).pixel_map.abs().max() > 0
    net[8].weight.data.neg_()
    other = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    assert at.Classifier(other, size=16).weights_digest != at.Classifier(packed, size=16).weights_digest


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * 1.0


class CompiledForward(nn.Sequential):
    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        for each in self:
            x = each(x)
        return x


@pytest.mark.parametrize("how", ["wrapped", "in place", "inside", "forward", "forward of a part", "forward of the class"])
def test_compiled_modules_are_seen_through(how: str) -> None:
    module = vgg()
    if how == "in place":
        module.compile(backend="eager")
    if how == "inside":
        module = nn.Sequential(torch.compile(module, backend="eager"))
    if how == "forward of the class":
        module = CompiledForward(*module)
    for part in {"forward": [module], "forward of a part": module}.get(how, []):
        part.forward = torch.compile(part.forward, backend="eager")
    own = [vars(each).get("forward") for each in module.modules()]
    compiled = torch.compile(module, backend="eager") if how == "wrapped" else module
    with torch.no_grad():
        compiled(rand(2, 3, 16, 16))
    plain, used = (at.Classifier(each, size=16, scores="logits", batch_size=4) for each in (vgg(), compiled))
    inputs = rand(6, 3, 16, 16)
    assert apart(used.logits(inputs), plain.logits(inputs)) < 1e-5 and apart(used.features(inputs), plain.features(inputs)) < 1e-5
    for method in ("grad_cam", "ablation_cam", "guided_backprop", "deep_lift", "saliency"):
        found, expected = (at.attribute(photo(16), each, method, 1).pixel_map for each in (used, plain))
        assert apart(found, expected) < 1e-5
    if how not in ("inside", "forward of the class"):
        assert used.weights_digest == plain.weights_digest and used.name == "Sequential"
    assert [vars(each).get("forward") for each in module.modules()] == own
    assert (compiled._compiled_call_impl is None) == (how != "in place")


def test_weights_are_hashed_once_and_again_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    monkeypatch.setattr("attribution.model.digest._bytes", lambda t, plain=digest._bytes: hashed.append(1) or plain(t))
    used, copied = at.Classifier(vgg(), size=16), at.Classifier(copy.deepcopy(vgg()), size=16)
    first = used.weights_digest
    count = len(hashed)
    at.attribute(photo(16), used, "saliency")
    assert used.weights_digest == first == at.Classifier(used.module, size=16).weights_digest and len(hashed) == count > 0
    assert copied.weights_digest == first and len(hashed) == 2 * count
    seen = {first}
    weight = used.module[0].weight
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1
    seen.add(used.weights_digest)
    weight.data[1, 1, 1, 1] = 0.25
    seen.add(used.weights_digest)
    used.module[0].weight = nn.Parameter(weight.detach() * 2)
    seen.add(used.weights_digest)
    used.module[4].running_mean.add_(1)
    seen.add(used.weights_digest)
    assert len(seen) == 5
    used.module.load_state_dict(copied.module.state_dict())
    assert used.weights_digest == first


# --- several threads


class Shaped(nn.Module):
    """A network whose batch norm and dropout would show every lapse into training mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv2d(4, 6, 3), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def traces(module: nn.Module) -> tuple[Any, ...]:
    hooks = [len(each._forward_hooks) + len(each._forward_pre_hooks) + len(each._backward_hooks) for each in module.modules()]
    modes, kinds = [each.training for each in module.modules()], [type(each) for each in module.modules()]
    values = {name: value.clone() for name, value in module.state_dict().items()}
    asks = [(parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    return hooks, modes, kinds, asks, sorted((name, value.tolist()) for name, value in values.items())


def stress(threads: int, calls: int, training: bool) -> None:
    module = Shaped().train(training)
    first = at.Classifier(module, size=12, scores="logits", batch_size=64)
    users = [first, at.Classifier(module, size=12, scores="logits"), at.Classifier(nn.DataParallel(module), size=12, scores="logits")]
    images = [photo(12, seed) for seed in range(3)]
    regions = torch.arange(144).view(12, 12) // 36

    def features(used: at.Classifier, image: Tensor) -> Tensor:
        return used.features(used.inputs(image).expand(3, -1, -1, -1))

    def temporary(used: at.Classifier, image: Tensor) -> Tensor:
        with used.forwarding(2):
            assert used.batch_size == 2
            return used.logits(torch.cat([used.inputs(each) for each in (image, *images)]))

    def explained(used: at.Classifier, image: Tensor) -> Tensor:
        found = at.explain(image, used, 1, regions=regions, batch_size=7)
        return torch.cat([found.insertion_scores, found.order.float()])

    def method(name: str) -> Any:
        return lambda used, image: at.attribute(image, used, name, 1, batch_size=5, **SHORT.get(name, {})).pixel_map

    jobs = [features, temporary, explained, *map(method, ("grad_cam", "guided_backprop", "deep_lift", "smooth_grad", "kernel_shap"))]
    before = traces(module)
    expected = {(j, i): job(first, image) for j, job in enumerate(jobs) for i, image in enumerate(images)}
    wrong: list[Any] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(calls):
            j, i = draw.randrange(len(jobs)), draw.randrange(len(images))
            try:
                found = jobs[j](draw.choice(users), images[i])
                if not torch.allclose(found, expected[j, i], rtol=1e-3, atol=1e-5):
                    wrong.append((j, i, float((found - expected[j, i]).abs().max())))
            except Exception as error:
                wrong.append((j, i, repr(error)))

    running = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert wrong == [] and traces(module) == before and first.batch_size == 64


def test_threads_that_share_a_module() -> None:
    stress(4, 12, training=True)


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    own = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(own)


@pytest.mark.usefixtures("restless")
def test_threads_that_call_a_function_of_a_module() -> None:
    """A function in the place of a module holds the modules that it calls: their mode belongs to all threads."""
    module = Shaped().train()
    used, inputs = [at.Classifier(lambda x: module(x), size=12, scores="logits") for _ in range(4)], rand(2, 3, 12, 12)
    with torch.no_grad():
        expected = copy.deepcopy(module).eval()(inputs)
    before, wrong = traces(module), list[float]()

    def work(mine: at.Classifier) -> None:
        for _ in range(60):
            gap = float((mine.logits(inputs) - expected).abs().max())
            if not gap < 1e-5:
                wrong.append(gap)

    running = [threading.Thread(target=work, args=(each,)) for each in used]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert wrong == [] and traces(module) == before


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_many_threads_that_share_a_module(training: bool) -> None:
    stress(8, 200, training)


def test_a_setting_of_one_thread_is_not_seen_by_another() -> None:
    used, inside, leave = small(batch_size=64), threading.Event(), threading.Event()
    seen: list[int] = []

    def work() -> None:
        with used.forwarding(7):
            used.batch_size = 3  # as a batch that does not fit into memory does
            seen.append(used.batch_size)
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60) and used.batch_size == 64
    with used.forwarding(5), used.in_float32():
        leave.set()
        thread.join()
        assert used.batch_size == 5
    assert used.batch_size == 64 and seen == [3] and used.precision == "float32"


@pytest.mark.parametrize("wrap", [lambda m: m.forward, lambda m: lambda x: m(x), lambda m: nn.Sequential(m).forward])
def test_modules_inside_a_function_are_evaluated_and_stay_as_they_were(wrap: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    inputs = rand(5, 3, 8, 8)
    with torch.no_grad():
        expected = module.eval()(inputs)
    module.train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    used = at.Classifier(wrap(module), size=8, scores="softmax")
    assert torch.allclose(used.logits(inputs), expected, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert module.training and module[2].training


def test_blocks_that_are_computed_again_for_their_gradients_are_seen(small_cat: Tensor) -> None:
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, depth=2).eval()
    wanted = {m: at.attribute(small_cat, at.Classifier(module, size=32), m, 1).pixel_map for m in ("grad_cam", "attn_lrp")}
    module.set_grad_checkpointing(True)
    for method, expected in wanted.items():
        assert torch.allclose(at.attribute(small_cat, at.Classifier(module, size=32), method, 1).pixel_map, expected, atol=1e-6)
    assert module.grad_checkpointing


class Moody(nn.Module):
    """It fails on dark images, in a way of choice."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.head = error, nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.mean()) < 0.1:
            raise self.error
        return self.head(x.flatten(1))


@pytest.mark.parametrize("error", [ValueError("too dark"), KeyError("dark"), OSError("dark"), SystemExit(4)])
def test_whatever_a_module_raises_on_a_later_image_is_one_line(error: BaseException) -> None:
    classifier = at.Classifier(Moody(error).eval(), size=(2, 2), mean=(0, 0, 0), std=(1, 1, 1), name="moody")
    classifier.logits(torch.ones(2, 3, 2, 2))
    with pytest.raises(
        at.UserError,
        match=rf"moody fails on float32 \[1, 3, 2, 2\] \({'RuntimeError' if isinstance(error, SystemExit) else type(error).__name__}: ",
    ):
        classifier.logits(torch.zeros(1, 3, 2, 2))


def test_weights_on_the_meta_device_are_refused() -> None:
    with pytest.raises(at.UserError, match="has weights on the meta device, which hold no numbers: load them first"):
        at.Classifier(nn.Linear(3, 3, device="meta"), size=(1, 1), mean=(0, 0, 0), std=(1, 1, 1))
