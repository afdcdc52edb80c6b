from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import photo, vgg
from torch import Tensor, nn

from attribution.hooks import edited_outputs, one_module_a_call, record_outputs, replaced_forwards


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
