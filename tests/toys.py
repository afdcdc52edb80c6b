"""Classifiers whose scores are known in closed form, and folders of small images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import attribution as at

SIDE = 8


class Linear(nn.Module):
    """Two logits: a weighted sum of all pixels, and zero."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, SIDE, SIDE, generator=generator) / SIDE)

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.weight).sum(dim=(1, 2, 3))
        return torch.stack([score, torch.zeros_like(score)], dim=1)


class SometimesNaN(Linear):
    """Not a number for images whose first pixel is red."""

    def forward(self, x: Tensor) -> Tensor:
        broken = x[:, :1, :1, :1].amax(dim=(1, 2, 3)) > 0.99
        return torch.where(broken[:, None], torch.nan, super().forward(x))


def linear_classifier(seed: int = 0, module: type[Linear] = Linear) -> at.Classifier:
    return at.Classifier(module(seed), size=SIDE, class_names=["yes", "no"], scores="logits", name="linear", batch_size=64)


def image_folder(folder: Path, count: int = 6, side: int = SIDE) -> Path:
    """A flat folder of random images 0.png, 1.png ..., none of whose first pixels is red."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        pixels = generator.integers(0, 250, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder
