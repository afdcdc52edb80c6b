from __future__ import annotations

import warnings
from typing import Any

import captum.attr
import numpy as np
import pytest
import reference
import timm
import torch
import torch.nn.functional as F
import torchvision
from networks import apart, classifier, linear, make_task, photo, scaled, tiny_vit, vgg
from torch import Tensor, nn

import attribution as at
from attribution.baselines.attribute import attribute
from attribution.baselines.cams import grad_cam_map, grad_cam_plus_plus_map, layer_cam_map
from attribution.network.maps import find_feature_layer, token_grid

CAMS = ("grad_cam", "grad_cam_plus_plus", "layer_cam", "score_cam", "ablation_cam")


def enlarged(values: np.ndarray, size: tuple[int, int]) -> Tensor:
    return F.interpolate(torch.from_numpy(values)[None, None].float(), size=size, mode="bilinear", align_corners=False)[0, 0]


class Inside:
    """The output of a module and its gradient, by plain hooks; channels can be set to zero."""

    def __init__(self, used: at.Classifier, module: nn.Module, image: Tensor, target: int) -> None:
        self.used, self.module, self.target = used, module, target
        self.inputs = used.inputs(image)
        self.tokens = isinstance(module, nn.LayerNorm)
        outputs: list[Tensor] = []
        handle = module.register_forward_hook(lambda _m, _a, output: outputs.append(output))
        score = used.module(self.inputs.clone().requires_grad_())[0, target]
        handle.remove()
        (gradient,) = torch.autograd.grad(score, outputs[0])
        self.activation, self.gradient = self.to_map(outputs[0]), self.to_map(gradient)

    def to_map(self, value: Tensor) -> Tensor:
        """[C, h, w]; of tokens, the class token first, then row by row."""
        if not self.tokens:
            return value[0].detach()
        side = int(value.shape[1] ** 0.5)
        return torch.stack([value[0, 1 + y * side : 1 + (y + 1) * side].detach() for y in range(side)]).permute(2, 0, 1)

    def without(self, channel: int | None) -> float:
        def edit(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            if channel is not None and self.tokens:
                output[:, :, channel] = 0
            elif channel is not None:
                output[:, channel] = 0
            return output

        handle = self.module.register_forward_hook(edit)
        with torch.no_grad():
            value = float(self.used.module(self.inputs)[0, self.target].double())
        handle.remove()
        return value

    def probability(self, inputs: Tensor) -> float:
        with torch.no_grad():
            return float(self.used.module(inputs).softmax(1)[0, self.target])


@pytest.fixture(scope="module", params=["cnn", "vit"])
def inside(request: Any, cnn: at.Classifier, vit: at.Classifier, small_cat: Tensor) -> Inside:
    if request.param == "cnn":
        return Inside(cnn, cnn.module.layer3, small_cat, 3)
    return Inside(vit, vit.module.blocks[5].norm1, small_cat, 3)


@pytest.mark.parametrize("method", CAMS)
def test_naive_derivations(method: str, inside: Inside, small_cat: Tensor) -> None:
    expected = {
        "grad_cam": lambda: reference.grad_cam(inside.activation, inside.gradient),
        "grad_cam_plus_plus": lambda: reference.grad_cam_plus_plus(inside.activation, inside.gradient),
        "layer_cam": lambda: reference.layer_cam(inside.activation, inside.gradient),
        "score_cam": lambda: reference.score_cam(inside.activation, inside.probability, inside.inputs, torch.zeros_like(inside.inputs)),
        "ablation_cam": lambda: reference.ablation_cam(inside.activation, inside.without),
    }[method]()
    found = attribute(small_cat, inside.used, method, 3, fill="model_mean").pixel_map
    assert expected.max() > 0
    tolerance = 2e-3 if method == "ablation_cam" else 1e-3  # drops are differences of float32 scores
    assert apart(found, enlarged(expected, (32, 32))) < tolerance


def test_grad_cam_is_captums(cnn: at.Classifier, small_cat: Tensor) -> None:
    method = captum.attr.LayerGradCam(cnn.module, cnn.module.layer2)
    direct = method.attribute(cnn.inputs(small_cat), 3, relu_attributions=True)
    large = captum.attr.LayerAttribution.interpolate(direct, (32, 32), "bilinear")[0, 0]
    for layer in ("layer2", cnn.module.layer2):
        assert apart(attribute(small_cat, cnn, "grad_cam", 3, layer=layer).pixel_map, large) < 1e-4


@pytest.mark.parametrize("mean", [False, True])
def test_grad_cam_plus_plus_variants(mean: bool, inside: Inside) -> None:
    name = "mean" if mean else "sum"
    found = grad_cam_plus_plus_map(inside.activation.double(), inside.gradient.double(), None, name, name)
    assert apart(found, torch.from_numpy(reference.grad_cam_plus_plus(inside.activation, inside.gradient, mean, mean))) < 1e-6


def test_the_exponential_of_a_large_score_stays_finite() -> None:
    activation, gradient = torch.rand(2, 3, 3), torch.randn(2, 3, 3)
    plain = grad_cam_plus_plus_map(activation, gradient)
    for score in (1.0, 60.0, 500.0):
        found = grad_cam_plus_plus_map(activation, gradient, torch.tensor(score))
        assert found.isfinite().all()
        assert apart(found / found.max(), plain / plain.max()) < 1e-5


def test_closed_forms() -> None:
    """One channel of ones with gradient g: Grad-CAM g, LayerCAM g, Grad-CAM++ sum of 1/(2 + g S) g."""
    activation, gradient = torch.ones(1, 2, 2), torch.full((1, 2, 2), 0.5)
    assert torch.allclose(grad_cam_map(activation, gradient), torch.full((2, 2), 0.5))
    assert torch.allclose(layer_cam_map(activation, gradient), torch.full((2, 2), 0.5))
    assert torch.allclose(grad_cam_plus_plus_map(activation, gradient), torch.full((2, 2), 4 * 0.5 / (2 + 0.5 * 4)))
    for function in (grad_cam_map, layer_cam_map, grad_cam_plus_plus_map):
        assert function(activation, -gradient).abs().max() == 0
        assert function(activation, 0 * gradient).abs().max() == 0


def test_score_cam_softmax_weights(cnn: at.Classifier, small_cat: Tensor) -> None:
    inside = Inside(cnn, cnn.module.layer3, small_cat, 3)
    expected = np.zeros(inside.activation.shape[1:])
    scores = []
    for channel in inside.activation:
        mask = F.interpolate(channel[None, None], size=(32, 32), mode="bilinear", align_corners=False)
        mask = (mask - mask.min()) / (mask.max() - mask.min())
        scores.append(inside.probability(mask * inside.inputs))
    weights = np.exp(scores) / np.exp(scores).sum()
    for weight, channel in zip(weights, inside.activation, strict=True):
        expected += weight * channel.double().numpy()
    found = attribute(small_cat, inside.used, "score_cam", 3, weights="softmax", fill="model_mean").pixel_map
    assert apart(found, enlarged(np.maximum(expected, 0), (32, 32))) < 1e-3


class Constant(nn.Module):
    """A map that does not depend on the position: nothing to mask with."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.spread, self.head = nn.AdaptiveAvgPool2d(1), nn.Upsample(size=(4, 4)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.spread(self.pool(x)).mean(dim=(2, 3)))


def test_score_cam_of_a_constant_map_is_zero() -> None:
    assert attribute(photo(16), classifier(Constant().eval()), "score_cam", layer="spread").pixel_map.abs().max() == 0


def test_ablation_cam_of_a_linear_head_is_grad_cam_of_input_over_score() -> None:
    """With z = sum_c w_c mean(A_c), the drop of channel c is w_c mean(A_c)."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3, bias=False)).eval()
    used, image = classifier(module), photo(16)
    activation = module[:2](used.inputs(image))[0].detach()
    drops = module[4].weight[1].detach() * activation.mean(dim=(1, 2))
    expected = torch.einsum("c,chw->hw", drops / drops.sum(), activation).relu()
    found = attribute(image, used, "ablation_cam", 1, layer="1", batch_size=4).pixel_map
    assert apart(found, F.interpolate(expected[None, None], size=(16, 16), mode="bilinear")[0, 0]) < 1e-4


@pytest.mark.parametrize("method", CAMS)
def test_a_module_called_twice_counts_with_its_last_call(method: str) -> None:
    torch.manual_seed(0)
    relu, pool = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
    layers = [nn.Conv2d(3, 6, 3), relu, nn.Conv2d(6, 4, 3), relu, pool, nn.Flatten(), nn.Linear(4, 3)]
    reused = scaled(nn.Sequential(*layers))
    plain = nn.Sequential(*layers[:3], nn.ReLU(), *layers[4:])
    image = photo(16)
    found = attribute(image, classifier(reused), method, 1, layer=relu).pixel_map
    assert apart(found, attribute(image, classifier(plain), method, 1, layer="3").pixel_map) < 1e-5


def test_a_layer_that_returns_a_tuple_is_refused() -> None:
    torch.manual_seed(0)
    used = classifier(scaled(torchvision_vit()))
    for method in CAMS:
        with pytest.raises(at.UserError, match=r"self_attention.*tuple"):
            attribute(photo(16), used, method, layer="encoder.layers.encoder_layer_0.self_attention")


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)


NETWORKS: list[tuple[str, Any, int, str, str, tuple[int, int], int]] = [
    ("torchvision resnet18", lambda: torchvision.models.resnet18(num_classes=4), 64, "layer4", "nchw", (2, 2), 0),
    ("densenet121", lambda: torchvision.models.densenet121(num_classes=4), 64, "features", "nchw", (2, 2), 0),
    ("timm resnet10t", lambda: timm.create_model("resnet10t", num_classes=4), 64, "layer4", "nchw", (2, 2), 0),
    ("vit class token", tiny_vit, 16, "blocks.1.norm1", "tokens", (4, 4), 1),
    ("vit average", lambda: tiny_vit(class_token=False, global_pool="avg"), 16, "blocks", "tokens", (4, 4), 0),
    ("vit registers", lambda: tiny_vit(reg_tokens=4), 16, "blocks.1.norm1", "tokens", (4, 4), 5),
    (
        "deit distilled",
        lambda: timm.models.deit.VisionTransformerDistilled(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=4),
        16,
        "blocks.1.norm1",
        "tokens",
        (4, 4),
        2,
    ),
    ("torchvision vit", torchvision_vit, 16, "encoder.layers.encoder_layer_1.ln_1", "tokens", (4, 4), 1),
    ("convnext_atto", lambda: timm.create_model("convnext_atto", num_classes=4), 64, "stages.3", "nchw", (2, 2), 0),
]
SLOW: list[tuple[str, Any, int, str, str, tuple[int, int], int]] = [
    ("convnext_tiny", lambda: torchvision.models.convnext_tiny(num_classes=4), 64, "features.7", "nchw", (2, 2), 0),
    ("timm swin", lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=112, num_classes=4), 112, "norm", "nhwc", (4, 4), 0),
    ("torchvision swin_t", lambda: torchvision.models.swin_t(num_classes=4), 64, "permute", "nchw", (2, 2), 0),
]


@pytest.mark.parametrize(
    ("build", "size", "name", "kind", "grid", "prefix"),
    [pytest.param(*case[1:], id=case[0]) for case in NETWORKS]
    + [pytest.param(*case[1:], id=case[0], marks=pytest.mark.slow) for case in SLOW],
)
def test_the_layer_found(build: Any, size: int, name: str, kind: str, grid: tuple[int, int], prefix: int) -> None:
    torch.manual_seed(0)
    used, image = classifier(build().eval(), size), photo(size)
    found = find_feature_layer(make_task(used, image))
    last = name.rsplit(".", 1)[0]
    assert found.name == name or (kind != "tokens" and found.name.startswith(last)), found.name
    assert (found.kind, found.grid, found.prefix) == (kind, grid, prefix)
    outputs: list[Tensor] = []
    handle = found.module.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    used.logits(used.inputs(image))
    handle.remove()
    values = found.to_map(outputs[-1])
    assert values.shape[2:] == grid
    if kind == "tokens":
        assert torch.equal(values[0, :, 1, 2], outputs[-1][0, prefix + grid[1] + 2])
        again = token_grid(make_task(used, image), outputs[-1].shape[1])
        assert again == (grid, prefix)
    if kind == "nhwc":
        assert torch.equal(values[0, :, 1, 0], outputs[-1][0, 1, 0])
    by_name = attribute(image, used, "grad_cam", 1, layer=found.name).pixel_map
    assert torch.equal(by_name, attribute(image, used, "grad_cam", 1).pixel_map)
    assert torch.equal(by_name, attribute(image, used, "grad_cam", 1, layer=found.module).pixel_map)
    assert by_name.max() > 0 or by_name.abs().max() == 0


def test_non_square_tokens() -> None:
    used = at.Classifier(tiny_vit(img_size=(16, 24)), size=(16, 24), scores="logits")
    found = find_feature_layer(make_task(used, photo(16, width=24)))
    assert (found.grid, found.prefix) == ((4, 6), 1)


def test_networks_without_a_map() -> None:
    used, _ = linear(8)
    with pytest.raises(at.UserError, match="no layer of Sequential has a map"):
        attribute(photo(8), used, "grad_cam")


def test_the_last_map_of_a_vgg() -> None:
    assert find_feature_layer(make_task(classifier(vgg()), photo(16))).name == "6"


class Tokens(nn.Module):
    """A vision transformer written by hand, as people write them: no module of torch, timm or a name is known, attention by einsum."""

    def __init__(self, pool: str = "cls", width: int = 24, heads: int = 3, inner: int = 36) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.start = nn.Linear(3 * 4 * 4, width), nn.Parameter(torch.randn(1, 1, width))
        self.position, self.heads, self.pool = nn.Parameter(torch.randn(1, 17, width)), heads, pool
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "before": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * inner, bias=False), "out": nn.Linear(inner, width),
                    "then": nn.LayerNorm(width), "up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(3)
        )  # fmt: skip
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 4, stride=4).transpose(1, 2)
        x = torch.cat([self.start.expand(len(x), -1, -1), self.embed(patches)], dim=1) + self.position
        for block in self.blocks:
            q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in block["qkv"](block["before"](x)).chunk(3, dim=-1))
            weights = (torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5).softmax(-1)
            x = x + block["out"](torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["then"](x))))
        x = self.last(x)
        return self.head(x[:, 0] if self.pool == "cls" else x[:, 1:].mean(dim=1))


UNKNOWN: list[tuple[str, Any, int, str]] = [
    ("by hand, class token", Tokens, 16, "blocks.2.before"),
    ("by hand, mean", lambda: Tokens("mean"), 16, "last"),
    ("late class token", lambda: timm.create_model("cait_xxs24_224", img_size=32, depth=2, num_classes=4), 32, "blocks_token_only.1.norm1"),
    ("positional attention", lambda: timm.create_model("convit_tiny", img_size=32, num_classes=4), 32, "blocks.11.norm1"),
    ("mlp head, nhwc", lambda: timm.create_model("caformer_s18", num_classes=4), 64, "stages"),
    ("mlp head, conv", lambda: timm.create_model("inception_next_atto", num_classes=4), 64, "stages"),
]


@pytest.mark.parametrize(("build", "size", "name"), [pytest.param(*case[1:], id=case[0]) for case in UNKNOWN])
def test_the_layer_that_the_head_reads_is_found_whatever_its_class(build: Any, size: int, name: str) -> None:
    """The layer by hand; gradients arrive at every position; detached, nothing of the image reaches the keys and values, or the logits."""
    torch.manual_seed(0)
    used, image = classifier(build().eval(), size), photo(size)
    found = find_feature_layer(make_task(used, image))
    assert found.name == name
    outputs: list[Tensor] = []
    handle = found.module.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    logits = used.logits(used.inputs(image).requires_grad_())
    handle.remove()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((logits * weights).sum(), outputs[-1])
    assert (found.to_map(gradient).abs().amax(dim=1) > 0).all()


def test_two_branches_that_a_head_reads_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse, self.head = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(3, 4, 4, 4), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.fine(x).mean(dim=(2, 3)), self.coarse(x).mean(dim=(2, 3))], dim=1))

    used = classifier(Two().eval())
    with pytest.raises(at.NotApplicable, match=r"no map of the image through which everything passes.*layer=.*fine, coarse"):
        attribute(photo(16), used, "grad_cam")
    assert attribute(photo(16), used, "grad_cam", layer="fine").provenance["layer"] == "fine"


@pytest.mark.parametrize("method", CAMS)
def test_an_empty_map_warns_and_names_the_layer(method: str) -> None:
    """A network whose last map is dead: every unit of it is below zero for any image."""
    torch.manual_seed(0)
    dead = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    nn.init.constant_(dead[2].bias, -100.0)
    with pytest.warns(UserWarning, match=rf"the map of {method} for class 'class 1' of Sequential at the layer 3 is 0 everywhere"):
        found = attribute(photo(16), classifier(dead.eval()), method, 1)
    assert not found.pixel_map.any()


def test_the_layer_stands_in_what_is_kept(cnn: at.Classifier, small_cat: Tensor, tmp_path: Any) -> None:
    found = attribute(small_cat, cnn, "grad_cam", 3)
    assert found.provenance["layer"] == "layer3" and "layer layer3" in repr(found)
    found.save(tmp_path / "kept.npz")
    assert at.Explanation.load(tmp_path / "kept.npz").provenance["layer"] == "layer3"
    assert "layer layer3" in "".join(text.get_text() for ax in found.plot().axes for text in [ax.title])
    assert "layer" not in attribute(small_cat, cnn, "saliency", 3).provenance
    assert attribute(small_cat, cnn, "layer_cam", 3, layer="layer2").provenance["layer"] == "layer2"


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam_plus_plus", "layer_cam"])
def test_a_head_that_reads_one_place_is_told(method: str) -> None:
    """Each class's logit is the maximum of its own map. With their mean in its place nothing is told."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    for pool, told in ((nn.AdaptiveMaxPool2d(1), True), (nn.AdaptiveAvgPool2d(1), False)):
        used = at.Classifier(nn.Sequential(*body, pool, nn.Flatten()).eval(), size=8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attribute(photo(8), used, method, 1)
        assert any("at one of 64 places of layer" in str(each.message) for each in caught) == told
