"""Zero-shot classifiers equal their library: random weights, tokenizers made here, nothing downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attribution as at
from attribution.presets import PRESETS

NAMES = ["a cat", "a dog", "two birds"]
TEXTS = [f"a photo of {name}" for name in NAMES]
VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 16,
}
TEXT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64, "max_position_embeddings": 24}


def write_clip(folder: Path) -> tuple[Any, Any]:
    """A small CLIP of transformers with the words of open_clip's own tokenizer; returns it with its tokenizer."""
    T = pytest.importorskip("transformers")
    bpe = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    words = {renamed.get(word, word): number for word, number in bpe.encoder.items()}
    tokenizer = T.CLIPTokenizer(vocab=words, merges=list(bpe.bpe_ranks))
    text = {**TEXT, "vocab_size": len(words), "bos_token_id": 49406, "eos_token_id": 49407}
    torch.manual_seed(0)
    model = T.CLIPModel(T.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=40)).eval()
    for part in (tokenizer, model, T.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})):
        part.save_pretrained(folder)
    return model, tokenizer


def write_siglip(folder: Path) -> tuple[Any, Any]:
    T = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "a", "photo", "of", "cat", "dog", "two", "birds"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    given = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_input_names": ["input_ids"]}
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=inner, **given)
    text = {**TEXT, "vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    model = T.SiglipModel(T.SiglipConfig(vision_config=VISION, text_config=text)).eval()
    model.logit_scale.data.fill_(2.0)
    model.logit_bias.data.fill_(-1.5)
    for part in (tokenizer, model, T.SiglipImageProcessor(size={"height": 64, "width": 64})):
        part.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("clip")
    return folder, *write_clip(folder)


def expected_logits(model: Any, tokenizer: Any, inputs: Tensor, padding: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=inputs, **tokenizer(TEXTS, return_tensors="pt", **padding)).logits_per_image


def test_clip_of_transformers(clip_folder: tuple[Path, Any, Any], cat: Tensor) -> None:
    folder, model, tokenizer = clip_folder
    classifier = at.zero_shot(folder, NAMES, device="cpu")
    inputs = classifier.inputs(cat)
    expected = expected_logits(model, tokenizer, inputs, {"padding": True})
    assert torch.allclose(classifier.logits(inputs), expected, atol=1e-5)
    assert torch.allclose(classifier.probabilities(inputs), expected.softmax(dim=1), atol=1e-5)
    assert classifier.class_names == tuple(NAMES)


def test_siglip_has_independent_labels_and_a_bias(tmp_path: Path, cat: Tensor) -> None:
    model, tokenizer = write_siglip(tmp_path)
    classifier = at.zero_shot(tmp_path, NAMES, device="cpu")
    inputs = classifier.inputs(cat)
    expected = expected_logits(model, tokenizer, inputs, {"padding": "max_length", "max_length": 24})
    assert expected.std() > 1e-3 and torch.allclose(classifier.logits(inputs), expected, atol=1e-5)
    assert torch.allclose(classifier.probabilities(inputs), expected.sigmoid(), atol=1e-5)
    assert classifier.outputs.independent


def write_open_clip(kind: str, folder: Path) -> tuple[str, Any]:
    """The name of a small open_clip model whose weights lie in the folder, and the model."""
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    transformer = {"image_size": 64, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16}
    vision = {"vit": transformer, "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}}[kind]
    name = f"tiny-{kind}"
    (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 40, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)
    torch.manual_seed(1)
    model = open_clip.create_model(name, load_weights=False).eval()
    torch.save(model.state_dict(), folder / "weights.pt")
    return name, model


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_open_clip(kind: str, tmp_path: Path, cat: Tensor) -> None:
    open_clip = pytest.importorskip("open_clip")
    name, model = write_open_clip(kind, tmp_path)
    classifier = at.zero_shot(f"open_clip:{name}", NAMES, device="cpu", checkpoint=tmp_path / "weights.pt")
    inputs = classifier.inputs(cat)
    with torch.no_grad():
        expected, _ = model.get_logits(inputs, open_clip.get_tokenizer(name)(TEXTS))
    assert expected.std() > 1e-3 and torch.allclose(classifier.logits(inputs), expected, atol=1e-5)
    saved = tmp_path / "saved.safetensors"
    at.save_classifier(classifier, saved)
    again = at.load_classifier(saved, device="cpu")
    assert torch.allclose(again.logits(inputs), expected, atol=1e-5) and again.class_names == tuple(NAMES)


def test_several_templates_are_averaged_as_published(tmp_path: Path, cat: Tensor) -> None:
    """normalize(mean of normalized embeddings), Radford et al., section 3.1.4."""
    open_clip = pytest.importorskip("open_clip")
    name, model = write_open_clip("vit", tmp_path)
    templates = ["a photo of {}", "a drawing of {}, small."]
    classifier = at.zero_shot(f"open_clip:{name}", NAMES, template=templates, device="cpu", checkpoint=tmp_path / "weights.pt")
    inputs, tokenizer = classifier.inputs(cat), open_clip.get_tokenizer(name)
    with torch.no_grad():
        rows = []
        for each in NAMES:
            embedded = F.normalize(model.encode_text(tokenizer([template.replace("{}", each) for template in templates])), dim=1)
            rows.append(F.normalize(embedded.mean(dim=0), dim=0))
        expected = model.logit_scale.exp() * model.encode_image(inputs, normalize=True) @ torch.stack(rows).T
    assert torch.allclose(classifier.logits(inputs), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["grad_eclip", "grad_cam", "attention_rollout", "attn_lrp", "integrated_gradients", "occlusion"])
def test_methods_apply(method: str, clip_folder: tuple[Path, Any, Any], cat: Tensor) -> None:
    classifier = at.zero_shot(clip_folder[0], NAMES, device="cpu")
    first, second = (at.attribute(cat, classifier, method, target).pixel_map for target in (0, 1))
    assert first.isfinite().all() and first.std() > 0
    if method != "attention_rollout":
        assert not torch.equal(first, second), "the classes differ by their texts alone"


def test_the_text_side_is_computed_once(clip_folder: tuple[Path, Any, Any], cat: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    T = pytest.importorskip("transformers")
    calls = []
    inner = T.CLIPModel.get_text_features
    monkeypatch.setattr(T.CLIPModel, "get_text_features", lambda *args, **more: calls.append(1) or inner(*args, **more))
    classifier = at.zero_shot(clip_folder[0], NAMES, device="cpu")
    for _ in range(2):
        classifier.probabilities(classifier.inputs(cat))
    assert len(calls) == 1
    assert not any("text" in name for name, _ in classifier.module.named_modules())


@pytest.mark.parametrize("preset", ["smdl-clip-vit-l", "lima-clip-vit-l"])
def test_published_presets(preset: str, clip_folder: tuple[Path, Any, Any], cat: Tensor) -> None:
    classifier = at.zero_shot(clip_folder[0], NAMES, device="cpu")
    regions = at.make_regions(cat, "grid", count=9)
    found = at.explain(cat, classifier, preset=preset, regions=regions.labels)
    assert sorted(found.order.tolist()) == list(range(regions.count))
    assert found.provenance["settings"]["weights"] == vars(PRESETS[preset].weights)
    shown = classifier.probabilities(classifier.inputs(cat))[0, found.target]
    assert float(found.insertion_scores[-1]) == pytest.approx(float(shown), abs=1e-5)


def test_saved_with_its_text_side(clip_folder: tuple[Path, Any, Any], tmp_path: Path, cat: Tensor) -> None:
    classifier = at.zero_shot(clip_folder[0], NAMES, device="cpu")
    inputs, path = classifier.inputs(cat), tmp_path / "clip.safetensors"
    at.save_classifier(classifier, path)
    again = at.load_classifier(path, device="cpu")
    assert torch.allclose(again.logits(inputs), classifier.logits(inputs), atol=1e-5)
    assert again.identity.weights == classifier.identity.weights and again.class_names == tuple(NAMES)
    size = path.stat().st_size
    at.save_classifier(classifier, path, dtype=torch.float16)
    half = at.load_classifier(path, device="cpu")
    assert path.stat().st_size < 0.6 * size and half.runner.dtype == torch.float32
    assert torch.allclose(half.probabilities(inputs), classifier.probabilities(inputs), atol=1e-2)


def test_another_image_size(clip_folder: tuple[Path, Any, Any], cat: Tensor) -> None:
    folder, model, tokenizer = clip_folder
    classifier = at.zero_shot(folder, NAMES, device="cpu", size=96)
    inputs = classifier.inputs(cat)
    with torch.no_grad():
        given = tokenizer(TEXTS, padding=True, return_tensors="pt")
        expected = model(pixel_values=inputs, interpolate_pos_encoding=True, **given).logits_per_image
    assert inputs.shape[-1] == 96 and torch.allclose(classifier.logits(inputs), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a cat"], {}, "zero-shot classes are 'a cat': expected at least two"),
        ([], {}, "zero-shot classes are none: expected at least two"),
        (["a", " "], {}, "zero-shot class 1 is empty"),
        (["a", "b", "a "], {}, "zero-shot class 'a' is there twice"),
        ("cat", {}, "classes are 'cat': expected a list of texts"),
        (["a", "b"], {"template": "a photo"}, "template is 'a photo': expected a text with {} in the place of the class"),
        (["a", "b"], {"template": []}, "template is 'missing'"),
        (["a", "cat " * 40], {}, "the text 'a photo of cat cat .* has 45 tokens: expected at most 24"),
    ],
)
def test_prompts_that_are_refused(names: Any, options: dict[str, Any], message: str, clip_folder: tuple[Path, Any, Any]) -> None:
    with pytest.raises(at.UserError, match=message):
        at.zero_shot(clip_folder[0], names, device="cpu", **options)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            lambda folder: at.load_classifier(folder),
            r"not a backbone; to classify by texts, use at\.zero_shot",
        ),
        (lambda _: at.load_classifier("open_clip:ViT-B-32/openai"), "give the texts of the classes by --zero-shot FILE"),
        (lambda _: at.zero_shot("timm:resnet18", NAMES), "unknown zero-shot model 'timm:resnet18': expected hf:ID"),
        (lambda _: at.zero_shot("open_clip:ViT-B-32", NAMES), "needs weights, from a tag or a checkpoint"),
        (lambda _: at.zero_shot("open_clip:ViT-B-32/none", NAMES), "open_clip has no weights 'none' of ViT-B-32"),
        (lambda _: at.zero_shot("open_clip:ViT-B-33/openai", NAMES), "open_clip has no model 'ViT-B-33': expected one such as ViT-B-3"),
    ],
)
def test_models_that_are_refused(load: Callable[[Path], Any], message: str, clip_folder: tuple[Path, Any, Any]) -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(at.UserError, match=message):
        load(clip_folder[0])


def test_the_command(clip_folder: tuple[Path, Any, Any], tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]) -> None:
    classes, templates = tmp_path / "classes.txt", tmp_path / "templates.txt"
    classes.write_text("a cat\na dog\n")
    templates.write_text("a photo of {}\na drawing of {}\n")
    common = ["docs/photo.png", "--model", clip_folder[0], "--regions", "grid", "--region-count", 4, "--device", "cpu"]
    code, out, err = run_command("explain", *common, "--zero-shot", classes, "--template", templates, "--out", tmp_path / "out")
    assert code == 0 and ("a cat" in out or "a dog" in out), err
    code, _, err = run_command("explain", *common, "--template", "a photo of {}", "--out", tmp_path / "out")
    assert code == 2 and "template (--template) goes with zero_shot" in err
    classes.write_text("a cat\n")
    code, _, err = run_command("explain", *common, "--zero-shot", classes, "--out", tmp_path / "out")
    assert code == 2 and err.startswith("error: zero-shot classes are 'a cat': expected at least two") and err.count("\n") == 1
