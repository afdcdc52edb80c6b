"""Batch normalisation inside convolutions: the same scores, and nobody who looks into the module notices."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import attribution as at
from attribution.hooks import record_outputs
from attribution.model.folding import folded
from attribution.model.forwarding import _CHECKED, _twins

SIDE = 128


class Block(nn.Module):
    """A residual block whose convolution is followed by a normalisation, or returned as well."""

    def __init__(self, leaks: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.leaks = nn.Conv2d(4, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4), leaks

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        return torch.relu(self.norm(made) + (made if self.leaks else x))


def network(*blocks: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=4, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    return varied(module)


def varied(module: nn.Module) -> nn.Module:
    """The module with normalisations that change something."""
    generator = torch.Generator().manual_seed(1)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d) and each.running_mean is not None and each.running_var is not None:
            each.running_mean.copy_(torch.randn(each.num_features, generator=generator) * 0.1)
            each.running_var.copy_(torch.rand(each.num_features, generator=generator) + 0.5)
            if each.affine:
                with torch.no_grad():
                    each.weight.copy_(torch.rand(each.num_features, generator=generator) + 0.5)
                    each.bias.copy_(torch.randn(each.num_features, generator=generator) * 0.1)
    return module.eval()


def wrapped(module: nn.Module, size: int = SIDE) -> at.Classifier:
    return at.Classifier(module, size=size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), batch_size=4)


def norms_run(module: nn.Module, classifier: at.Classifier) -> int:
    """How many normalisations are computed while the classifier forwards an image."""
    count = 0
    real = torch.nn.functional.batch_norm

    def counted(*args: object, **kwargs: object) -> Tensor:
        nonlocal count
        count += 1
        return real(*args, **kwargs)  # type: ignore[arg-type]

    torch.nn.functional.batch_norm = counted  # type: ignore[assignment]
    try:
        classifier.logits(torch.rand(1, 3, *classifier.preprocessing.size))
    finally:
        torch.nn.functional.batch_norm = real
    return count


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: network(Block(), Block(bias=True)),
    "without affine constants": lambda: network(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)),
    "timm efficientnet": lambda: varied(timm.create_model("tf_efficientnet_lite0", num_classes=5)),
    "timm resnet": lambda: varied(timm.create_model("resnet18", num_classes=5)),
    "torchvision resnet": lambda: varied(torchvision.models.resnet18(num_classes=5)),
    "torchvision densenet": lambda: varied(torchvision.models.densenet121(num_classes=5)),
    "torchvision mobilenet": lambda: varied(torchvision.models.mobilenet_v3_small(num_classes=5)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_scores_are_the_same_and_normalisations_are_gone(name: str) -> None:
    torch.manual_seed(0)
    module = MODELS[name]()
    before = copy.deepcopy(module.state_dict())
    classifier, inputs = wrapped(module), torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    plain, all_of_them = classifier.logits(inputs), norms_run(module, classifier)
    with classifier.folding():
        found = [classifier.logits(inputs) for _ in range(_CHECKED)][-1]  # the module is forwarded too, to compare
        left = norms_run(module, classifier)
    assert left < all_of_them and (left == 0 or "densenet" in name)
    assert float((found - plain).abs().max()) <= 5e-5 * (1 + float(plain.abs().max()))
    assert not torch.equal(found, plain) or float(plain.abs().max()) == 0
    assert norms_run(module, classifier) == all_of_them, "after the context the module itself is forwarded"
    after = module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "module",
    [
        network(Block(leaks=True)),
        network(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        network(*[Block()] * 2),
        network(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)),
        network(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    ],
    ids=["used twice", "not alone", "called twice", "parametrised", "no running statistics"],
)
@pytest.mark.filterwarnings("ignore:the scores of .* depend on the other images")
def test_what_cannot_be_folded_stays(module: nn.Module) -> None:
    classifier, inputs = wrapped(module), torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    plain = classifier.logits(inputs)
    with classifier.folding():
        assert torch.allclose(classifier.logits(inputs), plain, atol=1e-5)
        assert norms_run(module, classifier) >= 1


def test_a_convolution_that_is_used_elsewhere_is_found_by_the_scores() -> None:
    module = network(Block(leaks=True))
    inputs = torch.randn(1, 3, SIDE, SIDE)
    twin = folded(module, lambda: module(inputs))
    assert twin is not None and not torch.allclose(twin(inputs), module(inputs), atol=1e-3), "the copy alone would be wrong"
    classifier = wrapped(module)
    with classifier.folding():
        assert _twins.get() is None


def test_hooks_gradients_and_features_reach_the_module_itself() -> None:
    module = network(Block())
    classifier, inputs = wrapped(module), torch.rand(2, 3, SIDE, SIDE)
    scores, features = classifier.logits(inputs), classifier.features(inputs)
    with classifier.folding():
        with record_outputs([module[1]]) as calls:
            assert torch.equal(classifier.logits(inputs), scores)
        assert len(calls) == 1
        assert torch.allclose(classifier.features(inputs), features, atol=1e-6)
        leaf = inputs.clone().requires_grad_()
        with torch.enable_grad():
            classifier.logits(leaf)[:, 0].sum().backward()
        assert leaf.grad is not None and float(leaf.grad.abs().sum()) > 0
        seen: list[int] = []
        handle = module[1].register_forward_hook(lambda *_: seen.append(1))
        classifier.logits(inputs)
        handle.remove()
        assert seen == [1]


def test_modes_come_back_and_later_weights_count() -> None:
    module = network(Block())
    module.train()
    module[3].eval()
    classifier, inputs = wrapped(module), torch.rand(2, 3, SIDE, SIDE)
    modes = [each.training for each in module.modules()]
    before = classifier.logits(inputs)
    with classifier.folding():
        classifier.logits(inputs)
        assert [each.training for each in module.modules()] == modes
    module[0].weight.data *= 2
    with classifier.folding():
        changed = classifier.logits(inputs)
    assert torch.allclose(changed, classifier.logits(inputs), atol=1e-5)
    assert not torch.allclose(changed, before, atol=1e-3)


def test_small_inputs_and_black_boxes_are_left_alone() -> None:
    module = network(Block())
    for classifier in (wrapped(module, 64), at.Classifier(lambda x: x.mean((2, 3)), size=SIDE)):
        with classifier.folding():
            assert _twins.get() is None


def test_an_explanation_is_the_same(cat: Tensor) -> None:
    classifier = wrapped(network(Block(), Block(bias=True)))
    cells = {"regions": "grid", "region_options": {"count": 12}, "evaluations": 90}
    found = at.explain(cat, classifier, **cells)
    plainly = at.Classifier.folding
    try:
        at.Classifier.folding = lambda self: self.forwarding(None)  # type: ignore[method-assign]
        plain = at.explain(cat, classifier, **cells)
    finally:
        at.Classifier.folding = plainly  # type: ignore[method-assign]
    assert torch.equal(found.order, plain.order)
    assert found.insertion_scores is not None and plain.insertion_scores is not None
    assert torch.allclose(found.insertion_scores, plain.insertion_scores, atol=1e-5)


def test_threads_have_copies_of_their_own() -> None:
    module = network(Block())
    classifier, inputs = wrapped(module), torch.rand(2, 3, SIDE, SIDE)
    plain = classifier.logits(inputs)
    found: list[Tensor] = []

    def job() -> None:
        assert _twins.get() is None
        with classifier.folding():
            found.extend(classifier.logits(inputs) for _ in range(5))

    threads = [threading.Thread(target=job) for _ in range(4)]
    with classifier.folding():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 20 and all(torch.allclose(each, plain, atol=1e-5) for each in found)
    assert _twins.get() is None


class Listed(nn.Module):
    """A network that reaches its layers through a list of its own, which a copy of it shares."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop, self.head = nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Linear(4, 5)
        self.stages = [(self.conv, self.norm)]

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in self.stages:
            x = torch.relu(norm(conv(x)))
        return self.head(self.drop(x.mean((2, 3))))


def test_layers_that_a_copy_shares_are_in_evaluation_mode_too(cat: Tensor) -> None:
    torch.manual_seed(0)
    module = varied(Listed()).train()
    before, expected = copy.deepcopy(module.state_dict()), wrapped(copy.deepcopy(module).eval())
    found = at.explain(cat, wrapped(module), regions="grid", region_options={"count": 4}, evaluations=8)
    assert module.training and all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.allclose(found.probabilities, expected.probabilities(expected.inputs(cat))[0].cpu(), atol=1e-5)


class Masked(nn.Module):
    """A network that uses what a convolution returned twice, and rules out its last class."""

    def __init__(self, within: float = 1.0) -> None:
        super().__init__()
        self.conv, self.norm, self.head, self.within = nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.Linear(4, 5), within

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        scores = self.head(torch.relu(self.norm(made)).mean((2, 3)) + self.within * made.mean((2, 3)))
        return torch.cat([scores[:, :4], torch.full_like(scores[:, :1], -1e9)], dim=1)


class DayAndNight(nn.Module):
    """A network that normalises dark images in another way, or bright ones not at all."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.conv, self.day, self.head = nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.night = nn.BatchNorm2d(4) if twice else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        norm = self.night if float(x.detach().mean()) < 0.7 else self.day
        return self.head(torch.relu(norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("module", [Masked(), DayAndNight(True), DayAndNight(False)], ids=["masked class", "two ways", "one way"])
@pytest.mark.parametrize("bright", [False, True])
def test_copies_that_differ_on_some_images_are_not_believed(module: nn.Module, bright: bool, cat: Tensor) -> None:
    torch.manual_seed(0)
    photo = cat * 0.1 + 0.9 if bright else cat * 0.5
    classifier = at.Classifier(varied(module), size=SIDE, batch_size=1)
    plain = classifier.probabilities(classifier.inputs(photo))[0].cpu()
    found = at.explain(photo, classifier, regions="grid", region_options={"count": 4}, evaluations=8)
    assert torch.allclose(found.probabilities, plain, atol=1e-5)
