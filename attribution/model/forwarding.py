"""Forward passes: devices, precisions, batch sizes, and batches that do not fit into memory."""

from __future__ import annotations

import torch
from torch import Tensor

from attribution.errors import UserError

PRECISIONS = ("float32", "bfloat16", "float16")


def automatic_batch_size(pixels: int, device: torch.device) -> int:
    """Images forwarded at once: on a CPU few enough for the caches, on an accelerator enough to fill it."""
    least, budget = (16, 2**16) if device.type == "cpu" else (32, 2**23)
    return max(least, min(512, budget // max(1, pixels)))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a forward pass failed for want of memory, on an accelerator or on the CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def even_chunks(rows: Tensor, most: int) -> tuple[Tensor, ...]:
    """Rows in as few parts of at most ``most`` as will do, of nearly equal size: a small last batch wastes a pass."""
    return rows.tensor_split(max(1, -(-len(rows) // most)))


def resolve_device(device: str | torch.device) -> torch.device:
    """A device by name; "auto" is CUDA, else Apple's GPU, else the CPU.

    Raises:
        UserError: a name that torch does not know or a device that this machine does not have.
    """
    if str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.zeros(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"device {str(device)!r} cannot be used ({reason}): expected auto, cpu, cuda, cuda:N or mps") from None
    return resolved
