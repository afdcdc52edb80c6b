"""Small random networks and a hand-made task, shared by the tests of the attribution methods."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import attribution as at
from attribution.task import Task


def vgg(seed: int = 0, inplace: bool = False) -> nn.Sequential:
    """Convolutions, ReLU and pooling modules in a row: what Captum's LRP and DeepLIFT are made for."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 5),
    ).eval()


def tiny_vit(seed: int = 0, **options: object) -> VisionTransformer:
    """Two blocks of width 16 on 16 x 16 images, 4 x 4 patches; weights large enough for attention to differ between tokens."""
    torch.manual_seed(seed)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 5}
    return scaled(VisionTransformer(**{**settings, **options}))


def scaled(module: nn.Module, deviation: float = 0.3) -> nn.Module:
    """The module in evaluation mode with every weight drawn anew, no head left at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=deviation)
    return module.eval()


def classifier(module: nn.Module, size: int = 16, **options: object) -> at.Classifier:
    return at.Classifier(module, size=size, scores="logits", **options)


def photo(size: int, seed: int = 0, width: int | None = None) -> Tensor:
    return torch.rand(3, size, width or size, generator=torch.Generator().manual_seed(seed))


def make_task(of: at.Classifier, image: Tensor, target: int = 0, seed: int = 0, fill: float = 0.0) -> Task:
    """What ``attribute`` hands to a method."""
    filled = torch.full_like(image, fill)
    return Task(of, image, filled, target, of.inputs(image), of.preprocessing(filled[None]), seed)


def linear(size: int, classes: int = 3, seed: int = 0) -> tuple[at.Classifier, Tensor]:
    """logits = W x + b, and W [C, 3, size, size]."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes)).eval()
    return classifier(module, size), module[1].weight.detach().view(classes, 3, size, size)


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value expected."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
