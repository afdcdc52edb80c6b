"""Precision, memory layout and compiling: what the module meets, what is left as it was, what ``tune`` chooses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import classifier, photo, tiny_vit, vgg
from torch import Tensor, nn

import attribution as at
from attribution import METHODS, SEARCHES
from attribution.hooks import one_module_a_call, replaced_forwards, stand_ins
from attribution.model.forwarding import PRECISIONS
from attribution.network.segments import Activation, Probe, Segment
from attribution.network.stages import find_layer, stages
from evaluation.study.identity import identity_of


class Watched(nn.Module):
    """A convolution and a head; remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.dtypes, self.last = list[torch.dtype](), list[bool]()

    def forward(self, x: Tensor) -> Tensor:
        self.last.append(x.is_contiguous(memory_format=torch.channels_last))
        features = self.conv(x)
        self.dtypes.append(features.dtype)
        return self.head(features.mean(dim=(2, 3)))


@pytest.fixture
def inputs() -> Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_a_lower_precision_is_for_forward_passes_alone(precision: str, inputs: Tensor) -> None:
    plain, lower = (at.Classifier(Watched(), size=8, precision=each) for each in ("float32", precision))
    expected, found = plain.logits_and_features(inputs), lower.logits_and_features(inputs)
    assert lower.module.dtypes[-1] == getattr(torch, precision) and plain.module.dtypes[-1] == torch.float32
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, atol=2e-2) and not torch.equal(ours, theirs)
    wanted = inputs.clone().requires_grad_()
    lower.logits(wanted).sum().backward()
    assert lower.module.dtypes[-1] == torch.float32 and wanted.grad is not None
    assert all(parameter.dtype == torch.float32 for parameter in lower.module.parameters())


def test_what_a_module_returns_is_found_out_in_float32(inputs: Tensor) -> None:
    """Probabilities in bfloat16 do not sum to 1 closely enough to be told from logits."""

    class Probabilities(Watched):
        def forward(self, x: Tensor) -> Tensor:
            scores = super().forward(x).softmax(dim=1)
            return scores.to(self.dtypes[-1])

    found = at.Classifier(Probabilities(), size=8, precision="bfloat16").probabilities(inputs)
    assert torch.allclose(found, at.Classifier(Probabilities(), size=8).probabilities(inputs), atol=1e-2)


def test_channels_last_changes_the_layout_of_the_inputs_alone(inputs: Tensor) -> None:
    used = at.Classifier(Watched(), size=8, channels_last=True)
    assert torch.allclose(used.logits(inputs), at.Classifier(Watched(), size=8).logits(inputs), atol=1e-6)
    assert used.module.last[-1] and inputs.is_contiguous() and used.module.conv.weight.is_contiguous()


def test_a_compiled_module_leaves_out_no_hook_and_no_gradient(monkeypatch: pytest.MonkeyPatch, inputs: Tensor) -> None:
    calls = []

    def compiling(module: nn.Module, **_: object) -> nn.Module:
        def compiled(x: Tensor) -> Tensor:
            calls.append(len(x))
            return module(x)

        return compiled  # type: ignore[return-value]

    monkeypatch.setattr(torch, "compile", compiling)
    used = at.Classifier(Watched(), size=8, compiled=True)
    used.logits(inputs)
    used.logits(inputs)
    assert calls == [5, 5]
    used.features(inputs)
    used.logits(inputs.clone().requires_grad_())
    handle = used.module.conv.register_forward_hook(lambda *_: None)
    used.logits(inputs)
    handle.remove()
    assert calls == [5, 5]
    for somebody_else in (
        lambda: stand_ins(used.module, {"head": [torch.zeros(5, 4)]}),
        lambda: replaced_forwards({used.module.conv: lambda x: x.repeat(1, 2, 1, 1)}),
        lambda: one_module_a_call(used.module, (nn.Identity,), lambda: used.module(inputs)),
    ):
        with somebody_else():
            used.logits(inputs)
    assert calls == [5, 5]
    used.logits(inputs)
    assert calls == [5, 5, 5]


def test_hooks_that_belong_to_the_module_are_no_watchers(monkeypatch: pytest.MonkeyPatch, inputs: Tensor) -> None:
    """Old-style weight_norm, for one, is a hook."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: lambda x: calls.append(len(x)) or module(x))
    module = Watched()
    module.conv.register_forward_pre_hook(lambda *_: None)
    used = at.Classifier(module, size=8, compiled=True)
    used.logits(inputs)
    assert calls == [5]
    with used.module.head.register_forward_hook(lambda *_: None):
        used.logits(inputs)
    assert calls == [5]


@pytest.mark.slow
def test_what_is_really_compiled_says_the_same(cnn: at.Classifier) -> None:
    compiled = at.load_classifier("zoo:cnn", device="cpu", compiled=True)
    for count in (3, 7, 16):
        images = compiled.preprocessing(torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count)))
        assert torch.allclose(compiled.probabilities(images), cnn.probabilities(images), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", ["cnn", "vit"])
def test_every_method_works_in_a_lower_precision(network: str, method: str) -> None:
    module = vgg() if network == "cnn" else tiny_vit()
    image = photo(16)
    options = {"rise": {"samples": 40}, "hsic": {"samples": 40}, "kernel_shap": {"n_samples": 40}, "lime": {"n_samples": 40}}.get(
        method, {}
    )
    if method == "shapley_value_sampling":
        options = {"n_samples": 2}
    try:
        plain = at.attribute(image, classifier(module), method, 1, seed=0, **options)
    except at.NotApplicable as error:
        pytest.skip(str(error))
    lower = at.attribute(image, classifier(module, precision="bfloat16"), method, 1, seed=0, **options)
    assert lower.pixel_map.dtype == torch.float32 and lower.pixel_map.isfinite().all()
    if METHODS[method].family in ("gradient", "control"):
        assert torch.allclose(lower.pixel_map, plain.pixel_map, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("fill", ["black", "drop"])
def test_every_search_works_in_a_lower_precision(search: str, fill: str) -> None:
    used = classifier(tiny_vit(class_token=True), precision="bfloat16")
    found = at.explain(photo(16), used, 1, regions="grid", region_options={"rows": 2, "columns": 4}, search=search, fill=fill)
    assert sorted(found.order.tolist()) == list(range(8)) and found.provenance["precision"] == "bfloat16"


def test_neuron_paths_are_those_of_float32() -> None:
    module = tiny_vit()
    used = classifier(module, precision="bfloat16")
    found, plain = (at.neuron_path(photo(16), each, 1) for each in (used, classifier(module)))
    assert used.precision == "bfloat16" and torch.equal(found.neurons, plain.neurons)
    assert torch.allclose(found.activations, plain.activations) and torch.allclose(found.gradients, plain.gradients)


@pytest.mark.parametrize("network", [vgg, tiny_vit])
def test_layers_of_grids_are_those_of_float32(network: Callable[[], nn.Module]) -> None:
    module = network()
    used, plain = classifier(module, precision="bfloat16"), classifier(module)
    assert [layer.name for layer in stages(used)] == [layer.name for layer in stages(plain)]
    assert find_layer(used, "final").name == find_layer(plain, "final").name
    layer = stages(plain)[-1]
    given = Activation(torch.rand(2, *Probe(plain).activation(layer).maps.shape[1:]))
    output = None if layer.kind != "tokens" else Probe(plain).activation(layer).output
    given = Activation(given.maps, output)
    assert torch.equal(Segment(used, layer)(given).maps, Segment(plain, layer)(given).maps)
    assert used.precision == "bfloat16"


def test_what_was_compiled_is_not_used_for_another_module(monkeypatch: pytest.MonkeyPatch, inputs: Tensor) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: lambda x: module(x))
    used = at.Classifier(Watched(), size=8, compiled=True)
    first = used.logits(inputs)
    torch.manual_seed(1)
    used.module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    assert not torch.allclose(used.logits(inputs), first)
    assert torch.allclose(used.logits(inputs), used.module(inputs))


class Clock:
    """A clock that only goes on when a module says how long it takes."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("attribution.tuning.perf_counter", made)
    return made


class Paced(nn.Module):
    """Takes 20 ms, and 1 ms in bfloat16; in float16 it fails; ``off`` is what bfloat16 costs in accuracy."""

    def __init__(self, clock: Clock, off: float) -> None:
        super().__init__()
        self.clock, self.off = clock, off

    def forward(self, x: Tensor) -> Tensor:
        lower = torch.is_autocast_enabled("cpu")
        if lower and torch.get_autocast_dtype("cpu") == torch.float16:
            raise RuntimeError("not implemented for 'Half'")
        self.clock.now += 0.001 if lower else 0.02
        return torch.stack([x.mean(dim=(1, 2, 3)) + self.off * lower, x[:, 0, 0, 0]], dim=1)


@pytest.mark.parametrize(("off", "chosen"), [(0.01, "bfloat16"), (5.0, "float32")])
def test_the_fastest_way_that_is_close_enough_is_chosen(clock: Clock, off: float, chosen: str) -> None:
    used = at.Classifier(Paced(clock, off), size=8, batch_size=4)
    ways = at.tune(None, used, repeats=3)
    assert used.precision == chosen
    assert [way.precision for way in ways if way.chosen] == [chosen]
    assert [way.precision for way in ways] == ["bfloat16", "bfloat16", "float32", "float32"]
    assert [way.rate for way in ways] == pytest.approx([4 / 0.001, 4 / 0.001, 4 / 0.02, 4 / 0.02])
    plain = next(way for way in ways if way.precision == "float32" and not way.channels_last)
    assert plain.deviation == 0 and (ways[0].deviation > 0.5) == (off > 1)
    assert "bfloat16" in str(ways[0]) and "images/s" in str(ways[0])


def test_a_hopeless_precision_is_not_tried_in_other_layouts(clock: Clock) -> None:
    calls: list[torch.dtype] = []

    class Hopeless(Paced):
        def forward(self, x: Tensor) -> Tensor:
            lower = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            calls.append(lower)
            clock.now += {torch.float32: 0.001, torch.float16: 0.1, torch.bfloat16: 0.2}[lower]
            return x.mean(dim=(2, 3))

    tried = at.Classifier(Hopeless(clock, 0.0), size=8, batch_size=4)
    ways = at.tune(None, tried, repeats=2)
    assert [(way.precision, way.channels_last) for way in ways] == [
        ("float32", False),
        ("float32", True),
        ("float16", False),
        ("bfloat16", False),
    ]
    assert calls.count(torch.float16) == calls.count(torch.bfloat16) == 2
    assert tried.precision == "float32" and not tried.channels_last


@pytest.mark.parametrize(("share", "chosen"), [(0.96, "float32"), (0.94, "bfloat16")])
def test_what_saves_less_than_a_twentieth_is_left_alone(clock: Clock, share: float, chosen: str) -> None:
    class Nearly(Paced):
        def forward(self, x: Tensor) -> Tensor:
            clock.now += 0.01 * (share if torch.is_autocast_enabled("cpu") else 1)
            return x.mean(dim=(2, 3))

    used = at.Classifier(Nearly(clock, 0.0), size=8, batch_size=4)
    at.tune(None, used, precisions=["bfloat16"], repeats=1)
    assert used.precision == chosen


def test_the_old_order_of_arguments_still_works(clock: Clock) -> None:
    used, image = at.Classifier(Paced(clock, 0.0), size=8, batch_size=4), torch.rand(3, 8, 8)
    for arguments, options in (((used,), {}), ((used, image), {}), ((used,), {"image": image})):
        used.precision = "float32"
        with pytest.warns(DeprecationWarning, match=r"tune\(classifier, image, \.\.\.\) is now tune\(image, classifier, \.\.\.\)"):
            at.tune(*arguments, repeats=1, **options)
        assert used.precision == "bfloat16"


def test_what_does_not_fit_into_memory_leaves_the_batch_size_of_what_does(clock: Clock) -> None:
    class Greedy(Paced):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_autocast_enabled("cpu") and len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    used = at.Classifier(Greedy(clock, 5.0), size=8, batch_size=8)
    at.tune(None, used, repeats=1)
    assert (used.precision, used.batch_size) == ("float32", 8)
    used = at.Classifier(Greedy(clock, 0.01), size=8, batch_size=8)
    at.tune(None, used, repeats=1)
    assert (used.precision, used.batch_size) == ("bfloat16", 2)


def test_an_image_shows_how_close_a_precision_is(clock: Clock, tmp_path: Path) -> None:
    class Bright(Paced):
        """Off where an image is brighter than noise ever is on average."""

        def forward(self, x: Tensor) -> Tensor:
            self.off = 5.0 if float(x.mean(dim=(1, 2, 3)).max()) > 0.8 else 0.0
            return super().forward(x)

    used = at.Classifier(Bright(clock, 0.0), size=8, batch_size=4)
    at.tune(None, used, repeats=2)
    assert used.precision == "bfloat16"
    at.tune(torch.full((3, 20, 20), 0.9), used, repeats=2)
    assert used.precision == "float32"
    with pytest.raises(at.UserError, match="no such file"):
        at.tune(tmp_path / "none.png", used)
    with pytest.raises(at.UserError, match="repeats is 0"):
        at.tune(None, used, repeats=0)
    with pytest.raises(at.UserError, match="tolerance is -1"):
        at.tune(None, used, tolerance=-1)


def test_an_interrupted_trial_changes_nothing(clock: Clock) -> None:
    class Stopped(Paced):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                raise KeyboardInterrupt
            return super().forward(x)

    used = at.Classifier(Stopped(clock, 0.0), size=8, batch_size=4, channels_last=True)
    with pytest.raises(KeyboardInterrupt):
        at.tune(None, used)
    assert (used.precision, used.channels_last, used.compiled) == ("float32", True, False)


def test_a_name_has_nothing_to_set() -> None:
    with pytest.raises(at.UserError, match="classifier is 'zoo:cnn': expected a Classifier"):
        at.tune(None, "zoo:cnn")  # type: ignore[arg-type]


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(at.UserError, match=r"precision is 'float17': expected one of float32, bfloat16, float16"):
        at.Classifier(Watched(), size=8, precision="float17")
    with pytest.raises(at.UserError, match=r"precision is 'float17': expected one of float32, bfloat16, float16"):
        at.tune(None, at.Classifier(Watched(), size=8), precisions=["float17"])


def test_the_precision_belongs_to_what_a_result_depends_on(inputs: Tensor) -> None:
    image = inputs[0]
    used = at.Classifier(Watched(), size=8, class_names=list("abcd"))
    prototypes = used.with_prototypes(torch.eye(4, 6))
    plain, before = at.explain(image, used, regions="grid", region_options={"count": 4}), identity_of(used, "small")
    used.precision = "bfloat16"
    lower = at.explain(image, used, regions="grid", region_options={"count": 4})
    assert [each.provenance["precision"] for each in (plain, lower)] == ["float32", "bfloat16"]
    assert identity_of(used, "small") != before and prototypes.precision == "bfloat16"


def test_the_command_takes_a_precision(run_command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    arguments = ["explain", at.demo_image_path(), "--model", "zoo:cnn", "--region-count", "4", "--out", tmp_path, "--device", "cpu"]
    code, _, said = run_command(*arguments, "--precision", "float17")
    assert code == 2 and "precision is 'float17': expected one of float32, bfloat16, float16, auto" in said
    code, _, said = run_command(*arguments, "--precision", "auto", "--batch-size", "2")
    assert code == 0 and "images/s" in said
    code, _, again = run_command(*arguments, "--precision", "auto", "--batch-size", "2")
    assert code == 0 and "images/s" not in again  # nothing is tried where nothing is left to do
    made = at.Explanation.load(next(tmp_path.glob("*.npz")))
    assert made.provenance["precision"] in PRECISIONS and made.provenance["precision"] in said
