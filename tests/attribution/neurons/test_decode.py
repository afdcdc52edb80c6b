from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks import classifier, photo, scaled, tiny_vit
from neuron_toys import ToyTransformer, toy_classifier, toy_images
from timm.layers import RmsNorm
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

import attribution as at
from attribution.neurons import Exemplar, NeuronDecoder, edited_probabilities, exemplars, find_neurons
from tests.attribution.neurons.test_layers import ARCHITECTURES, beit, distilled


def removed(toy: ToyTransformer, inputs: Tensor, layer: int, unit: int) -> tuple[Tensor, Tensor]:
    """How the logits change without a neuron, and what it had, summed over the tokens read."""
    seen = {}

    def remove(at_layer: int, hidden: Tensor) -> Tensor:
        if at_layer != layer:
            return hidden
        seen["activation"] = hidden[:, :, unit].sum(dim=1)
        return hidden.index_fill(2, torch.tensor([unit]), 0)

    with torch.no_grad():
        return toy(inputs, toy.at_tokens(remove)) - toy(inputs), seen["activation"]


@pytest.mark.parametrize("mode", ["raw", "centred"])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_linear_transformer_exactly(pooled: bool, mode: Any) -> None:
    """Without a normalisation, removing neuron j changes the logits by -a_j s_j, in every layer."""
    toy = ToyTransformer(linear=True, pooled=pooled, classes=5)
    decoder, inputs = NeuronDecoder(toy_classifier(toy), mode), toy_images(4)
    for layer in range(3):
        effects = decoder.effects(layer)
        assert effects.shape == (12, 5)
        for unit in range(12):
            change, activation = removed(toy, inputs, layer, unit)
            assert torch.allclose(change, -activation[:, None] * effects[unit], atol=1e-4)


def test_agreement_of_a_linear_transformer_is_one() -> None:
    """Whatever the sign of the activation; a neuron that says nothing has no agreement."""
    for pooled in (False, True):
        toy = ToyTransformer(linear=True, pooled=pooled, classes=6)
        with torch.no_grad():
            toy.blocks[1].mlp.fc2.weight[:, 3] = 0
        used, inputs = toy_classifier(toy, batch_size=3), toy_images(7)
        decoder, signs = NeuronDecoder(used), set()
        for layer in range(3):
            found = decoder.agreement(inputs, layer, range(12))
            silent = np.array([layer == 1 and unit == 3 for unit in range(12)])
            assert np.isnan(found[silent]).all() and np.allclose(found[~silent], 1)
            signs |= {bool(removed(toy, inputs, layer, unit)[1].mean() > 0) for unit in range(12)}
        assert signs == {False, True}


def test_agreement_is_a_rank_correlation() -> None:
    """In a network with normalisation, against ranks by hand; the last layer agrees more than the first."""
    toy = ToyTransformer(classes=6, seed=2)
    used, inputs = toy_classifier(toy), toy_images(5)
    decoder = NeuronDecoder(used)
    means = {}
    for layer in (0, 2):
        found = decoder.agreement(inputs, layer, range(12))
        for unit in range(12):
            change, activation = removed(toy, inputs, layer, unit)
            change, effect = change.mean(dim=0), -activation.mean().sign() * decoder.effects(layer, [unit])[0]
            ranks = [np.argsort(np.argsort(values.numpy())) for values in (change, effect)]
            assert found[unit] == pytest.approx(1 - 6 * np.sum((ranks[0] - ranks[1]) ** 2) / (6 * 35), abs=1e-9)
        means[layer] = found.mean()
    assert means[2] > 0.7 and means[2] > means[0]


def by_hand(weight: Tensor, gain: Tensor | None, down: Tensor, scale: Tensor | None, centred: bool = True) -> Tensor:
    """Rows W (gain * (v - mean v)) of each v = scale * column, one neuron and class at a time in float64: [F, C]."""
    rows = []
    for column in down.detach().double().unbind(dim=1):
        v = column if scale is None else scale.detach().double() * column
        v = v - v.mean() if centred else v
        v = v if gain is None else gain.detach().double() * v
        rows.append([float((of_class * v).sum()) for of_class in weight.detach().double()])
    return torch.tensor(rows)


def test_layer_norm_by_hand() -> None:
    toy = ToyTransformer()
    decoder, raw = NeuronDecoder(toy_classifier(toy)), NeuronDecoder(toy_classifier(toy), "raw")
    for layer, block in enumerate(toy.blocks):
        expected = by_hand(toy.head.weight, toy.norm.weight, block.mlp.fc2.weight, None)
        assert torch.allclose(decoder.effects(layer), expected, atol=1e-5)
        assert torch.allclose(decoder.effects(layer, [5, 0]), expected[[5, 0]], atol=1e-5)
        assert torch.allclose(decoder.directions(layer), block.mlp.fc2.weight.T, atol=1e-6)
        assert torch.allclose(raw.effects(layer), by_hand(toy.head.weight, None, block.mlp.fc2.weight, None, False), atol=1e-5)


# builder, final normalisation, head, layer scale of a block
HEADS: dict[str, tuple[Callable[[], nn.Module], str, str | None]] = {
    "class token": (tiny_vit, "norm", None),
    "registers": (lambda: tiny_vit(reg_tokens=3), "norm", None),
    "layer scale": (lambda: tiny_vit(init_values=0.5), "norm", "ls2.gamma"),
    "beit": (beit, "fc_norm", "gamma_2"),
    "beit, class token": (lambda: beit(global_pool="token"), "norm", "gamma_2"),
    "fc_norm": (lambda: tiny_vit(global_pool="avg", init_values=0.5), "fc_norm", "ls2.gamma"),
    "norm, then mean": (lambda: tiny_vit(global_pool="avg", fc_norm=False), "norm", None),
    "rms norm": (lambda: tiny_vit(norm_layer=RmsNorm), "norm", None),
    "norm in the mlp": (lambda: tiny_vit(scale_mlp_norm=True, qk_norm=True), "norm", None),
}
POOLED = {"beit", "fc_norm", "norm, then mean"}


@pytest.mark.parametrize("name", HEADS)
def test_heads_by_hand(name: str) -> None:
    """Layer scales are in, a pooled model divides by its tokens, RMS normalisation does not centre."""
    build, norm, scale = HEADS[name]
    module = build()
    decoder = NeuronDecoder(classifier(module))
    read = 16 if name in POOLED else 1
    assert decoder.layers.read == read
    for layer, block in enumerate(module.blocks):
        gain = module.get_submodule(norm).weight
        gamma = None if scale is None else block.get_parameter(scale)
        expected = by_hand(module.head.weight, gain, block.mlp.fc2.weight, gamma, name != "rms norm") / read
        assert torch.allclose(decoder.effects(layer), expected.float(), atol=1e-5), layer
        assert float(expected.abs().max()) > 1e-3


def test_two_heads_are_averaged() -> None:
    module = distilled()
    decoder = NeuronDecoder(classifier(module))
    weight = (module.head.weight + module.head_dist.weight) / 2
    expected = by_hand(weight, module.norm.weight, module.blocks[1].mlp.fc2.weight, None) / 2
    assert torch.allclose(decoder.effects(1), expected.float(), atol=1e-5)


@pytest.mark.parametrize("name", ["torchvision", "hugging face", "swiglu", "eva"])
def test_other_architectures_decode_their_last_layer(name: str) -> None:
    """The shift of the residual stream and, with the deviation of the clean run held, what the head makes of it."""
    used = classifier(ARCHITECTURES[name][0]())
    decoder = NeuronDecoder(used, "scaled", inputs=used.inputs(photo(16)))
    layers, inputs, unit = decoder.layers, used.inputs(photo(16)), 3
    norm = [each for each in used.module.modules() if isinstance(each, nn.LayerNorm)][-1]
    entered: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _module, args: entered.append(args[0]))
    with layers.recorded() as hidden:
        used.logits(inputs)
    edited_probabilities(used, inputs, torch.tensor([[-1, unit]]), layers=layers)
    handle.remove()
    clean_x, edited_x = (x if x.ndim == 2 else x[:, list(layers.positions)].mean(dim=1) for x in entered)
    deviation = clean_x.std(dim=1, correction=0)
    activation = layers.at_tokens(hidden[1])[:, :, unit].sum()
    shift = (edited_x - clean_x)[0]
    assert torch.allclose(shift, -activation * decoder.directions(1, [unit])[0] / layers.read, atol=1e-5)
    head = used.heads[0]
    expected = head.weight @ (norm.weight * (shift - shift.mean())) / deviation
    assert torch.allclose(-activation * decoder.effects(1, [unit])[0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_scaled_is_in_logits(pooled: bool) -> None:
    """Divided by the mean deviation at the final normalisation."""
    toy = ToyTransformer(pooled=pooled)
    inputs = toy_images(7)
    with torch.no_grad():
        x = toy.stream(inputs)[:, toy.start : toy.stop].double()
    deviation = np.mean([[float(np.std(token.numpy())) for token in tokens] for tokens in x])
    used = toy_classifier(toy, batch_size=3)
    found, centred = NeuronDecoder(used, "scaled", inputs=inputs), NeuronDecoder(used)
    assert torch.allclose(found.effects(1), (centred.effects(1) / deviation).float(), rtol=1e-4, atol=1e-6)
    if not pooled:  # a small activation, its direction taken out of the deviation's own change by the mean over many images
        unit, change = 5, torch.zeros(4)
        for image in inputs:
            step = 1e-3

            def push(layer: int, hidden: Tensor, step: float = step) -> Tensor:
                return hidden + step * torch.eye(12)[unit] if layer == 2 else hidden

            with torch.no_grad():
                change += (toy(image[None], toy.at_tokens(push)) - toy(image[None]))[0] / step / len(inputs)
        assert np.corrcoef(change, found.effects(2, [unit])[0])[0, 1] > 0.6


def test_scaled_by_rms() -> None:
    module = tiny_vit(norm_layer=RmsNorm)
    used, seen = classifier(module), []
    inputs = torch.cat([used.inputs(photo(16, seed)) for seed in range(3)])
    handle = module.norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0][:, 0]))
    used.logits(inputs)
    handle.remove()
    deviation = seen[-1].double().square().mean(dim=1).sqrt().mean()
    found, centred = NeuronDecoder(used, "scaled", inputs=inputs), NeuronDecoder(used)
    assert torch.allclose(found.effects(1), (centred.effects(1) / deviation).float(), rtol=1e-4, atol=1e-6)


def test_prototypes_are_the_head() -> None:
    toy, matrix = ToyTransformer(), torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    decoder = NeuronDecoder(toy_classifier(toy).with_prototypes(matrix, 2.5))
    expected = 2.5 * by_hand(matrix, toy.norm.weight, toy.blocks[2].mlp.fc2.weight, None)
    assert torch.allclose(decoder.effects(2), expected.float(), atol=1e-4)


def test_a_model_of_probabilities_is_decoded_by_its_logits() -> None:
    toy = ToyTransformer()
    used = toy_classifier(nn.Sequential(toy, nn.Softmax(dim=1)), scores="probabilities")
    assert torch.equal(NeuronDecoder(used).effects(1), NeuronDecoder(toy_classifier(toy)).effects(1))


# Null


@pytest.mark.parametrize("mode", ["centred", "raw"])
def test_p_values_are_those_of_random_directions(mode: Any) -> None:
    toy = ToyTransformer(width=8, classes=5, seed=3)
    decoder = NeuronDecoder(toy_classifier(toy), mode)
    drawn = torch.randn(20000, 8, generator=torch.Generator().manual_seed(0))
    drawn = drawn / drawn.norm(dim=1, keepdim=True)
    readout = decoder.readout - decoder.readout.mean(dim=0)
    null = (drawn @ readout.T).abs()  # [20000, C]
    p = decoder.p_values(2)
    assert p.shape == (12, 5) and p.dtype == np.float64 and p.min() < 0.1 and p.max() > 0.9
    for unit in range(12):
        v = decoder.directions(2, [unit])[0]
        effect = (v @ readout.T).abs() / v.norm()
        share = (null >= effect).float().mean(dim=0)
        assert np.allclose(decoder.p_values(2, [unit])[0], p[unit], atol=1e-12)
        assert np.allclose(p[unit], share, atol=0.015)


def test_p_values_at_the_ends() -> None:
    """A direction along a class's row is beyond every other; one that no class reads, or none at all, is like any."""
    toy = ToyTransformer(linear=True, classes=3)
    with torch.no_grad():
        toy.head.weight.zero_()
        toy.head.weight[0, 4], toy.head.weight[1, 4] = 1, -1
        down = toy.blocks[2].mlp.fc2.weight.zero_()
        down[4, 0], down[5, 1] = 2.0, 1.0
    p = NeuronDecoder(toy_classifier(toy)).p_values(2)
    assert np.allclose(p[0], [0, 0, 1], atol=1e-12)
    assert np.allclose(p[1:], 1)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    order, found, least = np.argsort(p, axis=None), np.empty(p.size), 1.0
    for place in range(p.size - 1, -1, -1):
        least = min(least, p.flat[order[place]] * p.size / (place + 1))
        found[order[place]] = least
    return found.reshape(p.shape)


def test_top_classes() -> None:
    toy, names = ToyTransformer(classes=6, width=16, seed=4), list("abcdef")
    with torch.no_grad():  # one of them beyond chance
        toy.blocks[2].mlp.fc2.weight[:, 3] = (toy.head.weight - toy.head.weight.mean(dim=0))[1] * toy.norm.weight
    decoder = NeuronDecoder(toy_classifier(toy, class_names=names))
    units = [(2, 0), (0, 11), (1, 4), (2, 3)]
    corrected = benjamini_hochberg(np.concatenate([decoder.p_values(layer, [unit]) for layer, unit in units]))
    found = decoder.top_classes(units, count=4)
    assert corrected.min() < 0.01 < 0.5 < corrected.max()
    for row, (decoded, (layer, unit)) in enumerate(zip(found, units, strict=True)):
        effect = decoder.effects(layer, [unit])[0].double()
        effect = effect - effect.mean()
        order = effect.argsort(descending=True).tolist()
        assert (decoded.layer, decoded.unit) == (layer, unit)
        assert [each.index for each in decoded.top] == order[:4] and [each.index for each in decoded.bottom] == order[::-1][:4]
        for each in decoded.top + decoded.bottom:
            assert each.name == names[each.index] and each.effect == pytest.approx(float(effect[each.index]), abs=1e-5)
            assert each.p == pytest.approx(corrected[row, each.index], abs=1e-12)
        share = effect.exp() / effect.exp().sum()
        assert decoded.selectivity == pytest.approx(1 + float((share * share.log()).sum()) / math.log(6), abs=1e-5)
    assert decoder.top_classes([]) == []
    assert [len(each.top) for each in decoder.top_classes([(0, 1)], count=9)] == [6]


def test_a_neuron_that_speaks_for_one_class_is_found() -> None:
    """Planted: unit 7 of the last layer writes the row of class 3, less the mean of all."""
    toy = ToyTransformer(classes=8, width=32, seed=5)
    with torch.no_grad():
        row = (toy.head.weight - toy.head.weight.mean(dim=0))[3] * toy.norm.weight
        toy.blocks[2].mlp.fc2.weight[:, 7] = 3 * (row - row.mean())
    planted, other = NeuronDecoder(toy_classifier(toy)).top_classes([(2, 7), (2, 8)])
    assert planted.top[0].index == 3 and planted.top[0].p < 1e-6 and planted.selectivity > 0.9
    assert other.top[0].p > 1e-3


# Refusals


class Squashed(ToyTransformer):
    """A head that is not the end."""

    def forward(self, x: Tensor, edit: Any = None) -> Tensor:
        return 5 * super().forward(x, edit).tanh()


class DeepHead(ToyTransformer):
    def __init__(self) -> None:
        super().__init__()
        self.before = scaled(nn.Linear(8, 8))

    def forward(self, x: Tensor, edit: Any = None) -> Tensor:
        return self.head(self.before(self.norm(self.stream(x, edit))[:, 0]).relu())


class TwoNorms(ToyTransformer):
    def __init__(self) -> None:
        super().__init__()
        self.another = nn.LayerNorm(8)

    def forward(self, x: Tensor, edit: Any = None) -> Tensor:
        return self.head(self.another(self.norm(self.stream(x, edit))[:, 0]))


class ConvolutionHead(ToyTransformer):
    """A 1 x 1 convolution in the place of the linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = scaled(nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor, edit: Any = None) -> Tensor:
        return self.head(self.norm(self.stream(x, edit))[:, 0, :, None, None]).flatten(1)


def post_norm() -> nn.Module:
    return tiny_vit(block_fn=ResPostBlock)


PROTOTYPES = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
REFUSED: dict[str, tuple[Callable[[], at.Classifier], str]] = {
    "post-norm block": (lambda: classifier(post_norm()), "a normalisation follows layer 0 directly"),
    "cosines": (lambda: toy_classifier(ToyTransformer()).with_prototypes(PROTOTYPES, 100.0, True), "its scores are cosines"),
    "squashed": (lambda: toy_classifier(Squashed()), "its logits are not what its linear head returns"),
    "deep head": (lambda: toy_classifier(DeepHead()), "reads more than the normalised class token"),
    "two norms": (lambda: toy_classifier(TwoNorms()), "2 normalisations follow its last MLP"),
    "convolution": (lambda: toy_classifier(ConvolutionHead()), "its head is no linear layer"),
    "attention pooling": (lambda: classifier(tiny_vit(class_token=False, global_pool="map")), "cannot be decoded"),
    "no transformer": (lambda: at.load_classifier("zoo:cnn", device="cpu"), "expected a vision transformer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    build, reason = REFUSED[name]
    with pytest.raises(at.NotApplicable, match=reason) as caught:
        NeuronDecoder(build())
    assert "\n" not in str(caught.value)


def test_errors() -> None:
    used = toy_classifier(ToyTransformer())
    with pytest.raises(at.UserError, match="mode is 'log': expected one of centred, raw, scaled"):
        NeuronDecoder(used, "log")
    with pytest.raises(at.UserError, match="mode='scaled' needs inputs"):
        NeuronDecoder(used, "scaled")


def test_the_zoo(vit: at.Classifier) -> None:
    module, decoder = vit.module, NeuronDecoder(vit)
    expected = by_hand(module.head.weight, module.norm.weight, module.blocks[5].mlp.fc2.weight[:, :9], None)
    assert torch.allclose(decoder.effects(5, range(9)), expected.float(), atol=1e-4)


# Exemplars


class Meter(nn.Module):
    """Hidden unit 3 is how red a patch is, unit 5 how green; the token read is the mean of the patches, or the patches themselves."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.patches = nn.Conv2d(3, 4, 4, 4)
        self.fc1, self.fc2, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for channel, unit in ((0, 3), (1, 5)):
                self.patches.weight[channel, channel] = 1 / 16
                self.fc1.weight[unit, channel] = 1
                self.fc2.weight[channel, unit] = 1
            self.head.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if not self.pooled:
            x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        x = x + self.fc2(self.fc1(x))
        return self.head(x.mean(dim=1) if self.pooled else x[:, 0])


def meter(pooled: bool, **options: Any) -> at.Classifier:
    return at.Classifier(Meter(pooled), size=32, scores="logits", **options)


def coloured(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 1, count)[
        torch.randperm(count, generator=torch.Generator().manual_seed(1))
    ].view(-1, 1, 1, 1)


@pytest.mark.parametrize("batches", [[20], [7, 1, 12]])
@pytest.mark.parametrize("pooled", [False, True])
def test_exemplars_are_the_brightest(pooled: bool, batches: list[int]) -> None:
    used, images = meter(pooled, batch_size=6), coloured(20)
    assert find_neurons(used).read == (64 if pooled else 1)
    red, green = exemplars(used, images.split(batches), [(0, 3), (0, 5)], count=4)
    for found, channel in ((red, 0), (green, 1)):
        brightness = images[:, channel].mean(dim=(1, 2))
        assert [each.index for each in found] == brightness.argsort(descending=True)[:4].tolist()
        for each in found:
            assert each.activation == pytest.approx(float(brightness[each.index]), abs=1e-5)
            patches = images[each.index, channel].unflatten(0, (8, 4)).unflatten(2, (8, 4)).mean(dim=(1, 3))
            assert torch.allclose(each.patches, patches, atol=1e-5)


@pytest.mark.parametrize("quantile", [0.5, 0.75, 0.9])
def test_regions_cover_what_the_quantile_leaves(quantile: float) -> None:
    """Over all images, patch for patch; enlarged about as much."""
    images = coloured(30)
    (found,) = exemplars(meter(True), [images], [(0, 3)], count=30, quantile=quantile)
    assert sorted(each.index for each in found) == list(range(30))
    values = torch.stack([each.patches for each in found])
    assert found[0].threshold == pytest.approx(np.quantile(values.numpy(), quantile), abs=1e-6)
    above = [each for each in found if float(each.patches.max()) >= each.threshold]
    area = sum(float(each.mask(8, 8).sum()) for each in above) / (30 * 64)
    assert area == pytest.approx(1 - quantile, abs=0.01)
    for each in above:
        assert torch.equal(each.mask(8, 8), each.patches >= each.threshold)


def test_enlarged_regions() -> None:
    """A ramp: the region is the part above the threshold, whatever the size."""
    ramp = torch.linspace(0, 1, 8).expand(8, 8)
    each = Exemplar(0, 0.0, ramp, 0.75)
    for size in (8, 64, 256):
        mask = each.mask(size, size)
        assert bool((mask == mask[0]).all()) and bool((mask[0, 1:] >= mask[0, :-1]).all())
        assert float(mask.float().mean()) == pytest.approx(2 / 8, abs=1 / 16)
    assert each.mask(16, 32).shape == (16, 32)
    peak = torch.zeros(8, 8)
    peak[2, 5] = 0.3
    low = Exemplar(0, 0.0, peak, 0.9)  # nothing above the threshold: the largest patch
    assert low.mask(8, 8).nonzero().tolist() == [[2, 5]]
    mask = low.mask(64, 64)
    assert 0 < int(mask.sum()) <= 64 and set(torch.div(mask.nonzero(), 8, rounding_mode="floor").unique(dim=0).flatten().tolist()) == {2, 5}
    assert Exemplar(0, 0.0, None, 0.0).mask(4, 6).all()


def test_exemplars_of_nothing() -> None:
    assert exemplars(meter(True), [], [(0, 3), (0, 5)]) == [(), ()]
    assert exemplars(meter(True), [coloured(2)], []) == []
    assert [len(found) for found in exemplars(meter(True), [coloured(2)], [(0, 3)], count=5)] == [2]


def test_exemplars_of_a_class_token() -> None:
    """Ranked by what the token has, shown by what the patches have; the class token's grid is the last tokens."""
    toy, inputs, seen = ToyTransformer(seed=6), toy_images(6), []
    toy(inputs, lambda layer, hidden: seen.append(hidden.detach()) or hidden)
    (found,) = exemplars(toy_classifier(toy), [inputs], [(1, 4)], count=6)
    hidden = seen[1][:, :, 4]
    assert [each.index for each in found] == hidden[:, 0].argsort(descending=True).tolist()
    for each in found:
        assert each.activation == pytest.approx(float(hidden[each.index, 0]), abs=1e-5)
        assert torch.allclose(each.patches, hidden[each.index, 1:].view(2, 2), atol=1e-5)
