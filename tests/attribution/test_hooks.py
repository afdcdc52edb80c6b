from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from networks import photo, vgg
from torch import Tensor, nn

from attribution.hooks import (
    edited_inputs,
    edited_outputs,
    evaluation_mode,
    frozen_parameters,
    one_module_a_call,
    record_outputs,
    replaced_forwards,
    stand_ins,
    stopped_after,
)


class Stop(RuntimeError):
    pass


def traces(module: nn.Module) -> list[Any]:
    return [(id(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]


class Shared(nn.Module):
    """One in-place ReLU in three places: twice in a block, once outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.relu = nn.ReLU(inplace=True)
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.block = nn.Sequential(self.second, self.relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.third(self.block(self.relu(self.first(x)))))


def test_record_outputs_keeps_values_that_are_changed_in_place() -> None:
    module, x = vgg(inplace=True), photo(16)[None]
    with record_outputs([module[0], module[4]]) as calls:
        result = module(x)
    assert [m for m, _ in calls] == [module[0], module[4]]
    assert torch.equal(calls[0][1], vgg()[0](x)) and calls[0][1].min() < 0
    (gradient,) = torch.autograd.grad(result.sum(), calls[0][1])
    hidden = vgg()[0](x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(vgg()[1:](hidden).sum(), hidden)
    assert torch.allclose(gradient, expected)


def test_record_outputs_counts_every_call() -> None:
    module = Shared()
    with record_outputs([module.relu]) as calls:
        result = module(torch.ones(1, 4))
    assert len(calls) == 3
    assert torch.equal(calls[-1][1], result)


@pytest.mark.parametrize("raises", [False, True])
def test_every_hook_is_gone(raises: bool) -> None:
    module, x = Shared(), torch.ones(1, 4)
    before, expected = traces(module), module(x)
    for block in (
        record_outputs([module.relu, module.first]),
        edited_outputs(module.first, lambda y: y * 2),
        replaced_forwards({module.second: lambda y: y * 3, module.relu: torch.sigmoid}),
        one_module_a_call(module, (nn.ReLU,), lambda: module(x)),
        stand_ins(module, {"first": [x], "relu": [x, x]}),
        stopped_after(module.second),
    ):
        try:
            with block:
                module(x)
                if raises:
                    raise Stop
        except Stop:
            pass
        assert traces(module) == before
        assert torch.equal(module(x), expected)


def test_edited_outputs() -> None:
    module, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.ones(1, 4)
    with edited_outputs(module[0], torch.zeros_like):
        assert torch.equal(module(x)[0], module[1].bias)


def test_edited_outputs_of_the_last_call_only() -> None:
    module, x = Shared(), torch.ones(2, 4)
    seen: list[Tensor] = []
    with edited_outputs(module.relu, lambda y: seen.append(y) or y + 1, every=3):
        found = [module(x), module(x)]
    assert len(seen) == 2
    assert torch.equal(found[0], module(x) + 1) and torch.equal(found[1], found[0])


def test_replaced_forwards_keep_hooks_and_a_forward_of_their_own() -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    own = module.forward
    vars(module)["forward"] = own
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, _a, output: seen.append(output))
    with replaced_forwards({module: lambda y: y * 5}):
        assert torch.equal(module(x), x * 5)
        with replaced_forwards({module: lambda y: y * 7}):
            assert torch.equal(module(x), x * 7)
        assert torch.equal(module(x), x * 5)
    handle.remove()
    assert len(seen) == 3
    assert vars(module)["forward"] is own


def test_one_module_a_call() -> None:
    module, x = Shared(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    relu, expected = module.relu, module(x)
    with one_module_a_call(module, (nn.ReLU,), lambda: module(x)):
        assert module.relu is module.block[1] is not relu
        copies = list(module.relu.copies)
        assert len(copies) == 3 and not any(each.inplace for each in copies)
        called: list[nn.Module] = []
        for each in copies:
            each.register_forward_hook(lambda m, _a, _o: called.append(m))
        for _ in range(2):
            assert torch.equal(module(x), expected)
        assert called == copies * 2
    assert module.relu is module.block[1] is relu and relu.inplace
    assert not relu._forward_hooks


def test_one_module_a_call_when_the_probe_fails() -> None:
    module = Shared()
    before = traces(module)

    def probe() -> None:
        raise Stop

    with pytest.raises(Stop), one_module_a_call(module, (nn.ReLU,), probe):
        pass
    assert traces(module) == before


def test_one_module_a_call_leaves_the_weights_alone() -> None:
    module = Shared()
    weights = copy.deepcopy(module.state_dict())
    with one_module_a_call(module, (nn.ReLU,), lambda: module(torch.ones(1, 4))):
        assert module.state_dict().keys() == weights.keys()


def test_stand_ins_answer_in_the_first_calls() -> None:
    """Two values for the ReLU's first two calls, one of them at its other place; its third call is its own."""
    module, x = Shared(), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    one, two = torch.full((2, 4), 3.0), torch.full((2, 4), -5.0)
    before = traces(module)
    fired: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda m, _a, _o: fired.append(m)) for m in (module.relu, module.first, module.second, module.third)]
    with stand_ins(module, {"first": [one], "relu": [one, two]}):
        assert module.relu is module.block[1]
        found = module(x)
    assert fired == [module.second, module.third, module.relu]
    for handle in handles:
        handle.remove()
    assert torch.equal(found, module.third(two).relu())
    assert traces(module) == before


def test_later_calls_reach_the_module() -> None:
    module, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(1, 4)
    given = torch.full((1, 4), 2.0)
    with stand_ins(module, {"0": [given]}):
        first, second = module(x), module(x)
    assert torch.equal(first, module[2](given)) and torch.equal(second, module(x))


def test_stand_ins_of_inner_modules_and_of_what_is_around_them() -> None:
    """The outer one answers while it has values; the inner one stands in the module behind it."""
    module, x = Shared(), torch.ones(1, 4)
    given, inner = torch.full((1, 4), 0.5), torch.full((1, 4), 0.25)
    second, block = module.second, module.block
    with stand_ins(module, {"block.0": [inner], "block": [given]}):
        assert module.block is not block and module.block.original is block
        assert torch.equal(module(x), module.relu(module.third(given)))
        assert torch.equal(module(x), module.relu(module.third(inner)))
    assert module.block is block and module.block[0] is second is module.second


def test_stand_ins_are_the_module_for_whoever_reads_it() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4))
    with stand_ins(module, {"0": [torch.zeros(1)]}):
        assert module[0].stride == (2, 2) and module[0].out_channels == 4
        assert module[0].weight.shape == (4, 3, 3, 3)
        with pytest.raises(AttributeError, match="nothing_of_the_kind"):
            _ = module[0].nothing_of_the_kind


def test_stand_ins_of_a_module_that_is_not_there_change_nothing() -> None:
    module = Shared()
    before = traces(module)
    with pytest.raises(AttributeError), stand_ins(module, {"first": [torch.ones(1, 4)], "nowhere.first": [torch.ones(1, 4)]}):
        pass
    with pytest.raises(AttributeError), stand_ins(module, {"first": [torch.ones(1, 4)], "nowhere": [torch.ones(1, 4)]}):
        pass
    assert traces(module) == before


@pytest.mark.parametrize("raises", [False, True])
def test_stand_ins_within_one_module_a_call(raises: bool) -> None:
    """A stand-in replaces the copies of a ReLU and puts these back, not the ReLU."""
    module, x = Shared(), torch.ones(1, 4)
    before, relu, expected = traces(module), module.relu, module(x)
    with one_module_a_call(module, (nn.ReLU,), lambda: module(x)):
        copies = module.relu
        assert copies is not relu
        try:
            with stand_ins(module, {"relu": [torch.full((1, 4), 2.0)]}):
                assert module.relu.original is copies
                found = module(x)
                if raises:
                    raise Stop
        except Stop:
            pass
        assert module.relu is copies is module.block[1]
        assert torch.equal(module(x), expected)
    assert traces(module) == before and module.relu is relu
    # relu(first) answered with 2; the last call is a copy's
    assert torch.equal(found, relu(module.third(module.block(torch.full((1, 4), 2.0)))))


def test_stopped_after() -> None:
    module, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(1, 4)
    later: list[int] = []
    handle = module[2].register_forward_pre_hook(lambda _m, _a: later.append(1))
    with stopped_after(module[1]) as found:
        module(x)
        raise AssertionError("what follows must not run")
    assert len(found) == 1 and torch.equal(found[0], module[1](module[0](x)))
    assert not later
    handle.remove()


def test_stopped_after_keeps_the_graph() -> None:
    module, x = vgg(), photo(16)[None].requires_grad_()
    with stopped_after(module[3]) as found:
        module(x)
    (gradient,) = torch.autograd.grad(found[0].square().sum(), x)
    (expected,) = torch.autograd.grad(module[:4](x).square().sum(), x)
    assert torch.equal(gradient, expected)


def test_stopped_after_a_module_that_is_never_called() -> None:
    module = nn.Sequential(nn.Linear(4, 2))
    with stopped_after(nn.ReLU()) as found:
        result = module(torch.ones(1, 4))
    assert found == [] and torch.equal(result, module(torch.ones(1, 4)))


def test_stopped_after_lets_other_errors_pass() -> None:
    module = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    with pytest.raises(RuntimeError, match="mat1"), stopped_after(module[1]):
        module(torch.ones(1, 3))
    assert not module[1]._forward_hooks


def test_stopped_after_a_stand_in() -> None:
    """What a network does between two of its layers: what came before answers, what follows is not run."""
    module, x = vgg(), photo(16)[None]
    given = torch.rand(2, 6, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = module[3](module[2](given))
    with stand_ins(module, {"0": [torch.zeros(2, 6, 16, 16)], "1": [given]}), stopped_after(module.get_submodule("3")) as found:
        module(x)
    assert torch.equal(found[0], expected)


class Weighted(nn.Module):
    def forward(self, x: Tensor, weight: float, bias: float = 0.0) -> Tensor:
        return weight * x + bias


@pytest.mark.parametrize("raises", [False, True])
def test_edited_inputs(raises: bool) -> None:
    """The first argument at every call, the others as they are; of each module by its own edit; gone afterwards."""
    first, second, x = Weighted(), nn.Linear(4, 4), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    before = traces(first) + traces(second)
    with suppress(Stop), edited_inputs({first: lambda y: y + 1, second: torch.zeros_like}):
        for _ in range(2):
            assert torch.equal(first(x, 3.0, bias=2.0), 3 * (x + 1) + 2)
            assert torch.equal(second(x), second.bias.expand(2, 4))
        if raises:
            raise Stop
    assert traces(first) + traces(second) == before
    assert torch.equal(first(x, 3.0), 3 * x)


@pytest.mark.parametrize("raises", [False, True])
def test_frozen_parameters(raises: bool) -> None:
    """No parameter asks for gradients, inputs may; afterwards those that asked do so again, and only those."""
    module, x = vgg(), photo(16)[None].requires_grad_()
    module[0].weight.requires_grad_(False)
    module[3].bias.grad = torch.ones(8)
    asking = [parameter.requires_grad for parameter in module.parameters()]
    assert any(asking) and not all(asking)
    with suppress(Stop), frozen_parameters(module):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        module(x).sum().backward()
        if raises:
            raise Stop
    assert [parameter.requires_grad for parameter in module.parameters()] == asking
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert [name for name, parameter in module.named_parameters() if parameter.grad is not None] == ["3.bias"]
    assert torch.equal(module[3].bias.grad, torch.ones(8))


@pytest.mark.parametrize("switched", [evaluation_mode, frozen_parameters])
def test_blocks_that_overlap_switch_back_when_the_last_ends(switched: Any) -> None:
    """As blocks of two threads do: the first that ends must not switch on what the other still needs off."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].eval()
    module[0].bias.requires_grad_(False)

    def state() -> list[bool]:
        return [m.training for m in module.modules()] + [p.requires_grad for p in module.parameters()]

    before = state()
    first, second = switched(module), switched(module[1])
    first.__enter__()
    within = state()
    assert within != before
    second.__enter__()
    first.__exit__(None, None, None)
    rest = [m.training for m in module[1].modules()] if switched is evaluation_mode else [p.requires_grad for p in module[1].parameters()]
    assert not any(rest) and state() != before
    second.__exit__(None, None, None)
    assert state() == before
