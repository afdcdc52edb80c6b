"""The digest of a model's weights: computed once, and again when they change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_known: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def weights_digest(module: nn.Module, forward_kwargs: Mapping[str, Any]) -> str:
    """sha256 over the names, shapes and bytes of a module's parameters and buffers, and over what its forward is given besides.

    ``torch.compile`` changes nothing. The module is hashed again when a tensor was replaced or changed, also through ``.data``.
    """
    weights = _of_module(module)
    if not forward_kwargs:
        return weights
    digest = hashlib.sha256(weights.encode())
    for name in sorted(forward_kwargs):
        digest.update(f"{name} {type(forward_kwargs[name]).__name__}".encode())
        tensors = list(_tensors(name, forward_kwargs[name]))
        digest.update(b"".join(map(_bytes, (tensor for _, tensor in tensors))) if tensors else repr(forward_kwargs[name]).encode())
    return digest.hexdigest()


def _of_module(module: nn.Module) -> str:
    state = module.state_dict()
    found = (item for name in state for item in _tensors(name.replace("_orig_mod.", ""), state[name]))
    tensors = sorted(found, key=lambda item: item[0])
    sums = torch.stack([_sum(tensor) for _, tensor in tensors]).tolist() if tensors else []
    state_of_all = [(name, *_place(tensor), total) for (name, tensor), total in zip(tensors, sums, strict=True)]
    if module in _known and _known[module][0] == state_of_all:
        return _known[module][1]
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    if not tensors and isinstance(module, torch.jit.ScriptModule):  # frozen: its weights are constants of its code
        code, constants = module.code_with_constants
        digest.update(code.encode() + b"".join(_bytes(each) for each in constants.const_mapping.values() if isinstance(each, Tensor)))
    _known[module] = (state_of_all, digest.hexdigest())
    return _known[module][1]


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an entry of a state dict: itself, or those that a quantised layer packs."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple | list):
        for index, each in enumerate(value):
            yield from _tensors(f"{name}.{index}", each)


def _flat(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.dequantize() if tensor.is_quantized else tensor).contiguous().flatten().view(torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return _flat(tensor).cpu().numpy().tobytes()


def _sum(tensor: Tensor) -> Tensor:
    """The sum of all 64-bit words modulo 2^64: one fast pass, which shows a change that no counter of versions does."""
    flat = _flat(tensor)
    flat = flat.clone() if flat.storage_offset() % 8 else flat
    whole = len(flat) // 8 * 8
    return flat[:whole].view(torch.int64).sum().cpu() + flat[whole:].sum().cpu()


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr() if not tensor.is_quantized else 0, 0 if tensor.is_inference() else tensor._version
