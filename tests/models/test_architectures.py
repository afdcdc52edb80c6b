"""Every cell of the table of architectures is right, or a refusal that names the cause."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from architectures import (
    METHODS,
    Architecture,
    all_architectures,
    attempt,
    attended,
    hugging_face_models,
    layer_found,
    made,
    quick_architectures,
    row_of,
)
from networks import apart, photo

import attribution as at
from attribution.dropping import masked_inputs

pytest.importorskip("transformers")


def check(architecture: Architecture) -> None:
    row = row_of(architecture)
    for name, cell in row.cells.items():
        assert cell.startswith(("right", "refused: ") + (("unmeasured",) if name == "CAM layer" else ())), (
            f"{name} of {architecture.name}: {cell}"
        )
    assert row.cells["explain"] == "right"
    if architecture.reads == "parallel":
        assert [row.cells[name].partition(":")[0] for name in METHODS] == ["refused", "refused", "refused", "right"], row.cells
    elif architecture.reads:
        assert row.cells["attention_rollout"] == row.cells["transformer_attribution"] == "right", row.cells
        assert row.cells["CAM layer"].startswith("right") and row.cells["neurons"].startswith("right"), row.cells
        assert (row.cells["grad_eclip"] == "right") == (architecture.reads in ("cls", "dist")), row.cells["grad_eclip"]


@pytest.mark.parametrize("architecture", quick_architectures(), ids=lambda each: each.name)
def test_a_dozen(architecture: Architecture) -> None:
    check(architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", all_architectures(), ids=lambda each: f"{each.source} {each.name}")
def test_all(architecture: Architecture) -> None:
    check(architecture)


def named(name: str) -> tuple[at.Classifier, Architecture]:
    (found,) = [each for each in hugging_face_models() if each.name == f"{name}ForImageClassification"]
    return made(found), found


def test_rollout_of_the_attentions_that_hugging_face_returns() -> None:
    """From ``output_attentions`` of the eager implementation: no code of ours, and none of the fused function."""
    used, _ = named("ViT")
    image = photo(64)
    used.module.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = used.module(used.inputs(image), output_attentions=True).attentions
    rollout = torch.eye(17)
    for weights in attentions:
        rollout = (weights[0].mean(0) + torch.eye(17)) / 2 @ rollout
    expected = F.interpolate(rollout[0, 1:].view(1, 1, 4, 4), size=(64, 64), mode="bilinear", align_corners=False)[0, 0]
    eager = {name: at.attribute(image, used, name, 1).pixel_map for name in ("attention_rollout", "transformer_attribution", "grad_eclip")}
    used.module.set_attn_implementation("sdpa")
    for name, found in eager.items():
        assert apart(at.attribute(image, used, name, 1).pixel_map, found) < 1e-4, name
    assert apart(eager["attention_rollout"], expected) < 1e-4


@pytest.mark.parametrize(("name", "prefix"), [("ViT", 1), ("DeiT", 2)])
def test_hugging_face_models_drop_tokens(name: str, prefix: int) -> None:
    """Against the model's own parts on the sequence without the hidden patches."""
    used, _ = named(name)
    image = photo(64)
    labels = at.make_regions(image, "grid", rows=4, columns=4).labels
    hiding, masked = masked_inputs(used, image, labels, "drop")
    shown = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.6
    body = getattr(used.module, name.lower())
    for row, logits in zip(shown, hiding.logits(masked(shown)), strict=True):
        with torch.no_grad():
            tokens = body.embeddings(used.inputs(image))
            tokens = tokens[:, [*range(prefix), *(prefix + patch for patch in row.nonzero()[:, 0].tolist())]]
            for layer in body.layers:
                tokens = layer(tokens)
                tokens = tokens[0] if isinstance(tokens, tuple) else tokens
            expected = used.module.classifier(body.layernorm(tokens)[:, 0])
        assert torch.allclose(logits[None], expected, atol=1e-4)


def test_shuffled_tokens_are_refused() -> None:
    """A masked autoencoder shuffles the patches, so that no token has a place in the image."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=96, patch_size=16, mask_ratio=0.0
    )

    class Probe(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = transformers.ViTMAEModel(config), torch.nn.Linear(48, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x).last_hidden_state[:, 0])

    used = at.Classifier(Probe().eval(), size=96)
    for method in ("grad_cam", "attention_rollout"):
        with pytest.raises(at.NotApplicable, match="not at the places of the patches"):
            at.attribute(photo(96), used, method)


def test_the_checks_can_fail() -> None:
    """The wrong row of the rollout, and a layer that nothing reads."""
    used, architecture = named("Beit")
    wrong = Architecture(architecture.source, architecture.name, architecture.build, architecture.size, "cls", architecture.prefix)
    assert attended(used, wrong, photo(64), "attention_rollout").startswith("WRONG")
    assert attempt(lambda: layer_found(used, photo(64))).startswith("right")
