"""A function that makes a classifier, for ``--model docs/examples/own_model.py:day_or_night``."""

import torch
from torch import nn

import attribution as at


def day_or_night(threshold: float = 0.5) -> at.Classifier:
    """Is the photo bright? A convolution that averages, and a head of two classes."""
    module = nn.Sequential(nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        module[0].weight.fill_(1 / 3)
        module[0].bias.fill_(-threshold)
        module[3].weight.copy_(torch.tensor([[-10.0], [10.0]]))
        module[3].bias.zero_()
    return at.Classifier(module, size=64, class_names=["night", "day"])
