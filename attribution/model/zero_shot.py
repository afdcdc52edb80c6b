"""Zero-shot classifiers: a model of images and texts, such as CLIP or SigLIP, whose classes are texts."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from attribution.errors import UserError, describe
from attribution.model import huggingface as hf
from attribution.model.classifier import Classifier
from attribution.model.forwarding import first_line, resolve_device
from attribution.model.matching import matching_settings
from attribution.model.outputs import Meaning
from attribution.model.preprocessing import checked_sides
from attribution.model.prototypes import PrototypeForward
from attribution.model.saving import Recipe
from attribution.model.source import Checkpoint, Wanted, optional_package

TEMPLATE = "a photo of {}"
_APART = 1e-4  # of cosines, between the library's own and those of the tower alone


@dataclass(frozen=True, eq=False)
class TwoTowers:
    """A model of images and texts in parts.

    Attributes:
        image: from inputs [n, 3, h, w] to embeddings [n, D].
        texts: from texts to embeddings [n, D].
        reference: the library's own embeddings of inputs, to compare with.
        scale, bias: logits = scale * cosine + bias.
        kind: "softmax" of classes, or "sigmoid" of independent labels.
        settings: of ``Classifier``.
        recipe: how the image tower is built again.
    """

    image: nn.Module
    texts: Callable[[Sequence[str]], Tensor]
    reference: Callable[[Tensor], Tensor]
    scale: float
    bias: float
    kind: Meaning
    settings: Mapping[str, Any]
    recipe: Recipe


def zero_shot(
    model: str | Path,
    classes: Sequence[str],
    *,
    template: str | Sequence[str] = TEMPLATE,
    device: str | torch.device = "auto",
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Classifier:
    """A classifier of a model of images and texts, whose classes are texts (CLIP: Radford et al., ICML 2021).

    Its logits equal the library's: scale * cosine of image and text, plus a bias for SigLIP (Zhai et al., ICCV 2023), whose scores are
    sigmoids of independent labels. The texts are embedded once.

    Args:
        model: "hf:ID" or a folder of ``save_pretrained`` (CLIP, SigLIP and their like in transformers, safetensors only), or
            "open_clip:NAME/TAG", such as "open_clip:ViT-B-32/laion2b_s34b_b79k".
        classes: C names, at least two; they become the class names.
        template: how a name becomes a text; "{}" stands for the name. The embeddings of several templates are averaged, as published
            for CLIP.
        device: "auto" (CUDA, else Apple's GPU, else the CPU) or any torch device.
        checkpoint: weights of an open_clip model, in the place of /TAG.
        pretrained: False gives random weights.
        size: of the input, pixels or (h, w); position embeddings are interpolated as the library does.
        batch_size: most images forwarded at once.
        options: fields of the configuration (transformers), or arguments of ``open_clip.create_model``.

    Raises:
        UserError: too few, empty or equal names; a template without a place for the name; a text that is too long; a model that cannot be
            loaded, or whose parts do not give its own logits.
    """
    names, templates = _checked_names(classes), _checked_templates(template)
    spec = str(model)
    source, _, name = spec.partition(":")
    where = None if checkpoint is None else Checkpoint(Path(checkpoint))
    wanted = Wanted(where, pretrained, None if size is None else checked_sides(size), dict(options or {}))
    if Path(spec).is_dir():
        towers = _of_transformers(spec, wanted)
    elif source in _SOURCES and name:
        towers = _SOURCES[source](name, wanted)
    else:
        raise UserError(f"unknown zero-shot model {spec!r}: expected hf:ID, a folder of save_pretrained, or open_clip:NAME/TAG")
    with torch.no_grad():
        matrix = _embedded(towers.texts, names, templates).cpu()
    on = resolve_device(device)
    base = Classifier(towers.image.to(on).eval(), name=spec, scores="softmax", batch_size=batch_size, **towers.settings)
    base.recipe = towers.recipe
    _check(base, towers, spec)
    forward = PrototypeForward(base.forward, matrix.to(on), towers.scale, True, towers.bias, towers.kind, True)
    return base.with_forward(forward, class_names=names)


class ImageTower(nn.Module):
    """The image side of a model of transformers: pixels to embeddings."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model = model.vision_model
        self.visual_projection = getattr(model, "visual_projection", nn.Identity())

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        found = self.vision_model(pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return self.visual_projection(found.pooler_output)


def tower_of(recipe: Recipe) -> nn.Module:
    """The image tower of a saved zero-shot classifier, with random weights.

    Raises:
        UserError: the library is not installed, or does not know the model.
    """
    source, _, name = recipe.model.partition(":")
    if source == "open_clip":
        return _open_clip_model(name.partition("/")[0], Wanted(pretrained=False, options=recipe.options)).visual.eval()
    return ImageTower(hf.from_configuration(recipe.config or {}, recipe.model, "AutoModel")).eval()


def _of_transformers(place: str, wanted: Wanted) -> TwoTowers:
    name, T = hf.named(place), hf.transformers(hf.named(place))
    wanted.only(name, "size", "options")
    folder = hf.folder_of(place)
    config = hf.configuration(folder, name, wanted.options)
    model = hf.weights_of(T.AutoModel, folder, name, config, wanted.pretrained)
    if not all(hasattr(model, part) for part in ("vision_model", "logit_scale", "get_text_features")):
        raise UserError(f"{name} is a {type(model).__name__}: expected a model of images and texts, such as CLIP or SigLIP")
    tokenizer = hf.tokenizer_of(folder, name)
    sigmoid = hasattr(model, "logit_bias")
    most = int(model.config.text_config.max_position_embeddings)

    def texts(sentences: Sequence[str]) -> Tensor:
        lengths = [len(each) for each in tokenizer(list(sentences))["input_ids"]]
        _check_lengths(sentences, lengths, most)
        padded = {"padding": "max_length", "max_length": most} if sigmoid else {"padding": True}
        given = tokenizer(list(sentences), return_tensors="pt", **padded)
        if int(given["input_ids"].max()) >= model.config.text_config.vocab_size:
            raise UserError(f"the tokenizer of {name} has more words than its model: expected the tokenizer that belongs to the model")
        return _embedding(model.get_text_features(**given))

    tower = ImageTower(model)
    settings = hf.sized(hf.preprocessing_of(folder, name), tower, wanted.size, name)
    kwargs = settings.get("forward_kwargs", {})
    return TwoTowers(
        tower, texts, lambda inputs: _embedding(model.get_image_features(pixel_values=inputs, **kwargs)),
        float(model.logit_scale.detach().exp()), float(model.logit_bias.detach()) if sigmoid else 0.0, "sigmoid" if sigmoid else "softmax",
        settings, Recipe(name, config=hf.plain_configuration(model), tower=True),
    )  # fmt: skip


def _of_open_clip(place: str, wanted: Wanted) -> TwoTowers:
    name, _, tag = place.partition("/")
    spec = f"open_clip:{place}"
    open_clip = optional_package("open_clip", "clip", spec)
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), 5, 0.3)
        raise UserError(f"open_clip has no model {name!r}: expected one such as {', '.join(near) or 'ViT-B-32'}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    some = ", ".join(tags[:5])
    if bool(tag) == (wanted.checkpoint is not None) and wanted.pretrained:
        raise UserError(f"{spec} needs weights, from a tag or a checkpoint: expected open_clip:{name}/TAG, TAG such as {some}")
    if tag and tag not in tags:
        raise UserError(f"open_clip has no weights {tag!r} of {name}: expected one such as {some or 'none'}")
    model = _open_clip_model(place, wanted)
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # a download may fail in many ways
        raise UserError(f"the tokenizer of {spec} could not be loaded ({first_line(error)}): connect to the network once") from None

    def texts(sentences: Sequence[str]) -> Tensor:
        if hasattr(tokenizer, "encode"):
            _check_lengths(sentences, [len(tokenizer.encode(each)) + 2 for each in sentences], int(model.context_length))
        return model.encode_text(tokenizer(list(sentences)))

    bias = model.logit_bias
    recipe = Recipe(spec, dict(wanted.options) | ({} if wanted.size is None else {"force_image_size": list(wanted.size)}), tower=True)
    return TwoTowers(
        model.visual, texts, model.encode_image, float(model.logit_scale.detach().exp()), 0.0 if bias is None else float(bias.detach()),
        "softmax" if bias is None else "sigmoid", _open_clip_settings(model, spec), recipe,
    )  # fmt: skip


def _open_clip_model(place: str, wanted: Wanted) -> Any:
    name, _, tag = place.partition("/")
    open_clip = optional_package("open_clip", "clip", f"open_clip:{place}")
    weights = str(wanted.checkpoint.path) if wanted.checkpoint is not None else tag
    sized = {} if wanted.size is None else {"force_image_size": wanted.size}
    given: dict[str, Any] = {"pretrained": weights} if wanted.pretrained else {"load_weights": False, "pretrained_text": False}
    published = {} if wanted.checkpoint is not None else open_clip.get_pretrained_cfg(name, tag)
    try:
        place = published.get("hf_hub", "").rstrip("/")
        with hf.fetching(place) if place else nullcontext():
            return open_clip.create_model(name, **given, **sized, **wanted.options).eval()
    except Exception as error:  # network, files and configurations raise many types
        raise UserError(
            f"open_clip:{place} could not be loaded ({first_line(error)}): connect to the network once, or give a checkpoint"
        ) from None


def _open_clip_settings(model: Any, spec: str) -> dict[str, Any]:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(**model.visual.preprocess_cfg)
    transform = image_transform_v2(config, is_train=False)
    size = (config.size, config.size) if isinstance(config.size, int) else tuple(config.size)
    geometry = {
        "size": size,
        "resize": {"shortest": "short_side", "longest": "long_side"}.get(config.resize_mode, "squash"),
        "interpolation": config.interpolation if config.interpolation == "bilinear" else "bicubic",
        "rounding": "timm" if config.resize_mode == "longest" or size[0] != size[1] else "torchvision",
        "padding": "black",
    }

    def pipeline(image: Image.Image) -> Tensor:
        return transform(image)

    return matching_settings(pipeline, geometry, spec)


def _embedded(texts: Callable[[Sequence[str]], Tensor], names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Text embeddings [C, D] of length 1: the mean over the templates of embeddings of length 1."""
    each = [F.normalize(texts([template.replace("{}", name) for name in names]).float(), dim=1) for template in templates]
    return F.normalize(torch.stack(each).mean(dim=0), dim=1)


def _check(base: Classifier, towers: TwoTowers, name: str) -> None:
    """Refuse a model whose embeddings its image tower alone does not give."""
    inputs = base.preprocessing.gray_inputs(base.device)
    with torch.no_grad():
        ours = F.normalize(base.logits(inputs), dim=1)
        theirs = F.normalize(towers.reference(inputs).float(), dim=1)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=_APART):
        raise UserError(f"the image tower of {name} does not give the embeddings of the model: expected a model like CLIP or SigLIP")


def _embedding(found: Any) -> Tensor:
    """The embedding, which transformers returns as a tensor or as the pooled output."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _check_lengths(sentences: Sequence[str], lengths: Sequence[int], most: int) -> None:
    longest = max(lengths)
    if longest > most:
        raise UserError(f"the text {sentences[lengths.index(longest)][:60]!r} has {longest} tokens: expected at most {most}")


def _checked_names(classes: Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, str) or not all(isinstance(each, str) for each in classes):
        raise UserError(f"classes are {describe(classes)}: expected a list of texts, one for each class")
    names = tuple(each.strip() for each in classes)
    if len(names) < 2:
        raise UserError(f"zero-shot classes are {', '.join(map(repr, names)) or 'none'}: expected at least two, to choose between")
    if "" in names:
        raise UserError(f"zero-shot class {names.index('')} is empty: expected a text for each class")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"zero-shot class {repeated[0]!r} is there twice: expected different ones")
    return names


def _checked_templates(template: str | Sequence[str]) -> tuple[str, ...]:
    templates = (template,) if isinstance(template, str) else tuple(template)
    wrong = [each for each in templates if not isinstance(each, str) or "{}" not in each]
    if wrong or not templates:
        raise UserError(
            f"template is {wrong[0] if wrong else 'missing'!r}: expected a text with {{}} in the place of the class, as in {TEMPLATE!r}"
        )
    return templates


_SOURCES: dict[str, Callable[[str, Wanted], TwoTowers]] = {"hf": _of_transformers, "open_clip": _of_open_clip}
