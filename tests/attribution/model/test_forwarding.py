"""Forwards that are plugged into a classifier: what they share, what they change, and calls from several threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attribution as at
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


class Overlapping(nn.Module):
    """In training mode between calls. The second call begins during the first, and goes on after it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)
        self.second_began, self.first_ended = threading.Event(), threading.Event()
        self.modes = list[bool]()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            assert self.second_began.wait(60)
        elif len(x) == 2:
            self.second_began.set()
            assert self.first_ended.wait(60)
        self.modes.append(self.training or self.head.training)
        return self.head(x.mean((2, 3)))


def test_calls_from_several_threads_leave_a_model_as_it_came() -> None:
    module = Overlapping()
    module.head.bias.requires_grad_(False)
    plain = small()
    known = plain.with_forward(ModuleForward(module, plain.preprocessing, name="known", outputs=Outputs(4, "logits")))
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: known.logits(rand(n, 3, 8, 8))})) for n in (1, 2)]
    for thread in threads:
        thread.start()
    threads[0].join(60)
    module.first_ended.set()
    threads[1].join(60)
    assert module.modes == [False, False] and module.training and module.head.training
    assert [each.requires_grad for each in module.parameters()] == [True, False]
    assert not module._forward_hooks and not module._forward_pre_hooks
    for count, logits in found.items():
        assert torch.allclose(logits, module.head(rand(count, 3, 8, 8).mean((2, 3))))
    assert sorted(found) == [1, 2]
