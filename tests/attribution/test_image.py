from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch import Tensor

import attribution as at
from attribution.image import limit_size

HEIGHT, WIDTH = 24, 37
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0 : 1 : HEIGHT * 1j, 0 : 1 : WIDTH * 1j], 0.3), axis=-1)
RGB = (SMOOTH * 255).round().astype(np.uint8)
GRAY = RGB[:, :, 1].copy()
ALPHA = RGB[:, :, 0].copy()
RGBA = np.dstack([RGB, ALPHA])
GRAY16 = (SMOOTH[:, :, 1] * 65535).round().astype(np.uint16)
GRAY_FLOAT = SMOOTH[:, :, 1].astype(np.float32)
PALETTE = [(0, 0, 0), (255, 10, 20), (30, 200, 40), (90, 90, 250)]
INDICES = (np.arange(HEIGHT)[:, None] // 3 + np.arange(WIDTH) // 5) % 4
COLOURS = np.array(PALETTE, np.uint8)[INDICES]
TRANSPARENT = np.dstack([COLOURS, np.where(INDICES == 2, 0, 255).astype(np.uint8)])


def truth(array: np.ndarray) -> np.ndarray:
    """float64 [3, H, W] by definition: scaled by the type's range, gray repeated, alpha over white."""
    scale = {"uint8": 255, "uint16": 65535}.get(array.dtype.newbyteorder("=").name, 1)
    values = array.astype(np.float64) / scale
    values = values if values.ndim == 3 else values[:, :, None]
    if values.shape[2] == 4:
        values = values[:, :, :3] * values[:, :, 3:] + 1 - values[:, :, 3:]
    return np.broadcast_to(values, (*values.shape[:2], 3)).transpose(2, 0, 1)


def assert_is(image: Tensor, array: np.ndarray, tolerance: float = 1e-6) -> None:
    assert image.dtype == torch.float32
    assert image.device.type == "cpu"
    assert image.is_contiguous()
    assert 0 <= image.min() <= image.max() <= 1
    expected = truth(array)
    assert image.shape == expected.shape
    assert np.abs(image.numpy() - expected).max() <= tolerance


def palette_image() -> Image.Image:
    picture = Image.new("P", (WIDTH, HEIGHT))
    picture.putdata(INDICES.ravel().tolist())
    picture.putpalette([value for colour in PALETTE for value in colour])
    return picture


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


FORMATS = {
    "rgb.png": (Image.fromarray(RGB), {}, RGB, 0),
    "gray.png": (Image.fromarray(GRAY), {}, GRAY, 0),
    "gray16.png": (Image.fromarray(GRAY16), {}, GRAY16, 0),
    "gray-alpha.png": (Image.fromarray(np.dstack([GRAY, ALPHA])), {}, np.dstack([GRAY, GRAY, GRAY, ALPHA]), 0),
    "rgba.png": (Image.fromarray(RGBA), {}, RGBA, 0),
    "palette.png": (palette_image(), {}, COLOURS, 0),
    "palette-transparent.png": (palette_image(), {"transparency": 2}, TRANSPARENT, 0),
    "bilevel.png": (Image.fromarray(GRAY > 99), {}, np.where(GRAY > 99, 255, 0).astype(np.uint8), 0),
    "rgb.bmp": (Image.fromarray(RGB), {}, RGB, 0),
    "rgb.tif": (Image.fromarray(RGB), {}, RGB, 0),
    "gray16.tiff": (Image.fromarray(GRAY16), {}, GRAY16, 0),
    "big-endian16.tif": (Image.frombytes("I;16B", (WIDTH, HEIGHT), GRAY16.astype(">u2").tobytes()), {}, GRAY16, 0),
    "float.tif": (Image.fromarray(GRAY_FLOAT), {}, GRAY_FLOAT, 0),
    "lossless.webp": (Image.fromarray(RGB), {"lossless": True}, RGB, 0),
    "lossless-alpha.webp": (Image.fromarray(RGBA), {"lossless": True, "exact": True}, RGBA, 0),
    "lossy.webp": (Image.fromarray(RGB), {"quality": 95}, RGB, 0.04),
    "rgb.jpg": (Image.fromarray(RGB), {"quality": 95, "subsampling": 0}, RGB, 0.02),
    "gray.jpeg": (Image.fromarray(GRAY), {"quality": 95}, GRAY, 0.02),
    "cmyk.jpg": (Image.fromarray(RGB).convert("CMYK"), {"quality": 95, "subsampling": 0}, RGB, 0.03),
    "first-frame.gif": (palette_image(), {"save_all": True, "append_images": [Image.new("P", (WIDTH, HEIGHT))] * 2}, COLOURS, 0),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_values_that_were_written(name: str, tmp_path: Path) -> None:
    picture, options, array, tolerance = FORMATS[name]
    path = tmp_path / name
    picture.save(path, **options)
    image = at.load_image(path)
    assert_is(image, array, tolerance + 1e-6)
    for source in (str(path), path.read_bytes(), Image.open(io.BytesIO(path.read_bytes()))):
        assert torch.equal(at.load_image(source), image)


def tiff(values: np.ndarray, sample_format: int = 1, photometric: int = 1) -> bytes:
    """A little-endian TIFF of one channel by hand; sample format 2 is signed, 3 is float, photometric 0 has its white at 0."""
    data, (height, width), bits = values.tobytes(), values.shape, 8 * values.dtype.itemsize
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def test_tiffs_whose_white_is_zero_are_inverted() -> None:
    for values, sample_format, truth in ((GRAY, 1, 255 - GRAY), (GRAY16, 1, 65535 - GRAY16), (GRAY_FLOAT, 3, 1 - GRAY_FLOAT)):
        even = values[:, :36]
        assert_is(at.load_image(tiff(even, sample_format)), even)
        assert_is(at.load_image(tiff(even, sample_format, photometric=0)), truth[:, :36])


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("<i2", -1000, 3000), ("<i2", 0, 30000), ("<u4", 0, 2**31), ("<i4", 0, 65535), ("i1", -100, 100)]
)
def test_whole_numbers_without_a_white_are_refused(dtype: str, low: int, high: int) -> None:
    """They were clipped to black, or read with another white."""
    values = np.linspace(low, high, 24).round().astype(dtype).reshape(4, 6)
    data = tiff(values, 1 if dtype == "<u4" else 2)
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(at.UserError, match=r"holds signed or 32-bit whole numbers.*expected 8 or 16 bits without sign"):
            at.load_image(source)
    with pytest.raises(at.UserError, match="the PIL image holds signed or 32-bit whole numbers"):
        at.load_image(Image.fromarray(RGB).convert("I"))


def test_the_transparent_gray_of_a_16_bit_png_is_white() -> None:
    values = np.array([[0, 500, 30000, 500]], np.uint16)
    assert_is(at.load_image(encoded(Image.fromarray(values), "png", transparency=500)), np.array([[0, 65535, 30000, 65535]], np.uint16))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_of_pil_shows_the_same_picture(mode: str) -> None:
    """A gray square on white survives every mode, up to the rounding of its colour space."""
    pixels = np.full((6, 8, 3), 255, np.uint8)
    pixels[2:4, 2:5] = 0 if mode == "1" else 100
    picture = Image.fromarray(pixels)
    between = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    converted = (picture if between is None else picture.convert(between)).convert(mode)
    assert converted.mode == mode
    assert_is(at.load_image(converted), pixels, 0.02)


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, RGB),
        (2, RGB[:, ::-1]),
        (3, RGB[::-1, ::-1]),
        (4, RGB[::-1]),
        (5, RGB.transpose(1, 0, 2)),
        (6, np.rot90(RGB, -1)),
        (7, RGB[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(RGB)),
    ],
)
def test_exif_rotation_is_applied(orientation: int, shown: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), "png", exif=exif)
    assert_is(at.load_image(data), shown)
    assert_is(at.load_image(Image.open(io.BytesIO(data))), shown)


@pytest.mark.parametrize(
    "array",
    [
        RGB,
        RGB[::-1],
        RGB[:, ::2],
        GRAY,
        GRAY[:, :, None],
        RGBA,
        GRAY16,
        GRAY16.astype(">u2"),
        SMOOTH,
        SMOOTH.astype(np.float16),
        GRAY_FLOAT,
    ],
    ids=["rgb", "flipped", "strided", "gray", "gray1", "rgba", "uint16", "big-endian", "float64", "float16", "float32"],
)
def test_arrays(array: np.ndarray) -> None:
    before = array.copy()
    image = at.load_image(array)
    assert_is(image, array)
    image.zero_()
    assert np.array_equal(array, before)


@pytest.mark.parametrize(
    "array", [RGB, GRAY[:, :, None], RGBA, SMOOTH.astype(np.float32), SMOOTH], ids=["rgb", "gray", "rgba", "float", "double"]
)
@pytest.mark.parametrize("leading", [False, True])
def test_tensors(array: np.ndarray, leading: bool) -> None:
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    before = tensor.clone()
    image = at.load_image(tensor[None] if leading else tensor)
    assert_is(image, array)
    image.zero_()
    assert torch.equal(tensor, before)


def test_a_tensor_with_a_gradient_is_detached() -> None:
    assert not at.load_image(torch.rand(3, 4, 4, requires_grad=True)).requires_grad


@given(
    array=st.sampled_from([np.uint8, np.uint16, np.float32, np.float64]).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(lambda size: st.sampled_from([size, *((*size, c) for c in (1, 3, 4))])),
            elements=st.floats(0, 1, width=32) if np.dtype(dtype).kind == "f" else None,
        )
    )
)
@settings(max_examples=60, deadline=None)
def test_arrays_come_back_at_every_shape_and_type(array: np.ndarray) -> None:
    assert_is(at.load_image(array), array)
    if array.dtype == np.uint8 and array.shape[-1] != 1:
        assert torch.equal(at.load_image(encoded(Image.fromarray(array), "png")), at.load_image(array))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing.png", lambda path: None, r"missing\.png: no such file"),
        ("folder.png", lambda path: path.mkdir(), r"folder\.png is a folder: give an image file"),
        ("empty.png", lambda path: path.touch(), r"empty\.png is empty \(0 bytes\)"),
        ("text.jpg", lambda path: path.write_text("not a picture at all\n" * 9), r"text\.jpg is not an image .* expected JPEG, PNG"),
        ("nul\0byte.png", lambda path: None, "cannot be read: .*null byte"),
        ("x" * 5000, lambda path: None, "cannot be read: File name too long"),
    ],
    ids=["missing", "folder", "empty", "text", "null-byte", "too-long"],
)
def test_unreadable_paths(name: str, make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(at.UserError, match=message):
        at.load_image(tmp_path / name)


@pytest.mark.parametrize("name", ["rgb.png", "rgb.jpg", "rgb.bmp", "rgb.tif", "lossless.webp"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_truncated_files(name: str, share: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    whole = tmp_path / name
    Image.fromarray(noise).save(whole, **FORMATS[name][1])
    data = whole.read_bytes()
    path = tmp_path / f"cut-{name}"
    path.write_bytes(data[: int(len(data) * share)])
    for source in (path, path.read_bytes()):
        with pytest.raises(at.UserError, match=r"is a damaged image \(.+\): get a complete copy|is not an image that Pillow can read"):
            at.load_image(source)


def test_empty_bytes() -> None:
    with pytest.raises(at.UserError, match=r"the image bytes is empty \(0 bytes\)"):
        at.load_image(b"")


@pytest.mark.parametrize("pixels", [HEIGHT * WIDTH - 1, HEIGHT * WIDTH // 3])
def test_decompression_bomb(pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(RGB), "png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH)
    assert_is(at.load_image(data), RGB)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", pixels)
    with pytest.raises(at.UserError, match=rf"more than {pixels} pixels: shrink it first"):
        at.load_image(data)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 3, 4, 4), np.uint8), r"array of shape \[2, 3, 4, 4\].*expected \[H, W\]"),
        (np.zeros((3, 8, 8), np.uint8), r"array of shape \[3, 8, 8\].*a tensor is read as \[3, H, W\]"),
        (np.zeros((0, 4, 3), np.uint8), r"array of shape \[0, 4, 3\]"),
        (np.zeros(4, np.uint8), r"array of shape \[4\]"),
        (np.zeros((4, 4, 3), np.int64), "array of dtype int64 cannot be read: expected uint8, uint16, or float"),
        (np.zeros((4, 4, 3), bool), "array of dtype bool"),
        (np.full((4, 4, 3), 255.0), r"float64 \[4, 4, 3\] has float values from 255 to 255: expected \[0, 1\], before any normalisation"),
        (np.full((4, 4, 3), -0.1), r"has float values from -0\.1 to -0\.1"),
        (np.array([[0.5, np.nan]]), "has float values from nan to nan"),
        (np.array([[0.5, np.inf]]), r"has float values from 0\.5 to inf"),
        (torch.zeros(8, 8, 3), r"tensor of shape \[8, 8, 3\].*an array is read as \[H, W, 3\]"),
        (torch.zeros(2, 3, 8, 8), r"tensor of shape \[2, 3, 8, 8\]"),
        (torch.zeros(8, 8), r"tensor of shape \[8, 8\]"),
        (torch.zeros(3, 0, 8), r"tensor of shape \[3, 0, 8\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), r"tensor of dtype torch\.int32 .*expected uint8, or float"),
        (torch.full((3, 4, 4), 2.0), "the image tensor has float values from 2 to 2"),
        (torch.full((3, 4, 4), torch.nan), "the image tensor has float values from nan to nan"),
        (Image.fromarray(np.full((4, 4), 7.0, np.float32)), "the PIL image has float values from 7 to 7"),
        (3, "cannot read an image from int: give a path"),
        (None, "cannot read an image from NoneType"),
        ([[0.0]], "cannot read an image from list"),
    ],
)
def test_values_that_are_no_image(source: Any, message: str) -> None:
    with pytest.raises(at.UserError, match=message):
        at.load_image(source)


def test_limit_size_shrinks_the_long_side_and_keeps_the_aspect_ratio(cat: Tensor) -> None:
    shrunk = limit_size(cat, 100)
    assert shrunk.shape == (3, round(300 * 100 / 451), 100)
    picture = Image.fromarray((cat.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    pillow = np.asarray(picture.resize((100, 67), Image.Resampling.BILINEAR)) / 255
    assert np.abs(shrunk.permute(1, 2, 0).numpy() - pillow).max() < 1.5 / 255
    assert limit_size(cat, 451) is cat
    assert limit_size(cat, None) is cat
    assert limit_size(cat[:, :2], 100).shape == (3, 1, 100)
    with pytest.raises(at.UserError, match="max_side is 0: expected a whole number of at least 1"):
        limit_size(cat, 0)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_is_an_array_of_two_dimensions() -> None:
    values = np.random.default_rng(0).random((8, 6), dtype=np.float32)
    assert torch.equal(at.load_image(np.asmatrix(values)), at.load_image(values))


@pytest.mark.parametrize(
    ("image", "line"),
    [
        (torch.rand(3, 8, 8).to_sparse(), "the image is a sparse tensor, or one of the meta device"),
        (torch.rand(3, 8, 8, device="meta"), "the image is a sparse tensor, or one of the meta device"),
        ("", "the path of the image is empty"),
    ],
)
def test_images_without_values_are_refused(image: Any, line: str) -> None:
    with pytest.raises(at.UserError, match=line):
        at.load_image(image)
