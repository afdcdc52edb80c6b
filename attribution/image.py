"""Read images of any kind as one form: a float32 RGB tensor [3, H, W] in [0, 1]."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from attribution.checks import check_whole
from attribution.errors import UserError, describe
from attribution.files import read_file

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"})
MAX_SIDE = 512
_FILTERS = threading.Lock()  # Python's filters of warnings are shared by all threads
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # formats that start another program, such as EPS, are left out
_INTEGER_16_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
_BITS, _WHITE_IS_ZERO, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF

ImageSource = str | Path | bytes | Image.Image | np.ndarray | Tensor


def load_image(source: ImageSource) -> Tensor:
    """Read an image as a float32 RGB tensor, the only form that the library computes with.

    Args:
        source: a path or the bytes of a JPEG (also CMYK), PNG (8 or 16 bit, palette, gray, alpha), WebP, TIFF, BMP or GIF
            file (the first frame); a PIL image; an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, uint16, or
            float in [0, 1]; a tensor [3, H, W], [1, H, W] or [4, H, W], also with a leading dimension of 1, of uint8, or float
            in [0, 1]. EXIF rotation is applied, transparent pixels are blended with white, colour profiles are ignored. Files and PIL
            images of signed or 32-bit whole numbers, as of a scanner or a map of heights, are refused.

    Returns:
        float32 [3, H, W], RGB in [0, 1], on the CPU (a tensor stays on its device).

    Raises:
        UserError: a missing, empty or damaged file, a file that is no image, more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``,
            or another shape, dtype or range.
    """
    if isinstance(source, Tensor):
        if source.is_meta or source.layout != torch.strided:
            raise UserError("the image is a sparse tensor, or one of the meta device without values: give a dense one")
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, describe(source))
    if isinstance(source, Image.Image):
        return _from_pil(source, "the PIL image")
    if isinstance(source, bytes):
        return _from_bytes(source, "the image bytes")
    if isinstance(source, str) and not source:
        raise UserError("the path of the image is empty: give a path, PIL image, array [H, W, 3] or tensor [3, H, W]")
    if isinstance(source, str | Path):
        return _from_bytes(_read_file(Path(source)), str(source))
    raise UserError(f"cannot read an image from {describe(source)}: give a path, PIL image, array [H, W, 3] or tensor [3, H, W]")


def image_files(folder: str | Path) -> list[Path]:
    """The image files at any depth below a folder, sorted.

    Links to files and folders are followed. A link to a folder that it lies in ends there. Names that begin with a dot are left out, as
    are the files that systems and editors put beside images ("._photo.png", ".ipynb_checkpoints").

    Raises:
        UserError: a folder that cannot be listed, or a link without a target where a folder of images may have been.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}): its images would be left out; make it readable")

    found: list[Path] = []
    above: dict[str, tuple[str, ...]] = {str(folder): (os.path.realpath(folder),)}  # of a folder: real paths of it and of those above it
    for path, names, files in os.walk(folder, followlinks=True, onerror=refuse):
        inner = {name: os.path.realpath(os.path.join(path, name)) for name in names if not name.startswith(".")}
        names[:] = [name for name, real in inner.items() if real not in above[path]]
        above.update({os.path.join(path, name): (*above[path], inner[name]) for name in names})
        for file in (Path(path, name) for name in files if not name.startswith(".")):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                found.append(file)
            elif not file.suffix and file.is_symlink() and not file.exists():
                raise UserError(f"{file} is a link to {os.readlink(file)}, which does not exist: mend the link, or remove it")
    return sorted(found)


def demo_image_path() -> Path:
    """The path of the default photo, Chelsea the cat, inside the installed scikit-image; nothing is downloaded."""
    return demo_image_paths()[0]


def demo_image_paths() -> list[Path]:
    """The paths of the demo's photos, a cat and a cup of coffee with a spoon, inside the installed scikit-image."""
    import skimage

    paths = [Path(skimage.__file__).parent / "data" / name for name in ("chelsea.png", "coffee.png")]
    for path in paths:
        if not path.is_file():
            raise UserError(f"the demo photo is missing from scikit-image ({path.name}): reinstall scikit-image, or give an image")
    return paths


def limit_size(image: Tensor, max_side: int | None = MAX_SIDE) -> Tensor:
    """Shrink an image [3, H, W], antialiased, to a longer side of max_side pixels. A smaller image is returned unchanged."""
    if max_side is not None:
        check_whole("max_side", max_side, 1)
    height, width = image.shape[-2:]
    if max_side is None or max(height, width) <= max_side:
        return image
    scale = max_side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def _read_file(path: Path) -> bytes:
    try:
        data = read_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give an image file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return data


def _from_bytes(data: bytes, name: str) -> Tensor:
    if not data:
        raise UserError(f"{name} is empty (0 bytes): give an image file")
    try:
        with _FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
            picture.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: shrink it first, "
            "or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
        ) from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is not an image that Pillow can read: expected JPEG, PNG, WebP, TIFF, BMP or GIF") from None
    except Exception as error:  # a hostile or damaged file can raise any exception inside a decoder
        raise UserError(f"{name} is a damaged image ({error or type(error).__name__}): get a complete copy of the file") from None
    return _from_pil(picture, name)


def _from_pil(picture: Image.Image, name: str) -> Tensor:
    tags: Mapping[int, Any] = getattr(picture, "tag_v2", {})
    if 2 in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1)) or (picture.mode == "I" and picture.format != "PNG"):
        raise UserError(
            f"{name} holds signed or 32-bit whole numbers, which do not say what is black and what is white: expected 8 or 16 bits without "
            "sign; save it so, or give an array of floats in [0, 1]"
        )
    inverted, clear = tags.get(_WHITE_IS_ZERO) == 0, picture.info.get("transparency")
    white = 4095 if np.max(tags.get(_BITS, 16)) == 12 else 65535
    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode in (*_INTEGER_16_MODES, "I"):
            values = np.asarray(picture).astype(np.float32)
            shown = np.where(values == clear, white, white - values if inverted else values)
            return _from_array(shown / np.float32(white), name)
        if picture.mode == "F":
            return _from_array(1 - np.asarray(picture) if inverted else np.asarray(picture), name)
        if picture.mode == "La":
            picture = picture.convert("LA")
        if picture.has_transparency_data:
            return _from_array(np.asarray(picture.convert("RGBA")), name)
        return _from_array(np.asarray(picture.convert("RGB")), name)
    except UserError:
        raise
    except Exception as error:  # damaged EXIF blocks and palettes fail here
        raise UserError(f"{name} is a damaged image ({error or type(error).__name__}): get a complete copy of the file") from None


def _from_array(array: np.ndarray, name: str) -> Tensor:
    array = np.asarray(array)  # a matrix has two dimensions whatever is done to it
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise UserError(
            f"an image array of shape {list(array.shape)} cannot be read: expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] "
            "(a tensor is read as [3, H, W])"
        )
    if array.dtype.newbyteorder("=") == np.uint16:
        scaled = torch.from_numpy(array.astype(np.float32) / np.float32(65535))
    elif array.dtype == np.uint8:
        scaled = torch.from_numpy(array.copy()).float() / 255
    elif array.dtype.kind == "f":
        scaled = _checked_unit_range(torch.from_numpy(array.astype(np.float32)), name)
    else:
        raise UserError(f"an image array of dtype {array.dtype} cannot be read: expected uint8, uint16, or float in [0, 1]")
    return _to_rgb(scaled.permute(2, 0, 1))


def _from_tensor(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.ndim == 4 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4) or 0 in tensor.shape:
        several = "; for several images use explain_many" if tensor.ndim == 4 else ""
        raise UserError(
            f"an image tensor of shape {list(tensor.shape)} cannot be read: expected [3, H, W] (an array is read as [H, W, 3]){several}"
        )
    if tensor.dtype == torch.uint8:
        return _to_rgb(tensor.float() / 255)
    if not tensor.is_floating_point():
        raise UserError(f"an image tensor of dtype {tensor.dtype} cannot be read: expected uint8, or float in [0, 1]")
    return _to_rgb(_checked_unit_range(tensor.float(), "the image tensor"))


def _checked_unit_range(values: Tensor, name: str) -> Tensor:
    low, high = values.min().item(), values.max().item()
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # NaN fails both comparisons
        raise UserError(f"{name} has float values from {low:.4g} to {high:.4g}: expected [0, 1], before any normalisation")
    return values.clamp(0, 1)


def _to_rgb(image: Tensor) -> Tensor:
    if image.shape[0] == 1:
        image = image.expand(3, -1, -1)
    if image.shape[0] == 4:
        alpha = image[3:]
        image = image[:3] * alpha + (1 - alpha)
    return image.contiguous()


def describe_size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
