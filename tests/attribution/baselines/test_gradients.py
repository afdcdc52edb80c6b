from __future__ import annotations

import copy
from typing import Any

import captum.attr
import pytest
import torch
import torch.nn.functional as F
import torchvision
from captum.attr._utils.lrp_rules import EpsilonRule, GammaRule, IdentityRule
from networks import apart, classifier, linear, make_task, photo, scaled, vgg
from torch import Tensor, nn

import attribution as at
from attribution.baselines.attribute import METHODS, attribute
from attribution.network.maps import operations
from attribution.task import Scores, seeded

ignore_hook_warnings = pytest.mark.filterwarnings("ignore:\\s*Setting .*backward hooks")


_KINKS = 5e-3  # between means over points of a path: one that lies at the kink of a ReLU falls on either side, by the machine's kernels


@pytest.fixture(params=["cnn", "vgg"])
def model(request: Any, cnn: at.Classifier, small_cat: Tensor) -> tuple[at.Classifier, Tensor]:
    return (cnn, small_cat) if request.param == "cnn" else (classifier(vgg()), photo(16))


@pytest.fixture
def resnet() -> at.Classifier:
    torch.manual_seed(0)
    return classifier(torchvision.models.resnet18(num_classes=4).eval(), 64)


def leaf(used: at.Classifier, image: Tensor) -> Tensor:
    return used.inputs(image).requires_grad_()


def test_saliency(model: tuple[at.Classifier, Tensor]) -> None:
    used, image = model
    direct = captum.attr.Saliency(used.module).attribute(leaf(used, image), target=2)[0]
    assert apart(attribute(image, used, "saliency", 2).pixel_map, direct.sum(0)) < 1e-5
    assert apart(attribute(image, used, "saliency", 2, channels="max").pixel_map, direct.amax(0)) < 1e-5
    signed = captum.attr.Saliency(used.module).attribute(leaf(used, image), target=2, abs=False)[0]
    assert apart(attribute(image, used, "saliency", 2, abs=False).pixel_map, signed.sum(0)) < 1e-5


def test_the_output_explained(cnn: at.Classifier, small_cat: Tensor) -> None:
    inputs = leaf(cnn, small_cat)
    (expected,) = torch.autograd.grad(cnn.module(inputs).softmax(1)[0, 5], inputs)
    found = attribute(small_cat, cnn, "saliency", 5, output="probability", abs=False).pixel_map
    assert apart(found, expected[0].sum(0)) < 1e-4


def test_input_x_gradient(model: tuple[at.Classifier, Tensor]) -> None:
    used, image = model
    direct = captum.attr.InputXGradient(used.module).attribute(leaf(used, image), target=1)[0]
    assert apart(attribute(image, used, "input_x_gradient", 1).pixel_map, direct.sum(0)) < 1e-5


@pytest.mark.parametrize("preset", ["lima", "rao", None])
def test_integrated_gradients(preset: str | None, model: tuple[at.Classifier, Tensor]) -> None:
    used, image = model
    steps, rule = {"lima": (80, "riemann_trapezoid"), "rao": (20, "gausslegendre"), None: (50, "gausslegendre")}[preset]
    inputs = used.inputs(image)
    direct = captum.attr.IntegratedGradients(used.module).attribute(inputs, torch.zeros_like(inputs), 1, n_steps=steps, method=rule)[0]
    expected = (direct.mean(0) if preset == "lima" else direct.sum(0)).float()
    fill = None if preset else "model_mean"  # a preset has the fill of its reference code
    assert apart(attribute(image, used, "integrated_gradients", 1, preset=preset, fill=fill).pixel_map, expected) < _KINKS


def test_integrated_gradients_are_complete(cnn: at.Classifier, small_cat: Tensor) -> None:
    values = attribute(small_cat, cnn, "integrated_gradients", 3, n_steps=120, fill="black").pixel_map
    ends = cnn.logits(torch.cat([cnn.inputs(small_cat), cnn.inputs(torch.zeros_like(small_cat))]))[:, 3]
    assert float(values.sum()) == pytest.approx(float(ends[0] - ends[1]), rel=0.02)


@pytest.mark.parametrize(("kind", "absolute"), [("smoothgrad", True), ("smoothgrad", False), ("smoothgrad_sq", False), ("vargrad", True)])
def test_smooth_grad(kind: Any, absolute: bool, model: tuple[at.Classifier, Tensor]) -> None:
    used, image = model
    tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(used.module))
    with seeded(11):
        direct = tunnel.attribute(leaf(used, image), nt_type=kind, nt_samples=6, stdevs=0.1, target=1, abs=absolute)[0]
    found = attribute(image, used, "smooth_grad", 1, nt_type=kind, abs=absolute, nt_samples=6, stdevs=0.1, seed=11, batch_size=4)
    assert apart(found.pixel_map, direct.sum(0)) < 1e-4


def test_smooth_grad_is_the_mean_gradient_of_noisy_inputs(cnn: at.Classifier, small_cat: Tensor) -> None:
    """For a linear network every noisy gradient is the weight, whatever the noise."""
    used, weight = linear(8)
    found = attribute(photo(8), used, "smooth_grad", 1, nt_samples=5, stdevs=3.0, abs=False).pixel_map
    assert apart(found, weight[1].sum(0)) < 1e-5
    assert attribute(photo(8), used, "smooth_grad", 1, nt_samples=5, nt_type="vargrad").pixel_map.abs().max() < 1e-8
    still = attribute(small_cat, cnn, "smooth_grad", 1, nt_samples=2, stdevs=0.0, abs=False).pixel_map
    assert apart(still, attribute(small_cat, cnn, "saliency", 1, abs=False).pixel_map) < 1e-4


def test_gradient_shap(model: tuple[at.Classifier, Tensor]) -> None:
    used, image = model
    inputs = used.inputs(image)
    baselines = torch.cat([torch.zeros_like(inputs), used.inputs(at.make_fill(image, "blur"))])
    with seeded(4):
        direct = captum.attr.GradientShap(used.module).attribute(inputs, baselines, n_samples=6, stdevs=0.1, target=1)[0]
    found = attribute(image, used, "gradient_shap", 1, n_samples=6, stdevs=0.1, seed=4, batch_size=4, fill="model_mean").pixel_map
    assert apart(found, direct.sum(0).float()) < _KINKS


@ignore_hook_warnings
def test_deep_lift(model: tuple[at.Classifier, Tensor]) -> None:
    used, image = model
    inputs = used.inputs(image)
    direct = captum.attr.DeepLift(copy.deepcopy(used.module)).attribute(leaf(used, image), torch.zeros_like(inputs), 1)[0]
    found = attribute(image, used, "deep_lift", 1, fill="model_mean").pixel_map
    assert apart(found, direct.sum(0).detach()) < 1e-4
    gain = used.logits(torch.cat([inputs, torch.zeros_like(inputs)]))[:, 1].diff().neg()
    assert float(found.sum()) == pytest.approx(float(gain), rel=1e-3, abs=1e-4)  # summation to delta


class SeparateRelus(nn.Module):
    """torchvision's BasicBlock with its own ReLU at each place, not in place."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.first, self.second = block, nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        b = self.block
        y = b.bn2(b.conv2(self.first(b.bn1(b.conv1(x)))))
        return self.second(y + (x if b.downsample is None else b.downsample(x)))


def by_hand(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    copied.relu = nn.ReLU()
    for index in range(1, 5):
        stage = getattr(copied, f"layer{index}")
        for place, block in enumerate(stage):
            stage[place] = SeparateRelus(block)
            del block.relu
    return copied


@ignore_hook_warnings
@pytest.mark.parametrize("method", ["deep_lift", "guided_backprop", "deconvolution", "guided_grad_cam"])
def test_reused_and_in_place_relus(method: str, resnet: at.Classifier) -> None:
    image, copied = photo(64), by_hand(resnet.module)
    inputs = leaf(resnet, image)
    assert torch.allclose(copied(inputs), resnet.module(inputs))
    if method == "deep_lift":
        direct = captum.attr.DeepLift(copied).attribute(inputs, torch.zeros_like(inputs), 1)
    elif method == "guided_grad_cam":
        direct = captum.attr.GuidedGradCam(copied, copied.layer4).attribute(inputs, 1, interpolate_mode="bilinear")
    else:
        kind = {"guided_backprop": captum.attr.GuidedBackprop, "deconvolution": captum.attr.Deconvolution}[method]
        direct = kind(copied).attribute(inputs, 1).abs()
    assert apart(attribute(image, resnet, method, 1, fill="model_mean").pixel_map, direct[0].sum(0).detach()) < 1e-4


@ignore_hook_warnings
@pytest.mark.parametrize("method", ["guided_backprop", "deconvolution"])
def test_modified_gradients(method: str, model: tuple[at.Classifier, Tensor]) -> None:
    used, image = model
    kind = {"guided_backprop": captum.attr.GuidedBackprop, "deconvolution": captum.attr.Deconvolution}[method]
    direct = kind(copy.deepcopy(used.module)).attribute(leaf(used, image), 1)[0].detach()
    assert apart(attribute(image, used, method, 1, abs=False).pixel_map, direct.sum(0)) < 1e-5
    assert apart(attribute(image, used, method, 1).pixel_map, direct.abs().sum(0)) < 1e-5
    plain = attribute(image, used, "saliency", 1, abs=False).pixel_map
    assert apart(direct.sum(0), plain) > 0.01


@ignore_hook_warnings
def test_guided_grad_cam(cnn: at.Classifier, small_cat: Tensor) -> None:
    module = copy.deepcopy(cnn.module)
    method = captum.attr.GuidedGradCam(module, module.layer3)
    direct = method.attribute(leaf(cnn, small_cat), 1, interpolate_mode="bilinear")[0].detach()
    assert apart(attribute(small_cat, cnn, "guided_grad_cam", 1).pixel_map, direct.sum(0)) < 1e-4
    product = attribute(small_cat, cnn, "guided_backprop", 1, abs=False).pixel_map * attribute(small_cat, cnn, "grad_cam", 1).pixel_map
    assert apart(direct.sum(0), product) < 1e-4


def test_guided_grad_cam_on_a_relu(resnet: at.Classifier) -> None:
    """A layer that is itself a ReLU, in place and reused."""
    image = photo(64)
    found = attribute(image, resnet, "guided_grad_cam", 1, layer="layer4.1.relu").pixel_map
    assert apart(found, attribute(image, resnet, "guided_grad_cam", 1, layer="layer4.1").pixel_map) < 1e-5


@pytest.mark.parametrize("gamma", [0.0, 0.25])
@pytest.mark.parametrize("inplace", [False, True])
def test_lrp(gamma: float, inplace: bool) -> None:
    used, image, copied = classifier(vgg(inplace=inplace)), photo(16), vgg()
    for module in copied:
        if isinstance(module, nn.Linear | nn.Flatten):
            module.rule = EpsilonRule()
        elif isinstance(module, nn.Conv2d) and gamma:
            module.rule = GammaRule(gamma=gamma)
        elif isinstance(module, nn.BatchNorm2d) and gamma:
            module.rule = IdentityRule()
    direct = captum.attr.LRP(copied).attribute(leaf(used, image), target=1)[0].detach()
    assert apart(attribute(image, used, "lrp", 1, gamma=gamma).pixel_map, direct.sum(0)) < 1e-4


class Pooled(nn.Module):
    """Its functions move values to other places, or are means of a single value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.wide, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 14), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(self.relu(self.conv(x)).transpose(2, 3))
        return self.head(torch.cat(y.mean(dim=(2, 3)).split(2, dim=1), dim=1))


def test_lrp_beside_functions_that_change_no_value() -> None:
    torch.manual_seed(0)
    module = Pooled().eval()
    wide = copy.deepcopy(module.wide)
    wide.weight = nn.Parameter(wide.weight.transpose(2, 3).contiguous())
    as_modules = nn.Sequential(module.conv, module.relu, wide, nn.Flatten(), module.head)
    found, expected = (attribute(photo(16), classifier(each), "lrp", 1, gamma=0.0).pixel_map for each in (module, as_modules))
    assert expected.abs().max() > 0 and apart(found, expected) < 1e-5


def test_lrp_conserves_the_logit_without_biases() -> None:
    module = vgg()
    for layer in module:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.bias.data.zero_()
    used = classifier(module)
    for gamma in (0.0, 0.25):
        values = attribute(photo(16), used, "lrp", 1, gamma=gamma).pixel_map
        assert float(values.sum()) == pytest.approx(float(used.logits(used.inputs(photo(16)))[0, 1]), rel=1e-3)


def test_lrp_by_hand() -> None:
    """Epsilon rule of two linear layers, written out."""
    torch.manual_seed(0)
    used = classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)).eval(), 2)
    x = used.inputs(photo(2))[0].flatten()
    first, second = used.module[1].weight.detach(), used.module[3].weight.detach()
    hidden = (first @ x).relu()
    relevance = hidden * second[1]
    z = first * x
    inputs = (z * (relevance / z.sum(1))[:, None]).sum(0)
    assert apart(attribute(photo(2), used, "lrp", 1, gamma=0.0).pixel_map, inputs.view(3, 2, 2).sum(0)) < 1e-4


class Functional(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv, self.relu, self.head, self.function = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.function(self.conv(x))).mean(dim=(2, 3)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.gate, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        return self.head((y * self.sigmoid(self.gate(y))).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("methods", "module", "reason"),
    [
        ("deep_lift guided_backprop deconvolution lrp guided_grad_cam", Functional(F.relu), "1 of its 2 relu operations are functions"),
        ("deep_lift guided_backprop deconvolution lrp guided_grad_cam", Functional(nn.GELU()), "1 x gelu"),
        ("deep_lift guided_backprop deconvolution lrp guided_grad_cam", Functional(nn.SiLU(inplace=True)), "1 x silu"),
        ("deep_lift guided_backprop deconvolution lrp guided_grad_cam", Functional(nn.ReLU6()), "1 x hardtanh"),
        ("deep_lift guided_backprop deconvolution lrp guided_grad_cam", Functional(nn.PReLU()), "1 x prelu"),
        ("deep_lift", Functional(nn.SELU()), "1 of its 1 elu operations"),
        ("deep_lift", Functional(F.leaky_relu), "1 of its 1 leaky_relu operations"),
        ("deep_lift lrp", Functional(lambda x: F.max_pool2d(x, 2)), "1 of its 1 max_pool2d_with_indices operations"),
        ("deep_lift", Gated(), "1 products of two maps"),
        ("guided_backprop deconvolution guided_grad_cam lrp", Functional(nn.LeakyReLU()), "1 x leaky_relu"),
        ("guided_backprop deconvolution guided_grad_cam", nn.Sequential(nn.Conv2d(3, 4, 4), nn.Flatten(), nn.Linear(676, 3)), "no ReLU"),
        ("lrp", nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3)), "GroupNorm"),
        ("lrp", Functional(lambda x: x.clamp(-0.01, 0.01)), "none for its functions clamp, mean;"),
        ("lrp", Functional(lambda x: torch.maximum(x, x.flip(3)).square()), "none for its functions maximum, mean, square;"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_networks_where_the_rule_would_be_the_plain_gradient(methods: str, module: nn.Module, reason: str) -> None:
    used = classifier(module.eval())
    before = [sorted(vars(m)) for m in module.modules()]
    for method in methods.split():
        with pytest.raises(at.UserError, match=f"{method} .*{reason}"):
            attribute(photo(16), used, method)
    assert [sorted(vars(m)) for m in module.modules()] == before
    assert attribute(photo(16), used, "integrated_gradients", n_steps=2).pixel_map.isfinite().all()


@pytest.mark.parametrize("kind", [nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus])
def test_deep_lift_sums_to_the_difference_for_every_activation(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), kind(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), kind(), nn.Flatten(), nn.Linear(100, 3))
    used, image = classifier(pooled.eval()), photo(16)
    found = attribute(image, used, "deep_lift", 2, fill="black").pixel_map
    ends = used.logits(torch.stack([image, torch.zeros_like(image)]))[:, 2]
    assert float(found.sum()) == pytest.approx(float(ends[0] - ends[1]), rel=1e-3)


def test_operations_are_counted(cnn: at.Classifier, vit: at.Classifier, small_cat: Tensor) -> None:
    assert operations(make_task(cnn, small_cat)) == {"relu": 19, "residual sum": 9}
    assert operations(make_task(vit, small_cat)) == {"native_layer_norm": 13, "gelu": 6, "attention": 6}
    assert operations(make_task(classifier(Gated().eval()), photo(16))) == {"relu": 1, "sigmoid": 1, "product": 1}


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].family == "gradient" and m != "lrp"])
def test_a_linear_network_has_one_gradient(method: str) -> None:
    """Every method of gradients is the weight, or the weight times input minus baseline."""
    if method in ("guided_backprop", "deconvolution", "guided_grad_cam"):
        pytest.skip("needs a ReLU")
    used, weight = linear(8)
    image = photo(8)
    signed = {"abs": False} if "abs" in METHODS[method].options else {}
    found = attribute(image, used, method, 2, fill="black", **signed).pixel_map
    if method == "gradient_shap":  # half of its baselines are the blurred image
        return
    times = {"saliency": 1.0, "smooth_grad": 1.0}.get(method, image)
    assert apart(found, (weight[2] * times).sum(0)) < 1e-4


@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
def test_scores_under_autograd_do_not_depend_on_the_batch_size(batch_size: int, cnn: at.Classifier) -> None:
    way = cnn.preprocessing
    used = at.Classifier(cnn.module, size=32, mean=way.mean, std=way.std, batch_size=batch_size)
    inputs = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = Scores(used, "logit")
    values = scores(inputs)
    (found,) = torch.autograd.grad(values[:, 1].square().sum(), inputs)
    expected_values = cnn.module(inputs)
    (expected,) = torch.autograd.grad(expected_values[:, 1].square().sum(), inputs)
    assert apart(values, expected_values) < 1e-5 and apart(found, expected) < 1e-4
    assert scores.evaluations == 5


def test_a_reused_relu_needs_separation() -> None:
    """Without one module a call DeepLIFT on a reused ReLU does not sum to the difference; with it it does."""
    torch.manual_seed(0)
    relu = nn.ReLU(inplace=True)
    module = scaled(nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Flatten(), nn.Linear(576, 3)))
    used, image = classifier(module), photo(16)
    found = attribute(image, used, "deep_lift", 2, fill="black").pixel_map
    ends = used.logits(torch.stack([image, torch.zeros_like(image)]))[:, 2]
    assert float(found.sum()) == pytest.approx(float(ends[0] - ends[1]), rel=1e-3)
    assert module[1] is module[3] is relu and relu.inplace


@pytest.mark.parametrize("operation", [lambda t: t.clamp(min=0), lambda t: t**2, lambda t: torch.maximum(t, t.new_zeros(()))])
def test_deep_lift_is_refused_where_its_map_does_not_add_up(operation: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(operation(self.second(operation(3 * self.first(x)))).mean((2, 3)))

    torch.manual_seed(1)
    used = at.Classifier(Net().eval(), size=12, scores="softmax")
    with pytest.raises(at.NotApplicable, match=r"its map sums to .*, but the score changes by"):
        at.attribute(torch.rand(3, 12, 12), used, "deep_lift", 1)


@pytest.mark.parametrize(
    ("method", "options"),
    [("smooth_grad", {"nt_samples": 70}), ("gradient_shap", {"n_samples": 70}), ("integrated_gradients", {"n_steps": 70})],
)
def test_batch_size_bounds_the_rows_of_a_pass(method: str, options: dict[str, int]) -> None:
    """The rows of a pass under gradients decide how much memory it takes."""
    module, rows = vgg(), []
    module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    used = classifier(module, batch_size=4)
    attribute(photo(16), used, method, 1, **options)
    assert sum(rows) >= 70 and max(rows) <= 4
