"""Small random networks of every kind that the grid settings tell apart, and what each setting computes, written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from networks import tiny_vit
from torch import Tensor, nn

import attribution as at

SIDE = 16
CLASSES = 5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def drawn(module: nn.Module, seed: int = 0, deviation: float = 0.3) -> nn.Module:
    """The module in evaluation mode with every parameter and running mean drawn, running variances near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * deviation)
            if name.endswith("running_var"):
                buffer.copy_(1 + torch.rand(buffer.shape, generator=generator))
    return module.eval()


class Pooled(nn.Module):
    """Convolutions, global average, one linear layer; without padding where a test needs every position to be treated alike."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 10, 3, padding=1, stride=2),
            nn.ReLU(),
        )
        self.fc = nn.Linear(10, CLASSES)

    def head(self, maps: Tensor) -> Tensor:
        return self.fc(maps.mean(dim=(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Vgg(nn.Module):
    """Three linear layers on a map of 4 x 4, with adaptive pooling in front of them (torchvision) or without."""

    def __init__(self, adaptive: bool = True, reshape: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 7, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(7, 7, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        if adaptive:
            self.avgpool = nn.AdaptiveAvgPool2d((4, 4))
        self.reshape = reshape
        self.classifier = nn.Sequential(
            nn.Linear(7 * 16, 12), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(12, 9), nn.ReLU(inplace=True), nn.Linear(9, CLASSES)
        )

    def head(self, maps: Tensor) -> Tensor:
        return self.classifier(torch.flatten(maps, 1))

    def convolved(self, maps: Tensor) -> Tensor:
        """The linear layers as convolutions (4 x 4, then 1 x 1), their logits averaged over all positions."""
        first, second, third = (layer for layer in self.classifier if isinstance(layer, nn.Linear))
        y = F.conv2d(maps, first.weight.view(12, 7, 4, 4), first.bias).relu()
        y = F.conv2d(y, second.weight[:, :, None, None], second.bias).relu()
        return F.conv2d(y, third.weight[:, :, None, None], third.bias).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x)
        if hasattr(self, "avgpool"):
            maps = self.avgpool(maps)
        return self.classifier(maps.view(-1, 7 * 16)) if self.reshape else self.head(maps)


class FixedPooling(nn.Module):
    """A global average by a kernel of the map's own size, as many networks for CIFAR-10 have it: it fails on a larger image."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.ReLU()
        )
        self.fc = nn.Linear(8, CLASSES)

    def head(self, maps: Tensor) -> Tensor:
        return self.fc(maps.mean(dim=(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(self.features(x), 4)
        return self.fc(y.view(len(y), -1))


class Residual(nn.Module):
    """One ReLU module for the whole network, as a block of torchvision calls its own twice, and a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU()
        self.first = nn.Conv2d(6, 8, 3, padding=1, stride=2)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(6, 8, 1, stride=2)
        self.last = nn.Conv2d(8, 10, 3, padding=1)
        self.fc = nn.Linear(10, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.second(self.relu(self.first(x))) + self.shortcut(x))
        return self.relu(self.last(x))

    def head(self, maps: Tensor) -> Tensor:
        return self.fc(maps.mean(dim=(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Tokens(nn.Module):
    """A transformer without attention: a prefix token and patches through linear layers; the head reads the mean of the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.prefix = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(3)))
        self.fc = nn.Linear(8, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([self.prefix.expand(len(x), -1, -1), tokens], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x)[:, 1:].mean(dim=1))


class Last(nn.Module):
    """Channels last, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(3)))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x).permute(0, 2, 3, 1)).mean(dim=(1, 2)))


@dataclass(frozen=True)
class Kind:
    """A network, and its logits under each setting from model inputs [1, 3, n h, n w] of a grid.

    ``final`` is the map that DiPart cuts, [1, C, h, w] of an input of any size; ``head`` reads such a map of a cell, ``whole`` one of
    a grid.
    """

    module: nn.Module
    final: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    whole: Callable[[Tensor], Tensor]

    def logits(self, setting: str, inputs: Tensor, cell: int, n: int) -> Tensor:
        if setting == "gridpg":
            return self.whole(self.final(inputs))
        if setting == "difull":
            return self.head(self.final(cut(inputs, cell, n)))
        return self.head(cut(self.final(inputs), cell, n))


def cut(maps: Tensor, cell: int, n: int) -> Tensor:
    """Cell number so-and-so of [.., n h, n w], row by row."""
    height, width = maps.shape[-2] // n, maps.shape[-1] // n
    top, left = cell // n * height, cell % n * width
    return maps[..., top : top + height, left : left + width]


def kinds() -> dict[str, Kind]:
    pooled, residual = drawn(Pooled(), 1), drawn(Residual(), 2)
    fixed = drawn(FixedPooling(), 8)
    vggs = {"vgg": drawn(Vgg(), 3), "flat": drawn(Vgg(adaptive=False), 4), "reshaping": drawn(Vgg(adaptive=False, reshape=True), 5)}
    tokens, last = drawn(Tokens(), 6, 0.5), drawn(Last(), 7, 0.5)

    def token_map(x: Tensor) -> Tensor:
        side = x.shape[-1] // 4
        return tokens.features(x)[:, 1:].transpose(1, 2).unflatten(2, (x.shape[-2] // 4, side))

    def token_head(maps: Tensor) -> Tensor:
        return tokens.fc(maps.mean(dim=(2, 3)))

    def last_map(x: Tensor) -> Tensor:
        return last.blocks(last.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def last_head(maps: Tensor) -> Tensor:
        return last.fc(maps.mean(dim=(2, 3)))

    found = {
        "pooled": Kind(pooled, pooled.features, pooled.head, pooled.head),
        "fixed pooling": Kind(fixed, fixed.features, fixed.head, fixed.head),
        "residual": Kind(residual, residual.features, residual.head, residual.head),
        "tokens": Kind(tokens, token_map, token_head, token_head),
        "channels last": Kind(last, last_map, last_head, last_head),
    }
    return found | {name: Kind(each, each.features, each.head, each.convolved) for name, each in vggs.items()}


def classifier(module: nn.Module | Callable[[Tensor], object], side: int | tuple[int, int] = SIDE, **options: object) -> at.Classifier:
    settings = {"mean": MEAN, "std": STD, "scores": "logits", "name": "toy", **options}
    return at.Classifier(module, size=side, **settings)


def grid(n: int = 2, side: int | tuple[int, int] = SIDE, seed: int = 0, count: int = 1) -> Tensor:
    """float32 [count, 3, n h, n w] in [0, 1]."""
    height, width = (side, side) if isinstance(side, int) else side
    return torch.rand(count, 3, n * height, n * width, generator=torch.Generator().manual_seed(seed))


def normalised(images: Tensor) -> Tensor:
    """The model inputs of images [..., 3, h, w] of the size that they come in."""
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def class_token_vit() -> nn.Module:
    """timm's, 4 x 4 patches of 4 at 16 pixels; its head reads the class token."""
    return tiny_vit(3, depth=3)
