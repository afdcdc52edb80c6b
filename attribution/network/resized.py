"""Networks at the size of a whole grid: GridPG and DiPart show n x n cells, each of the model's own size, as one image.

Convolutional networks take any size. A transformer has one position embedding for each patch, so a copy of it gets embeddings that are
resampled for the grid. The copy shares every other weight with the original, which is not changed. A network that would compute another
function on a grid than on a cell is refused; an example is windowed attention whose windows do not fit.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attribution.errors import NotApplicable
from attribution.hooks import evaluation_mode, removed_after

_POSITIONS = re.compile(r"(^|_)pos\w*emb|rel_pos_[hw]$")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_KEYWORD = "interpolate_pos_encoding"


@dataclass(frozen=True)
class Resized:
    """A network that takes images of another size.

    Attributes:
        module: the network itself where it takes the size, else a copy that shares its weights; submodules keep their names.
        interpolated: whether position embeddings, biases or rotary angles were resampled for the size. The network was never trained
            with resampled ones, which takes a grid further from its training distribution. Records should say so.
    """

    module: nn.Module
    interpolated: bool


def resized(module: nn.Module, size: tuple[int, int], image: tuple[int, int]) -> Resized:
    """Adapt a network to images of the size of a grid. The given network is not altered.

    The network itself is returned in two cases: a forward pass of one black image succeeds, or only a head of fixed size fails. Such a
    head is a linear layer (or batch norm) after a flatten, and its feature maps can be cut into cells before it. In neither case
    must the output be one row of C scores: a head that flattens with ``view(-1, k)``, or pools with a fixed kernel, runs and
    returns more.

    Otherwise a copy is changed: timm models by their ``set_input_size``, torchvision's vision transformer by ``interpolate_embeddings``
    (bicubic, corners aligned), and models with an ``interpolate_pos_encoding`` keyword (Hugging Face) by setting this keyword. They
    are also found inside other modules, such as one that normalises the image first. Prefix tokens keep their embeddings. Windows
    keep their size: a Swin stage with one window at the trained size has several on a grid, and shifts them.

    The copy shares parameters and persistent buffers with the original. Loading other weights in place changes both; replacing a
    parameter changes only one. Buffers that are not persistent (masks, indices, rotary tables) depend on the size, so the copy has
    its own. Hooks are not copied: a hook that records would record twice. The edits of hooks on the original are therefore missing
    in the copy. Only the hooks of ``torch.nn.utils`` (weight_norm, spectral_norm, pruning) are copied, because they compute
    weights.

    Args:
        module: the network, as trained at ``size``.
        size: (h, w) that it was trained at, pixels.
        image: (H, W) wanted, pixels.

    Raises:
        NotApplicable: the network cannot run at that size; its windows, patch merging or patches do not fit the size; or it scales
            every image to its own size and would see the grid as one cell.
    """
    if size == image:
        return Resized(module, False)
    refuse = partial(_refusal, module, size, image)
    first = _run(module, image)
    if first.flat_head:
        return Resized(module, False)
    if first.error is None:
        # The first convolution gets another size than the image, and the same one for images of two sizes: the network scales every
        # image to this size, and would see a grid as one cell.
        scaled = first.stem not in (None, image) and _run(module, size).stem == first.stem
        if scaled or first.misfit is not None:
            raise refuse(f"it scales every image to {_by(first.stem)} itself" if scaled and first.stem else first.misfit)
        return Resized(module, _resamples_positions(module, module))
    try:
        twin = _sharing_copy(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm tells how it resamples bias tables, which a user cannot change
            found = _adapt(twin, image)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise refuse(_first_line(error)) from None
    second = _run(twin, image) if found else first
    if second.error is not None or second.misfit is not None:
        raise refuse(second.error or second.misfit)
    return Resized(twin, _resamples_positions(module, twin))


def _refusal(module: nn.Module, size: tuple[int, int], image: tuple[int, int], reason: str | None) -> NotApplicable:
    return NotApplicable(
        f"{type(module).__name__} works on images of {_by(size)} and cannot take a grid of {_by(image)} ({reason}): "
        "use DiFull, which runs the cells one by one and needs no other size"
    )


def _by(sides: tuple[int, int]) -> str:
    return f"{sides[0]}x{sides[1]}"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:160] if lines else type(error).__name__


@dataclass(frozen=True)
class _Run:
    """The outcome of one forward pass.

    Attributes:
        error: message of the exception that ended it; None if it succeeded.
        flat_head: whether a head of fixed size raised that error.
        misfit: the first window or merging that did not fit its map.
        stem: (h, w) of the input of the first convolution.
    """

    error: str | None
    flat_head: bool
    misfit: str | None
    stem: tuple[int, int] | None


def _run(module: nn.Module, image: tuple[int, int]) -> _Run:
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    black = torch.zeros(1, 3, *image, dtype=weight.dtype, device=weight.device)
    heads: list[tuple[Any, Tensor]] = []  # those that run at the moment
    misfits: list[str] = []
    stems: list[tuple[int, int]] = []

    def enter(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            heads.append((layer, args[0]))

    def leave(layer: nn.Module, _args: Any, _output: Any) -> None:
        heads.clear()

    def measure(layer: nn.Module, args: tuple[Any, ...]) -> None:
        misfits.extend(filter(None, [_window_misfit(layer, args), _merging_misfit(layer, args)]))
        if isinstance(layer, nn.Conv2d) and args and isinstance(args[0], Tensor):
            stems.append((args[0].shape[-2], args[0].shape[-1]))

    dense = [m for m in module.modules() if isinstance(m, nn.Linear | nn.BatchNorm1d)]
    handles = [layer.register_forward_pre_hook(enter) for layer in dense]
    handles += [layer.register_forward_hook(leave) for layer in dense]
    handles += [layer.register_forward_pre_hook(measure) for layer in module.modules()]
    error = None
    flat_head = False
    with evaluation_mode(module), removed_after(handles), torch.no_grad():
        try:
            module(black)
        except torch.OutOfMemoryError:
            raise
        except Exception as raised:
            error = _first_line(raised)
            flat_head = (bool(heads) and _is_flat(*heads[-1])) or _fails_to_flatten(error, dense)
    return _Run(error, flat_head, misfits[0] if misfits else None, stems[0] if stems else None)


def _is_flat(layer: nn.Linear | nn.BatchNorm1d, received: Tensor) -> bool:
    """Whether a layer got a vector of another length than it takes, as when a head flattens a map of fixed size."""
    expected = layer.in_features if isinstance(layer, nn.Linear) else layer.num_features
    return received.ndim == 2 and received.shape[0] == 1 and received.shape[1] != expected


def _fails_to_flatten(error: str, dense: Sequence[nn.Module]) -> bool:
    """Whether ``view(n, k)`` or ``view(-1, k)`` failed in front of a linear layer that takes k numbers."""
    found = re.search(r"shape '\[(?:-1|1), (\d+)\]' is invalid for input of size", error)
    return found is not None and any(isinstance(m, nn.Linear) and m.in_features == int(found[1]) for m in dense)


def _window_misfit(layer: nn.Module, args: tuple[Any, ...]) -> str | None:
    window = _window(layer)
    if window is None:
        return None
    widths = {m.in_features for m in layer.modules() if isinstance(m, nn.Linear)}
    widths |= {m.normalized_shape[-1] for m in layer.modules() if isinstance(m, nn.LayerNorm)}
    sides = _map_sides(args, widths)
    if sides is None or all(side % step == 0 for side, step in zip(sides, window, strict=True)):
        return None
    return f"a map of {_by(sides)} does not divide into its windows of {_by(window)}"


def _window(layer: nn.Module) -> tuple[int, int] | None:
    """(h, w) of the windows that a layer cuts its map into, in positions; None for other layers."""
    window = getattr(layer, "window_size", getattr(layer, "ws", None))  # ws: timm's Twins
    if hasattr(layer, "window_resolution"):  # timm's EfficientViT-MSRA: the size that its attention was built for
        window = getattr(getattr(layer, "attn", None), "resolution", None)
    return _pair(window)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        value = (value, value)
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value):
        return value[0], value[1]
    return None


def _merging_misfit(layer: nn.Module, args: tuple[Any, ...]) -> str | None:
    """Why patch merging does not fit a map. It joins 2 x 2 neighbours and pads odd sides, which shifts the cells that follow."""
    reduction = getattr(layer, "reduction", None)
    if not isinstance(reduction, nn.Linear) or not args or not isinstance(args[0], Tensor):
        return None
    sides = _map_sides(args, {reduction.in_features // 4})
    if sides is None or args[0].shape[-1] * 4 != reduction.in_features or (sides[0] % 2 == 0 and sides[1] % 2 == 0):
        return None
    return f"a map of {_by(sides)} cannot be merged two by two"


def _map_sides(args: tuple[Any, ...], widths: set[int]) -> tuple[int, int] | None:
    """(h, w) of the map that a layer gets: [n, h, w, C] where C is one of the widths, else [n, C, h, w]; or [n, h w, C] and then (h, w)."""
    if not args or not isinstance(args[0], Tensor):
        return None
    shape = args[0].shape
    if len(shape) == 3 and len(args) > 1:
        sides = _pair(tuple(args[1]) if isinstance(args[1], tuple | list) else None)
        return sides if sides is not None and sides[0] * sides[1] == shape[1] else None
    if len(shape) != 4:
        return None
    return (shape[1], shape[2]) if shape[3] in widths else (shape[2], shape[3])


def _sharing_copy(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    for each in module.modules():
        for name, buffer in each._buffers.items():
            if buffer is not None:
                memo[id(buffer)] = buffer.detach().clone() if name in each._non_persistent_buffers_set else buffer
        # deepcopy refuses a tensor with a history, such as a weight that weight_norm computed. It is shared: nothing writes into it.
        memo.update({id(value): value for value in vars(each).values() if isinstance(value, Tensor) and not value.is_leaf})
        for hooks in (getattr(each, name) for name in _HOOKS):
            memo[id(hooks)] = OrderedDict((key, hook) for key, hook in hooks.items() if _makes_weights(hook))
    return copy.deepcopy(module, memo)


def _makes_weights(hook: Any) -> bool:
    return any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__)


def _adapt(module: nn.Module, image: tuple[int, int]) -> bool:
    """Change every part that depends on the image size, in place; False if there is none."""
    found = False
    for applies, change in _CHANGES:
        for part in list(_outermost(module, applies)):
            change(part, image)
            found = True
    return found


def _outermost(module: nn.Module, applies: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """The modules for which a test holds, without those inside them: a model passes the change on to its parts."""
    if applies(module):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child, applies)


def _takes(function: Any, keyword: str) -> bool:
    try:
        return keyword in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _is_timm(module: nn.Module) -> bool:
    # PatchEmbed has the method too, but alone it would leave the embeddings that are added to its patches behind
    return hasattr(module, "forward_features") and _takes(getattr(module, "set_input_size", None), "img_size")


def _resize_timm(model: Any, image: tuple[int, int]) -> None:
    patch = _pair(getattr(getattr(model, "patch_embed", None), "patch_size", None))
    if patch is not None:
        _check_patches(image, patch)
    model.set_input_size(img_size=image, **_trained_windows(model))


def _check_patches(image: tuple[int, int], patch: tuple[int, int]) -> None:
    if image[0] % patch[0] or image[1] % patch[1]:
        raise ValueError(f"its patches of {_by(patch)} do not divide the image")


def _trained_windows(model: Any) -> dict[str, Any]:
    """Arguments of set_input_size that keep the windows and so their bias tables. By default timm scales windows with the image."""
    if _takes(model.set_input_size, "grid_size"):  # MaxViT: one size for all stages
        partitions = [pair for m in model.modules() if (pair := _pair(getattr(m, "partition_size", None)))]
        return {"window_size": partitions[0], "grid_size": partitions[0]} if partitions else {}
    if not _takes(model.set_input_size, "window_size"):
        return {}
    stages: nn.Module = model.layers if hasattr(model, "layers") else model.stages
    windows = [next(pair for m in stage.modules() if (pair := _pair(getattr(m, "window_size", None)))) for stage in stages.children()]
    return {"window_size": windows[0] if len(set(windows)) == 1 else tuple(windows)}


def _is_torchvision_vit(module: nn.Module) -> bool:
    return hasattr(module, "image_size") and hasattr(module, "seq_length") and hasattr(getattr(module, "encoder", None), "pos_embedding")


def _resize_torchvision_vit(model: Any, image: tuple[int, int]) -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings

    if image[0] != image[1]:
        raise ValueError("torchvision's vision transformer takes square images only")
    _check_patches(image, (model.patch_size, model.patch_size))
    old = model.encoder.pos_embedding
    with torch.no_grad():
        state = interpolate_embeddings(image[0], model.patch_size, OrderedDict({"encoder.pos_embedding": old}))
    new = state["encoder.pos_embedding"]
    model.encoder.pos_embedding = nn.Parameter(new, requires_grad=old.requires_grad)
    model.image_size, model.seq_length = image[0], new.shape[1]


def _is_hugging_face(module: nn.Module) -> bool:
    return _takes(module.forward, _KEYWORD)


def _resize_hugging_face(model: nn.Module, _image: tuple[int, int]) -> None:
    # on the instance rather than in a wrapper, so that layers keep the names that users know
    vars(model)["forward"] = partial(model.forward, **{_KEYWORD: True})


def _resamples_positions(module: nn.Module, twin: nn.Module) -> bool:
    """Whether a network resamples positions at another size: embeddings of the patches, or tables that are computed anew."""
    named = [*twin.named_parameters(), *twin.named_buffers(), *twin.named_modules()]
    embedded = any(_POSITIONS.search(name.rpartition(".")[2]) and not isinstance(part, nn.Identity) for name, part in named)
    rotated = any(getattr(part, "rope", None) is not None for part in twin.modules())
    return embedded or rotated or _new_tables(module, twin)


def _new_tables(module: nn.Module, twin: nn.Module) -> bool:
    """Whether a tensor of the copy differs from the original's. The masks of shifted windows do not count: they hold no positions."""
    before = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    after = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    changed = (name for name, tensor in after.items() if name not in before or not _same(before[name], tensor))
    return any(not name.endswith("attn_mask") for name in changed)


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second))


_CHANGES: tuple[tuple[Callable[[nn.Module], bool], Callable[[Any, tuple[int, int]], None]], ...] = (
    (_is_timm, _resize_timm),
    (_is_torchvision_vit, _resize_torchvision_vit),
    (_is_hugging_face, _resize_hugging_face),
)
