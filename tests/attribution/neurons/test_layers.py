from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from networks import classifier, photo, scaled, tiny_vit
from neuron_toys import LikeHuggingFace, ToyTransformer, toy_classifier, toy_images, unchanged
from timm.layers import GluMlp, SwiGLU
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import attribution as at
from attribution.hooks import edited_inputs
from attribution.neurons import NeuronLayers, edited_probabilities, find_neurons, neuron_path

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5, "mlp_ratio": 2.0}


def distilled() -> nn.Module:
    torch.manual_seed(0)
    return scaled(timm.models.deit.VisionTransformerDistilled(**SMALL))


def beit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return scaled(Beit(**SMALL, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True, **options))


def eva() -> nn.Module:
    torch.manual_seed(0)
    return scaled(Eva(**SMALL, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True))


def torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    return scaled(torchvision.models.VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5))


def hugging_face() -> nn.Module:
    torch.manual_seed(0)
    return scaled(LikeHuggingFace())


TIMM, TORCHVISION, HUGGING_FACE = "blocks.{}.mlp.fc2", "encoder.layers.encoder_layer_{}.mlp.3", "vit.encoder.layer.{}.output.dense"
# builder, names, F, start, stop, tokens, place
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], str, int, int, int, int, str]] = {
    "class token": (tiny_vit, TIMM, 32, 0, 1, 17, "class token"),
    "registers": (lambda: tiny_vit(reg_tokens=3), TIMM, 32, 0, 1, 20, "class token"),
    "fc_norm": (lambda: tiny_vit(global_pool="avg"), TIMM, 32, 1, 17, 17, "16 tokens that the head pools"),
    "norm, then mean": (lambda: tiny_vit(global_pool="avg", fc_norm=False), TIMM, 32, 1, 17, 17, "16 tokens that the head pools"),
    "no class token": (lambda: tiny_vit(class_token=False, global_pool="avg"), TIMM, 32, 0, 16, 16, "16 tokens that the head pools"),
    "pooled, registers": (lambda: tiny_vit(reg_tokens=3, global_pool="avg"), TIMM, 32, 4, 20, 20, "16 tokens that the head pools"),
    "attention pooling": (lambda: tiny_vit(class_token=False, global_pool="map"), TIMM, 32, 0, 16, 16, "16 tokens that the head pools"),
    "layer scale": (lambda: tiny_vit(init_values=0.5), TIMM, 32, 0, 1, 17, "class token"),
    "norm in the mlp": (lambda: tiny_vit(scale_mlp_norm=True), TIMM, 32, 0, 1, 17, "class token"),
    "swiglu": (lambda: tiny_vit(mlp_layer=SwiGLU), TIMM, 32, 0, 1, 17, "class token"),
    "glu": (lambda: tiny_vit(mlp_layer=GluMlp, mlp_ratio=3.0), TIMM, 24, 0, 1, 17, "class token"),
    "distilled": (distilled, TIMM, 32, 0, 2, 18, "class and distillation token"),
    "beit": (beit, TIMM, 32, 1, 17, 17, "16 tokens that the head pools"),
    "beit, class token": (lambda: beit(global_pool="token"), TIMM, 32, 0, 1, 17, "class token"),
    "eva": (eva, TIMM, 32, 1, 17, 17, "16 tokens that the head pools"),
    "torchvision": (torchvision_vit, TORCHVISION, 32, 0, 1, 17, "class token"),
    "hugging face": (hugging_face, HUGGING_FACE, 32, 0, 1, 17, "class token"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_found(name: str) -> None:
    build, pattern, width, start, stop, tokens, place = ARCHITECTURES[name]
    used = classifier(build())
    with unchanged(used.module):
        found = find_neurons(used)
    assert found.names == tuple(pattern.format(layer) for layer in range(2)) and len(found) == 2
    assert all(used.module.get_submodule(each) is module for each, module in zip(found.names, found.modules, strict=True))
    assert (found.width, found.positions, found.tokens, found.read) == (width, tuple(range(start, stop)), tokens, stop - start)
    assert found.grid == (4, 4) and found.place == place


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_head_reads_these_tokens_and_no_others(name: str) -> None:
    used = classifier(ARCHITECTURES[name][0]())
    found, inputs = find_neurons(used), used.inputs(photo(16))
    clean = used.logits(inputs)
    for token in range(found.tokens):

        def shift(hidden: Tensor, token: int = token) -> Tensor:
            hidden = hidden.clone()
            hidden[:, token] += torch.linspace(-1, 2, hidden.shape[-1])
            return hidden

        with edited_inputs({found.modules[-1]: shift}):
            changed = used.logits(inputs)
        assert torch.equal(changed, clean) == (token not in found.positions), token


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_removed_neuron_of_the_last_layer_is_a_column_of_zeros(name: str) -> None:
    """Of the down projection, in a copy: what a neuron is, found without any hook."""
    used = classifier(ARCHITECTURES[name][0]())
    found, inputs = find_neurons(used), used.inputs(photo(16))
    clean, changed = used.probabilities(inputs), 0
    for unit in (0, 7, found.width - 1):
        other = copy.deepcopy(used.module)
        with torch.no_grad():
            other.get_submodule(found.names[-1]).weight[:, unit] = 0
        expected = classifier(other).probabilities(inputs)
        edited = edited_probabilities(used, inputs, torch.tensor([[-1, unit]]), layers=found)
        assert torch.allclose(edited, expected, atol=1e-6)
        changed += not torch.allclose(clean, expected, atol=1e-4)
    assert changed


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recorded_values_imposed_again_change_nothing(name: str) -> None:
    used = classifier(ARCHITECTURES[name][0]())
    found, inputs = find_neurons(used), torch.cat([used.inputs(photo(16, seed)) for seed in range(2)])
    with found.recorded() as hidden:
        clean = used.logits(inputs)
    assert list(hidden) == [0, 1] and all(each.shape == (2, found.tokens, found.width) for each in hidden.values())
    values = {layer: found.at_tokens(each) for layer, each in hidden.items()}
    with found.overridden(values):
        assert torch.equal(used.logits(inputs), clean)
    with found.overridden({1: values[1].flip(0)}):
        assert not torch.allclose(used.logits(inputs), clean, atol=1e-4)
    assert torch.equal(used.logits(inputs), clean)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_path_in_each_architecture(name: str) -> None:
    used = classifier(ARCHITECTURES[name][0]())
    path = neuron_path(photo(16), used, target=1, steps=3)
    assert path.layers == find_neurons(used).names and path.place == find_neurons(used).place
    assert path.target_score == pytest.approx(float(used.probabilities(used.inputs(photo(16)))[0, 1]), abs=1e-6)
    assert (path.forwards, path.backwards) == (1 + 3 * 3, 3 * 3)
    assert path.score != 0 and path.neurons.shape == (2,)


def test_the_zoo(vit: at.Classifier) -> None:
    found = find_neurons(vit)
    assert found.names == tuple(f"blocks.{layer}.mlp.fc2" for layer in range(6))
    assert (found.width, found.positions, found.tokens, found.grid) == (256, (0,), 65, (8, 8))


def test_layers_by_name() -> None:
    used = toy_classifier(ToyTransformer())
    every = find_neurons(used)
    named = find_neurons(used, list(every.names))
    assert (named.names, named.modules, named.width, named.positions) == (every.names, every.modules, 12, (0,))
    later = find_neurons(used, every.names[1:])
    assert (later.names, later.positions) == (every.names[1:], (0,))
    path = neuron_path(toy_images(1)[0].sigmoid(), used, steps=2, layers=every.names[1:])
    assert path.layers == every.names[1:] and path.neurons.shape == (2,)


@pytest.mark.parametrize("pooled", [False, True])
def test_layers_by_name_before_the_last_are_read_at_the_same_tokens(pooled: bool) -> None:
    """The head reads what it reads, whichever layers are looked at."""
    used = toy_classifier(ToyTransformer(pooled=pooled))
    every = find_neurons(used)
    for names in (every.names[:1], every.names[:2]):
        found = find_neurons(used, names)
        assert (found.names, found.positions) == (names, every.positions)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["blocks.9.mlp.fc2"], "no layer 'blocks.9.mlp.fc2'"),
        (["blocks.0"], "called 0 times as a linear layer: expected one called once on"),
        (["blocks.0.mlp"], "called 0 times as a linear layer"),
        (["head"], r"expected one called once on \[n, tokens, F\]"),
        ([], "layers is empty"),
        (["blocks.0.mlp.fc2", "blocks.0.mlp.fc2"], "input to output"),
        (["blocks.1.mlp.fc2", "blocks.0.mlp.fc2"], "input to output"),
    ],
)
def test_bad_names(layers: list[str], message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        find_neurons(toy_classifier(ToyTransformer()), layers)


def test_layers_of_different_widths() -> None:
    with pytest.raises(at.NotApplicable, match="8, 12 hidden units: expected as many in each"):
        find_neurons(toy_classifier(ToyTransformer()), ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"])


class SharedMlp(ToyTransformer):
    """Both layers run the same block."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.blocks[1] = self.blocks[0]


def test_tokens_that_are_no_neighbours() -> None:
    used, inputs = toy_classifier(Apart()), toy_images(1)
    found = find_neurons(used)
    assert found.positions == (0, 4) and found.place == "class token and 1 tokens that the head pools"
    with found.recorded() as hidden:
        clean = used.logits(inputs)
    assert torch.equal(found.at_tokens(hidden[2]), hidden[2][:, [0, 4]])
    with found.overridden({2: found.at_tokens(hidden[2])}):
        assert torch.equal(used.logits(inputs), clean)
    with found.overridden({2: torch.zeros_like(found.at_tokens(hidden[2]))}):
        everywhere = used.logits(inputs)
    with edited_inputs({found.modules[2]: torch.zeros_like}):
        assert torch.allclose(used.logits(inputs), everywhere, atol=1e-6)  # the other tokens of the last layer are not read


class Apart(ToyTransformer):
    """The head reads the class token and the last patch."""

    def forward(self, x: Tensor, edit: Any = None) -> Tensor:
        return self.head(self.norm(self.stream(x, edit))[:, [0, -1]].mean(dim=1))


class Blind(ToyTransformer):
    """The head reads what entered the blocks."""

    def forward(self, x: Tensor, edit: Any = None) -> Tensor:
        self.stream(x, edit)
        return self.head(self.patches(x).mean(dim=(2, 3)))


def swin() -> nn.Module:
    torch.manual_seed(0)
    depths = {"depths": (2, 2), "num_heads": (2, 2), "window_size": 2, "drop_path_rate": 0.0}
    return scaled(SwinTransformer(img_size=16, patch_size=2, embed_dim=8, num_classes=5, **depths))


def cait() -> nn.Module:
    torch.manual_seed(0)
    return scaled(Cait(**SMALL, depth_token_only=1, mlp_ratio_token_only=2.0))


REFUSED: dict[str, tuple[Callable[[], at.Classifier], str]] = {
    "token merging": (lambda: classifier(swin()), "merging"),
    "late class token": (lambda: classifier(cait()), "its MLPs see 1, 16 tokens: expected as many in each"),
    "shared": (lambda: toy_classifier(SharedMlp()), "runs one MLP several times"),
    "blind": (lambda: toy_classifier(Blind()), "do not depend on its last MLP"),
    "black box": (lambda: toy_classifier(lambda x: x.mean(dim=(2, 3)), name="box"), "box is a black box: neurons need an nn.Module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    build, reason = REFUSED[name]
    used = build()
    with pytest.raises(at.NotApplicable, match=reason) as caught:
        find_neurons(used)
    assert used.name in str(caught.value) and "\n" not in str(caught.value)


def test_a_refused_model_is_left_as_it_was() -> None:
    for build in (lambda: classifier(cait()), lambda: toy_classifier(Blind())):
        used = build()
        used.module.train()
        with unchanged(used.module), pytest.raises(at.NotApplicable):
            find_neurons(used)


def test_a_cnn_is_refused(cnn: at.Classifier) -> None:
    with pytest.raises(at.NotApplicable, match="no MLP over tokens was found in it: expected a vision transformer"):
        find_neurons(cnn)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_whatever_mode_of_the_caller(mode: Any) -> None:
    used = toy_classifier(ToyTransformer(pooled=True).train())
    with unchanged(used.module), mode():
        found = find_neurons(used)
    assert isinstance(found, NeuronLayers) and (found.positions, found.grid) == ((1, 2, 3, 4), (2, 2))


def test_a_probabilistic_output_and_prototypes() -> None:
    toy = ToyTransformer()
    for used in (
        toy_classifier(nn.Sequential(toy, nn.Softmax(dim=1)), scores="probabilities"),
        toy_classifier(toy).with_prototypes(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), 2.0, True),
    ):
        found = find_neurons(used)
        assert (len(found), found.width, found.positions) == (3, 12, (0,))
