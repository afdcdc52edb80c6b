"""Networks at the size of a grid: the original stays as it is, weights are shared, what cannot be right is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import tiny_vit, vgg
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torchvision.models import SwinTransformer as TorchvisionSwin
from torchvision.models import VisionTransformer as TorchvisionVit
from torchvision.models import resnet18

import attribution as at
from attribution.errors import NotApplicable
from attribution.network.resized import resized


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in evaluation mode, every parameter drawn: torchvision's heads and timm's class tokens start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def images(height: int, width: int | None = None, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width or height, generator=torch.Generator().manual_seed(1))


def distilled() -> nn.Module:
    options: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 4}
    return drawn(timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False, **options))


def swin(side: int = 32, window: int = 4) -> nn.Module:
    """Stages of 16 x 16 and 8 x 8 positions at 32 pixels."""
    options: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 4, "drop_path_rate": 0.0}
    return drawn(SwinTransformer(img_size=side, patch_size=2, window_size=window, **options))


def beit() -> nn.Module:
    return drawn(
        Beit(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=4, use_abs_pos_emb=False, use_rel_pos_bias=True)
    )


def eva() -> nn.Module:
    return drawn(Eva(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=4, use_rot_pos_emb=True))


def torchvision_vit() -> TorchvisionVit:
    vit = TorchvisionVit(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4)
    return drawn(vit)  # type: ignore[return-value]


def torchvision_swin(window: int = 2) -> nn.Module:
    """Stages of 8 x 8 and 4 x 4 positions at 32 pixels."""
    options: dict[str, Any] = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "num_classes": 4}
    return drawn(TorchvisionSwin(patch_size=[4, 4], window_size=[window, window], **options))


class Embeddings(nn.Module):
    """Patches and positions as Hugging Face's ViTEmbeddings: an error at other sizes, unless asked to interpolate."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 8, stride=8)
        self.position_embeddings = nn.Parameter(torch.randn(1, 16, 6, generator=torch.Generator().manual_seed(3)))

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        tokens = self.patches(pixel_values)
        sides = tuple(tokens.shape[-2:])
        positions = self.position_embeddings.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        if interpolate_pos_encoding:
            positions = F.interpolate(positions, size=sides, mode="bicubic", align_corners=False)
        elif sides != (4, 4):
            raise ValueError(f"Input image size {tuple(pixel_values.shape[-2:])} doesn't match model (32, 32).\nSecond line")
        return (tokens + positions).flatten(2).transpose(1, 2)


class HuggingFace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.classifier = nn.Linear(6, 4)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        tokens = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return self.classifier(tokens.tanh().mean(dim=1))


class Normalised(nn.Module):
    """What people wrap around a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x * self.scale - 1)


TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    # what is built, and which parameters must be new; a Swin's tables fit its windows at every size
    "timm_vit": (lambda: tiny_vit(img_size=32, patch_size=8), {"pos_embed"}),
    "timm_deit_distilled": (distilled, {"pos_embed"}),
    "timm_swin": (swin, set()),
    "timm_beit": (beit, {f"blocks.{i}.attn.relative_position_bias_table" for i in range(2)}),
    "timm_eva": (eva, {"pos_embed"}),
    "torchvision_vit": (torchvision_vit, {"encoder.pos_embedding"}),
    "hugging_face": (lambda: drawn(HuggingFace()), set()),
    "wrapped": (lambda: Normalised(tiny_vit(img_size=32, patch_size=8)), {"network.pos_embed"}),
}


@pytest.fixture(params=TRANSFORMERS)
def transformer(request: pytest.FixtureRequest) -> tuple[str, nn.Module, set[str]]:
    build, new = TRANSFORMERS[request.param]
    return request.param, build(), new


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Every attribute that is no tensor, module or hook: img_size, grid_size, window_size, seq_length ..."""
    simple = (int, float, str, bool, tuple, list, dict, type(None))
    found = {}
    for name, part in module.named_modules():
        own = {k: v for k, v in vars(part).items() if isinstance(v, simple) and not k.startswith(("_parameters", "_buffers", "_modules"))}
        found.update({f"{name}.{k}": copy.deepcopy(v) for k, v in own.items() if "hook" not in k})
    return found


def test_the_original_is_untouched_and_the_copy_shares_its_weights(transformer: tuple[str, nn.Module, set[str]]) -> None:
    _, module, new = transformer
    module.train()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    before = {name: (tensor, tensor.data_ptr(), tensor._version, tensor.detach().clone()) for name, tensor in tensors.items()}
    attributes, names = plain_attributes(module), [name for name, _ in module.named_modules()]
    logits = module(images(32))
    found = resized(module, (32, 32), (64, 64))

    after = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert after.keys() == before.keys()
    for name, (tensor, pointer, version, values) in before.items():
        assert after[name] is tensor, name
        assert tensor.data_ptr() == pointer and tensor._version == version and torch.equal(tensor, values), name
    assert plain_attributes(module) == attributes
    assert all("forward" not in vars(part) for part in module.modules())
    assert all(part.training for part in module.modules()) and all(part.training for part in found.module.modules())
    assert torch.equal(module(images(32)), logits)
    with pytest.raises((AssertionError, ValueError)):
        module(images(64))

    assert found.module is not module
    assert [name for name, _ in found.module.named_modules()] == names
    own = dict(found.module.named_parameters())
    assert {name for name in own if own[name] is not tensors[name]} == new
    persistent = module.state_dict().keys() - dict(module.named_parameters()).keys()
    assert all(dict(found.module.named_buffers())[name] is tensors[name] for name in persistent)
    assert all(own[name].requires_grad == tensors[name].requires_grad for name in own)


def test_gradients_reach_the_whole_grid(transformer: tuple[str, nn.Module, set[str]]) -> None:
    name, module, _ = transformer
    shape = (64, 96) if "torchvision" not in name else (96, 96)
    found = resized(module, (32, 32), shape)
    grid = images(*shape).requires_grad_()
    logits = found.module(grid)
    (gradient,) = torch.autograd.grad(logits.square().sum(), grid)
    blocks = F.avg_pool2d(gradient.abs(), 8)
    assert (blocks > 0).all()
    assert found.interpolated is (name != "timm_swin")


def test_at_its_own_size_a_network_is_returned_as_it_is(transformer: tuple[str, nn.Module, set[str]]) -> None:
    _, module, _ = transformer
    found = resized(module, (32, 32), (32, 32))
    assert found.module is module and not found.interpolated


def test_a_copy_set_back_to_its_own_size_is_the_original() -> None:
    """Up and down again keeps all but the embeddings; with those of the original, the logits are the original's."""
    module = tiny_vit(img_size=32, patch_size=8)
    back = resized(resized(module, (32, 32), (64, 64)).module, (64, 64), (32, 32)).module
    assert back is not module
    back.pos_embed = module.pos_embed
    assert torch.equal(back(images(32)), module(images(32)))


def stretched(grid: Tensor, sides: tuple[int, int]) -> Tensor:
    """Bicubic resampling (a = -0.75, corners aligned) as one small matrix for each axis; grid [h, w, D] -> [H, W, D]."""

    def matrix(old: int, new: int) -> Tensor:
        rows = torch.zeros(new, old, dtype=torch.float64)
        for i in range(new):
            place = i * (old - 1) / (new - 1)
            for k in range(int(place) - 1, int(place) + 3):
                d = abs(place - k)
                a = -0.75
                weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else (a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0)
                rows[i, min(max(k, 0), old - 1)] += weight
        return rows

    rows, columns = matrix(grid.shape[0], sides[0]), matrix(grid.shape[1], sides[1])
    return torch.einsum("ia,jb,abd->ijd", rows, columns, grid.double())


@pytest.mark.parametrize("n", [2, 3])
def test_torchvision_embeddings_are_stretched_and_the_class_token_keeps_its_own(n: int) -> None:
    module = torchvision_vit()
    found = resized(module, (32, 32), (32 * n, 32 * n)).module
    old, new = module.encoder.pos_embedding.detach()[0], found.encoder.pos_embedding.detach()[0]
    assert torch.equal(new[0], old[0])
    expected = stretched(old[1:].unflatten(0, (4, 4)), (4 * n, 4 * n)).flatten(0, 1)
    assert torch.allclose(new[1:].double(), expected, atol=1e-6)
    assert (found.image_size, found.seq_length) == (32 * n, 16 * n * n + 1)
    fresh = TorchvisionVit(image_size=32 * n, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4).eval()
    fresh.load_state_dict(found.state_dict())
    assert torch.equal(fresh(images(32 * n)), found(images(32 * n)))


@pytest.mark.parametrize(("build", "prefix"), [(lambda: tiny_vit(img_size=32, patch_size=8), 1), (distilled, 2)], ids=["vit", "distilled"])
def test_timm_embeddings_are_resampled_behind_the_prefix_tokens(build: Callable[[], nn.Module], prefix: int) -> None:
    module = build()
    found = resized(module, (32, 32), (64, 96)).module
    old, new = module.pos_embed.detach()[0], found.pos_embed.detach()[0]
    side = 32 // module.patch_embed.patch_size[0]
    assert torch.equal(new[:prefix], old[:prefix])
    grid = old[prefix:].T.unflatten(1, (side, side))[None]
    expected = F.interpolate(grid, size=(2 * side, 3 * side), mode="bicubic", antialias=True, align_corners=False)[0].flatten(1).T
    assert torch.allclose(new[prefix:], expected, atol=1e-6)
    assert found.patch_embed.img_size == (64, 96) and module.patch_embed.img_size == (32, 32)


@pytest.mark.parametrize("n", [2, 3])
def test_zoo_vit_on_a_grid(vit: at.Classifier, n: int) -> None:
    module = vit.module
    digest, logits = vit.weights_digest, vit.logits(images(32))
    found = resized(module, (32, 32), (32 * n, 32 * n))
    assert found.interpolated and found.module.pos_embed.shape == (1, 64 * n * n + 1, 128)
    options: dict[str, Any] = {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "mlp_ratio": 2.0, "num_classes": 10}
    larger = timm.models.VisionTransformer(img_size=32 * n, **options)
    larger.load_state_dict(found.module.state_dict())
    with torch.no_grad():
        assert torch.allclose(larger.eval()(images(32 * n)), found.module(images(32 * n)), atol=1e-5)
    assert vit.weights_digest == digest and torch.equal(vit.logits(images(32)), logits)


def test_hugging_face_models_are_asked_to_interpolate() -> None:
    for module in (drawn(HuggingFace()), Normalised(drawn(HuggingFace()))):
        found = resized(module, (32, 32), (64, 64)).module
        inner = getattr(module, "network", module)
        grid = images(64) * 2 - 1 if inner is not module else images(64)
        assert torch.equal(found(images(64)), inner(grid, interpolate_pos_encoding=True))


def test_a_swin_keeps_its_windows_and_gets_masks_of_its_own() -> None:
    module = swin()
    found = resized(module, (32, 32), (64, 64))
    assert not found.interpolated
    larger = swin(side=64)
    larger.load_state_dict(module.state_dict())
    assert torch.equal(found.module(images(64)), larger(images(64)))
    old, new = module.layers[0].blocks[1], found.module.layers[0].blocks[1]
    assert new.window_size == old.window_size == (4, 4)
    assert (len(old.attn_mask), len(new.attn_mask)) == (16, 64)


def test_a_small_last_stage_keeps_its_clamped_window() -> None:
    """At 16 pixels the second stage is 4 x 4: timm cuts a window of 8 down to it, and to 8 in the first stage."""
    module = swin(side=16, window=8)
    found = resized(module, (16, 16), (32, 32)).module
    assert [stage.blocks[0].window_size for stage in found.layers] == [(8, 8), (4, 4)]
    tables = [name for name, _ in module.named_parameters() if "bias_table" in name]
    assert tables and all(found.get_parameter(name) is module.get_parameter(name) for name in tables)


def test_swin_tiny_at_its_published_size() -> None:
    module = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=3).eval()
    found = resized(module, (224, 224), (448, 448))
    assert found.module is not module and not found.interpolated
    assert all(mine is theirs for mine, theirs in zip(found.module.parameters(), module.parameters(), strict=True))
    assert {stage.blocks[0].window_size for stage in found.module.layers} == {(7, 7)}
    assert module.patch_embed.img_size == (224, 224)


@pytest.mark.parametrize(
    ("build", "size", "image", "reason"),
    [
        (lambda: swin(side=12, window=3), 12, 30, "a map of 15x15 cannot be merged two by two"),
        (lambda: swin(side=28, window=7), 28, 36, "a map of 18x18 does not divide into its windows of 7x7"),
        (lambda: torchvision_swin(window=3), 24, 64, "a map of 16x16 does not divide into its windows of 3x3"),
        (lambda: torchvision_swin(window=5), 20, 60, "a map of 15x15 cannot be merged two by two"),
        (torchvision_vit, 32, 60, "its patches of 8x8 do not divide the image"),
        (lambda: tiny_vit(img_size=30, patch_size=4), 30, 90, "its patches of 4x4 do not divide the image"),
    ],
)
def test_windows_merging_and_patches_that_do_not_fit(build: Callable[[], nn.Module], size: int, image: int, reason: str) -> None:
    module = build()
    with pytest.raises(NotApplicable) as caught:
        resized(module, (size, size), (image, image))
    message = str(caught.value)
    assert message == (
        f"{type(module).__name__} works on images of {size}x{size} and cannot take a grid of {image}x{image} ({reason}): "
        "use DiFull, which runs the cells one by one and needs no other size"
    )


class TokenWindows(nn.Module):
    """A windowed block as Hugging Face's Swin calls it: tokens, then the sides of their map."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window_size = window

    def forward(self, tokens: Tensor, sides: tuple[int, int]) -> Tensor:
        return tokens


class WindowedTokens(nn.Module):
    def __init__(self, window: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.block = TokenWindows(window)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        return self.block(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])).mean(dim=1)


def test_windows_over_a_list_of_tokens() -> None:
    module = WindowedTokens(window=4)
    assert resized(module, (16, 16), (32, 48)).module is module
    with pytest.raises(NotApplicable, match="a map of 8x10 does not divide into its windows of 4x4"):
        resized(module, (16, 16), (32, 40))


def test_torchvision_vit_takes_squares_only() -> None:
    with pytest.raises(NotApplicable, match="takes square images only"):
        resized(torchvision_vit(), (32, 32), (64, 96))


def test_torchvision_swin_is_returned_as_it_is_where_its_windows_fit() -> None:
    module = torchvision_swin()
    found = resized(module, (32, 32), (64, 64))
    assert found.module is module and not found.interpolated


class Flat(nn.Module):
    """A map of 4 x 4 at 16 pixels, flattened in one of the ways that people write."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4))
        self.norm = nn.BatchNorm1d(64) if how == "norm" else nn.Identity()
        self.head = nn.Linear(64, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        rows = {"view": (len(x), 64), "loose": (-1, 64)}.get(self.how, (len(x), -1))
        return self.head(self.norm(x.view(*rows)))


@pytest.mark.parametrize(
    "build",
    [resnet18, vgg, lambda: Flat("flatten"), lambda: Flat("norm"), lambda: Flat("view"), lambda: Flat("loose"), lambda: nn.Conv2d(3, 2, 3)],
    ids=["resnet18", "vgg", "flatten", "norm", "view", "loose", "convolution"],
)
def test_convolutional_networks_are_returned_as_they_are(build: Callable[[], nn.Module]) -> None:
    module = build().train()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for image in ((32, 32), (64, 64), (24, 40)):
        found = resized(module, (16, 16), image)
        assert found.module is module and not found.interpolated
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items()), "batch norm must not learn from a probe"
    assert all(part.training for part in module.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class Mixer(nn.Module):
    """A linear layer over the tokens: of fixed size, but no head that a feature map could be cut before."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.patches(x).flatten(2)).mean(dim=2))


class Scaled(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(F.interpolate(x, size=(12, 12)))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Mixer, "mat1 and mat2 shapes cannot be multiplied"),
        (lambda: Scaled(resnet18()), "it scales every image to 12x12 itself"),
        (lambda: timm.create_model("cait_xxs24_224", img_size=16, depth=1, num_classes=2), "Input height (32) doesn't match model (16)."),
    ],
    ids=["mixer", "scaled", "cait"],
)
def test_what_cannot_be_resized_is_refused_in_one_line(build: Callable[[], nn.Module], reason: str) -> None:
    module = build()
    with pytest.raises(NotApplicable) as caught:
        resized(module, (16, 16), (32, 48))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_only_the_first_line_of_an_error_is_told() -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("first\nsecond")

    with pytest.raises(NotApplicable, match=r"\(first\)"):
        resized(Strict(), (16, 16), (32, 32))


def test_embeddings_that_a_network_resamples_itself_are_told() -> None:
    module = tiny_vit(img_size=32, patch_size=8, dynamic_img_size=True)
    found = resized(module, (32, 32), (64, 64))
    assert found.module is module and found.interpolated
    copied = resized(tiny_vit(img_size=32, patch_size=8), (32, 32), (64, 64)).module
    assert torch.allclose(found.module(images(64)), copied(images(64)), atol=1e-5)


def test_hooks_stay_with_the_original_but_those_that_compute_weights() -> None:
    module = Normalised(tiny_vit(img_size=32, patch_size=8))
    # the older of torch's two ways on purpose: it lives in a hook
    hooked = nn.utils.spectral_norm(module.network.head)  # type: ignore[arg-type]
    calls: list[int] = []
    module.network.blocks[0].register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr,index]
    module.eval()
    found = resized(module, (32, 32), (64, 64)).module
    calls.clear()
    found(images(64))
    assert calls == []
    module(images(32))
    assert calls == [1]
    features = torch.rand(2, 16, generator=torch.Generator().manual_seed(5))
    before = found.network.head(features)
    with torch.no_grad():
        hooked.weight_orig[0] += 1
    expected = features @ (hooked.weight_orig / (hooked.weight_u @ hooked.weight_orig @ hooked.weight_v)).T + hooked.bias
    assert torch.allclose(found.network.head(features), expected, atol=1e-5) and not torch.allclose(before, expected, atol=1e-2)


def test_a_weight_with_a_history_can_be_copied() -> None:
    module = tiny_vit(img_size=32, patch_size=8)
    module.attention_seen = module.pos_embed * 2  # what a careless hook leaves behind
    assert resized(module, (32, 32), (64, 64)).module.attention_seen is module.attention_seen
