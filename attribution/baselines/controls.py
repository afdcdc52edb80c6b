"""Null controls: maps that know nothing of the classifier. A metric that they satisfy shows nothing about a method."""

from __future__ import annotations

import torch
from skimage import filters
from torch import Tensor

from attribution.errors import UserError
from attribution.task import Task


def random(task: Task) -> Tensor:
    """Independent uniform values, one for each pixel of the image."""
    return torch.rand(task.image.shape[1:], generator=torch.Generator().manual_seed(task.seed))


def constant(task: Task) -> Tensor:
    """The same value everywhere: what remains is how ties are broken."""
    return torch.ones(task.image.shape[1:])


def center_prior(task: Task, *, width: float = 0.25) -> Tensor:
    """A Gaussian at the centre of the image, its standard deviation a share of each side: photographers centre their subject."""
    if not width > 0:
        raise UserError(f"width is {width}: expected a positive share of the image's sides")
    axes = [torch.linspace(-0.5, 0.5, side) if side > 1 else torch.zeros(1) for side in task.image.shape[1:]]
    vertical, horizontal = (torch.exp(-axis.square() / (2 * width**2)) for axis in axes)
    return vertical[:, None] * horizontal


def edge_filter(task: Task) -> Tensor:
    """The Sobel gradient magnitude of the gray image (Adebayo et al., NeurIPS 2018, compare their edge detector)."""
    gray = task.image.cpu().mean(dim=0).double().numpy()
    return torch.from_numpy(filters.sobel(gray)).float()
