"""Architectures that people have, small and with random weights, and what is right for each: derivations that share no code with ours.

``python tests/architectures.py FILE`` writes the table of all of them.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import attribution as at
from attribution.network.maps import find_feature_layer
from attribution.neurons import edited_probabilities, find_neurons
from attribution.task import Task

CLASSES = 6
METHODS = ("attention_rollout", "transformer_attribution", "grad_eclip", "attn_lrp")
_OTHERS = """
cait_xxs24_224 crossvit_tiny_240 convit_tiny coat_tiny xcit_nano_12_p16_224 caformer_s18 convformer_s18 inception_next_atto
poolformer_s12 poolformerv2_s12 pit_ti_224 pit_ti_distilled_224 mobilevit_xxs mobilevitv2_050 swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 twins_svt_small pvt_v2_b0 levit_128s mixer_s32_224 resmlp_12_224 gmlp_ti16_224 volo_d1_224 resnet18
resnet26d seresnet18 resnext26ts wide_resnet50_2 densenet121 dla34 hrnet_w18_small res2net50_14w_8s skresnet18 regnetx_002
regnety_002 nfnet_l0 efficientnet_b0 efficientvit_b0 efficientvit_m0 mobilenetv2_050 mobilenetv3_small_050
mobilenetv4_conv_small_050 mnasnet_small fbnetc_100 ghostnet_050 lcnet_050 tinynet_e convnext_atto convnextv2_atto
edgenext_xx_small mobileone_s0 repvgg_a0 vovnet39a cspresnet50 darknet53 inception_v3 xception41 vgg11 focalnet_tiny_srf nest_tiny
fastvit_t8 tiny_vit_5m_224 visformer_tiny maxvit_rmlp_pico_rw_256 coatnet_pico_rw_224 rdnet_tiny starnet_s1 hgnetv2_b0 repvit_m0_9
sequencer2d_s
"""
_QUICK_TIMM = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")


@dataclass(frozen=True)
class Architecture:
    """One model: how to build it, its input size, and the tokens that its head reads ("cls", "dist", "avg", "cls+avg", "pool"
    or ""; "parallel" for attentions side by side, of which no product is read)."""

    source: str
    name: str
    build: Callable[[], nn.Module]
    size: int
    reads: str = ""
    prefix: int = 0


@dataclass
class Row:
    """What was found for one model. A cell is "right", a refusal, "unmeasured", or starts with WRONG."""

    source: str
    name: str
    cells: dict[str, str] = field(default_factory=dict)


HEADING = """# Architectures

**Question.** For which models is each method right, and what is said where it is not defined?

% needs-data
```sh
python tests/architectures.py docs/results/architectures.md
```

Models of timm, torchvision and Hugging Face with random weights, most of them at small sizes. Each cell is measured, and is either right
or a refusal, whose text is below the table. What right means:

- **explain**: the insertion curve ends at the probability of the image (up to 1e-4).
- **CAM layer**: noise put into 16 places of the input lands at these places of the layer's map (rows and columns correlate by more than
  0.5), and gradients arrive there. With random weights some models spread noise over the whole of a small map: *unmeasured*.
- **attention_rollout, transformer_attribution, grad_eclip**: equal to the equations, computed from the model's own attention weights by
  code that shares nothing with the library (up to 1e-3 of the maximum).
- **attn_lrp**: finite and not empty. Its rules are tested one by one elsewhere.
- **neurons**: a neuron removed at the last layer gives the probabilities of a copy whose weights of that neuron are zero.

"""


# --- building


def timm_models() -> Iterator[Architecture]:
    import timm

    # size 0: the size of the model; depth where the model takes one
    vits = {
        **dict.fromkeys(("vit_tiny_patch16_224", "vit_base_patch32_clip_224", "deit3_small_patch16_224"), "cls"),
        "deit_tiny_distilled_patch16_224": "dist", "vit_little_patch16_reg4_gap_256": "avg", "vit_small_patch16_dinov3": "avg",
        "vit_base_patch16_siglip_gap_224": "avg",
        "vit_base_patch16_siglip_224": "pool", "beit_base_patch16_224": "avg", "beitv2_base_patch16_224": "avg",
        "eva02_tiny_patch14_224": "avg", "vit_relpos_small_patch16_224": "avg", "vit_srelpos_small_patch16_224": "avg",
        "naflexvit_base_patch16_gap": "avg", "flexivit_small": "cls", "vit_small_patch16_18x2_224": "parallel",
    }  # fmt: skip
    for name, reads in vits.items():
        size = 112 if "patch14" in name else 96
        options: dict[str, Any] = {"img_size": size, "depth": 2}

        def build(name: str = name, options: dict[str, Any] = options) -> nn.Module:
            return timm.create_model(name, num_classes=CLASSES, **options)

        yield Architecture("timm", name, build, size, reads)
    for name in _OTHERS.split():
        if timm.is_model(name):
            size = int(timm.get_pretrained_cfg(name).input_size[-1])  # type: ignore[union-attr]
            yield Architecture("timm", name, lambda name=name: timm.create_model(name, num_classes=CLASSES), size)


def torchvision_models() -> Iterator[Architecture]:
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        vit = name.startswith("vit_")

        def build(name: str = name, options: dict[str, Any] = options, vit: bool = vit) -> nn.Module:
            made = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)
            if vit:
                del made.encoder.layers[2:]
            return made

        size = 224 if vit or name.startswith(("maxvit", "googlenet", "inception")) else 128
        size = 299 if name == "inception_v3" else size
        yield Architecture("torchvision", name, build, size, "cls" if vit else "", 1)


def hugging_face_models() -> Iterator[Architecture]:
    import transformers as T

    vit: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    vit |= {"image_size": 64, "patch_size": 16}
    dino = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2, "image_size": 56, "patch_size": 14}
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    four: dict[str, Any] = {"depths": [1, 1, 1, 1]}
    swin = {"image_size": 64, "embed_dim": 24, "depths": [1, 1, 2], "num_heads": [2, 2, 4], "window_size": 4}
    pyramid = {"image_size": 64, "hidden_sizes": [16, 32, 48, 64], **four, "num_attention_heads": [1, 2, 3, 4], "mlp_ratios": [2] * 4}
    levit = {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8] * 3}
    wide = {"hidden_sizes": [16, 24, 32, 48], **four}
    specs: list[tuple[str, dict[str, Any], str, int]] = [
        ("ViT", vit, "cls", 1), ("ViTMSN", vit, "cls", 1), ("DeiT", vit, "cls", 2), ("Beit", vit, "avg", 1),
        ("Data2VecVision", vit, "avg", 1),
        ("IJepa", vit, "avg", 0), ("Dinov2", dino, "cls+avg", 1), ("Dinov2WithRegisters", {**dino, "num_register_tokens": 4}, "cls+avg", 5),
        ("Siglip", {"vision_config": vit, "text_config": {**text, "vocab_size": 64}}, "avg", 0),
        ("CLIP", {"vision_config": vit, "text_config": {**text, "vocab_size": 64}}, "avg", 1),
        ("Swin", swin, "", 0), ("Swinv2", swin, "", 0), ("ConvNext", wide, "", 0), ("ConvNextV2", wide, "", 0),
        ("ResNet", {"embedding_size": 16, **wide, "layer_type": "basic"}, "", 0),
        ("RegNet", {"embedding_size": 16, **wide, "groups_width": 8}, "", 0),
        ("MobileViT", {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 32, 40, 64]}, "", 0),
        ("MobileViTV2", {"image_size": 64, "width_multiplier": 0.5}, "", 0),
        ("MobileNetV1", {"image_size": 64, "depth_multiplier": 0.25}, "", 0),
        ("MobileNetV2", {"image_size": 64, "depth_multiplier": 0.35}, "", 0),
        ("EfficientNet", {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}, "", 0),
        ("Pvt", pyramid, "", 0), ("PvtV2", pyramid, "", 0),
        ("Segformer", {key: value for key, value in pyramid.items() if key != "image_size"}, "", 0), ("Levit", levit, "", 0),
        ("FocalNet", {"image_size": 64, "embed_dim": 16, **four}, "", 0), ("PoolFormer", wide, "", 0),
        ("Bit", {"embedding_size": 32, "hidden_sizes": [32, 64, 64, 96], **four, "num_groups": 8}, "", 0),
        ("SwiftFormer", {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 48]}, "", 0),
    ]  # fmt: skip
    for name, options, reads, prefix in specs:

        def build(name: str = name, options: dict[str, Any] = options) -> nn.Module:
            config = getattr(T, f"{name}Config")(num_labels=CLASSES, **copy.deepcopy(options))
            return getattr(T, f"{name}ForImageClassification")(config)

        yield Architecture("Hugging Face", f"{name}ForImageClassification", build, 56 if "Dinov2" in name else 64, reads, prefix)


def made(architecture: Architecture) -> at.Classifier:
    """The classifier, with random weights that keep its outputs apart and BatchNorm calibrated on random images."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        module = architecture.build()
        for name, parameter in module.named_parameters():
            if name.endswith("weight") and parameter.ndim == 1 and not parameter.any():  # norms that start a branch at zero
                nn.init.ones_(parameter)
            elif parameter.ndim > 1 and not parameter.any():  # heads that start at zero
                nn.init.normal_(parameter, std=0.1)
            elif parameter.ndim == 2 and architecture.reads and "pos" not in name:
                parameter.data *= 2  # attention that differs between tokens
        norms = [each for each in module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        if norms:
            for each in norms:
                each.momentum = None
            module.train()
            with torch.no_grad():
                module(torch.randn(4, 3, architecture.size, architecture.size) + torch.randn(4, 3, 1, 1))
    return at.Classifier(module.eval(), size=architecture.size, mean=0.5, std=0.25, name=architecture.name)


# --- second derivations


@contextmanager
def written_out(other: Callable[[Tensor, Tensor, Tensor, Tensor], None], halved: bool = False) -> Iterator[None]:
    """torch's fused attention written out in the place of the function; each call tells query, key, value and weights."""
    fused = F.scaled_dot_product_attention

    def part(x: Tensor, share: float) -> Tensor:
        return share * x + (1 - share) * x.detach() if halved else x

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0, is_causal: bool = False, scale: Any = None,
               **_: Any) -> Tensor:  # fmt: skip
        scores = torch.einsum("bhqd,bhkd->bhqk", part(q, 0.25), part(k, 0.25)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        weights = torch.exp(scores + (0 if attn_mask is None else attn_mask))
        weights = weights / weights.sum(-1, keepdim=True)
        other(q, k, v, weights)
        context = torch.einsum("bhqk,bhkd->bhqd", weights, part(v, 0.5))
        contexts.append(context)
        return context

    contexts: list[Tensor] = []
    F.scaled_dot_product_attention = attend
    try:
        yield contexts
    finally:
        F.scaled_dot_product_attention = fused


def derived(used: at.Classifier, architecture: Architecture, inputs: Tensor, target: int, prefix: int) -> dict[str, Tensor]:
    """The maps [N patches] of the attention methods from the model's own attention weights, by the equations."""
    found: list[tuple[Tensor, ...]] = []
    with written_out(lambda *each: found.append(each)) as contexts:
        score = used.logits(inputs.clone().requires_grad_())[0, target]
    weights = [each[3] for each in found]
    gradients = torch.autograd.grad(score, [*weights, *contexts], allow_unused=True)
    blocks = [a for a in weights if a.shape[-2] == a.shape[-1]]
    tokens = blocks[0].shape[-1]
    rollout = relevance = torch.eye(tokens)
    for a, g in zip(blocks, gradients, strict=False):
        mixed = a[0].detach().mean(0) / 2 + torch.eye(tokens) / 2
        rollout, relevance = mixed @ rollout, relevance + (a.detach() * g)[0].clamp(min=0).mean(0) @ relevance
    share = torch.zeros(tokens)
    if architecture.reads == "dist":
        share[:2] = 0.5
    elif architecture.reads == "avg":
        share[prefix:] = 1 / (tokens - prefix)
    else:
        share[0] = 1.0
    if architecture.reads == "cls+avg":
        share[0], share[prefix:] = 0.5, 0.5 / (tokens - prefix)
    maps = {"attention_rollout": share @ rollout, "transformer_attribution": share @ (relevance - torch.eye(tokens))}
    if architecture.reads == "pool":
        a, g = weights[-1].detach(), gradients[len(weights) - 1]
        maps = {"attention_rollout": a[0].mean(0)[0] @ rollout, "transformer_attribution": (a * g)[0].clamp(min=0).mean(0)[0] @ relevance}
    q, k, v, g = (
        t[0].detach().transpose(0, 1).flatten(1) for t in (*found[len(blocks) - 1][:3], gradients[len(weights) + len(blocks) - 1])
    )
    cosine = F.cosine_similarity(q[:1], k[prefix:])
    cosine = (cosine - cosine.min()) / (cosine.max() - cosine.min())
    maps = {name: values[prefix:] for name, values in maps.items()}
    return {**maps, "grad_eclip": (cosine * (v[prefix:] * g[0]).sum(1)).clamp(min=0)}


# --- cells


def attempt(cell: Callable[[], str]) -> str:
    try:
        return cell()
    except at.UserError as error:
        return f"refused: {error}" if "\n" not in str(error) else f"WRONG: {error}"


def explained(used: at.Classifier, image: Tensor) -> str:
    found = at.explain(image, used, regions="grid", region_options={"rows": 2, "columns": 2}, search="greedy")
    p = float(used.probabilities(used.inputs(image))[0, found.target])
    return "right" if abs(float(found.insertion_scores[-1]) - p) < 1e-4 else "WRONG: the curve does not end at p"


def layer_found(used: at.Classifier, image: Tensor) -> str:
    """Bumps put into the input land at their places in the map: rows with rows, columns with columns. Gradients arrive at the map."""
    inputs = used.inputs(image)
    task = Task(used, image, image, 0, inputs, torch.zeros_like(inputs))
    layer = find_feature_layer(task)

    def maps(x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = layer.module.register_forward_hook(lambda _m, _a, output: kept.append(output))
        try:
            score = used.logits(x)[0].sum()  # a single class may be dead behind a ReLU
        finally:
            handle.remove()
        if x.requires_grad:
            return layer.to_map(torch.autograd.grad(score, kept[-1])[0])
        return layer.to_map(kept[-1])[0]

    if not maps(inputs.clone().requires_grad_()).any():
        return f"WRONG: no gradient arrives at {layer.name}"
    (height, width), clean = task.size, maps(inputs)
    h, w = max(2, height // 8), max(2, width // 8)
    places = (0.12 + 0.76 * torch.rand(16, 2, generator=torch.Generator().manual_seed(0))).tolist()
    centres = []
    for y, x in places:
        bumped, top, left = inputs.clone(), int(y * height) - h // 2, int(x * width) - w // 2
        bumped[:, :, top : top + h, left : left + w] += torch.randn(1, 3, h, w, generator=torch.Generator().manual_seed(1))
        strength = (maps(bumped) - clean).square().sum(0)
        centres.append([float((each * torch.arange(len(each))).sum() / each.sum()) for each in (strength.sum(1), strength.sum(0))])
    put, landed = torch.tensor(places).T, torch.tensor(centres).T
    alike = [float(torch.corrcoef(torch.stack([put[axis], landed[axis]]))[0, 1]) for axis in range(2)]
    name, least = f"{layer.name} {layer.grid[0]}x{layer.grid[1]}", min(alike)
    if least > 0.5:
        return f"right: {name}"
    # with random weights, attention and pooling over the whole map spread a bump to all of a small map; of 2 x 2 positions little is seen
    return (
        f"unmeasured: {name}"
        if not least < -0.5 or min(layer.grid) < 3
        else f"WRONG: bumps land elsewhere in {name} ({alike[0]:.2f}, {alike[1]:.2f})"
    )


def attended(used: at.Classifier, architecture: Architecture, image: Tensor, method: str) -> str:
    """Equality with the second derivation; a model with windows, stages or class attention alone has none and is refused."""
    found = at.attribute(image, used, method, 1, **({"gamma_conv": 0.0, "gamma_linear": 0.0} if method == "attn_lrp" else {})).pixel_map
    if not architecture.reads or (architecture.reads == "parallel" and method != "attn_lrp"):
        return "WRONG: not refused"
    inputs, patches = used.inputs(image), len(found.flatten())
    if method == "attn_lrp":
        return "right" if bool(found.isfinite().all()) and bool(found.any()) else "WRONG: empty"
    tokens = [0]
    with written_out(lambda q, k, v, a: tokens.append(a.shape[-1])):
        used.logits(inputs.clone().requires_grad_())  # without gradients torch's own attention modules take another path
    patches = max(side * side for side in range(2, 40) if 0 <= tokens[1] - side * side <= 16)
    expected = derived(used, architecture, inputs, 1, tokens[1] - patches)[method]
    side = round(patches**0.5)
    large = F.interpolate(expected.detach().view(1, 1, side, side), size=found.shape, mode="bilinear", align_corners=False)[0, 0]
    apart = float((found - large).abs().max() / large.abs().max().clamp(min=1e-12))
    return "right" if apart < 1e-3 else f"WRONG: {apart:.1e} from the derivation"


def neurons(used: at.Classifier, image: Tensor) -> str:
    """A removed neuron of the last layer equals a copy whose column of the down projection is zero."""
    found, inputs = find_neurons(used), used.inputs(image)
    other = copy.deepcopy(used.module)
    unit = torch.full((len(found),), -1)
    unit[-1] = 3
    with torch.no_grad():
        other.get_submodule(found.names[-1]).weight[:, 3] = 0
    way = used.preprocessing
    expected = at.Classifier(other, size=way.size, mean=way.mean, std=way.std).probabilities(inputs)
    close = torch.allclose(edited_probabilities(used, inputs, unit[None], layers=found), expected, atol=1e-5)
    return f"right: {found.place}" if close else "WRONG: removing a neuron is not removing its column"


def row_of(architecture: Architecture) -> Row:
    """Every cell of one model."""
    row = Row(architecture.source, architecture.name)
    used = made(architecture)
    image = F.interpolate(at.load_image(at.demo_image_path())[None], size=(architecture.size,) * 2, mode="area")[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the map of .* everywhere", UserWarning)
        row.cells["explain"] = attempt(lambda: explained(used, image))
        row.cells["CAM layer"] = attempt(lambda: layer_found(used, image))
        for method in METHODS:
            row.cells[method] = attempt(lambda method=method: attended(used, architecture, image, method))
        row.cells["neurons"] = attempt(lambda: neurons(used, image))
    return row


def all_architectures() -> list[Architecture]:
    return [*timm_models(), *torchvision_models(), *hugging_face_models()]


def quick_architectures() -> list[Architecture]:
    """A dozen in which much went wrong once."""
    return [each for each in timm_models() if each.name in _QUICK_TIMM] + [
        each for each in hugging_face_models() if each.reads or each.name.startswith(("Swin", "Levit"))
    ][:11]


def table(rows: list[Row]) -> str:
    """The rows as a page. Refusals are numbered, and listed below."""
    reasons: dict[str, int] = {}

    def cell(row: Row, text: str) -> str:
        if not text.startswith("refused: "):
            return text.removeprefix("right: ") if ": " in text and text.startswith("right") else text
        reason = re.sub(rf"\b({'|'.join(METHODS)}|{re.escape(row.name)})\b", lambda m: "MODEL" if m[0] == row.name else "METHOD", text[9:])
        reason = re.sub(r" \(weights [^)]*\)|, such as .*", "", reason)
        return f"refused [{reasons.setdefault(reason, len(reasons) + 1)}]"

    columns = list(rows[0].cells)
    lines = [f"| source | model | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
    lines += [f"| {r.source} | {r.name} | {' | '.join(cell(r, r.cells[c]) for c in columns)} |" for r in rows]
    return "\n".join([*lines, "", "Reasons:", "", *(f"{number}. {reason}" for reason, number in reasons.items()), ""])


def main(file: Path, names: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Measure all models, or those with one of some words in their names, and write the page."""
    torch.set_num_threads(2)
    rows = []
    for each in all_architectures():
        if names and not any(word in each.name for word in names):
            continue
        rows.append(row_of(each))
        print(each.source, each.name, {key: value[:60] for key, value in rows[-1].cells.items()}, flush=True)
        file.write_text(HEADING + table(rows), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
