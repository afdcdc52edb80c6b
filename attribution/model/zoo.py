"""The classifiers that are there after the installation: one of ImageNet, the default, and two small ones of CIFAR-10.

``imagenet`` is EfficientNet-Lite0 at 224 pixels, see ``lite``. ``cnn`` is ResNet-20 (He et al., CVPR 2016, section 4.2) and ``vit`` a
small vision transformer (Dosovitskiy et al., ICLR 2021) distilled from it; both take 32 pixels. Their cards ``assets/imagenet.md``,
``assets/cnn.md`` and ``assets/vit.md`` hold recipe, accuracy and limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from attribution.errors import UserError
from attribution.model import lite
from attribution.model.class_names import imagenet_names

DEFAULT_MODEL = "zoo:imagenet"  # of every command that takes a CNN
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
INPUT_SIZE = 32
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut: subsampled, padded with zero channels (option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        return x

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNetCifar(nn.Module):
    """ResNet-(6n+2) for 32x32 images; n = 3 is ResNet-20 with 269,722 parameters.

    Args:
        blocks_per_stage: n of the paper.
        widths: channels of ``layer1``, ``layer2`` and ``layer3`` (32, 16 and 8 positions a side for 32x32 images).
        num_classes: number of logits.
    """

    def __init__(self, blocks_per_stage: int = 3, widths: tuple[int, int, int] = (16, 32, 64), num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(widths[0], widths[0], blocks_per_stage, stride=1)
        self.layer2 = _stage(widths[0], widths[1], blocks_per_stage, stride=2)
        self.layer3 = _stage(widths[1], widths[2], blocks_per_stage, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, [n, 64, 8, 8] for 32x32 images."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self.forward_features(x)), 1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def build_cnn() -> ResNetCifar:
    """ResNet-20 with fresh weights."""
    return ResNetCifar()


def build_vit() -> nn.Module:
    """timm's VisionTransformer at 32 pixels: 8x8 patches of 4, 6 blocks, width 128, 4 heads, class token; fresh weights."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=INPUT_SIZE,
        patch_size=4,
        embed_dim=128,
        depth=6,
        num_heads=4,
        mlp_ratio=2.0,
        num_classes=len(CLASS_NAMES),
        class_token=True,
        global_pool="token",
    )


def load_zoo_module(name: str) -> nn.Module:
    """A zoo model with its weights, in evaluation mode, on the CPU.

    Args:
        name: a key of ``ZOO``.

    Raises:
        UserError: unknown name, or weights that are missing or not those of the card.
    """
    if name not in ZOO:
        raise UserError(f"unknown zoo model {name!r}: expected one of {', '.join(sorted(ZOO))}")
    module = ZOO[name].build()
    module.load_state_dict(ZOO[name].weights())
    return module.eval()


def _asset(name: str) -> dict[str, Tensor]:
    with as_file(files("attribution") / "assets" / f"{name}.safetensors") as path:
        return load_file(Path(path))


@dataclass(frozen=True)
class ZooModel:
    """A classifier of the zoo.

    Attributes:
        build: makes the module with fresh weights.
        weights: reads its weights by name.
        settings: its preprocessing, as arguments of ``Classifier``.
        class_names: makes the names of its classes.
    """

    build: Callable[[], nn.Module]
    weights: Callable[[], dict[str, Tensor]]
    settings: Mapping[str, Any]
    class_names: Callable[[], tuple[str, ...]]


_CIFAR10: dict[str, Any] = {"size": INPUT_SIZE, "mean": MEAN, "std": STD, "interpolation": "bicubic"}
ZOO: dict[str, ZooModel] = {
    "imagenet": ZooModel(lite.build_lite, lite.lite_weights, lite.SETTINGS, imagenet_names),
    "cnn": ZooModel(build_cnn, partial(_asset, "cnn"), _CIFAR10, lambda: CLASS_NAMES),
    "vit": ZooModel(build_vit, partial(_asset, "vit"), _CIFAR10, lambda: CLASS_NAMES),
}
