from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

import attribution as at
from attribution.model.forwarding import automatic_batch_size
from attribution.model.preprocessing import Preprocessing

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
WAYS = [
    Preprocessing((20, 28), MEAN, STD),
    Preprocessing((20, 28), MEAN, STD, "squash", interpolation="nearest"),
    Preprocessing((24, 24), MEAN, STD, "short_side", (30, 30), "bicubic"),
    Preprocessing((31, 24), MEAN, STD, "short_side", (26, 26)),
    Preprocessing((24, 24), MEAN, STD, "short_side", (30, 30), "bicubic", "RGB"),
    Preprocessing((24, 27), MEAN, STD, "long_side", interpolation="bicubic"),
    Preprocessing((24, 27), MEAN, STD, "long_side", None, "bicubic", "BGR", padding="black"),
    Preprocessing((24, 24), MEAN, STD, "long_side", (33, 22)),
]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def colour_sum(inputs: Tensor) -> Tensor:
    """Scores that a test can compute by hand: the mean of each channel."""
    return inputs.mean(dim=(2, 3))


def black_box(function: Any = colour_sum, **settings: Any) -> at.Classifier:
    return at.Classifier(function, **{"size": 8, **settings})


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.resize}-{way.interpolation}-{way.channels}")
@given(size=st.tuples(st.integers(1, 60), st.integers(1, 60)), share=st.floats(-1, 2), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_preprocessing_begins_affine(way: Preprocessing, size: tuple[int, int], share: float, seed: int) -> None:
    x, y = rand(2, 1, 3, *size, seed=seed)
    mixed = way.begun(share * x + (1 - share) * y)
    assert way(x).shape == (1, 3, *way.size)
    assert (mixed - (share * way.begun(x) + (1 - share) * way.begun(y))).abs().max() < 1e-4
    assert (way.begun(x) - way.begun(y) - way.begun_difference(x - y)).abs().max() < 1e-4


@pytest.mark.parametrize("resize", ["squash", "short_side", "long_side"])
@pytest.mark.parametrize("size", [(60, 91), (91, 60), (150, 140), (40, 40)])
def test_a_bicubic_resize_is_clipped_as_in_pillow(resize: Any, size: tuple[int, int]) -> None:
    """On pixels that are black or white, where a resize overshoots by up to 70 gray levels: within rounding, 1.1 gray levels."""
    pixels = (np.random.default_rng(0).random((*size, 3)) < 0.5).astype(np.uint8) * 255
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    way = Preprocessing((48, 44), MEAN, STD, resize, (56, 56), "bicubic", "RGB", "timm", "black")
    ours = way(image)[0] * std + mean
    height, width = way._resized_size(*size)
    resized = Image.fromarray(pixels)
    for side in [(width, size[0]), (width, height)] if way._sides(*size) == (1, 0) else [(size[1], height), (width, height)]:
        resized = resized.resize(side, Image.Resampling.BICUBIC)
    theirs = transforms.functional.center_crop(torch.from_numpy(np.array(resized)).permute(2, 0, 1), [48, 44])
    assert float((ours * 255 - theirs).abs().max()) < 1.13
    unclipped = replace(way, channels=None)(image)[0] * std + mean
    assert float((unclipped - ours).abs().max()) * 255 > 8


@given(have=st.tuples(st.integers(1, 12), st.integers(1, 12)), want=st.tuples(st.integers(1, 12), st.integers(1, 12)))
@settings(max_examples=80, deadline=None)
def test_crop_and_padding_lie_where_torchvision_puts_them(have: tuple[int, int], want: tuple[int, int]) -> None:
    image = rand(1, 3, *have) + 1
    ours = Preprocessing(want, resized=have)(image)
    assert torch.equal(ours, transforms.CenterCrop(want)(image))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(40, 57), (57, 40), (33, 33), (12, 90)])
def test_short_side_equals_torchvisions_resize_crop_and_normalize(interpolation: str, size: tuple[int, int]) -> None:
    image = rand(1, 3, *size)
    mode = InterpolationMode.NEAREST_EXACT if interpolation == "nearest" else InterpolationMode(interpolation)
    theirs = transforms.Compose([transforms.Resize(30, mode, antialias=True), transforms.CenterCrop(24), transforms.Normalize(MEAN, STD)])
    ours = Preprocessing((24, 24), MEAN, STD, "short_side", (30, 30), interpolation)
    assert torch.allclose(ours(image), theirs(image), atol=1e-5)


@pytest.mark.parametrize("size", [(40, 57), (57, 40), (12, 90)])
def test_squash_equals_torchvisions_resize(size: tuple[int, int]) -> None:
    image = rand(1, 3, *size)
    assert torch.allclose(Preprocessing((24, 30))(image), transforms.Resize((24, 30), antialias=True)(image), atol=1e-6)


def test_long_side_shows_the_whole_image_on_the_mean_colour() -> None:
    image = rand(1, 3, 20, 80)
    inputs = Preprocessing((40, 40), MEAN, STD, "long_side")(image)
    middle = transforms.Normalize(MEAN, STD)(transforms.Resize((10, 40), antialias=True)(image))
    assert torch.allclose(inputs[:, :, 15:25], middle, atol=1e-5)
    assert (inputs[:, :, :15] == 0).all()
    assert (inputs[:, :, 25:] == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r"input size \(0, 0\): expected a positive height and width"),
        ({"std": (1, 0, 1)}, "expected three numbers each, std positive"),
        ({"mean": (0.5,) * 4}, "mean and std have 4 numbers: expected 1 or 3, or say what they are by channels, such as 'RGBA'"),
        ({"mean": (0.5, 0.5)}, "mean and std have 2 numbers: expected 1 or 3"),
        ({"mean": (0.5,), "channels": "RGB"}, r"mean \(0\.5,\) and std 1\.0: expected 3 numbers each, one for each channel of RGB"),
        ({"mean": (0.5,), "std": (1, 1, 1)}, "expected 3 numbers each, one for each channel of RGB"),
        ({"mean": "gray"}, "mean is 'gray': expected one number for each channel"),
        ({"channels": "YUV"}, "channels is 'YUV': expected one of RGB, BGR, L, RGBA"),
        ({"size": 3.5}, r"input size 3\.5: expected a whole number"),
        ({"resize": "stretch"}, "resize is 'stretch': expected one of squash, short_side, long_side"),
        ({"interpolation": "lanczos"}, "interpolation is 'lanczos': expected one of bilinear, bicubic, nearest"),
        ({"scores": "energies"}, "scores is 'energies': expected one of auto, softmax, sigmoid, probabilities"),
        ({"batch_size": 2.5}, "batch_size is 2.5: expected a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size is 0: expected a whole number of at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_contradict(settings: dict, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        black_box(**settings)
    with pytest.raises(at.UserError, match=r"the model is int: expected an nn\.Module, or a callable"):
        at.Classifier(3, size=8)


def test_inputs_preprocess_any_image_and_keep_the_gradient_of_a_tensor(cat: Tensor) -> None:
    classifier = black_box(size=(16, 24), mean=MEAN, std=STD, resize="short_side")
    expected = classifier.preprocessing(cat[None])
    assert torch.equal(classifier.inputs(cat), expected)
    assert torch.equal(classifier.inputs(at.demo_image_path()), expected)
    image = cat.clone().requires_grad_()
    inputs = classifier.inputs(image)
    assert torch.equal(inputs, expected)
    inputs.sum().backward()
    shift = classifier.preprocessing.linear(torch.ones_like(cat)[None]).sum()
    assert torch.isclose(image.grad.sum(), shift, rtol=1e-3)


Logits = namedtuple("Logits", ["logits", "aux"])
OUTPUTS = {
    "tensor": lambda rows: rows,
    "double": lambda rows: rows.double(),
    "tuple": lambda rows: (rows, None),
    "list": lambda rows: [rows],
    "dict": lambda rows: {"loss": None, "logits": rows},
    "ordered dict": lambda rows: OrderedDict(logits=rows),
    "object": lambda rows: SimpleNamespace(logits=rows),
    "named tuple": lambda rows: Logits(logits=rows, aux=rows * 0),
    "array": lambda rows: rows.numpy(),
    "double array": lambda rows: rows.numpy().astype(np.float64),
    "flipped array": lambda rows: np.ascontiguousarray(rows.numpy()[::-1])[::-1],
    "dict of array": lambda rows: {"logits": rows.numpy()},
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_every_form(kind: str) -> None:
    inputs = rand(5, 3, 8, 8)
    logits = black_box(lambda x: OUTPUTS[kind](colour_sum(x)), scores="logits").logits(inputs)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, inputs.mean((2, 3)), atol=1e-6)


def test_a_read_only_array_is_taken() -> None:
    def frozen(inputs: Tensor) -> np.ndarray:
        scores = colour_sum(inputs).numpy()
        scores.flags.writeable = False
        return scores

    inputs = rand(2, 3, 8, 8)
    assert torch.equal(black_box(frozen, scores="logits").logits(inputs), colour_sum(inputs))


@pytest.mark.parametrize("scores", ["auto", "probabilities"])
@pytest.mark.parametrize("array", [False, True])
def test_probabilities_become_their_logarithm(scores: str, array: bool) -> None:
    def model(inputs: Tensor) -> Any:
        probabilities = (3 * colour_sum(inputs)).softmax(dim=1)
        return probabilities.numpy() if array else probabilities

    classifier, inputs = black_box(model, scores=scores), rand(4, 3, 8, 8)
    expected = (3 * colour_sum(inputs)).softmax(dim=1)
    assert torch.allclose(classifier.probabilities(inputs), expected, atol=1e-6)
    assert torch.allclose(classifier.logits(inputs), expected.log(), atol=1e-5)


@pytest.mark.parametrize("scores", ["auto", "logits"])
def test_logits_become_their_softmax(scores: str) -> None:
    classifier, inputs = black_box(scores=scores), rand(4, 3, 8, 8)
    assert torch.equal(classifier.logits(inputs), colour_sum(inputs))
    assert torch.allclose(classifier.probabilities(inputs), colour_sum(inputs).softmax(dim=1))


def test_scores_logits_overrides_what_looks_like_probabilities() -> None:
    classifier = black_box(lambda x: colour_sum(x).softmax(dim=1), scores="logits")
    inputs = rand(4, 3, 8, 8)
    assert torch.equal(classifier.logits(inputs), colour_sum(inputs).softmax(dim=1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x, r"function returned float32 \[2, 3, 8, 8\] for 2 images: expected scores \[2, classes\]"),
        (lambda x: x.mean((1, 2, 3)), r"returned float32 \[2\] for 2 images"),
        (lambda x: colour_sum(x)[:1], r"returned float32 \[1, 3\] for 2 images: expected scores \[2, classes\]"),
        (lambda x: colour_sum(x)[:, :0], r"returned float32 \[2, 0\] for 2 images"),
        (lambda x: np.zeros((2, 3, 4)), r"returned float64 \[2, 3, 4\] for 2 images"),
        (lambda x: {"scores": x, "boxes": x}, "returned a dict with scores, boxes for 2 images"),
        (lambda x: {}, "returned a dict with no keys for 2 images"),
        (lambda x: (), "returned a tuple of nothing for 2 images"),
        (lambda x: [x], r"returned a list of float32 \[2, 3, 8, 8\] for 2 images"),
        (lambda x: None, "returned NoneType for 2 images"),
        (lambda x: SimpleNamespace(logits=x), r"returned SimpleNamespace with logits float32 \[2, 3, 8, 8\] for 2 images"),
    ],
)
def test_outputs_that_are_no_scores_are_named(model: Any, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        black_box(model).logits(rand(2, 3, 8, 8))


@pytest.mark.parametrize(("value", "shown"), [(torch.nan, "nan"), (torch.inf, "inf")])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_scores_that_are_not_finite_are_located(value: float, shown: str, batch_size: int) -> None:
    def broken(inputs: Tensor) -> Tensor:
        scores = colour_sum(inputs)
        scores[scores > 5] = value
        return scores

    inputs = rand(5, 3, 8, 8)
    inputs[3, 2] = 9
    classifier = black_box(broken, batch_size=batch_size, name="broken net")
    for call in (classifier.logits, classifier.probabilities):
        with pytest.raises(
            at.UserError, match=rf"broken net returned {shown} for class 2 of image 3 in a batch of 5: expected finite scores"
        ):
            call(inputs)


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 9), torch.zeros(1, 1, 8, 8), np.zeros((1, 3, 8, 8)), "cat"],
    ids=lambda x: str(getattr(x, "shape", x)),
)
def test_inputs_of_another_shape_are_refused(inputs: Any) -> None:
    proto = at.Classifier(nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3, 4)), size=8).with_prototypes(torch.eye(3))
    for classifier in (black_box(), proto):
        with pytest.raises(at.UserError, match=r"model inputs are .*: expected \[n, 3, 8, 8\], as inputs\(\) returns them"):
            classifier.logits(inputs)


def test_no_inputs_give_no_rows(cnn: at.Classifier) -> None:
    logits, features = cnn.logits_and_features(torch.zeros(0, 3, 32, 32))
    assert logits.shape == (0, 10)
    assert features.shape == (0, 64)


def test_class_names_must_be_as_many_as_scores() -> None:
    with pytest.raises(at.UserError, match="function returns 3 scores, but 2 class names were given: give one for each"):
        black_box(class_names=("a", "b")).logits(rand(1, 3, 8, 8))
    assert black_box().class_names == ("class 0", "class 1", "class 2")


NAMES = ("Cat", "dog", "DOG", "crane", "crane", "7")


@pytest.mark.parametrize(
    ("target", "index"),
    [(0, 0), (5, 5), (np.int64(3), 3), (np.uint8(2), 2), ("Cat", 0), ("cAT", 0), ("dog", 1), ("DOG", 2), ("7", 5), ("4", 4), ("05", 5)],
)
def test_target_index(target: Any, index: int) -> None:
    found = black_box(class_names=NAMES).target_index(target)
    assert found == index
    assert type(found) is int


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (6, "class index 6 is out of range: mine has classes 0 to 5"),
        (-1, "class index -1 is out of range"),
        ("6", "class index 6 is out of range"),
        ("-1", "mine has no class '-1': expected one of Cat, dog, DOG, crane, crane, 7"),
        ("bird", "mine has no class 'bird'"),
        ("", "mine has no class ''"),
        ("Dog", r"class name 'Dog' stands for 2 classes of mine: dog \(1\), DOG \(2\); give the index"),
        ("crane", r"class name 'crane' stands for 2 classes of mine: crane \(3\), crane \(4\); give the index"),
        (True, "target is bool: expected a class name, or an index from 0 to 5"),
        (np.bool_(True), "target is bool"),
        (1.0, "target is float"),
        (None, "target is NoneType"),
        (torch.tensor(1), r"target is int64 \[\]"),
    ],
)
def test_targets_that_are_no_class(target: Any, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        black_box(class_names=NAMES, name="mine").target_index(target)


def test_many_class_names_are_shortened_in_messages() -> None:
    with pytest.raises(at.UserError, match=r"n0, n1, .*n11 \.\.\. \(50 classes\)"):
        black_box(class_names=[f"n{i}" for i in range(50)]).target_index("bird")


def test_features_of_the_cnn_are_the_mean_of_its_last_map(cnn: at.Classifier) -> None:
    inputs = rand(3, 3, 32, 32)
    logits, features = cnn.logits_and_features(inputs)
    with torch.no_grad():
        assert torch.allclose(features, cnn.module.forward_features(inputs).mean((2, 3)), atol=1e-5)
        assert torch.allclose(logits, cnn.module(inputs), atol=1e-5)
    assert torch.equal(cnn.features(inputs), features)


def test_features_of_the_vit_are_its_normed_class_token(vit: at.Classifier) -> None:
    inputs = rand(3, 3, 32, 32)
    module = vit.module
    with torch.no_grad():
        tokens = module.patch_embed(inputs)
        tokens = torch.cat([module.cls_token.expand(3, -1, -1), tokens], dim=1) + module.pos_embed
        for block in module.blocks:
            tokens = block(tokens)
        expected = module.norm(tokens)[:, 0]
    assert torch.allclose(vit.features(inputs), expected, atol=1e-4)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("wrap", [lambda module: module, Wrapper, nn.DataParallel, lambda module: nn.Sequential(nn.Identity(), module)])
def test_features_of_a_distilled_model_are_the_mean_of_both_heads_inputs(wrap: Any) -> None:
    torch.manual_seed(0)
    module = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2, num_classes=6).eval()
    classifier, inputs = at.Classifier(module, size=32), rand(3, 3, 32, 32)
    with torch.no_grad():
        tokens = module.forward_features(inputs)
        assert not torch.allclose(tokens[:, 0], tokens[:, 1], atol=0.1)
        assert torch.allclose(classifier.features(inputs), module.forward_head(tokens, pre_logits=True), atol=1e-5)


def test_features_before_a_convolution_as_the_final_layer_are_pooled() -> None:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 5, 3)
    classifier = at.Classifier(nn.Sequential(body, nn.ReLU(), nn.Conv2d(5, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), size=8)
    inputs = rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(classifier.features(inputs), body(inputs).relu().mean((2, 3)), atol=1e-6)


class TwoLayers(nn.Module):
    """Two linear layers of which either could be the final one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.mean((2, 3))).relu())


def test_head_names_the_layer_whose_input_is_the_feature() -> None:
    module, inputs = TwoLayers(), rand(3, 3, 8, 8)
    with torch.no_grad():
        hidden = module.first(inputs.mean((2, 3))).relu()
    assert torch.allclose(at.Classifier(module, size=8).features(inputs), hidden)
    assert torch.allclose(at.Classifier(module, size=8, head="second").features(inputs), hidden)
    assert torch.allclose(at.Classifier(module, size=8, head="first").features(inputs), inputs.mean((2, 3)))
    with pytest.raises(at.UserError, match="TwoLayers has no layer 'third': its last layers are first, second, unused"):
        at.Classifier(module, size=8, head="third").features(inputs)
    with pytest.raises(at.UserError, match="the final layer of TwoLayers was never called: name the right one with head="):
        at.Classifier(module, size=8, head="unused").features(inputs)


def test_models_without_features_say_so() -> None:
    with pytest.raises(at.UserError, match=r"function is a black box without features: give an nn\.Module"):
        black_box().features(rand(1, 3, 8, 8))
    pooled = at.Classifier(nn.Sequential(nn.AvgPool2d(8), nn.Flatten()), size=8)
    with pytest.raises(at.UserError, match="no final layer with 3 outputs was found in Sequential: name it with head="):
        pooled.features(rand(1, 3, 8, 8))


class Beside(nn.Module):
    """A linear layer of as many outputs as there are scores, past which the image reaches them too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.inside = nn.Linear(3, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.body(x.mean((2, 3)))
        return (pooled + self.inside(pooled.relu())).relu() @ torch.eye(5)


def test_a_layer_that_is_passed_by_is_no_final_layer() -> None:
    used = at.Classifier(Beside(), size=8, scores="softmax")
    with pytest.raises(at.UserError, match="no final layer with 5 outputs was found in Beside: name it with head="):
        used.features(rand(2, 3, 8, 8))
    named = at.Classifier(Beside(), size=8, scores="softmax", head="inside")
    assert named.features(rand(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("normalize", [False, True])
def test_prototypes_score_by_inner_product(cnn: at.Classifier, normalize: bool) -> None:
    matrix, inputs = rand(4, 64, seed=1) - 0.5, rand(5, 3, 32, 32)
    classifier = cnn.with_prototypes(matrix, scale=7.0, normalize=normalize)
    features, rows = cnn.features(inputs).double(), matrix.double()
    expected = torch.stack([torch.stack([(f * m).sum() / ((f.norm() * m.norm()) if normalize else 1) for m in rows]) for f in features]) * 7
    assert torch.allclose(classifier.logits(inputs).double(), expected, rtol=1e-4, atol=1e-4)
    assert classifier.class_names == ("class 0", "class 1", "class 2", "class 3")
    assert classifier.preprocessing == cnn.preprocessing
    assert classifier.num_classes == 4
    returned = classifier.features(inputs)
    assert torch.allclose(returned, F.normalize(features, dim=1).float() if normalize else features.float(), atol=1e-5)


def test_prototypes_that_are_the_final_layer_give_its_logits(cnn: at.Classifier) -> None:
    inputs = rand(3, 3, 32, 32)
    classifier = cnn.with_prototypes(cnn.module.fc.weight)
    assert torch.allclose(classifier.logits(inputs) + cnn.module.fc.bias.detach(), cnn.logits(inputs), atol=1e-4)
    assert classifier.class_names == cnn.class_names


def test_prototypes_have_their_own_digest(cnn: at.Classifier) -> None:
    matrix = rand(4, 64)
    variants = [{"matrix": matrix}, {"matrix": 2 * matrix}, {"matrix": matrix, "scale": 2}, {"matrix": matrix, "normalize": True}]
    digests = {cnn.with_prototypes(**variant).weights_digest for variant in variants}
    assert len(digests | {cnn.weights_digest}) == 5
    assert cnn.with_prototypes(matrix).weights_digest in digests


def test_bad_prototypes(cnn: at.Classifier) -> None:
    inputs = rand(2, 3, 32, 32)
    with pytest.raises(at.UserError, match=r"prototypes are float32 \[64\]: expected a matrix \[classes, features\]"):
        cnn.with_prototypes(torch.zeros(64))
    with pytest.raises(
        at.UserError, match=r"prototypes have 63 columns, zoo:cnn has 64 features and 10 outputs: give a matrix \[classes, D\]"
    ):
        cnn.with_prototypes(torch.zeros(5, 63)).logits(inputs)
    with pytest.raises(at.UserError, match="3 prototypes, but 2 class names were given: give one for each"):
        cnn.with_prototypes(torch.zeros(3, 64), class_names=("a", "b"))
    with pytest.raises(at.UserError, match="zoo:cnn with prototypes returned nan for class 0 of image 0 in a batch of 2"):
        cnn.with_prototypes(torch.full((3, 64), torch.nan)).logits(inputs)


@pytest.mark.parametrize("fixture", ["cnn", "vit"])
def test_results_do_not_depend_on_the_batch_size(fixture: str, request: pytest.FixtureRequest) -> None:
    module = request.getfixturevalue(fixture).module
    inputs = rand(7, 3, 32, 32)
    whole = at.Classifier(module, size=32, batch_size=100)
    logits, features = whole.logits_and_features(inputs)
    for batch_size in (1, 3, 7):
        classifier = at.Classifier(module, size=32, batch_size=batch_size)
        assert torch.allclose(classifier.logits(inputs), logits, atol=1e-4)
        assert torch.allclose(classifier.features(inputs), features, atol=1e-4)


@pytest.mark.parametrize("prototypes", [False, True])
def test_no_more_than_batch_size_images_are_forwarded_at_once(prototypes: bool) -> None:
    sizes = []

    class Recorder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x.mean((2, 3)))

    classifier = at.Classifier(nn.Sequential(Recorder(3, 5), nn.Linear(5, 4)), size=8)
    if prototypes:
        classifier = classifier.with_prototypes(torch.eye(5))
    classifier.logits(rand(1, 3, 8, 8))
    classifier.features(rand(1, 3, 8, 8))
    classifier.batch_size = 3
    sizes.clear()
    classifier.logits(rand(7, 3, 8, 8))
    assert sizes == [3, 2, 2]


def test_the_automatic_batch_size_falls_with_the_input_and_has_bounds() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [automatic_batch_size(side**2, cpu) for side in (1, 32, 224, 1000)] == [512, 64, 16, 16]
    assert [automatic_batch_size(side**2, gpu) for side in (32, 224, 1000)] == [512, 167, 32]
    assert black_box(size=32).batch_size == 64


def test_gradients_flow_when_the_inputs_require_them(cnn: at.Classifier) -> None:
    inputs = rand(3, 3, 32, 32)
    assert not cnn.logits(inputs).requires_grad
    assert not cnn.features(inputs).requires_grad
    ours, theirs = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    chunked = at.Classifier(cnn.module, size=32, batch_size=2)
    (gradient,) = torch.autograd.grad(chunked.logits(ours)[:, 3].sum() + chunked.features(ours).sum(), ours)
    features = cnn.module.forward_features(theirs).mean((2, 3))
    (expected,) = torch.autograd.grad(cnn.module.fc(features)[:, 3].sum() + features.sum(), theirs)
    assert expected.abs().max() > 0.01
    assert torch.allclose(gradient, expected, atol=1e-4)
    with torch.no_grad():
        assert not cnn.logits(ours).requires_grad


def mixed_module() -> nn.Module:
    """Batch norm and dropout, some parts in training mode, some parameters frozen, one gradient left over, one user's hook."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.Sequential(nn.ReLU(), nn.Dropout(0.5)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    module[0].eval()
    module[2][0].eval()
    module[0].weight.requires_grad_(False)
    module[5].weight.grad = torch.ones(4, 6)
    module[4].register_forward_hook(lambda m, args, output: None)
    return module


def state_of(module: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in module.modules()],
        "hooks": [[len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)] for m in module.modules()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in module.parameters()],
        "weights": {name: value.tolist() for name, value in module.state_dict().items()},
        "identities": [id(value) for value in (*module.parameters(), *module.buffers())],
    }


@pytest.mark.parametrize(
    "call", ["logits", "probabilities", "features", "logits_and_features", "weights_digest", "num_classes", "prototypes"]
)
@pytest.mark.parametrize("gradient", [False, True])
def test_a_model_leaves_every_call_as_it_came(call: str, gradient: bool) -> None:
    module = mixed_module()
    classifier = at.Classifier(module, size=8)
    before = state_of(module)
    inputs = rand(5, 3, 8, 8).requires_grad_(gradient)
    if call == "prototypes":
        classifier.with_prototypes(torch.eye(6)).logits(inputs)
    elif call in ("weights_digest", "num_classes"):
        assert getattr(classifier, call)
    else:
        getattr(classifier, call)(inputs)
    assert state_of(module) == before


def test_a_model_that_fails_leaves_as_it_came() -> None:
    module = mixed_module()

    def explode(*_: Any) -> None:
        raise RuntimeError("boom")

    classifier = at.Classifier(module, size=8)
    classifier.features(rand(1, 3, 8, 8))
    module[3].register_forward_hook(explode)
    before = state_of(module)
    with pytest.raises(RuntimeError, match="boom"):
        classifier.features(rand(2, 3, 8, 8))
    assert state_of(module) == before


def test_scores_are_those_of_evaluation_mode() -> None:
    module, inputs = mixed_module(), rand(5, 3, 8, 8)
    logits = at.Classifier(module, size=8).logits(inputs)
    with torch.no_grad():
        assert torch.allclose(module.eval()(inputs), logits, atol=1e-6)


@pytest.mark.parametrize("change", ["weight", "running mean", "dtype", "names"])
def test_the_digest_tells_weights_apart(change: str) -> None:
    module = mixed_module()
    classifier = at.Classifier(module, size=8)
    digest = classifier.weights_digest
    assert digest == at.Classifier(mixed_module(), size=16, mean=MEAN).weights_digest
    with torch.no_grad():
        if change == "weight":
            module[5].bias[2] += 1e-6
        elif change == "running mean":
            module[1].running_mean[0] = 1
        elif change == "dtype":
            module.double()
        else:
            module = nn.Sequential(*module[:5], nn.Identity(), module[5])
    assert at.Classifier(module, size=8).weights_digest != digest
    if change != "names":
        assert classifier.weights_digest != digest


def test_a_black_box_has_no_digest() -> None:
    assert black_box().weights_digest is None


class Small(nn.Module):
    """A model that only so many images fit into."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.most, self.error, self.tried = most, error, list[int]()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.tried.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_batches_are_halved_until_they_fit(error: Exception) -> None:
    module = Small(5, error)
    classifier = at.Classifier(module, size=8, batch_size=32)
    inputs = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = module.head(inputs.mean(dim=(2, 3)))
    classifier.find_out(want_features=False)
    module.tried.clear()
    assert torch.allclose(classifier.logits(inputs), expected)
    assert module.tried[:4] == [32, 16, 8, 4] and classifier.batch_size == 4
    assert torch.allclose(classifier.logits_and_features(inputs)[0], expected)
    assert max(module.tried[12:]) == 4  # it is remembered


def test_other_errors_and_single_images_are_not_tried_again() -> None:
    none_fits = Small(2, RuntimeError("out of memory"))
    classifier = at.Classifier(none_fits, size=8, batch_size=8, class_names=list("abcd"))
    classifier.logits(torch.rand(1, 3, 8, 8))
    none_fits.most = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        classifier.logits(torch.rand(8, 3, 8, 8))
    assert none_fits.tried[-4:] == [8, 4, 2, 1] and classifier.batch_size == 8
    broken = Small(2, RuntimeError("shapes do not fit"))
    classifier = at.Classifier(broken, size=8, batch_size=8)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        classifier.logits(torch.rand(8, 3, 8, 8))
    assert broken.tried[-1] == 8


@pytest.mark.parametrize("why", ["hooks", "gradients"])
def test_batches_that_others_count_on_stay_whole(why: str) -> None:
    module = Small(5, RuntimeError("out of memory"))
    classifier = at.Classifier(module, size=8, batch_size=16, class_names=list("abcd"))
    classifier.find_out(False)
    inputs = torch.rand(16, 3, 8, 8, requires_grad=why == "gradients")
    handle = module.head.register_forward_hook(lambda *_: None) if why == "hooks" else None
    with pytest.raises(RuntimeError, match="out of memory"):
        classifier.logits(inputs)
    assert module.tried[-1] == 16 and classifier.batch_size == 16
    if handle is not None:
        handle.remove()
        assert len(classifier.logits(inputs)) == 16


class Tower(nn.Module):
    """An image tower of CLIP, which has a projection of its own: a parameter, a linear layer, or none."""

    def __init__(self, projection: str, width: int = 6, embedding: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.up, self.down = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm, self.projection = nn.LayerNorm(width), projection
        self.matrix, self.linear = nn.Parameter(torch.randn(width, embedding)), nn.Linear(width, embedding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.down(self.up(self.patches(x).flatten(2).mean(dim=2)).relu()))
        return {"parameter": lambda: x @ self.matrix, "linear": lambda: self.linear(x), "none": lambda: x}[self.projection]()


@pytest.mark.parametrize("projection", ["parameter", "linear", "none"])
@pytest.mark.parametrize("embedding", [4, 6])
def test_prototypes_on_a_tower_with_its_projection(projection: str, embedding: int) -> None:
    """logits = scale cos(tower(x), text), for any width of the tower; or refused where features and outputs cannot be told apart."""
    tower = Tower(projection, embedding=embedding).eval()
    inputs, text = rand(3, 3, 8, 8), torch.randn(5, 6 if projection == "none" else embedding)
    with torch.no_grad():
        expected = 10 * nn.functional.normalize(tower(inputs), dim=1) @ nn.functional.normalize(text, dim=1).T
    used = at.Classifier(tower, size=8).with_prototypes(text, 10, True)
    if projection == "linear" and embedding == 6:
        with pytest.raises(at.UserError, match=r"6 features and 6 outputs: .*nn.Identity\(\)\), head='1'"):
            used.logits(inputs)
        used = at.Classifier(nn.Sequential(tower, nn.Identity()), size=8, head="1").with_prototypes(text, 10, True)
    logits, features = used.logits_and_features(inputs)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(nn.functional.normalize(features, dim=1) @ nn.functional.normalize(text, dim=1).T * 10, expected, atol=1e-5)


@pytest.mark.parametrize(("width", "embedding"), [(48, 32), (48, 48)])
@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_prototypes_on_open_clip(width: int, embedding: int, pool: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": width, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 16, "image_size": 64, "pool_type": pool}
    text = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(embed_dim=embedding, vision_cfg=vision, text_cfg=text).eval()
    tokens, inputs = torch.tensor([[1, 2, 99] + [0] * 13, [3, 4, 99] + [0] * 13]), rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, _ = clip.get_logits(inputs, tokens)
        matrix = clip.encode_text(tokens)
    used = at.Classifier(clip.visual, size=64).with_prototypes(matrix, float(clip.logit_scale.detach().exp()), True)
    assert torch.allclose(used.logits(inputs), expected, atol=1e-4)
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = at.attribute(image, used, "grad_cam")
    assert found.provenance["layer"] == ("transformer.resblocks.1.ln_1" if pool == "tok" else "ln_post")
    if pool == "tok":
        assert at.attribute(image, used, "grad_eclip", 0).pixel_map.isfinite().all()
