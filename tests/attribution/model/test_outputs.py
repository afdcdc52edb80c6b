"""What scores mean: softmax classes, independent labels, one logit, probabilities; and which part of an output holds them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, Saliency
from reference import masked_image
from torch import Tensor, nn

import attribution as at
import evaluation as ev
from attribution.masking import MaskedInputs
from attribution.model.outputs import Outputs
from attribution.objective import ScoreWeights, SubmodularObjective

SIDE = 12
CELLS = {"regions": "grid", "region_options": {"rows": 2, "columns": 3}}


class Net(nn.Module):
    """A small network with smooth scores that differ between images."""

    def __init__(self, count: int, last: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head, self.last = nn.Linear(24, count), last or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(6 * self.head(self.body(x)))


def net(count: int, last: nn.Module | None = None) -> Net:
    torch.manual_seed(3)
    return Net(count, last).eval()


@pytest.fixture
def image() -> Tensor:
    return torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inside", [False, True], ids=["logit", "probability"])
def test_one_score_is_the_probability_of_a_label(image: Tensor, inside: bool) -> None:
    module = net(1, nn.Sigmoid() if inside else None)
    with torch.no_grad():
        logit = net(1)(image[None])
    expected = float(logit.sigmoid())
    classifier = at.Classifier(module, size=SIDE)
    assert classifier.num_classes == 1
    assert float(classifier.probabilities(image[None])) == pytest.approx(expected, abs=1e-6)
    assert float(classifier.logits(image[None])) == pytest.approx(float(logit), abs=1e-4)
    assert at.explain(image, classifier, **CELLS).confidence == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("inside", [False, True], ids=["logit", "probability"])
def test_one_score_with_two_names_is_of_the_second(image: Tensor, inside: bool) -> None:
    module = net(1, nn.Sigmoid() if inside else None)
    yes = float(net(1)(image[None]).detach().sigmoid())
    classifier = at.Classifier(module, size=SIDE, class_names=["no", "yes"])
    assert classifier.probabilities(image[None])[0].tolist() == pytest.approx([1 - yes, yes], abs=1e-6)
    assert not classifier.outputs.independent
    wanted = at.explain(image, classifier, "no", **CELLS)
    assert wanted.confidence == pytest.approx(1 - yes, abs=1e-6)
    assert wanted.predicted == (int(yes > 0.5),)


def naive_curves(explanation: at.Explanation, probability: Any, fill: Tensor) -> tuple[list[float], list[float]]:
    """Probabilities with the first k regions shown, and with them hidden, one image at a time."""
    assert explanation.regions is not None and explanation.order is not None
    order, labels = explanation.order.tolist(), explanation.regions.labels
    everything = set(order)

    def one(shown: set[int]) -> float:
        with torch.no_grad():
            return float(probability(masked_image(explanation.image, labels, fill, shown)[None]))

    steps = range(len(order) + 1)
    return [one(set(order[:k])) for k in steps], [one(everything - set(order[:k])) for k in steps]


@pytest.mark.parametrize(
    ("module", "scores", "names", "target", "probability"),
    [
        (net(1), "auto", None, 0, lambda x: net(1)(x).sigmoid()),
        (net(1), "sigmoid", ["no", "yes"], 0, lambda x: 1 - net(1)(x).sigmoid()),
        (net(3), "sigmoid", None, 2, lambda x: net(3)(x).sigmoid()[:, 2]),
        (net(3, nn.Sigmoid()), "auto", None, 1, lambda x: net(3)(x).sigmoid()[:, 1]),
        (net(3, nn.Sigmoid()), "probabilities", None, 1, lambda x: net(3)(x).sigmoid()[:, 1]),
        (net(3, nn.Softmax(1)), "auto", None, 1, lambda x: net(3)(x).softmax(1)[:, 1]),
    ],
)
def test_curves_of_every_meaning_equal_a_naive_loop(
    image: Tensor, module: nn.Module, scores: Any, names: Any, target: int, probability: Any
) -> None:
    classifier = at.Classifier(module, size=SIDE, scores=scores, class_names=names)
    explanation = at.explain(image, classifier, target, **CELLS)
    shown, hidden = naive_curves(explanation, probability, torch.zeros(3, SIDE, SIDE))
    assert explanation.insertion_scores is not None and explanation.deletion_scores is not None
    assert explanation.insertion_scores.tolist() == pytest.approx(shown, abs=2e-6)
    assert explanation.deletion_scores.tolist() == pytest.approx(hidden, abs=2e-6)
    curves = ev.perturbation_curves(image, classifier, explanation, target)
    assert curves.insertion_auc == pytest.approx(explanation.insertion_auc, abs=1e-5)


@pytest.mark.parametrize(("count", "names"), [(1, None), (1, ["no", "yes"]), (4, None)])
def test_the_objective_of_labels_equals_its_definition(image: Tensor, count: int, names: Any) -> None:
    module, target = net(count), 0
    classifier = at.Classifier(module, size=SIDE, scores="sigmoid", class_names=names)
    labels = at.make_regions(image, "grid", rows=2, columns=3).labels
    fill = torch.zeros(3, SIDE, SIDE)
    masked = MaskedInputs(classifier, image, labels, fill)
    weights = ScoreWeights(consistency=2.0, collaboration=3.0, confidence=5.0, effectiveness=0.0)
    subsets = torch.rand(7, 6, generator=torch.Generator().manual_seed(2)) > 0.5
    found = SubmodularObjective(classifier, masked, target, weights)(subsets)
    for row, value in zip(subsets, found.tolist(), strict=True):
        shown = set(row.nonzero()[:, 0].tolist())
        with torch.no_grad():
            p, q = (module(masked_image(image, labels, fill, each)[None]).sigmoid()[0].tolist() for each in (shown, set(range(6)) - shown))
        of_target = (lambda x: 1 - x[0]) if names else (lambda x: x[0])
        certainty = sum(1 + (x * math.log(x) + (1 - x) * math.log(1 - x)) / math.log(2) for x in p) / count
        assert value == pytest.approx(2 * of_target(p) + 3 * (1 - of_target(q)) + 5 * certainty, abs=1e-4)


@pytest.mark.parametrize(("count", "names", "target", "sign"), [(1, None, 0, 1), (1, ["no", "yes"], 0, -1), (3, None, 1, 1)])
def test_gradient_methods_equal_captum_on_the_same_logit(image: Tensor, count: int, names: Any, target: int, sign: int) -> None:
    module, column = net(count), 1 if count == 3 else 0
    classifier = at.Classifier(module, size=SIDE, scores="sigmoid", class_names=names)
    inputs = image[None].clone().requires_grad_()
    found = at.attribute(image, classifier, "saliency", target, output="logit", channels="abs_max").pixel_map
    expected = Saliency(module).attribute(inputs, target=column)[0].amax(dim=0)
    assert found is not None and torch.allclose(found, expected, atol=1e-6)
    found = at.attribute(image, classifier, "integrated_gradients", target, output="logit", n_steps=16, fill="black").pixel_map
    expected = IntegratedGradients(module).attribute(image[None], torch.zeros(1, 3, SIDE, SIDE), target=column, n_steps=16)[0].sum(dim=0)
    assert found is not None and torch.allclose(found, sign * expected, atol=1e-5)


def test_labels_do_not_share_probability(image: Tensor, tmp_path: Path) -> None:
    def saturated(x: Tensor) -> Tensor:
        return torch.stack([x.mean((1, 2, 3)) * 0 + 12, x.mean((1, 2, 3)) * 0 + 12, x.mean((1, 2, 3)) * 0 - 12], 1).sigmoid()

    classifier = at.Classifier(saturated, size=SIDE, class_names=["a", "b", "c"])
    assert classifier.probabilities(image[None])[0].tolist() == pytest.approx([1, 1, 0], abs=1e-4)
    explanation = at.explain(image, classifier, **CELLS)
    assert explanation.predicted == (0, 1)
    assert explanation.provenance["labels"] == "independent"
    explanation.save(tmp_path / "saved.npz")
    assert at.Explanation.load(tmp_path / "saved.npz").predicted == (0, 1)


def test_probabilities_are_not_made_to_sum_to_one(image: Tensor) -> None:
    rounded = torch.tensor([[0.61, 0.38, 0.0]])
    classifier = at.Classifier(lambda x: rounded.expand(len(x), 3).numpy(), size=SIDE, scores="probabilities")
    assert classifier.probabilities(image[None])[0].tolist() == pytest.approx([0.61, 0.38, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("module", "scores", "message"),
    [
        (net(1), "softmax", "one score for an image, and the softmax of one score is always 1: give scores='sigmoid'"),
        (lambda x: x.mean((1, 2, 3))[:, None], "auto", "may be probabilities or logits: give scores='sigmoid'"),
        (lambda x: x.mean((2, 3)).sigmoid().numpy(), "auto", "may be probabilities or logits: give scores='softmax' or 'sigmoid'"),
        (lambda x: nn.functional.normalize(x.mean((2, 3)) - 0.2, dim=1), "auto", "an embedding, because every row has length 1"),
        (net(3), "label_probabilities", "as probabilities of labels: expected 0 to 1; give scores='sigmoid'"),
        (net(3), "logit", "scores is 'logit': expected one of auto, softmax, sigmoid"),
    ],
)
def test_scores_without_a_clear_meaning_are_refused(image: Tensor, module: Any, scores: Any, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        at.Classifier(module, size=SIDE, scores=scores).probabilities(image[None])


def test_classes_that_turn_out_to_be_labels_are_refused(image: Tensor) -> None:
    """Two labels at 0.5 each on plain images look like classes, until an image has both."""
    classifier = at.Classifier(lambda x: (9 * x.std((1, 2, 3)))[:, None].expand(-1, 2).clamp(0.5, 1).numpy() * 1.0, size=SIDE)
    classifier.runner._outputs = Outputs(2, "probabilities")
    with pytest.raises(at.UserError, match=r"in sum 2, as the probabilities of image 0.*'label_probabilities'"):
        classifier.probabilities(image[None])


def test_evidence_is_refused_for_labels(image: Tensor) -> None:
    with pytest.raises(at.UserError, match="'evidential' is for classes of which one is right, and Net has independent labels"):
        at.explain(image, at.Classifier(net(3), size=SIDE, scores="sigmoid"), objective_options={"confidence": "evidential"}, **CELLS)


def test_a_label_as_a_question_of_two_classes(image: Tensor) -> None:
    module = net(3)
    classifier = at.Classifier(module, size=SIDE, scores="sigmoid", class_names=["a", "b", "c"])
    single = classifier.of_label("b")
    p = float(module(image[None]).detach().sigmoid()[0, 1])
    assert single.class_names == ("no b", "b")
    assert single.probabilities(image[None])[0].tolist() == pytest.approx([1 - p, p], abs=1e-6)
    assert len({classifier.weights_digest, single.weights_digest, classifier.of_label("a").weights_digest}) == 3
    assert torch.equal(single.features(image[None]), classifier.features(image[None]))
    with pytest.raises(at.UserError, match="of_label is for independent labels"):
        single.of_label("b")


PARTS: dict[str, tuple[Any, Any]] = {
    "second of two": (lambda s: (s * 0 + 5, s), 1),
    "last of two": (lambda s: (s * 0 + 5, s), -1),
    "key": (lambda s: {"embedding": s * 0, "prediction": s}, "prediction"),
    "attribute": (lambda s: type("Out", (), {"found": s})(), "found"),
    "function": (lambda s: {"deep": [s]}, lambda out: out["deep"][0]),
}


@pytest.mark.parametrize("kind", PARTS)
def test_the_named_part_of_an_output_is_explained(image: Tensor, kind: str) -> None:
    wrap, output = PARTS[kind]
    module = net(3)
    classifier = at.Classifier(lambda x: wrap(module(x)), size=SIDE, output=output)
    assert torch.allclose(classifier.logits(image[None]), module(image[None]).detach(), atol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: (None, s),
        lambda s: (torch.zeros(()), s),
        lambda s: [s],
        lambda s: (torch.zeros(len(s), 5), s),
        lambda s: {"features": torch.zeros(len(s), 5), "pred": s},
    ],
    ids=["no loss", "loss", "list", "features of another width", "dict"],
)
def test_the_only_part_that_fits_is_explained(image: Tensor, wrap: Any) -> None:
    module = net(3)
    classifier = at.Classifier(lambda x: wrap(module(x)), size=SIDE, class_names=["a", "b", "c"])
    assert torch.allclose(classifier.logits(image[None]), module(image[None]).detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("wrap", "output", "message"),
    [
        (lambda s: (s * 0, s), None, "of which 0, 1 could be the scores: name them with output=, such as output=1"),
        (lambda s: {"image_embeds": s}, None, "a dict with image_embeds.*name the part with output="),
        (lambda s: (s,), 3, "it has no output 3"),
        (lambda s: {"a": s}, "b", "a dict with a: it has no output 'b'"),
        (lambda s: s[:, 0], None, r"a single score for an image is a row of one, \[:, None\]"),
        (lambda s: {"a": s[:, 0]}, "a", r"returned float32 \[2\] for 2 images"),
    ],
)
def test_an_output_that_is_ambiguous_is_refused(image: Tensor, wrap: Any, output: Any, message: str) -> None:
    module = net(3)
    with pytest.raises(at.UserError, match=message):
        at.Classifier(lambda x: wrap(module(x)), size=SIDE, output=output).logits(image[None])


def test_meaning_and_part_are_kept_in_a_saved_file(tmp_path: Path, image: Tensor) -> None:
    classifier = at.load_classifier("zoo:cnn", scores="sigmoid")
    at.save_classifier(classifier, tmp_path / "labels.safetensors")
    again = at.load_classifier(tmp_path / "labels.safetensors")
    inputs = again.inputs(image)
    assert np.allclose(again.probabilities(inputs), classifier.logits(inputs).sigmoid(), atol=1e-6)
    assert at.load_classifier(tmp_path / "labels.safetensors", scores="softmax").outputs.kind == "softmax"
    assert again.identity != at.load_classifier(tmp_path / "labels.safetensors", scores="softmax").identity


AFTER: dict[str, Any] = {
    "clamp": lambda z: z.sigmoid().clamp(1e-6, 1 - 1e-6),
    "mean of two": lambda z: (z.sigmoid() + (z / 2).sigmoid()) / 2,
    "hardsigmoid": nn.functional.hardsigmoid,
    "tanh": lambda z: (z.tanh() + 1) / 2,
    "by hand": lambda z: 1 / (1 + (-z).exp()),
    "softmax without a class": lambda z: z.softmax(1)[:, :2],
    "percentages": lambda z: 100 * z.softmax(1),
}


@pytest.mark.parametrize("kind", AFTER)
def test_probabilities_that_were_changed_are_not_taken_for_logits(image: Tensor, kind: str) -> None:
    module = net(3)
    with pytest.raises(at.UserError, match="may be probabilities or logits"):
        at.Classifier(lambda x: AFTER[kind](module(x)), size=SIDE).probabilities(image[None])


def joined(z: Tensor) -> Tensor:
    return torch.cat([z[:, :1].sigmoid(), z[:, 1:].sigmoid()], dim=1)


def stacked(z: Tensor) -> Tensor:
    return torch.stack([z[:, index].sigmoid() for index in range(3)], dim=1)


@pytest.mark.parametrize("join", [joined, stacked])
def test_sigmoids_of_several_heads_are_labels(image: Tensor, join: Any) -> None:
    module = net(3)
    found = at.Classifier(lambda x: join(module(x)), size=SIDE).probabilities(image[None])
    assert torch.allclose(found, module(image[None]).detach().sigmoid(), atol=1e-6)


def test_a_softmax_in_bfloat16_is_probabilities(image: Tensor) -> None:
    module = nn.Sequential(net(40), nn.Softmax(1)).bfloat16().eval()
    with torch.no_grad():
        expected = module(image[None].bfloat16()).float()
    assert torch.allclose(at.Classifier(module, size=SIDE).probabilities(image[None]), expected, atol=1e-6)


def test_sigmoid_of_probabilities_is_refused(image: Tensor) -> None:
    with pytest.raises(at.UserError, match="ends in a sigmoid and returns probabilities: give 'label_probabilities'"):
        at.Classifier(net(3, nn.Sigmoid()), size=SIDE, scores="sigmoid").probabilities(image[None])


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.own, self.other = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU())
        self.head, self.aux = nn.Linear(16, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.body(x)
        return self.head(self.own(shared).mean((2, 3))), self.aux(self.other(shared).mean((2, 3)))


def test_features_and_layers_are_those_of_the_output_chosen(image: Tensor) -> None:
    torch.manual_seed(5)
    module = TwoHeads().eval()
    classifier = at.Classifier(module, size=SIDE, output=0)
    with torch.no_grad():
        expected = module.own(module.body(image[None])).mean((2, 3))
    assert torch.allclose(classifier.features(image[None]), expected, atol=1e-6)
    explanation = at.attribute(image, classifier, "grad_cam", 1)
    assert explanation.provenance["layer"].startswith("own")


def test_scores_in_a_tensor_that_is_used_again_are_kept(image: Tensor) -> None:
    module, kept = net(3), torch.zeros(64, 3)

    def engine(x: Tensor) -> Tensor:
        with torch.no_grad():
            kept[: len(x)] = module(x)
        return kept[: len(x)]

    rows = torch.rand(11, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.allclose(at.Classifier(engine, size=SIDE, batch_size=4, scores="softmax").logits(rows), module(rows), atol=1e-6)


class Masked(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z + torch.tensor([0.0, -torch.inf, 0.0])


def test_a_masked_class_is_not_attributed(image: Tensor) -> None:
    with pytest.raises(at.UserError, match="never predicts 'class 1', its logit is -inf"):
        at.attribute(image, at.Classifier(nn.Sequential(net(3), Masked()), size=SIDE), "occlusion", 1)
