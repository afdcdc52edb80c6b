from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import attribution as at
from attribution.model import zoo
from attribution.model.checkpoints import read_state_dict
from attribution.model.loading import read_class_names

SMALL = "timm:resnet10t"


def timm_module(classes: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("resnet10t", num_classes=classes).eval()


def demo() -> Image.Image:
    return Image.open(at.demo_image_path()).convert("RGB")


def write_checkpoint(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


class Trap:
    """Unpickling one creates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_zoo(name: str, cat: Tensor) -> None:
    classifier = at.load_classifier(f"zoo:{name}", device="cpu")
    assert classifier.name == f"zoo:{name}"
    assert classifier.class_names == zoo.CLASS_NAMES
    assert classifier.class_names[int(classifier.logits(classifier.inputs(cat)).argmax())] == "cat"
    assert not any(module.training for module in classifier.module.modules())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zoo:resnet", "unknown zoo model 'resnet': expected one of cnn, imagenet, vit"),
        ("resnet18", "unknown model 'resnet18': expected zoo:cnn, zoo:imagenet, zoo:vit, timm:NAME, torchvision:NAME, hf:ID, a folder"),
        ("timm:", "unknown model 'timm:'"),
        ("keras:vgg16", "unknown model 'keras:vgg16'"),
        (Path("model.pt"), "unknown model 'model.pt'"),
        ("timm:vit_tiny", "timm has no model 'vit_tiny': did you mean .*vit"),
        ("timm:nosuchthing", r"timm has no model 'nosuchthing': see timm\.list_models\(\)"),
        ("torchvision:resnet19", r"torchvision has no classifier 'resnet19': see torchvision\.models\.list_models\(\)"),
        ("torchvision:resnet1", "torchvision has no classifier 'resnet1': did you mean .*resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no classifier 'fasterrcnn_resnet50_fpn'"),
        ("missing.safetensors", r"missing\.safetensors: no such file"),
        ("timm:resnet10t.nosuchtag", r"the weights of timm:resnet10t\.nosuchtag could not be loaded \(Invalid pretrained tag"),
    ],
    ids=str,
)
def test_unknown_models(spec: str | Path, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        at.load_classifier(spec, device="cpu")


def test_inputs_equal_timms_evaluation_transform() -> None:
    classifier = at.load_classifier("timm:vit_tiny_patch16_224", pretrained=False, device="cpu")
    config = timm.data.resolve_data_config(model=classifier.module)
    expected = timm.data.create_transform(**config, is_training=False)(demo())
    assert (classifier.inputs(demo())[0] - expected).abs().max() < 1.5 / 255 / min(config["std"])
    assert classifier.class_names[:2] == ("tench", "goldfish")


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_inputs_equal_torchvisions_evaluation_transform(name: str) -> None:
    classifier = at.load_classifier(f"torchvision:{name}", pretrained=False, device="cpu")
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    expected = transform(demo())
    assert (classifier.inputs(demo())[0] - expected).abs().max() < 1.5 / 255 / min(transform.std)
    assert classifier.class_names[:2] == ("tench", "goldfish")


def test_class_names_that_occur_twice_are_told_apart() -> None:
    names = at.load_classifier(SMALL, pretrained=False, device="cpu").class_names
    assert len(set(names)) == 1000
    assert names[134] == "crane bird"
    assert names[517] == "crane"


def test_settings_and_names_override_the_models_own() -> None:
    classifier = at.load_classifier(
        SMALL,
        pretrained=False,
        device="cpu",
        class_names=map(str, range(1000)),
        size=64,
        resized=None,
        resize="squash",
        batch_size=3,
        name="mine",
    )
    assert classifier.preprocessing.size == (64, 64)
    assert classifier.preprocessing.resize == "squash"
    assert classifier.preprocessing.mean == timm.data.IMAGENET_DEFAULT_MEAN
    assert classifier.class_names[999] == "999"
    assert classifier.batch_size == 3
    assert classifier.name == "mine"


WRAPPINGS: dict[str, Callable[[dict], dict]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "module": lambda state: {f"module.{key}": value for key, value in state.items()},
    "lightning": lambda state: {"state_dict": {f"model._orig_mod.{key}": value for key, value in state.items()}},
}


@pytest.mark.parametrize(
    ("wrapping", "suffix"), [*((wrapping, ".pt") for wrapping in WRAPPINGS), ("bare", ".safetensors"), ("module", ".safetensors")]
)
def test_checkpoints(wrapping: str, suffix: str, tmp_path: Path, small_cat: Tensor) -> None:
    module = timm_module(classes=7)
    path = write_checkpoint(WRAPPINGS[wrapping](module.state_dict()), tmp_path / f"weights{suffix}")
    classifier = at.load_classifier(SMALL, checkpoint=path, device="cpu", size=64)
    assert classifier.num_classes == 7
    assert classifier.class_names == tuple(f"class {index}" for index in range(7))
    inputs = classifier.inputs(small_cat)
    with torch.no_grad():
        assert torch.allclose(classifier.logits(inputs), module(inputs), atol=1e-6)


@pytest.mark.parametrize(("name", "head"), [("squeezenet1_1", "classifier.1"), ("resnet18", "fc")])
def test_torchvision_checkpoint_with_other_classes(name: str, head: str, tmp_path: Path, small_cat: Tensor) -> None:
    module = torchvision.models.get_model(name, num_classes=5).eval()
    path = write_checkpoint(module.state_dict(), tmp_path / "weights.pth")
    classifier = at.load_classifier(f"torchvision:{name}", checkpoint=path, device="cpu", class_names="abcde", size=64)
    assert classifier.class_names == tuple("abcde")
    assert classifier.module.get_submodule(head).weight.shape[0] == 5
    inputs = classifier.inputs(small_cat)
    with torch.no_grad():
        assert torch.allclose(classifier.logits(inputs), module(inputs), atol=1e-6)


def test_zoo_checkpoint(tmp_path: Path, small_cat: Tensor) -> None:
    torch.manual_seed(0)
    module = zoo.build_cnn().eval()
    path = write_checkpoint(module.state_dict(), tmp_path / "cnn.safetensors")
    classifier = at.load_classifier("zoo:cnn", checkpoint=path, device="cpu")
    inputs = classifier.inputs(small_cat)
    with torch.no_grad():
        assert torch.allclose(classifier.logits(inputs), module(inputs), atol=1e-6)


def renamed(state: dict) -> dict:
    return {key.replace("layer1", "stage1"): value for key, value in state.items()}


def reshaped(state: dict) -> dict:
    return {**state, "layer1.0.conv1.weight": torch.zeros(8, 64, 3, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            renamed,
            r"does not fit timm:resnet10t: \d+ of \d+ weights are missing \(layer1\.0.*; \d+ are unknown \(stage1\.0.*is it a",
        ),
        (reshaped, r"1 have another shape \(layer1\.0\.conv1\.weight: \[8, 64, 3, 3\] in the file, \[64, 64, 3, 3\] in the model\)"),
        (lambda state: {"fc.weight": state["fc.weight"]}, r"weights are missing \(conv1\.0\.weight"),
        (lambda state: {**state, "extra": torch.zeros(1)}, r"1 are unknown \(extra\)"),
        (lambda state: {"epoch": 3}, "holds dict: expected a state dict, names to tensors"),
        (lambda state: [1, 2], "holds list: expected a state dict"),
        (lambda state: torch.zeros(3), r"holds float32 \[3\]: expected a state dict"),
    ],
    ids=["renamed", "reshaped", "missing", "extra", "no-weights", "list", "tensor"],
)
def test_checkpoints_that_do_not_fit(change: Callable[[dict], Any], message: str, tmp_path: Path) -> None:
    path = write_checkpoint(change(timm_module(classes=1000).state_dict()), tmp_path / "weights.pt")
    with pytest.raises(at.UserError, match=message):
        at.load_classifier(SMALL, checkpoint=path, device="cpu")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage " * 40, b"\x80\x02garbage"], ids=["empty", "garbage", "half-pickle"])
def test_garbage_checkpoints(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(at.UserError, match=rf"{name}: no such checkpoint file"):
        at.load_classifier("zoo:cnn", checkpoint=path, device="cpu")
    path.write_bytes(content)
    with pytest.raises(at.UserError, match=rf"{name} (cannot be read as weights only|is not a readable safetensors file) \(.+\)"):
        at.load_classifier("zoo:cnn", checkpoint=path, device="cpu")


@pytest.mark.parametrize("where", ["top", "inside"])
def test_a_pickled_object_is_refused_and_not_run(where: str, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    path = write_checkpoint(
        trap if where == "top" else {"state_dict": {"fc.weight": torch.zeros(2)}, "args": trap}, tmp_path / "weights.pt"
    )
    with pytest.raises(at.UserError, match=r"weights\.pt cannot be read as weights only .*save model\.state_dict\(\)"):
        read_state_dict(path)
    assert not (tmp_path / "sprung").exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(at.UserError, match="cannot be read as weights only"):
        read_state_dict(path)


def no_network(*args: Any, **kwargs: Any) -> None:
    raise OSError("[Errno 101] Network is unreachable\nsecond line")


@pytest.mark.parametrize(
    ("spec", "library", "function"),
    [("timm:resnet10t.c3_in1k", timm, "create_model"), ("torchvision:resnet18", torchvision.models, "get_model")],
)
def test_a_download_that_fails_is_explained(spec: str, library: Any, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, function, no_network)
    message = rf"the weights of {spec} could not be loaded \(\[Errno 101\] Network is unreachable\): connect to the network"
    with pytest.raises(at.UserError, match=message):
        at.load_classifier(spec, device="cpu")


@pytest.mark.parametrize("spec", [SMALL, "torchvision:squeezenet1_1", "zoo:vit"])
def test_a_checkpoint_or_pretrained_false_asks_for_no_published_weights(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr("timm.models._builder.load_pretrained", no_network)
    classifier = at.load_classifier(spec, pretrained=False, device="cpu")
    path = write_checkpoint(classifier.module.state_dict(), tmp_path / "weights.pt")
    loaded = at.load_classifier(spec, checkpoint=path, device="cpu", class_names=classifier.class_names)
    assert loaded.weights_digest == classifier.weights_digest


SAVED = {
    "zoo:cnn": {},
    "timm:resnet10t": {
        "class_names": tuple("abcdefg"),
        "size": (48, 40),
        "resize": "long_side",
        "resized": (50, 44),
        "mean": (0.1, 0.2, 0.3),
    },
    "torchvision:squeezenet1_1": {"interpolation": "bicubic"},
}


@pytest.mark.parametrize("spec", SAVED)
def test_a_saved_classifier_comes_back_whole(spec: str, tmp_path: Path, cat: Tensor) -> None:
    checkpoint = None
    if spec == SMALL:
        checkpoint = write_checkpoint(timm_module(classes=7).state_dict(), tmp_path / "seven.pt")
    torch.manual_seed(0)
    saved = at.load_classifier(spec, pretrained=False, checkpoint=checkpoint, device="cpu", **SAVED[spec])
    path = tmp_path / "new" / "model.safetensors"
    at.save_classifier(saved, path)
    loaded = at.load_classifier(path, device="cpu", batch_size=5)
    assert loaded.name == f"{spec}@model"
    assert loaded.class_names == saved.class_names
    assert loaded.preprocessing == saved.preprocessing
    assert loaded.weights_digest == saved.weights_digest
    assert loaded.batch_size == 5
    inputs = loaded.inputs(cat)
    assert torch.equal(inputs, saved.inputs(cat))
    assert torch.equal(loaded.logits(inputs), saved.logits(inputs))
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_settings_override_a_saved_file(tmp_path: Path, cnn: at.Classifier) -> None:
    at.save_classifier(cnn, tmp_path / "cnn.safetensors")
    loaded = at.load_classifier(tmp_path / "cnn.safetensors", device="cpu", class_names="abcdefghij", resize="short_side")
    assert loaded.class_names == tuple("abcdefghij")
    assert loaded.preprocessing.resize == "short_side"
    assert loaded.preprocessing.mean == cnn.preprocessing.mean


def test_what_a_file_cannot_say_how_to_build_is_not_saved(tmp_path: Path, cnn: at.Classifier) -> None:
    path = tmp_path / "model.safetensors"
    for classifier in (
        at.Classifier(nn.Linear(2, 2), size=4),
        at.Classifier(lambda inputs: inputs.mean((2, 3)), size=4, name="zoo:cnn"),
    ):
        with pytest.raises(at.UserError, match="was not made by load_classifier, so a file could not say how to build it: give factory="):
            at.save_classifier(classifier, path)
    assert not path.exists()


def test_a_safetensors_file_without_a_card_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(timm_module(classes=3).state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(
        at.UserError, match=r"does not say which model it belongs to: use --model timm:NAME .* with --checkpoint plain\.safetensors"
    ):
        at.load_classifier(path, device="cpu")


@pytest.mark.parametrize("card", ["no json", "[]", '{"model": 3, "settings": {}}', '{"model": "zoo:cnn"}'])
def test_a_saved_file_with_a_broken_card(card: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"vision-attribution": card})
    with pytest.raises(at.UserError, match=r"is not a readable safetensors file|does not say which model it belongs to"):
        at.load_classifier(path, device="cpu")


def test_a_saved_file_that_names_itself_does_not_recurse(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    card = f'{{"model": "{path.as_posix()}", "settings": {{"size": 32}}, "class_names": []}}'
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"vision-attribution": card})
    with pytest.raises(at.UserError, match="a card that save_classifier did not write: it names"):
        at.load_classifier(path, device="cpu")


@pytest.mark.parametrize(
    "card",
    [
        {"settings": {"bogus": 1}, "class_names": []},
        {"settings": {"device": "cpu"}, "class_names": []},
        {"settings": {"size": [10**6, 10**6]}, "class_names": []},
        {"settings": {}, "class_names": 3},
    ],
)
def test_a_card_that_was_not_written_here_is_refused(card: dict, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    text = json.dumps({"model": "zoo:cnn", **card})
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"vision-attribution": text})
    with pytest.raises(at.UserError, match="a card that save_classifier did not write"):
        at.load_classifier(path, device="cpu")


def test_a_module_needs_a_size() -> None:
    with pytest.raises(at.UserError, match=r"a bare nn\.Module has no input size: give size=, mean=, std= and class_names="):
        at.load_classifier(nn.Flatten())
    classifier = at.load_classifier(nn.Flatten(), size=2, device="cpu", class_names="abcdefghijkl")
    assert torch.equal(classifier.logits(torch.arange(12.0).view(1, 3, 2, 2)), torch.arange(12.0)[None])


def test_a_classifier_is_returned_as_it_is(cnn: at.Classifier) -> None:
    assert at.load_classifier(cnn) is cnn


@pytest.mark.parametrize("kind", ["module", "classifier", "file"])
def test_a_checkpoint_beside_a_model_that_has_weights_is_not_ignored(kind: str, tmp_path: Path, cnn: at.Classifier) -> None:
    model = {"module": cnn.module, "classifier": cnn, "file": tmp_path / "a.safetensors"}[kind]
    settings = {"size": 32} if kind == "module" else {}
    with pytest.raises(at.UserError, match=r"a checkpoint goes with timm:NAME, torchvision:NAME or zoo:NAME: .* has its own weights"):
        at.load_classifier(model, checkpoint=tmp_path / "b.safetensors", **settings)


@pytest.mark.parametrize("model", ["zoo:cnn", nn.Flatten()], ids=["name", "module"])
@pytest.mark.parametrize("device", ["nonsense", "cuda:999"])
def test_device_that_cannot_be_used(model: str | nn.Module, device: str) -> None:
    with pytest.raises(at.UserError, match=rf"device '{device}' cannot be used \(.+\): expected auto, cpu, cuda, cuda:N or mps"):
        at.load_classifier(model, device=device, **({} if isinstance(model, str) else {"size": 2}))


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "around",
    [
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, out=Path("run")), "epoch": np.int64(3), "best": np.float32(0.5)},
        lambda state: {"weights": state, "history": np.arange(3.0), "rates": [np.float64(1e-3)]},
        lambda state: {"params": state},
        lambda state: {"model_state": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"ema": {"module": state, "decay": 0.9}},
        lambda state: {"state_dict": {**{f"model.{key}": value for key, value in state.items()}, "loss.pos_weight": torch.ones(5)}},
        lambda state: {f"encoder.{key}": value for key, value in state.items()},
    ],
    ids=["deit", "numpy", "params", "parallel", "ema", "lightning", "encoder"],
)
def test_layouts_of_checkpoints(around: Callable[[dict], Any], tmp_path: Path) -> None:
    state = timm_module(classes=5).state_dict()
    loaded = at.load_classifier("timm:resnet10t", checkpoint=saved(tmp_path / "checkpoint.pth", around(state)))
    assert all(torch.equal(value, state[key]) for key, value in loaded.module.state_dict().items())


def test_a_checkpoint_with_two_state_dicts_asks_for_one(tmp_path: Path) -> None:
    state = timm_module(classes=5).state_dict()
    averaged = {key: value * 0.5 for key, value in state.items()}
    path = saved(tmp_path / "last.pth.tar", {"state_dict": state, "state_dict_ema": averaged, "optimizer": {"state": {}}})
    with pytest.raises(at.UserError, match=r"several state dicts, state_dict, state_dict_ema of the same shapes: say which by"):
        at.load_classifier("timm:resnet10t", checkpoint=path)
    for key, expected in (("state_dict", state), ("state_dict_ema", averaged)):
        loaded = at.load_classifier("timm:resnet10t", checkpoint=path, checkpoint_key=key)
        assert torch.equal(loaded.module.fc.weight, expected["fc.weight"])
    with pytest.raises(at.UserError, match="has no state dict 'ema': expected one of state_dict, state_dict_ema"):
        at.load_classifier("timm:resnet10t", checkpoint=path, checkpoint_key="ema")
    with pytest.raises(at.UserError, match="checkpoint_key 'ema' was given without a checkpoint"):
        at.load_classifier("zoo:cnn", checkpoint_key="ema")


class Foreign:
    """What a weights-only file must not hold."""


def test_messages_of_files_are_one_plain_line(tmp_path: Path) -> None:
    foreign = saved(tmp_path / "foreign.pth", {"model": {"weight": torch.ones(1)}, "args": Foreign()})
    with pytest.raises(at.UserError) as caught:
        read_state_dict(foreign)
    assert "it holds an object of" in str(caught.value) and "Foreign, whose code would run" in str(caught.value)
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_files_and_bare_names_point_to_the_way_that_works(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(at.UserError, match=r"net\.pt is TorchScript, a program with its weights: give at\.Classifier\(torch\.jit\.load"):
        at.load_classifier("timm:resnet10t", checkpoint=path)
    with pytest.raises(at.UserError, match=r"; a TorchScript file becomes a classifier in Python, at\.Classifier\(torch\.jit\.load"):
        at.load_classifier(str(path))
    with pytest.raises(at.UserError, match=r"; a file of weights goes with the name of its model, as --checkpoint .*plain\.pth"):
        at.load_classifier(saved(tmp_path / "plain.pth", {}))
    with pytest.raises(at.UserError, match=r"; did you mean timm:resnet18 or torchvision:resnet18\?$"):
        at.load_classifier("resnet18")


@pytest.mark.parametrize("second", ["best_state_dict", "swa_state_dict", "anything"])
def test_two_sets_of_weights_under_any_keys_are_told_apart(tmp_path: Path, second: str) -> None:
    state = {"fc.weight": torch.zeros(2, 2)}
    torch.save(
        {"state_dict": state, second: {"fc.weight": torch.ones(2, 2)}, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        tmp_path / "a.pth",
    )
    with pytest.raises(at.UserError, match=f"holds several state dicts, state_dict, {second}"):
        read_state_dict(tmp_path / "a.pth")
    assert torch.equal(read_state_dict(tmp_path / "a.pth", second)["fc.weight"], torch.ones(2, 2))


def flat_sets(path: Path, *prefixes: str) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    states = [timm.create_model("resnet10t", num_classes=3).state_dict() for _ in prefixes]
    torch.save({prefix + name: value for prefix, state in zip(prefixes, states, strict=True) for name, value in state.items()}, path)
    return path, states


@pytest.mark.parametrize("prefixes", [("model.", "model_ema.module."), ("", "ema."), ("student.net.", "teacher.net.")])
def test_two_sets_of_weights_in_one_state_dict_are_told_apart(tmp_path: Path, prefixes: tuple[str, ...]) -> None:
    path, states = flat_sets(tmp_path / "a.pth", *prefixes)
    keys = [prefix.removesuffix(".") for prefix in prefixes]
    with pytest.raises(at.UserError, match=f"several sets of weights in one state dict, under the prefixes {keys[0]!r}, {keys[1]!r}: say"):
        at.load_classifier("timm:resnet10t", checkpoint=path)
    for key, state in zip(keys, states, strict=True):
        loaded = at.load_classifier("timm:resnet10t", checkpoint=path, checkpoint_key=key).module.state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
    with pytest.raises(at.UserError, match="has no state dict 'swa'"):
        at.load_classifier("timm:resnet10t", checkpoint=path, checkpoint_key="swa")


def test_a_prefix_below_a_key_names_one_set_of_weights(tmp_path: Path) -> None:
    path, states = flat_sets(tmp_path / "a.pth", "model.", "model_ema.module.")
    torch.save({"state_dict": torch.load(path, weights_only=True), "epoch": 3}, path)
    for key in ("model_ema.module", "state_dict.model_ema.module"):
        assert torch.equal(read_state_dict(path, key)["fc.weight"], states[1]["fc.weight"])


@pytest.mark.parametrize("swapped", [lambda c, path: (path, c), lambda c, path: (c, c), lambda c, path: (c.module, path)])
def test_save_classifier_names_what_it_was_given(cnn: at.Classifier, tmp_path: Path, swapped: Any) -> None:
    with pytest.raises(at.UserError, match=r"save_classifier received \w+ and \w+: expected a Classifier, then the path of a file"):
        at.save_classifier(*swapped(cnn, tmp_path / "cnn.safetensors"))


def test_class_names_with_a_byte_order_mark_and_unusual_spaces(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("cat\u2028fish\r\ndog\r\n".encode("utf-8-sig"))
    assert read_class_names(tmp_path / "names.txt") == ["cat\u2028fish", "dog"]


def test_position_embeddings_are_resampled_for_another_size_as_timm_does(tmp_path: Path, cat: Tensor) -> None:
    """A headless backbone gets the head, and the classes, of its checkpoint."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    small = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    name = "vit_small_patch14_dinov2"
    torch.manual_seed(0)
    trained = timm.create_model(name, num_classes=4, img_size=56, **small)
    path = write_checkpoint(trained.state_dict(), tmp_path / "weights.pt")
    classifier = at.load_classifier(f"timm:{name}", checkpoint=path, size=112, device="cpu", options=small)
    expected = timm.create_model(name, num_classes=4, img_size=112, **small).eval()
    expected.load_state_dict(checkpoint_filter_fn(trained.state_dict(), expected))
    inputs = classifier.inputs(cat)
    assert inputs.shape[-1] == 112 and classifier.num_classes == 4
    with torch.no_grad():
        assert torch.allclose(classifier.logits(inputs), expected(inputs), atol=1e-6)


def test_another_size_of_torchvisions_transformer(tmp_path: Path, cat: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings

    small = {"num_layers": 1, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 32}

    def build(size: int) -> nn.Module:
        return torchvision.models.VisionTransformer(size, 16, num_classes=3, **small).eval()

    monkeypatch.setattr(torchvision.models, "get_model", lambda _, weights, image_size=224, **__: build(image_size))
    torch.manual_seed(0)
    trained = build(224)
    path = write_checkpoint(trained.state_dict(), tmp_path / "weights.safetensors")
    classifier = at.load_classifier("torchvision:vit_b_16", checkpoint=path, size=64, device="cpu")
    expected = build(64)
    expected.load_state_dict(interpolate_embeddings(64, 16, trained.state_dict()))
    inputs = classifier.inputs(cat)
    with torch.no_grad():
        assert torch.allclose(classifier.logits(inputs), expected(inputs), atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("zoo:vit", {"size": 64}, r"zoo:vit fails on .* \(AssertionError: .*\): check size"),
        ("zoo:cnn", {"options": {"a": 1}}, r"zoo:cnn does not take model options \(a\)"),
        (SMALL, {"options": {"img_sizes": 96}}, "does not take its options, img_sizes=96"),
        ("timm:vit_tiny_patch16_224", {"size": 8}, "cannot be built with size|fails on"),
        ("torchvision:vit_b_16", {"size": (64, 96)}, "takes square images"),
    ],
)
def test_a_size_or_option_that_contradicts_the_model_fails_at_once(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        at.load_classifier(spec, device="cpu", pretrained=False, **options)


def test_another_size_keeps_the_proportion_of_the_crop() -> None:
    way = at.load_classifier(SMALL, device="cpu", pretrained=False, size=88).preprocessing
    config = timm.data.resolve_data_config({"input_size": (3, 88, 88)}, model=timm.create_model("resnet10t"))
    assert way.size == (88, 88) and way.resized == (int(88 / config["crop_pct"]),) * 2
    way = at.load_classifier("torchvision:resnet18", device="cpu", pretrained=False, size=112).preprocessing
    assert (way.size, way.resized) == ((112, 112), (128, 128))


def test_a_card_does_not_make_a_library_read_further_files(tmp_path: Path) -> None:
    path = tmp_path / "trap.safetensors"
    card = {"model": SMALL, "settings": {}, "class_names": [], "options": {"checkpoint_path": "other.pt"}}
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"vision-attribution": json.dumps(card)})
    with pytest.raises(at.UserError, match="a card that save_classifier did not write"):
        at.load_classifier(path)


def test_without_a_network_timm_asks_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The hub is asked once, then its cache alone: no retries, no lines about them, and one line for the user."""
    import huggingface_hub

    asked: list[str] = []

    def unreachable(_self: object, place: str, **_: object) -> None:
        asked.append(place)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(at.UserError, match=r"^the weights of timm:resnet10t could not be loaded .*: connect to the network once"):
        at.load_classifier("timm:resnet10t")
    assert asked == ["timm/resnet10t.c3_in1k"] and "Retrying" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"size": "abc"},
        {"size": None},
        {"size": [[1, 2], [3]]},
        {"size": 10**6},
        {"resized": [10**6, 10**6]},
        {"head": 3},
        {"forward_kwargs": [1]},
    ],
)
def test_edited_cards_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """What a received file says is checked: it takes no memory and ends in no traceback."""
    path = tmp_path / "mine.safetensors"
    at.save_classifier(at.load_classifier("zoo:cnn"), path)
    with safe_open(path, framework="pt") as file:
        card = json.loads(file.metadata()["vision-attribution"])
    card["settings"].update(change)
    save_file(load_file(path), path, metadata={"vision-attribution": json.dumps(card)})
    with pytest.raises(at.UserError, match="has a card that save_classifier did not write"):
        at.load_classifier(path)


def test_a_card_that_promises_prototypes(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    at.save_classifier(at.load_classifier("zoo:cnn"), path)
    with safe_open(path, framework="pt") as file:
        card = json.loads(file.metadata()["vision-attribution"])
    save_file(load_file(path), path, metadata={"vision-attribution": json.dumps({**card, "prototypes": {}})})
    with pytest.raises(at.UserError, match="says that it has prototypes, but lacks them"):
        at.load_classifier(path)


def test_convolutional_networks_by_name_get_channels_last(tmp_path: Path) -> None:
    """They are faster so; a transformer is not, and what the user says counts."""
    loaded = at.load_classifier("timm:resnet10t", pretrained=False, device="cpu")
    assert loaded.channels_last
    assert at.load_classifier("torchvision:squeezenet1_1", pretrained=False, device="cpu").channels_last
    assert not at.load_classifier("timm:vit_tiny_patch16_224", pretrained=False, device="cpu").channels_last
    plain = at.load_classifier("timm:resnet10t", pretrained=False, device="cpu", channels_last=False)
    assert not plain.channels_last
    inputs = torch.rand(2, 3, *loaded.preprocessing.size, generator=torch.Generator().manual_seed(0))
    plain.module.load_state_dict(loaded.module.state_dict())
    assert torch.allclose(loaded.logits(inputs), plain.logits(inputs), atol=1e-4)
    at.save_classifier(loaded, tmp_path / "saved.safetensors")
    assert at.load_classifier(tmp_path / "saved.safetensors", device="cpu").channels_last
