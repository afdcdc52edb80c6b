"""Networks cut at their layers: the parts together are the whole, and what cannot be cut is refused with the reason."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import timm
import torch
import torchvision
from grid_networks import CLASSES, SIDE, Pooled, Residual, Vgg, class_token_vit, classifier, drawn, kinds
from networks import apart
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torchvision.models import DenseNet, ResNet, VisionTransformer
from torchvision.models.resnet import BasicBlock

import attribution as at
from attribution.errors import NotApplicable, UserError
from attribution.network.maps import FeatureLayer
from attribution.network.segments import Activation, Probe, Segment, trace
from attribution.network.stages import at_grid, find_layer, last_growing_map, middle_of, only_averages, only_pools, stages
from evaluation.grids.model import at_size

KINDS = kinds()
FIXED = ("vgg", "flat", "reshaping", "fixed pooling")  # their heads take one size
LAYERED = [name for name in KINDS if name != "residual"]


def inputs(count: int = 3, side: int = SIDE, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def state(module: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (id(m), m.training, sorted(vars(m)), [len(getattr(m, name)) for name in hooks], [id(c) for c in m._modules.values()])
        for m in module.modules()
    ]


# --- what is found ---


class Chain(nn.Module):
    """Blocks one after another, named a, b, c ...; the head averages."""

    def __init__(self, *blocks: nn.Module, channels: int = 8) -> None:
        super().__init__()
        for name, block in zip("abcdefgh", blocks, strict=False):
            self.add_module(name, block)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for name, block in self.named_children():
            if name != "fc":
                x = block(x)
        return self.fc(x.mean(dim=(2, 3)))


class Block(nn.Module):
    """A residual block with activations of its own."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu1(self.conv1(x)))
        y += x
        return self.relu2(y)


def small_resnet() -> nn.Module:
    return drawn(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), deviation=0.05)


def small_densenet() -> nn.Module:
    return drawn(DenseNet(4, (2, 2, 2), 8, num_classes=CLASSES), deviation=0.1)


def small_convnext() -> nn.Module:
    return drawn(ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), num_classes=CLASSES), deviation=0.1)


def small_swin() -> nn.Module:
    return drawn(
        SwinTransformer(img_size=32, patch_size=2, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 2), num_classes=CLASSES)
    )


def torchvision_vit() -> nn.Module:
    return drawn(VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES))


def distilled_vit() -> nn.Module:
    options: dict[str, Any] = {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": CLASSES}
    return drawn(timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False, **options))


def pooled_vit() -> nn.Module:
    """timm's, without a class token, its head on the mean of the patches."""
    options: dict[str, Any] = {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": CLASSES}
    return drawn(timm.create_model("vit_tiny_patch16_224", pretrained=False, class_token=False, global_pool="avg", **options))


STAGES: dict[str, tuple[Any, int, list[str], str]] = {  # network, side, stages, the middle one
    "vgg": (lambda: drawn(Vgg()), 16, ["features.1", "features.4", "features.6"], "features.4"),
    "pooled": (lambda: drawn(Pooled()), 16, ["features.1", "features.5", "features.7"], "features.5"),
    "resnet": (small_resnet, 64, ["relu", "layer1", "layer2", "layer3", "layer4"], "layer2"),
    "densenet": (
        small_densenet,
        64,
        ["features.relu0", *(f"features.{name}" for name in ["denseblock1", "transition1", "denseblock2", "transition2", "denseblock3"])],
        "features.denseblock2",
    ),
    "convnext": (small_convnext, 64, ["stem", "stages.0", "stages.1", "stages.2", "stages.3"], "stages.1"),
    "swin": (small_swin, 32, ["patch_embed", "layers.0", "layers.1"], "layers.0"),
    "class token": (class_token_vit, 16, ["patch_embed", "blocks.0", "blocks.1"], "blocks.0"),
    "pooled tokens": (pooled_vit, 32, ["patch_embed", "blocks.0", "blocks.1", "blocks.2"], "blocks.1"),
    "distilled": (distilled_vit, 32, ["patch_embed", "blocks.0", "blocks.1"], "blocks.0"),
    "torchvision vit": (
        torchvision_vit,
        32,
        ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"],
        "encoder.layers.encoder_layer_0",
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_and_what_middle_and_final_mean(name: str) -> None:
    build, side, names, middle = STAGES[name]
    module = build()
    used = at.Classifier(module, size=side, scores="logits", name=name)
    before = state(module)
    assert [layer.name for layer in stages(used)] == names
    found = {wanted: find_layer(used, wanted) for wanted in ("middle", "final", middle)}
    assert found["middle"] is not None and found["final"] is not None and found[middle] is not None
    assert found["middle"].name == middle == found[middle].name and found["final"].name == names[-1]
    assert found["middle"].module is module.get_submodule(middle)
    assert find_layer(used, "input") is None
    assert state(module) == before


def test_the_zoo(cnn: at.Classifier, vit: at.Classifier) -> None:
    names = [[getattr(find_layer(each, wanted), "name", None) for wanted in ("middle", "final")] for each in (cnn, vit)]
    assert names == [["layer2", "layer3"], ["blocks.2", "blocks.4"]]


PUBLISHED = {  # Rao et al. for the first two
    "vgg11": ("features.12", "features.19"),
    "resnet18": ("layer2", "layer4"),
    "densenet121": ("features.transition2", "features.denseblock4"),
    "convnext_tiny": ("features.4", "features.7"),
    "vit_b_16": ("encoder.layers.encoder_layer_5", "encoder.layers.encoder_layer_10"),
    "vit_tiny_patch16_224": ("blocks.5", "blocks.10"),
    "deit_tiny_distilled_patch16_224": ("blocks.5", "blocks.10"),
    "swin_tiny_patch4_window7_224": ("layers.1", "layers.3"),
}


def full_size(name: str) -> at.Classifier:
    """A network of torchvision or timm at its own size with random weights, none of its heads left at zero."""
    torch.manual_seed(0)
    if hasattr(torchvision.models, name):
        module = getattr(torchvision.models, name)(weights=None)
    else:
        module = timm.create_model(name, pretrained=False)
    heads = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    for head in heads:
        nn.init.normal_(head.weight, std=0.05)
    return at.Classifier(module.eval(), size=224, name=name, scores="logits")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layers(name: str) -> None:
    used = full_size(name)
    found = [find_layer(used, wanted) for wanted in ("middle", "final")]
    assert tuple(layer.name for layer in found if layer is not None) == PUBLISHED[name]


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 1), (3, 2), (5, 3), (8, 5), (12, 7)])
def test_middle_of(count: int, expected: int) -> None:
    assert middle_of(count) == expected


def test_one_large_container_is_opened() -> None:
    body = nn.Sequential(*(Block() for _ in range(6)))
    used = classifier(drawn(Chain(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), body), deviation=0.15))
    assert [layer.name for layer in stages(used)] == ["b", *(f"c.{index}" for index in range(6))]


# --- what is refused ---


class Twice(nn.Module):
    """A convolution that is applied two times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.relu, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.shared(self.relu(self.shared(self.stem(x)))))
        return self.fc(x.mean(dim=(2, 3)))


class Skipping(nn.Module):
    """The head sees the first map beside the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        early = self.early(x).relu()
        late = self.late(early).relu()
        return self.fc(torch.cat([early.mean(dim=(2, 3)), late.mean(dim=(2, 3))], dim=1))


class OtherForPairs(Pooled):
    """Runs a module more for two images than for one."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.extra(x) if len(x) > 1 else x)


class Returning(nn.Module):
    """Its block returns a tuple."""

    def __init__(self) -> None:
        super().__init__()

        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 8, 3, padding=1)

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                y = self.conv(x)
                return y.relu(), y

        self.pair, self.fc = Pair(), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pair(x)[0].mean(dim=(2, 3)))


def test_a_layer_inside_a_residual_block_is_bypassed() -> None:
    module = drawn(Residual(), 2)
    for name in ("second", "shortcut", "first"):
        with pytest.raises(NotApplicable, match=rf"layer '{name}' of toy is bypassed: .* still depend on the image"):
            find_layer(classifier(module), name)
    for name in ("stem", "last"):
        assert find_layer(classifier(module), name).name == name  # type: ignore[union-attr]


def test_bypassed_layers_of_the_zoo_are_refused_with_others_to_choose(cnn: at.Classifier, vit: at.Classifier) -> None:
    with pytest.raises(NotApplicable, match=r"'layer2.0.bn2' .* is bypassed: .* such as .*layer3"):
        find_layer(cnn, "layer2.0.bn2")
    with pytest.raises(NotApplicable, match=r"'blocks.3.attn' .* is bypassed"):
        find_layer(vit, "blocks.3.attn")
    assert find_layer(cnn, "layer2.1").name == "layer2.1"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("module", "layer", "reason"),
    [
        (Twice(), "shared", r"layer 'shared' of toy is called 2 times in a pass: choose one that is called once"),
        (Twice(), "relu", r"called 2 times"),
        (Skipping(), "late", r"'late' of toy is bypassed"),
        (OtherForPairs(), "features.5", r"runs other modules for two images than for one"),
        (Pooled(), "nowhere", r"never calls a layer 'nowhere': its last layers are .*features"),
        (Pooled(), "fc", r"layer 'fc' of toy returns float32 \[1, 5\]: expected a map"),
        (Returning(), "pair", r"layer 'pair' of toy returns a tuple: expected a map"),
    ],
)
def test_layers_that_cannot_be_explained(module: nn.Module, layer: str, reason: str) -> None:
    drawn(module)
    before = state(module)
    with pytest.raises(UserError, match=reason):
        find_layer(classifier(module), layer)
    assert state(module) == before


def test_a_network_without_stages() -> None:
    """Activations that are functions, one container around it all."""
    with pytest.raises(NotApplicable, match="no stages that follow one another: name a module"):
        find_layer(classifier(drawn(Skipping())), "final")
    assert find_layer(classifier(drawn(Skipping())), "early").name == "early"  # type: ignore[union-attr]


def test_a_black_box_has_no_layers() -> None:
    used = classifier(lambda x: x.mean(dim=(2, 3)))
    assert find_layer(used, "input") is None
    for layer in ("middle", "final", "features"):
        with pytest.raises(NotApplicable, match="black box: only difull at the layer 'input'"):
            find_layer(used, layer)


def test_a_head_at_zero() -> None:
    module = drawn(Pooled())
    with torch.no_grad():
        module.fc.weight.zero_()
    with pytest.raises(NotApplicable, match=r"any image the same logits .*load its weights"):
        find_layer(classifier(module), "middle")


# --- parts of a network ---


@pytest.mark.parametrize("name", LAYERED)
def test_parts_make_the_whole(name: str) -> None:
    """Up to a layer, from there to a later one, from there to the logits; other images and another number of them than were probed."""
    used = classifier(KINDS[name].module)
    module, x = used.module, inputs()
    before = state(module)
    expected = module(x)
    found = stages(used)
    for index, first in enumerate(found):
        up_to = Segment(used, None, first)(Activation(x))
        assert apart(Segment(used, first)(up_to).maps, expected) < 1e-6
        for second in found[index:]:
            between = Segment(used, first, second)(up_to)
            assert torch.equal(between.maps, Segment(used, None, second)(Activation(x)).maps)
            assert apart(Segment(used, second)(between).maps, expected) < 1e-6
    assert state(module) == before and all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("name", LAYERED)
def test_gradients_of_a_part(name: str) -> None:
    """From a layer to the logits, against autograd through the whole network; from the input to a layer likewise."""
    used = classifier(KINDS[name].module)
    layer = stages(used)[1]
    x = inputs().requires_grad_()
    up_to = Segment(used, None, layer)(Activation(x))
    (direct,) = torch.autograd.grad(used.module(x).square().sum(), x)
    leaf = up_to.maps.detach().clone().requires_grad_()
    rest = Segment(used, layer)(Activation(leaf, None if up_to.output is None else up_to.output.detach())).maps
    (inner,) = torch.autograd.grad(rest.square().sum(), leaf)
    if layer.prefix:  # the prefix token takes part of the gradient of the whole
        tokens = used.module.blocks[:2](torch.cat([used.module.prefix.expand(3, -1, -1), used.module.patches(x).flatten(2).mT], 1))
        tokens = tokens.detach().requires_grad_()
        logits = used.module.fc(used.module.blocks[2](tokens)[:, 1:].mean(dim=1))
        (expected,) = torch.autograd.grad(logits.square().sum(), tokens)
        assert apart(inner, layer.to_map(expected)) < 1e-6
        return
    (chained,) = torch.autograd.grad(up_to.maps, x, inner)
    assert apart(chained, direct) < 1e-5


def test_nothing_before_the_start_is_computed_again() -> None:
    """VGG from its last ReLU on: the pooling, one time, and the linear layers."""
    used = classifier(drawn(Vgg(), 3))
    layer = find_layer(used, "final")
    rest = Segment(used, layer)
    called: list[str] = []
    handles = [m.register_forward_hook(lambda _m, _a, _o, name=n: called.append(name)) for n, m in used.module.named_modules() if n]
    rest(Activation(torch.rand(2, 7, 8, 8)))
    for handle in handles:
        handle.remove()
    assert called == ["features.7", "features", "avgpool", *(f"classifier.{index}" for index in range(6)), "classifier"]


def test_nothing_after_the_stop_is_computed() -> None:
    used = classifier(drawn(Vgg(), 3))
    first, last = find_layer(used, "features.4"), find_layer(used, "features.6")
    called: list[str] = []
    handles = [m.register_forward_hook(lambda _m, _a, _o, name=n: called.append(name)) for n, m in used.module.named_modules() if n]
    segment = Segment(used, first, last)
    called.clear()
    segment(Activation(torch.rand(2, 7, 8, 8)))
    for handle in handles:
        handle.remove()
    assert called == ["features.5", "features.6"]


def test_a_stop_before_the_start() -> None:
    used = classifier(drawn(Vgg(), 3))
    first, last = find_layer(used, "features.4"), find_layer(used, "features.6")
    with pytest.raises(NotApplicable, match=r"layer 'features.4' of toy does not come after 'features.6'"):
        Segment(used, last, first)
    given = Activation(torch.rand(1, 7, 8, 8))
    assert Segment(used, last, last)(given) is given


def test_maps_are_left_alone_by_what_works_in_place() -> None:
    """A convolution whose output the next module overwrites: with and without gradients, the maps given stay."""
    module = drawn(Vgg(), 3)
    used = classifier(module)
    layer = find_layer(used, "features.3")
    rest = Segment(used, layer)
    maps = torch.randn(2, 7, 8, 8, generator=torch.Generator().manual_seed(0))
    before = maps.clone()
    expected = module.head(module.avgpool(module.features[4:](maps.clone())))
    assert apart(rest(Activation(maps)).maps, expected) < 1e-6
    assert torch.equal(maps, before)
    leaf = maps.clone().requires_grad_()
    (found,) = torch.autograd.grad(rest(Activation(leaf)).maps.sum(), leaf)
    other = maps.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(module.head(module.avgpool(module.features[4:](other + 0))).sum(), other)
    assert apart(found, wanted) < 1e-6


def test_values_before_the_start_are_left_alone_by_what_works_in_place() -> None:
    """``y += x`` on what stands for a convolution, for one map and for several; and again, since the values are used again."""
    module = drawn(Chain(nn.Conv2d(3, 8, 3, padding=1), Block(), Block()), deviation=0.2)
    used = classifier(module)
    layer = find_layer(used, "c.relu2")
    assert layer is not None
    probe = Probe(used)
    rest = Segment(used, layer, probe=probe)
    values = {name: [value.one.clone() for value in each] for name, each in probe.values_before("c.relu2").items()}
    for count in (1, 3, 1):
        maps = torch.rand(count, 8, SIDE, SIDE)
        assert apart(rest(Activation(maps)).maps, module.fc(maps.mean(dim=(2, 3)))) < 1e-6
    for name, each in rest._before.items():
        assert all(torch.equal(value.one, kept) for value, kept in zip(each, values[name], strict=True)), name


def test_shared_activations_answer_in_their_first_calls_only() -> None:
    """One ReLU for the whole network: a call before the start is answered, those after it are its own."""
    module = drawn(Twice())
    module.last = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), module.relu)  # registered a second time

    def forward(x: Tensor) -> Tensor:
        x = module.last(module.relu(module.shared(module.stem(x))))
        return module.fc(module.relu(-x).mean(dim=(2, 3)) + x.mean(dim=(2, 3)))

    vars(module)["forward"] = forward
    drawn(module)
    used = classifier(module)
    layer = find_layer(used, "last.0")
    assert layer is not None
    maps = torch.randn(2, 8, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    expected = module.fc(maps.relu().mean(dim=(2, 3)))
    assert apart(Segment(used, layer)(Activation(maps)).maps, expected) < 1e-6


Named = namedtuple("Named", ["maps", "size"])


class Output(dict[str, Any]):
    """A dict whose items are attributes too, as transformers' outputs are."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Containers(nn.Module):
    """Blocks that return named tuples, dicts and lists of tensors, numbers and tuples."""

    def __init__(self) -> None:
        super().__init__()

        class Wrapped(nn.Module):
            def __init__(self, pack: Any) -> None:
                super().__init__()
                self.conv, self.pack = nn.Conv2d(8, 8, 3, padding=1), pack

            def forward(self, x: Tensor) -> Any:
                return self.pack(self.conv(x).relu())

        self.stem = nn.Conv2d(3, 8, 1)
        self.named = Wrapped(lambda y: Named(y, (y.shape[2], y.shape[3])))
        self.mapping = Wrapped(lambda y: Output(maps=y, shape=[tuple(y.shape[2:]), "nchw"]))
        self.listed = Wrapped(lambda y: [y, y.mean(dim=(2, 3)), None])
        self.last, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first = self.named(self.stem(x))
        assert first.size == (x.shape[2], x.shape[3])
        second = self.mapping(first.maps)
        assert second.shape[1] == "nchw"
        third = self.listed(second.maps)
        assert third[2] is None and third[1].shape[0] == len(x)
        return self.fc(self.last(third[0]).relu().mean(dim=(2, 3)))


def test_modules_that_return_containers() -> None:
    module = drawn(Containers())
    used, x = classifier(module), inputs()
    layer = find_layer(used, "last")
    up_to = Segment(used, None, layer)(Activation(x))
    assert apart(Segment(used, layer)(up_to).maps, module(x)) < 1e-6


def test_windows_of_one_image_are_repeated_for_many() -> None:
    """Swin folds its windows into the batch: what stands for them has as many rows as the images together."""
    module = small_swin()
    used, x = at.Classifier(module, size=32, scores="logits"), torch.randn(5, 3, 32, 32)
    layer = find_layer(used, "layers.1")
    assert layer is not None
    probe = Probe(used)
    folded = [value for each in probe.values_before(layer.name).values() for value in each if value.two.shape[0] != 2]
    assert all(value.of(5).shape[0] == 5 * value.one.shape[0] for value in folded)
    assert apart(Segment(used, layer, probe=probe)(Segment(used, None, layer)(Activation(x))).maps, module(x)) < 1e-5


def test_more_rows_than_the_batch_size() -> None:
    """Rows of maps and of the images that stand for them stay together, also where features are read (prototypes)."""
    module = drawn(Pooled())
    plain = classifier(module, batch_size=2)
    matrix = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    prototypes = plain.with_prototypes(matrix, scale=3.0, normalize=True)
    x = inputs(7)
    for used in (plain, prototypes):
        layer = find_layer(used, "features.5")
        found = Segment(used, layer)(Segment(used, None, layer)(Activation(x))).maps
        assert apart(found, used.logits(x)) < 1e-5
        assert used.batch_size == 2 == plain.batch_size
    assert prototypes._base.batch_size == 2  # type: ignore[attr-defined]


def test_an_error_inside_a_part_leaves_the_network_as_it_came() -> None:
    module = drawn(Vgg(), 3)
    used = classifier(module)
    layer = find_layer(used, "final")
    rest = Segment(used, layer)
    before = state(module)
    with pytest.raises(RuntimeError, match="mat1"):
        rest(Activation(torch.rand(1, 5, 8, 8)))
    assert state(module) == before


# --- traces ---


def test_trace_of_a_pass() -> None:
    """Calls in the order of their beginnings; when each ended, and the call that it is part of."""
    module = drawn(Chain(nn.Conv2d(3, 8, 1), Block()))
    x = inputs(1)
    calls = trace(module, x)
    assert [call.name for call in calls] == ["", "a", "b", "b.conv1", "b.relu1", "b.conv2", "b.relu2", "fc"]
    stops = {call.name: call.stop for call in calls}
    assert sorted(stops, key=stops.__getitem__) == ["a", "b.conv1", "b.relu1", "b.conv2", "b.relu2", "b", "fc", ""]
    parents = {call.name: call.parent_stop for call in calls}
    assert parents == {
        "": None,
        "a": stops[""],
        "b": stops[""],
        "fc": stops[""],
        **{f"b.{n}": stops["b"] for n in dict(module.b.named_children())},
    }
    assert [call.name for call in calls if call.edited] == ["b.conv2"]
    assert calls[1].positions == {"nchw": SIDE * SIDE, "nhwc": 8 * SIDE} and calls[-1].positions == {}
    assert torch.equal(calls[0].output, module(x))


def test_trace_of_a_pass_that_fails() -> None:
    module = drawn(Vgg(adaptive=False), 3)
    before = state(module)
    names = [call.name for call in trace(module, inputs(1, 2 * SIDE))]
    assert names == ["features", *(f"features.{index}" for index in range(8))]
    with pytest.raises(RuntimeError):
        trace(module, inputs(1)[:, :2])
    assert state(module) == before


def test_trace_keeps_the_mode_of_every_module() -> None:
    module = drawn(Pooled())
    module.features[4].train()
    module.fc.train()
    before, buffers = state(module), {name: each.clone() for name, each in module.named_buffers()}
    trace(module, inputs())
    assert state(module) == before
    assert all(torch.equal(each, buffers[name]) for name, each in module.named_buffers())


# --- at the size of a grid ---


def grown(module: nn.Module, n: int = 2, side: int = SIDE) -> tuple[at.Classifier, at.Classifier]:
    used = classifier(module, side)
    return at_size(used, (side, side), module), at_size(used, (n * side, n * side), module)


@pytest.mark.parametrize(("name", "layer"), [("pooled", "features"), ("vgg", "features"), ("residual", "last"), ("tokens", "blocks")])
def test_last_growing_map(name: str, layer: str) -> None:
    found = last_growing_map(*grown(KINDS[name].module))
    assert found.name == layer and found.grid == ((8, 8) if name == "residual" else (4, 4))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n", [2, 3])
def test_only_pools(name: str, n: int) -> None:
    cells, whole = grown(KINDS[name].module, n)
    assert only_pools(cells, whole, last_growing_map(cells, whole), n) == (name not in FIXED)


@pytest.mark.parametrize("name", KINDS)
def test_only_averages(name: str) -> None:
    cells, whole = grown(KINDS[name].module)
    # the residual network's last module is a convolution; the ReLU that follows is part of its head
    assert only_averages(cells, last_growing_map(cells, whole)) == (name not in ("vgg", "flat", "reshaping", "residual"))


def test_only_pools_is_not_fooled_by_large_biases() -> None:
    module = drawn(Vgg(), 3)
    with torch.no_grad():
        module.classifier[5].bias.add_(20000)
    cells, whole = grown(module)
    assert not only_pools(cells, whole, last_growing_map(cells, whole), 2)


def test_class_tokens_do_not_pool(vit: at.Classifier) -> None:
    from evaluation.grids.model import GridModel

    model = GridModel(vit, 2, "input")
    assert model.pooled_layer.kind == "tokens" and not model.head_pools


@pytest.mark.parametrize("side", [10, 14, 13])
def test_strides_that_do_not_divide_the_cell(side: int) -> None:
    """10 -> 5 -> 3 positions, but 20 -> 10 -> 5, not 6: another network than that of a cell."""
    with pytest.raises(NotApplicable, match=r"positions for a cell and \d+ for a grid of 4 in toy.*use difull"):
        last_growing_map(*grown(drawn(Pooled()), side=side))


def test_the_logits_depend_on_more_than_the_last_map() -> None:
    with pytest.raises(NotApplicable, match=r"depend on more than its last map \('late'\), so that it has no head"):
        last_growing_map(*grown(drawn(Skipping())))


def test_no_map_grows() -> None:
    module = drawn(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(64, CLASSES)))
    with pytest.raises(NotApplicable, match="no layer of toy has a map that grows"):
        last_growing_map(*grown(module))


def test_at_grid() -> None:
    module = drawn(Pooled())
    _, whole = grown(module, 3)
    layer = FeatureLayer("features.5", module.features[5], "nchw", (8, 8))
    found = at_grid(layer, whole, 3)
    assert found.grid == (24, 24) and found.module is module.features[5] and found.name == layer.name
