from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import apart, classifier, make_task, photo, scaled, tiny_vit, vgg
from timm.layers import RmsNorm, SwiGLU
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor, nn

import attribution as at
from attribution.baselines import rules
from attribution.baselines.attribute import attribute
from attribution.baselines.transformers import _attention_relevance
from attribution.network.attention import AttentionRules, open_attention
from attribution.network.reading import read_tokens

TRANSFORMER = ("attention_rollout", "transformer_attribution", "grad_eclip", "attn_lrp")


def distilled() -> nn.Module:
    torch.manual_seed(0)
    return scaled(timm.models.deit.VisionTransformerDistilled(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5))


def torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    return scaled(torchvision.models.VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5))


BUILDERS: dict[str, Any] = {
    "class token": tiny_vit,
    "registers": lambda: tiny_vit(reg_tokens=3),
    "average": lambda: tiny_vit(class_token=False, global_pool="avg"),
    "qk norm": lambda: tiny_vit(qk_norm=True, init_values=0.5),
    "scale norm": lambda: tiny_vit(scale_attn_norm=True),
    "one head": lambda: tiny_vit(num_heads=1),
    "distilled": distilled,
    "torchvision": torchvision_vit,
}
PREFIX = {"registers": 4, "average": 0, "distilled": 2}


@pytest.fixture(params=[*BUILDERS, "zoo"])
def model(request: Any, vit: at.Classifier, small_cat: Tensor) -> tuple[at.Classifier, Tensor, int]:
    """Classifier, image, number of prefix tokens."""
    if request.param == "zoo":
        return vit, small_cat, 1
    return classifier(BUILDERS[request.param]()), photo(16), PREFIX.get(request.param, 1)


def enlarged(values: Any, size: int) -> Tensor:
    tensor = torch.as_tensor(values).float()
    side = int(tensor.numel() ** 0.5)
    return F.interpolate(tensor.view(1, 1, side, side), size=(size, size), mode="bilinear", align_corners=False)[0, 0]


def attention_and_gradient(used: at.Classifier, image: Tensor, target: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The weights [heads, N, N] of each block and their gradients, by a second way: attention written out from the projections."""
    module = copy.deepcopy(used.module)
    kept: list[Tensor] = []

    def weights_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("nhqd,nhkd->nhqk", q, k) / q.shape[-1] ** 0.5
        a = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
        a.retain_grad()
        kept.append(a)
        return torch.einsum("nhqk,nhkd->nhqd", a, v)

    def timm_forward(m: nn.Module, x: Tensor, **_: Any) -> Tensor:
        n, tokens, width = x.shape
        qkv = m.qkv(x).reshape(n, tokens, 3, m.num_heads, width // m.num_heads)
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        return m.proj(m.norm(weights_of(m.q_norm(q), m.k_norm(k), v).transpose(1, 2).reshape(n, tokens, width)))

    def torch_forward(m: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, None]:
        n, tokens, width = x.shape
        qkv = (x @ m.in_proj_weight.T + m.in_proj_bias).reshape(n, tokens, 3, m.num_heads, width // m.num_heads)
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        return m.out_proj(weights_of(q, k, v).transpose(1, 2).reshape(n, tokens, width)), None

    for m in module.modules():
        if hasattr(m, "qkv"):
            m.forward = lambda x, m=m, **_: timm_forward(m, x)
        elif isinstance(m, nn.MultiheadAttention):
            m.forward = lambda q, k, v, m=m, **_: torch_forward(m, q)
    module(used.inputs(image))[0, target].backward()
    return [a[0].detach().double().numpy() for a in kept], [a.grad[0].double().numpy() for a in kept]


def read_row(used: at.Classifier, joint: np.ndarray, prefix: int) -> np.ndarray:
    if prefix == 0:
        return joint.mean(axis=0)
    if hasattr(used.module, "head_dist"):
        return joint[:2, prefix:].mean(axis=0)
    return joint[0, prefix:]


def test_opening_changes_no_logit(model: tuple[at.Classifier, Tensor, int]) -> None:
    used, image, _ = model
    task = make_task(used, image)
    expected = used.logits(task.inputs)
    with torch.no_grad(), open_attention(used.module) as calls:
        found = used.logits(task.inputs)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == read_tokens(task, "test").blocks
    for call, weights in zip(calls, attention_and_gradient(used, image, 1)[0], strict=True):
        assert torch.allclose(call.weights.sum(-1), torch.ones(call.weights.shape[:-1]), atol=1e-5)
        assert np.abs(call.weights[0].numpy() - weights).max() < 1e-5
        assert torch.allclose(call.context, call.weights @ call.value, atol=1e-6)
    assert weights.std() > 1e-4  # attention differs between tokens, so the test can fail


def test_rollout(model: tuple[at.Classifier, Tensor, int]) -> None:
    used, image, prefix = model
    joint = None
    for weights in attention_and_gradient(used, image, 1)[0]:
        mixed = weights.mean(axis=0) + np.eye(weights.shape[-1])
        mixed /= mixed.sum(axis=1, keepdims=True)
        joint = mixed if joint is None else mixed @ joint
    assert joint is not None and np.allclose(joint.sum(axis=1), 1)
    found = attribute(image, used, "attention_rollout", 1).pixel_map
    assert apart(found, enlarged(read_row(used, joint, prefix), image.shape[1])) < 1e-4
    assert torch.equal(found, attribute(image, used, "attention_rollout", 2).pixel_map)


def test_transformer_attribution(model: tuple[at.Classifier, Tensor, int]) -> None:
    used, image, prefix = model
    weights, gradients = attention_and_gradient(used, image, 1)
    joint = np.eye(weights[0].shape[-1])
    for a, g in zip(weights, gradients, strict=True):
        mean = np.zeros_like(a[0])
        for head in range(len(a)):
            mean += np.maximum(a[head] * g[head], 0) / len(a)
        joint = joint + mean @ joint
    if prefix == 0:
        joint = joint - np.eye(len(joint))
    found = attribute(image, used, "transformer_attribution", 1).pixel_map
    assert apart(found, enlarged(read_row(used, joint, prefix), image.shape[1])) < 1e-3


def test_grad_eclip(model: tuple[at.Classifier, Tensor, int]) -> None:
    used, image, prefix = model
    if prefix == 0:
        with pytest.raises(at.UserError, match=r"grad_eclip does not apply to .*class token"):
            attribute(image, used, "grad_eclip")
        return
    task = make_task(used, image, 1)
    with open_attention(used.module) as calls:
        score = used.logits(task.leaf())[0, 1]
    last = calls[-1]
    (gradient,) = torch.autograd.grad(score, last.context)
    q, k, v, g = (t.detach()[0].permute(1, 0, 2).flatten(1).double().numpy() for t in (last.query, last.key, last.value, gradient))
    cosines = [float(q[0] @ k[i] / np.linalg.norm(q[0]) / np.linalg.norm(k[i])) for i in range(prefix, len(k))]
    scale = [(c - min(cosines)) / (max(cosines) - min(cosines)) for c in cosines]
    values = [max(0.0, s * float(g[0] @ v[i + prefix])) for i, s in enumerate(scale)]
    assert apart(attribute(image, used, "grad_eclip", 1).pixel_map, enlarged(values, image.shape[1])) < 1e-3


def test_grad_eclip_with_one_head(vit: at.Classifier, small_cat: Tensor) -> None:
    """One head of full width changes the score that is differentiated; with one head it is the native variant."""
    native = attribute(small_cat, vit, "grad_eclip", 3).pixel_map
    assert apart(attribute(small_cat, vit, "grad_eclip", 3, heads="single").pixel_map, native) > 1e-3
    used = classifier(tiny_vit(num_heads=1))
    pair = [attribute(photo(16), used, "grad_eclip", 1, heads=heads).pixel_map for heads in ("native", "single")]
    assert apart(*pair) < 1e-5


class OwnPooling(nn.Module):
    """A head of one's own on the tokens of a vision transformer."""

    def __init__(self, pool: Any, width: int = 16) -> None:
        super().__init__()
        self.backbone, self.pool, self.head = tiny_vit(num_classes=0), pool, scaled(nn.Linear(width, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.backbone.forward_features(x)))


class Encoder(nn.Module):
    """torch's own transformer as a vision transformer; its fused layers call no attention module."""

    def __init__(self, norm_first: bool = True, pool: Any = lambda t: t[:, 0]) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
        self.patches, self.encoder = nn.Conv2d(3, 16, 4, 4), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.start, self.position, self.head = nn.Parameter(torch.ones(1, 1, 16)), nn.Parameter(torch.ones(1, 17, 16)), nn.Linear(16, 5)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.start.expand(len(x), -1, -1), patches], dim=1) + self.position
        return self.head(self.pool(self.encoder(tokens)))


PATCHES = [0.0] + [1 / 16] * 16
READ: dict[str, tuple[Any, list[float]]] = {
    "class token": (tiny_vit, [1.0] + [0.0] * 16),
    "mean of the patches": (lambda: tiny_vit(global_pool="avg"), PATCHES),
    "in a container": (lambda: nn.Sequential(tiny_vit(global_pool="avg")), PATCHES),
    "registers": (lambda: tiny_vit(reg_tokens=3), [1.0] + [0.0] * 19),
    "distilled": (distilled, [0.5, 0.5] + [0.0] * 16),
    "torchvision": (torchvision_vit, [1.0] + [0.0] * 16),
    "own pooling of the patches": (lambda: OwnPooling(lambda t: t[:, 1:].mean(1)), PATCHES),
    "own pooling of all tokens": (lambda: OwnPooling(lambda t: t.mean(1)), [1 / 17] * 17),
    "class token and mean": (lambda: OwnPooling(lambda t: torch.cat([t[:, 0], t[:, 1:].mean(1)], 1), 32), [0.5] + [1 / 32] * 16),
    "torch's encoder": (lambda: scaled(Encoder()), [1.0] + [0.0] * 16),
    "torch's encoder, norm last": (lambda: scaled(Encoder(False)), [1.0] + [0.0] * 16),
    "torch's encoder, own pooling": (lambda: scaled(Encoder(pool=lambda t: t[:, 1:].mean(1))), PATCHES),
}


@pytest.mark.parametrize("name", READ)
def test_what_the_head_reads(name: str) -> None:
    """Each token's share by hand, and the rows of the rollout that follow from it."""
    build, shares = READ[name]
    used, image = classifier(build()), photo(16)
    task = make_task(used, image)
    found = read_tokens(task, "test")
    assert torch.allclose(found.shares, torch.tensor(shares), atol=1e-4) and found.grid == (4, 4)
    with open_attention(used.module) as calls:
        score = used.logits(task.leaf())[0, 1]
    gradients = torch.autograd.grad(score, [call.weights for call in calls])
    rollout = relevance = torch.eye(found.tokens)
    for call, gradient in zip(calls, gradients, strict=True):
        rollout = (call.weights[0].detach().mean(0) + torch.eye(found.tokens)) / 2 @ rollout
        relevance = relevance + (call.weights.detach() * gradient)[0].clamp(min=0).mean(0) @ relevance
    for method, joint in (("attention_rollout", rollout), ("transformer_attribution", relevance - torch.eye(found.tokens))):
        expected = sum(share * joint[token] for token, share in enumerate(shares))[-16:]
        assert apart(attribute(image, used, method, 1).pixel_map, enlarged(expected, 16)) < 1e-3, method
    if sum(shares[-16:]) > 0:
        with pytest.raises(at.NotApplicable, match="its head reads the patches, not a class token alone"):
            attribute(image, used, "grad_eclip", 1)
    else:
        assert max(float(attribute(image, used, "grad_eclip", target).pixel_map.max()) for target in range(3)) > 0


class MeetingElsewhere(nn.Module):
    """A vision transformer whose tokens also meet in a convolution, so that attention does not say what each holds of each."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.depthwise = tiny_vit(), scaled(nn.Conv1d(16, 16, 3, padding=1, groups=16))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.vit._pos_embed(self.vit.patch_embed(x))
        for block in self.vit.blocks:
            tokens = block(tokens)
            tokens = tokens + self.depthwise(tokens.transpose(1, 2)).transpose(1, 2)
        return self.vit.forward_head(self.vit.norm(tokens))


@pytest.mark.parametrize("method", TRANSFORMER)
def test_tokens_that_meet_outside_of_attention_are_refused(method: str) -> None:
    with pytest.raises(at.NotApplicable, match=f"{method} does not apply to .*tokens also meet outside of its attention"):
        attribute(photo(16), classifier(MeetingElsewhere().eval()), method)


@pytest.mark.parametrize(
    ("build", "cause"),
    [
        (lambda: tiny_vit(global_pool="max"), "its head picks tokens by their values"),
        (lambda: tiny_vit(global_pool="avgmax"), "its head picks tokens by their values"),
        (lambda: OwnPooling(lambda t: t.amax(1)), "its head picks tokens by their values"),
        (lambda: tiny_vit(block_fn=ParallelThingsBlock), "attentions run side by side in its blocks"),
    ],
    ids=["max", "avgmax", "own", "parallel"],
)
@pytest.mark.parametrize("method", TRANSFORMER)
def test_readings_that_are_no_row_of_a_product(method: str, build: Any, cause: str) -> None:
    if method == "attn_lrp" and "side by side" in cause:  # its rules hold for any graph
        assert attribute(photo(16), classifier(build()), method).pixel_map.abs().max() > 0
        return
    cause = "it has no rule for a?max" if method == "attn_lrp" else cause
    with pytest.raises(at.NotApplicable, match=f"{method} does not apply to .*: {cause}"):
        attribute(photo(16), classifier(build()), method)


@pytest.mark.parametrize("method", TRANSFORMER)
def test_networks_without_global_attention(method: str) -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 1), num_heads=(1, 2), num_classes=4
    ).eval()
    for used, size in ((classifier(vgg()), 16), (classifier(swin, 56), 56)):
        with pytest.raises(at.UserError, match=f"{method} does not apply to .*(no attention|attention within windows)"):
            attribute(photo(size), used, method)


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        ("attn_lrp", {"norm_layer": RmsNorm}, "rms_norm"),
        ("attn_lrp", {"mlp_layer": SwiGLU}, "mul"),
        ("transformer_attribution", {"norm_layer": RmsNorm}, "RmsNorm"),
        ("transformer_attribution", {"act_layer": QuickGELU}, "QuickGELU"),
    ],
)
def test_layers_without_a_rule_are_refused(method: str, options: dict[str, Any], named: str) -> None:
    """Where a rule is missing, the plain gradient would pass silently."""
    used = classifier(tiny_vit(**options))
    variant = {"variant": "lrp"} if method == "transformer_attribution" else {}
    with pytest.raises(at.UserError, match=f"{method}.* does not apply to .*no rule for {named}"):
        attribute(photo(16), used, method, **variant)
    assert attribute(photo(16), used, "transformer_attribution").pixel_map.max() > 0


class ConstantFactor(nn.Module):
    """QuickGELU with a slope of f(x) / x; its buffer keeps it from being taken for an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slope", torch.tensor(1.702))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.slope * x.detach()).sigmoid()


def test_attn_lrp_takes_any_elementwise_activation() -> None:
    module = tiny_vit(act_layer=QuickGELU)
    other = copy.deepcopy(module)
    for block in other.blocks:
        block.mlp.act = ConstantFactor()
    found, expected = (attribute(photo(16), classifier(each), "attn_lrp", 1).pixel_map for each in (module, other))
    assert apart(found, expected) < 1e-4


def test_the_lrp_variant_needs_the_logits_of_the_network(vit: at.Classifier, small_cat: Tensor) -> None:
    """Relevance starts at an output of the module: not at prototypes on its features, not behind a softmax."""
    prototypes = vit.with_prototypes(torch.randn(4, 128, generator=torch.Generator().manual_seed(0)))
    way = vit.preprocessing
    behind = at.Classifier(nn.Sequential(vit.module, nn.Softmax(dim=1)), size=32, mean=way.mean, std=way.std)
    for used in (prototypes, behind):
        with pytest.raises(at.UserError, match=r"variant='lrp'.* does not apply to"):
            attribute(small_cat, used, "transformer_attribution", 1, variant="lrp")
        assert attribute(small_cat, used, "transformer_attribution", 1).pixel_map.max() > 0


# --- rules in the relevance form


def relevance_in(output: Tensor, relevance: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, relevance)


@given(seed=st.integers(0, 999), rows=st.integers(1, 4), wide=st.integers(1, 5), out=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_positive_linear(seed: int, rows: int, wide: int, out: int) -> None:
    torch.manual_seed(seed)
    x, weight = ((t.sign() * (t.abs() + 0.1)).double() for t in (torch.randn(rows, wide), torch.randn(out, wide)))
    x, bias, relevance = x.requires_grad_(), torch.randn(out).double(), torch.rand(rows, out).double()
    y = rules.positive_linear(x, weight, bias)
    assert torch.allclose(y, F.linear(x, weight, bias))
    (found,) = relevance_in(y, relevance, x)
    expected = torch.zeros(rows, wide).double()
    for r in range(rows):
        for o in range(out):
            parts = [max(float(x.detach()[r, i] * weight[o, i]), 0) for i in range(wide)]
            for i in range(wide):
                if sum(parts) > 0:
                    expected[r, i] += parts[i] / sum(parts) * relevance[r, o]
    assert torch.allclose(found, expected, atol=1e-6)
    reached = (torch.relu(x.detach()[:, None] * weight).sum(-1) > 0).double()
    assert float(found.sum()) == pytest.approx(float((relevance * reached).sum()), abs=1e-6)


def test_shared_product() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 4).double().requires_grad_(), torch.rand(2, 4, 5).double().requires_grad_()
    relevance = torch.randn(2, 3, 5).double()
    y = rules.shared_product(a, b)
    assert torch.allclose(y, a @ b)
    left, right = relevance_in(y, relevance, a, b)
    assert float(left.sum()) == pytest.approx(float(relevance.sum()) / 2, rel=1e-6)
    assert float(right.sum()) == pytest.approx(float(relevance.sum()) / 2, rel=1e-6)
    expected = torch.zeros(2, 3, 4).double()
    for n in range(2):
        for i in range(3):
            for j in range(4):
                expected[n, i, j] = (a[n, i, j] * b[n, j] / y[n, i] * relevance[n, i]).sum().detach() / 2
    assert torch.allclose(left, expected, rtol=1e-6)


def test_residual() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 4).double().requires_grad_(), torch.randn(3, 4).double().requires_grad_()
    relevance = torch.rand(3, 4).double()
    y = rules.residual(a, b)
    assert torch.equal(y, a + b)
    left, right = relevance_in(y, relevance, a, b)
    assert float((left + right).sum()) == pytest.approx(float(relevance.sum()), rel=1e-6)
    first, second = (a * relevance / (a + b)).detach(), (b * relevance / (a + b)).detach()
    share = abs(first.sum()) / (abs(first.sum()) + abs(second.sum()))
    assert torch.allclose(left, first / first.sum() * share * relevance.sum(), rtol=1e-5)
    assert float(right.sum()) == pytest.approx(float((1 - share) * relevance.sum()), rel=1e-6)


def test_unchanged_and_scaled_gradient() -> None:
    x, relevance = torch.randn(5).requires_grad_(), torch.randn(5)
    y = rules.unchanged(x, F.gelu)
    assert torch.equal(y, F.gelu(x))
    assert torch.equal(relevance_in(y, relevance, x)[0], relevance)
    z = rules.scaled_gradient(x, 0.25)
    assert torch.allclose(z, x)
    assert torch.allclose(relevance_in(z, relevance, x)[0], relevance / 4)


# --- rules in the gradient x input form


def test_layer_norm() -> None:
    torch.manual_seed(0)
    for affine in (True, False):
        module = nn.LayerNorm(6, elementwise_affine=affine).double()
        if affine:
            module.weight.data.normal_(), module.bias.data.zero_()
        x = torch.randn(2, 3, 6).double().requires_grad_()
        y = rules.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
        assert torch.allclose(y, module(x))
        upstream = torch.randn_like(y)
        (gradient,) = relevance_in(y, upstream, x)
        assert float((x * gradient).sum().detach()) == pytest.approx(
            float((y * upstream).sum().detach()), rel=1e-6
        )  # conserves without a bias


@pytest.mark.parametrize("module", [nn.GELU(), nn.SiLU(), nn.ReLU(), nn.ReLU(inplace=True)])
def test_ratio_slope(module: nn.Module) -> None:
    x = torch.tensor([-2.0, -1e-10, 0.0, 1e-10, 0.5, 3.0], requires_grad=True)
    y = rules.ratio_slope(x, function=module)
    value = type(module)()(x.detach())
    assert torch.allclose(y, value, atol=1e-7)
    (gradient,) = relevance_in(y, torch.ones(6), x)
    assert gradient.isfinite().all()
    assert torch.allclose((x * gradient).detach(), value, atol=1e-7)


@given(seed=st.integers(0, 999), gamma=st.sampled_from([0.05, 0.25, 1.0]), biased=st.booleans())
@settings(max_examples=30, deadline=None)
def test_gamma_linear(seed: int, gamma: float, biased: bool) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(2, 4).double().requires_grad_(), torch.randn(3, 4).double()
    bias = torch.randn(3).double() if biased else None
    y = rules.gamma_linear(x, weight, bias, gamma)
    assert torch.allclose(y, F.linear(x, weight, bias))
    upstream = torch.randn(2, 3).double()
    (gradient,) = relevance_in(y, upstream, x)
    expected = torch.zeros(2, 4).double()
    for n in range(2):
        for o in range(3):
            sign = 1 if y[n, o] > 0 else -1
            # a contribution of the output's sign counts 1 + gamma times
            parts = [float(x.detach()[n, i] * weight[o, i]) for i in range(4)]
            constant = float(bias[o]) if bias is not None else 0.0
            more = [p * (1 + gamma) if p * sign > 0 else p for p in parts]
            total = sum(more) + (constant * (1 + gamma) if constant * sign > 0 else constant)
            for i in range(4):
                expected[n, i] += more[i] / total * float(y.detach()[n, o] * upstream[n, o])
    assert torch.allclose(x * gradient, expected, rtol=1e-4, atol=1e-6)


def test_gamma_zero_is_the_gradient() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4).double().requires_grad_(), torch.randn(3, 4).double(), torch.randn(3).double()
    upstream = torch.randn(2, 3).double()
    found = relevance_in(rules.gamma_linear(x, weight, bias, 0.0), upstream, x)[0]
    assert torch.allclose(found, upstream @ weight, rtol=1e-6, atol=1e-6)
    images = torch.randn(1, 3, 8, 8).double().requires_grad_()
    convolution = nn.Conv2d(3, 4, 3, stride=2, padding=1).double()
    y = rules.gamma_convolution(images, convolution.weight, convolution.bias, 2, 1, gamma=0.0)
    upstream = torch.randn_like(y)
    assert torch.allclose(
        relevance_in(y, upstream, images)[0], relevance_in(convolution(images), upstream, images)[0], rtol=1e-5, atol=1e-5
    )


def test_gamma_convolution_is_gamma_linear_over_patches() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8).double().requires_grad_()
    convolution = nn.Conv2d(3, 5, 4, stride=4).double()
    patches = F.unfold(images, 4, stride=4).transpose(1, 2)
    y = rules.gamma_convolution(images, convolution.weight, convolution.bias, 4, gamma=0.25)
    z = rules.gamma_linear(patches, convolution.weight.flatten(1), convolution.bias, 0.25).transpose(1, 2).unflatten(2, (2, 2))
    assert torch.allclose(y, z)
    upstream = torch.randn_like(y)
    assert torch.allclose(relevance_in(y, upstream, images)[0], relevance_in(z, upstream, images)[0], rtol=1e-6, atol=1e-9)


def test_attn_lrp_without_gamma_is_the_gradient_of_the_rewritten_network() -> None:
    """The four changes written into a plain network: detached deviation, f(x) / x, halved products."""
    module = tiny_vit()
    used, image = classifier(module), photo(16)
    inputs = used.inputs(image).requires_grad_()

    def norm(m: nn.LayerNorm, x: Tensor) -> Tensor:
        mean, deviation = x.mean(-1, keepdim=True), (x.var(-1, unbiased=False, keepdim=True) + m.eps).sqrt().detach()
        return (x - mean) / deviation * m.weight + m.bias

    def quarter(x: Tensor, keep: float) -> Tensor:
        return keep * x + (1 - keep) * x.detach()

    x = module.patch_embed(inputs)
    x = torch.cat([module.cls_token, x], dim=1) + module.pos_embed
    for block in module.blocks:
        y = norm(block.norm1, x)
        q, k, v = block.attn.qkv(y).reshape(1, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        a = (quarter(q, 0.25) @ quarter(k, 0.25).transpose(-1, -2) / 8**0.5).softmax(-1)
        x = x + block.attn.proj((a @ quarter(v, 0.5)).transpose(1, 2).reshape(1, 17, 16))
        h = block.mlp.fc1(norm(block.norm2, x))
        x = x + block.mlp.fc2(h * (F.gelu(h) / h).detach())
    logit = module.head(norm(module.norm, x)[:, 0])[0, 1]
    (gradient,) = torch.autograd.grad(logit, inputs)
    expected = (inputs * gradient)[0].sum(0).detach()
    assert float(logit.detach()) == pytest.approx(float(used.logits(inputs.detach())[0, 1]), rel=1e-4)
    found = attribute(image, used, "attn_lrp", 1, gamma_conv=0.0, gamma_linear=0.0).pixel_map
    assert apart(found, expected) < 1e-3
    plain = attribute(image, used, "input_x_gradient", 1).pixel_map
    assert apart(found, plain) > 0.01


def test_attn_lrp_conserves_the_logit_where_attention_is_constant() -> None:
    """Without biases, tokens of no image and with queries at zero (softmax is then uniform), relevance sums to the logit.

    Half of an attention product's relevance goes to its weights and, the queries being zero, ends there: what arrives through
    one such block is the residual's share and half of the attention's. With the output projections at zero nothing is lost.
    """
    module = tiny_vit(class_token=False, global_pool="avg", qkv_bias=False)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias") or name.endswith("pos_embed") or "attn.proj" in name:
                parameter.zero_()
    used, image = classifier(module), photo(16)
    logit = float(used.logits(used.inputs(image))[0, 1])
    for gamma in (0.0, 0.1):
        found = attribute(image, used, "attn_lrp", 1, gamma_conv=gamma, gamma_linear=gamma).pixel_map
        assert float(found.sum()) == pytest.approx(logit, rel=1e-3)


def test_halved_factors_conserve_a_product() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 4).double().requires_grad_(), torch.randn(4, 5).double().requires_grad_()
    y = rules.scaled_gradient(a, 0.5) @ rules.scaled_gradient(b, 0.5)
    upstream = torch.randn(3, 5).double()
    left, right = relevance_in(y, upstream, a, b)
    assert float(((a * left).sum() + (b * right).sum()).detach()) == pytest.approx(float((y * upstream).sum().detach()), rel=1e-9)


@pytest.mark.parametrize("build", [tiny_vit, torchvision_vit], ids=["timm", "torchvision"])
def test_gamma_reaches_every_linear_layer(build: Any) -> None:
    used, image = classifier(build()), photo(16)
    maps = [attribute(image, used, "attn_lrp", 1, gamma_linear=g, gamma_conv=0.0).pixel_map for g in (0.0, 1e-4, 0.25)]
    assert apart(maps[1], maps[0]) < 0.05
    assert apart(maps[2], maps[0]) > 1e-3


# --- relevance of the attention


def alpha_beta(x: np.ndarray, weight: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    result = np.zeros_like(x)
    for t in range(len(x)):
        contributions = np.maximum(x[t][None] * weight, 0)
        totals = contributions.sum(axis=1)
        for o in range(len(weight)):
            if totals[o] > 0:
                result[t] += contributions[o] / totals[o] * relevance[t, o]
    return result


def split_residual(a: np.ndarray, b: np.ndarray, relevance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = a * relevance / (a + b), b * relevance / (a + b)
    total, both = relevance.sum(), abs(first.sum()) + abs(second.sum())
    return (abs(first.sum()) / both * total) / first.sum() * first, (abs(second.sum()) / both * total) / second.sum() * second


def test_attention_relevance_of_one_block() -> None:
    """Chefer et al.'s propagation from the logit to the attention of a single block, written out in numpy."""
    module = tiny_vit(depth=1).double()
    used = classifier(module)
    kept: dict[str, Tensor] = {}
    block = module.blocks[0]
    named = {
        "norm1": block.norm1, "attn": block.attn, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2, "norm2": block.norm2, "act": block.mlp.act,
        "proj": block.attn.proj, "block": block, "norm": module.norm, "embedded": module.norm_pre, "qkv": block.attn.qkv,
    }  # fmt: skip
    handles = [m.register_forward_hook(lambda _m, _a, out, key=key: kept.update({key: out.detach()})) for key, m in named.items()]
    inputs = used.inputs(photo(16))
    module(inputs.double())
    for handle in handles:
        handle.remove()
    value = {key: tensor[0].numpy() for key, tensor in kept.items()}
    q, k, v = (value["qkv"].reshape(17, 3, 2, 8)[:, i].transpose(1, 0, 2) for i in range(3))
    scores = q @ k.transpose(0, 2, 1) / 8**0.5
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    context = weights @ v

    one_hot = np.zeros((1, 5))
    one_hot[0, 1] = 1
    relevance = np.zeros((17, 16))
    relevance[0] = alpha_beta(value["norm"][:1], module.head.weight.detach().numpy(), one_hot)[0]
    middle = value["embedded"] + value["attn"]
    _, to_mlp = split_residual(middle[:, :], value["fc2"], relevance)
    skip, _ = split_residual(middle, value["fc2"], relevance)
    to_hidden = alpha_beta(value["act"], block.mlp.fc2.weight.detach().numpy(), to_mlp)
    to_norm2 = alpha_beta(value["norm2"], block.mlp.fc1.weight.detach().numpy(), to_hidden)
    _, to_attention = split_residual(value["embedded"], value["attn"], skip + to_norm2)
    flat = context.transpose(1, 0, 2).reshape(17, 16)
    to_context = alpha_beta(flat, block.attn.proj.weight.detach().numpy(), to_attention).reshape(17, 2, 8).transpose(1, 0, 2)
    expected = np.zeros_like(weights)
    for head in range(2):
        for i in range(17):
            for j in range(17):
                expected[head, i, j] = (
                    sum(weights[head, i, j] * v[head, j, d] / context[head, i, d] * to_context[head, i, d] for d in range(8)) / 2
                )

    found = None
    task = make_task(classifier(module.float()), photo(16), 1)
    (found,) = _attention_relevance(task, read_tokens(task, "test"))
    assert apart(found[0], torch.from_numpy(expected).float()) < 2e-2


@pytest.mark.parametrize("name", ["class token", "registers", "torchvision"])
def test_the_lrp_variant(name: str) -> None:
    used, image = classifier(BUILDERS[name]()), photo(16)
    prefix = PREFIX.get(name, 1)
    task = make_task(used, image, 1)
    relevances = _attention_relevance(task, read_tokens(task, "test"))
    _, gradients = attention_and_gradient(used, image, 1)
    joint = np.eye(gradients[0].shape[-1])
    for r, g in zip(relevances, gradients, strict=True):
        joint = (np.eye(len(joint)) + np.maximum(r[0].double().numpy() * g, 0).mean(axis=0)) @ joint
    found = attribute(image, used, "transformer_attribution", 1, variant="lrp").pixel_map
    assert apart(found, enlarged(joint[0, prefix:], 16)) < 1e-3
    assert apart(found / found.max(), attribute(image, used, "transformer_attribution", 1).heatmap) > 1e-3


def test_the_lrp_variant_needs_known_blocks() -> None:
    used = classifier(tiny_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock))
    with pytest.raises(at.UserError, match="does not apply to"):
        attribute(photo(16), used, "transformer_attribution", variant="lrp")


def test_other_rules_pass_through_open_attention(vit: at.Classifier, small_cat: Tensor) -> None:
    task = make_task(vit, small_cat)
    uniform = AttentionRules(softmax=lambda scores: torch.ones_like(scores) / scores.shape[-1])
    with torch.no_grad(), open_attention(vit.module, uniform) as calls:
        vit.logits(task.inputs)
    for call in calls:
        assert torch.allclose(call.context, call.value.mean(2, keepdim=True).expand(-1, -1, 65, -1), atol=1e-5)


@pytest.mark.parametrize("method", ["attention_rollout", "transformer_attribution", "attn_lrp", "grad_eclip"])
def test_attention_between_channels_is_named(method: str) -> None:
    xcit = timm.create_model("xcit_nano_12_p16_224", num_classes=3, img_size=64, depth=2).eval()
    used = at.Classifier(xcit, size=64, scores="softmax")
    with pytest.raises(at.NotApplicable, match="does not apply to Xcit: it has attention between channels, not between tokens"):
        attribute(photo(64), used, method)
