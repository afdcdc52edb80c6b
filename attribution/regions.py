"""Ways to cut an image into regions. Each returns one partition: an integer label map at the image's own resolution."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.checks import check_choice, check_types, check_whole, did_you_mean
from attribution.errors import UserError, describe
from attribution.image import ImageSource, load_image

PUBLISHED_COUNT = 49  # 7x7 cells of 30 pixels at 224x224, SMDL and LiMA
_PUBLISHED_SIDE = 224
_NEAR = 0.2  # a number of regions is as asked for if it differs by at most this share
_TRIES = 6  # most cuts by one algorithm to come near the number asked for
_SHRINKS = (1, 1 / 4, 1 / 16, 1 / 64)  # of the scale of an algorithm, until it makes enough regions
_CONTRIB = "pip uninstall opencv-python opencv-python-headless, then pip install --force-reinstall --no-deps opencv-contrib-python-headless"


@dataclass(frozen=True, eq=False)
class Regions:
    """A partition of an image.

    Attributes:
        labels: int64 [H, W], ids 0 to R-1, every pixel in exactly one region, no region empty.
        method: name of the method that made it; "labels" or "masks" where it was given.
        requested: number of regions asked for; None where the method has no such number.
        note: what is not as asked for, such as another number of regions; empty where nothing is.
        library: where several can make this cut with other labels, the one that did, such as "OpenCV"; else empty.
        seen: the part of the image whose pixels count in ``area``, (top, left, bottom, right), where a model crops; None for all of it.

    Raises:
        UserError: labels that are no integers [H, W]. Other ids than 0 to R-1 are renumbered (see ``partition``).
    """

    labels: Tensor
    method: str = "labels"
    requested: int | None = None
    note: str = ""
    library: str = ""
    seen: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", partition(self.labels))
        if self.seen is not None:
            (height, width), (top, left, bottom, right) = self.labels.shape, self.seen
            if not (0 <= top < bottom <= height and 0 <= left < right <= width):
                raise UserError(f"seen is {self.seen}: expected (top, left, bottom, right) inside an image of {width}x{height} pixels")

    @property
    def count(self) -> int:
        """R, the actual number of regions."""
        return int(self.labels.max()) + 1

    @property
    def area(self) -> Tensor:
        """float64 [R], exact share of the seen pixels in each region; sums to 1. A region that is not seen has 0."""
        return torch.bincount(self.seen_labels.flatten(), minlength=self.count).double() / self.seen_labels.numel()

    @property
    def seen_labels(self) -> Tensor:
        """The labels of the pixels that count."""
        return self.seen_part(self.labels)

    def seen_part(self, values: Tensor) -> Tensor:
        """The part of a map [H, W] of the image whose pixels count."""
        top, left, bottom, right = self.seen or (0, 0, *self.labels.shape)
        return values[top:bottom, left:right]

    @property
    def masks(self) -> Tensor:
        """bool [R, H, W], one mask per region."""
        return self.labels == torch.arange(self.count, device=self.labels.device)[:, None, None]

    def __repr__(self) -> str:
        asked = "" if self.requested is None else f" ({self.requested} requested)"
        return f"Regions({self.method}, {self.count}{asked}, {self.labels.shape[1]}x{self.labels.shape[0]})"


def is_method(regions: Any) -> bool:
    """Whether the value is a way to cut an image (a name or a callable), not the regions themselves."""
    return isinstance(regions, str) or (callable(regions) and not isinstance(regions, Regions))


def make_regions(image: ImageSource, regions: Any, **options: Any) -> Regions:
    """Cut an image into regions by a method, or check a label map or masks that are given.

    Args:
        image: whatever ``load_image`` takes. A float tensor [C, H, W] is used unchanged, and may be the map of a layer.
        regions: a key of ``REGIONS``; a callable (image, **options) -> label map, masks or ``Regions``; an int label map [H, W],
            whose negative ids become one more region; bool masks [R, H, W] (see ``from_masks``); or ``Regions``.
        options: arguments of the method. A ``count`` must be a whole number from 1 to H W.

    A ``count`` is met within 20 % where the method can: it then tries other values of its own parameters. Where it cannot, a warning
    and ``Regions.note`` say so.

    Raises:
        UserError: an unknown name, options that the method does not take, or labels of another size.
    """
    if not (isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3):
        image = load_image(image)
    name = regions if isinstance(regions, str) else getattr(regions, "__name__", "callable")
    if isinstance(regions, str):
        if regions not in REGIONS:
            raise UserError(
                f"unknown regions {regions!r}: expected one of {', '.join(REGIONS)}, a label map, masks or a callable"
                f"{did_you_mean(regions, REGIONS)}"
            )
        regions = REGIONS[regions]
    if callable(regions):
        made = _call_method(regions, image, name, options)
    elif options:
        raise UserError(f"options {', '.join(options)} go with a region method, not with {describe(regions)}")
    else:
        made = regions
    if not isinstance(made, Regions):
        made = _from_user(made, image)
    if made.labels.shape != image.shape[1:]:
        raise UserError(
            f"the label map is {made.labels.shape[1]}x{made.labels.shape[0]}, the image {image.shape[2]}x{image.shape[1]}: "
            "give labels at the image's own resolution"
        )
    return made


def several(regions: Regions) -> Regions:
    """The same regions, if there are two or more.

    Raises:
        UserError: one region, which has no order and explains nothing.
    """
    if regions.count < 2:
        raise UserError(
            f"{regions.method} gave 1 region, the whole image, and one region has no order: expected at least 2; "
            "ask for more (region_options={'count': 49}), or use another method, such as grid"
        )
    return regions


def grid(image: Tensor, count: int = PUBLISHED_COUNT, rows: int | None = None, columns: int | None = None) -> Regions:
    """Rectangular cells, numbered row by row. Their heights, and their widths, differ by at most one pixel.

    Args:
        image: float32 [3, H, W].
        count: about how many cells, as close to squares as possible. Exact for a square number on a square image.
        rows, columns: cells from top to bottom and from left to right, instead of count; one alone stands for both.

    Raises:
        UserError: more rows or columns than pixels, or fewer than one.
    """
    height, width = image.shape[1:]
    requested = None
    if rows is None and columns is None:
        requested = count
        rows, columns = _cells(count, height, width)
    rows, columns = columns if rows is None else rows, rows if columns is None else columns
    if rows is None or columns is None or not (0 < rows <= height and 0 < columns <= width):
        raise UserError(f"a grid of {rows}x{columns} cells does not fit an image of {height}x{width} pixels (rows x columns)")
    vertical = torch.arange(height) * rows // height
    horizontal = torch.arange(width) * columns // width
    return Regions(vertical[:, None] * columns + horizontal, "grid", requested or rows * columns)


def _cells(count: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of about ``count`` cells: of the shapes that are near enough the one with the squarest cells."""
    ideal = math.sqrt(count * height / width)
    shapes = [(rows, min(max(1, round(count / rows)), width)) for rows in sorted(range(1, height + 1), key=lambda rows: abs(rows - ideal))]
    return next((shape for shape in shapes if _is_near(shape[0] * shape[1], count)), shapes[0])


def slico(image: Tensor, count: int | None = None, region_size: int | None = None, ruler: float = 20.0, iterations: int = 20) -> Regions:
    """SLICO superpixels (Achanta et al., PAMI 2012) by OpenCV, with the parameters published for SMDL and LiMA.

    Where OpenCV lacks its contrib modules, scikit-image's SLICO is used instead: its labels are others, and a warning and
    ``Regions.note`` say so. An image too narrow for that number of
    superpixels is cut into the cells of a grid, and these say that too.

    Args:
        image: float32 [3, H, W] in [0, 1].
        count: about how many superpixels; sets region_size to sqrt(H W / count), or to a size that gives this number.
        region_size: side of a superpixel in pixels, kept exactly. Default: 30 at 224x224 (49 regions), scaled with the image.
        ruler: compactness of the first iteration.
        iterations: number of iterations, at least 1.

    Raises:
        UserError: both count and region_size, or a region_size larger than the image.
    """
    if count is not None and region_size is not None:
        raise UserError(f"slico takes count or region_size, not both: received count={count} and region_size={region_size}")
    height, width = image.shape[1:]

    def side(superpixels: float) -> int:  # OpenCV crashes on seeds farther apart than the image is wide
        return max(1, min(round(math.sqrt(height * width / superpixels)), height, width))

    @cache
    def cut(size: int) -> Tensor:
        slic = ximgproc.createSuperpixelSLIC(_uint8(image), ximgproc.SLICO, size, ruler)
        slic.iterate(iterations)
        return torch.from_numpy(slic.getLabels().astype(np.int64))

    requested = (count or PUBLISHED_COUNT) if region_size is None else None
    size = side(count or (_PUBLISHED_SIDE / 30) ** 2) if region_size is None else region_size
    check_whole("region_size", size, 1, min(height, width))
    check_whole("iterations", iterations, 1)
    ximgproc = _ximgproc()
    if ximgproc is None:
        note = "cut by scikit-image's SLICO, not by OpenCV's, the published one"
        warnings.warn(f"regions='slico' are {note}: {_CONTRIB}", stacklevel=2)
        return Regions(
            slic(image, count or max(1, round(height * width / size**2)), zero=True).labels, "slico", requested, note, slico_library()
        )
    labels = cut(size) if count is None else _as_many(count, lambda asked: cut(side(asked)))
    if requested is not None and len(labels.unique()) > 2 * requested:
        note = f"cells of a grid, since this image of {width}x{height} pixels is narrower than a superpixel"
        warnings.warn(f"regions='slico' are {note}", stacklevel=2)
        return replace(grid(image, requested), note=note)
    return Regions(labels, "slico", requested, library=slico_library())


def seeds(image: Tensor, count: int = 50, levels: int = 3, iterations: int = 10) -> Regions:
    """SEEDS superpixels (Van den Bergh et al., ECCV 2012) by OpenCV, with the parameters published for LiMA.

    Args:
        image: float32 [3, H, W] in [0, 1].
        count: about how many superpixels (50 asked gives 49 at 224x224).
        levels: levels of blocks, 2 or more; fewer are used where the image is too narrow, or where they come nearer to count.
        iterations: number of iterations.

    Raises:
        UserError: OpenCV without its contrib modules, or an image too narrow for that number of superpixels.
    """
    height, width = image.shape[1:]
    ximgproc = _ximgproc()
    if ximgproc is None:
        raise UserError(f"regions='seeds' need OpenCV's contrib modules: {_CONTRIB}; without them use slico, slic, grid or watershed")
    depths = [depth for depth in range(max(levels, 2), 1, -1) if _seeds_fit(width, height, count, depth)]
    if not depths:
        raise UserError(f"an image of {width}x{height} pixels is too small or narrow for {count} SEEDS superpixels: use grid or slico")

    def cut(depth: int, asked: int) -> Tensor | None:
        if not _seeds_fit(width, height, asked, depth):
            return None
        algorithm = ximgproc.createSuperpixelSEEDS(width, height, 3, asked, depth)
        algorithm.iterate(_uint8(image), iterations)
        return torch.from_numpy(algorithm.getLabels().astype(np.int64))

    return Regions(_nearest(count, (_as_many(count, partial(cut, depth)) for depth in depths)), "seeds", count)


def slic(image: Tensor, count: int = PUBLISHED_COUNT, compactness: float | None = None, zero: bool = False) -> Regions:
    """SLIC superpixels (Achanta et al., PAMI 2012) by scikit-image. With zero=True it is SLICO, without OpenCV and with other labels.

    Args:
        image: float32 [3, H, W] in [0, 1].
        count: about how many superpixels.
        compactness: weight of distance in space against distance in colour. Default: 10, or 100 or 1000 on an image of fine texture, where
            too few superpixels are left otherwise.
        zero: adapt the compactness per superpixel (SLIC-zero).
    """
    from skimage.segmentation import slic as skimage_slic

    def cut(weight: float, asked: int) -> Tensor:
        labels = skimage_slic(_hwc(image), n_segments=asked, compactness=weight, slic_zero=zero, start_label=0)
        return torch.from_numpy(labels.astype(np.int64))

    weights = (10.0, 100.0, 1000.0) if compactness is None else (compactness,)
    return Regions(_nearest(count, (_as_many(count, partial(cut, weight)) for weight in weights)), "slic", count)


def felzenszwalb(
    image: Tensor, count: int | None = PUBLISHED_COUNT, scale: float | None = None, sigma: float = 0.8, min_size: int | None = None
) -> Regions:
    """Graph-based segmentation (Felzenszwalb and Huttenlocher, IJCV 2004) by scikit-image, merged down to count regions.

    Args:
        image: float32 [3, H, W] in [0, 1].
        count: most regions. While there are more, the smallest region is merged into its neighbour with the nearest mean colour. None
            merges none.
        scale, sigma, min_size: as in scikit-image. By default scale is 50 and min_size 20 pixels; both are less on small images and
            where there would be fewer than count regions.
    """
    from skimage.segmentation import felzenszwalb as skimage_felzenszwalb

    def cut(shrink: float) -> Tensor:
        size = max(1, round(shrink * min(20, image[0].numel() // (4 * PUBLISHED_COUNT)))) if min_size is None else min_size
        labels = skimage_felzenszwalb(_hwc(image), scale=50 * shrink if scale is None else scale, sigma=sigma, min_size=size)
        return _merged(image, labels, count)

    return Regions(_nearest(count, map(cut, _SHRINKS if scale is None or min_size is None else (1,))), "felzenszwalb", count)


def quickshift(
    image: Tensor,
    count: int | None = PUBLISHED_COUNT,
    kernel_size: float | None = None,
    max_dist: float | None = None,
    ratio: float = 0.5,
) -> Regions:
    """Quickshift (Vedaldi and Soatto, ECCV 2008) by scikit-image, merged down to count regions as in ``felzenszwalb``.

    Args:
        image: float32 [3, H, W] in [0, 1].
        count: most regions; None merges none.
        kernel_size, max_dist, ratio: as in scikit-image. By default kernel_size is 4 and max_dist 20 pixels from 224x224 on; both are less
            on small images and where there would be fewer than count regions.
    """
    from skimage.segmentation import quickshift as skimage_quickshift

    small = min(1.0, math.sqrt(image[0].numel()) / _PUBLISHED_SIDE)

    def cut(shrink: float) -> Tensor:
        kernel = max(1.0, 4 * small * shrink) if kernel_size is None else kernel_size
        distance = max(2.0, 20 * small * shrink) if max_dist is None else max_dist
        labels = skimage_quickshift(_hwc(image).astype(np.float64), kernel_size=kernel, max_dist=distance, ratio=ratio, rng=0)
        return _merged(image, labels, count)

    return Regions(_nearest(count, map(cut, _SHRINKS if kernel_size is None or max_dist is None else (1,))), "quickshift", count)


def watershed(image: Tensor, count: int = PUBLISHED_COUNT, compactness: float = 0.001) -> Regions:
    """Compact watershed (Neubert and Protzel, ICPR 2014) by scikit-image on the gradient of the gray image.

    Args:
        image: float32 [3, H, W] in [0, 1].
        count: about how many regions.
        compactness: with 0 regions follow the edges only; large values give square cells.
    """
    from skimage.color import rgb2gray
    from skimage.filters import sobel
    from skimage.segmentation import watershed as skimage_watershed

    edges = sobel(rgb2gray(_hwc(image)))

    def cut(asked: int) -> Tensor:
        return torch.from_numpy(skimage_watershed(edges, markers=asked, compactness=compactness).astype(np.int64))

    return Regions(_as_many(count, cut), "watershed", count)


def saliency_patches(
    image: Tensor,
    heatmap: Any = None,
    side: int = 28,
    cells_per_region: int | None = None,
    count: int | None = None,
    level: Literal["cell", "pixel"] = "cell",
) -> Regions:
    """SMDL's prior allocation (Chen et al., ICLR 2024): cells of a grid are ranked by a heatmap, and each region gets the next ranks.

    Region 0 holds the most salient cells. Regions need not be contiguous. With cells_per_region the least salient cells, where they are
    too few for a region of full size, become one more region; with count the sizes of the regions differ by at most one cell.

    Args:
        image: float32 [3, H, W].
        heatmap: [h, w], any resolution, larger is more salient; resized to side x side by bilinear interpolation.
        side: cells from top to bottom, and from left to right (published: 28 for faces, 10 for CUB).
        cells_per_region: cells in a region (published: 8 for faces, 4 for CUB; default 8), or pixels at level "pixel".
        count: number of regions, instead of cells_per_region. Default at level "pixel": the published 112.
        level: "cell", or "pixel": every pixel is a cell.

    Raises:
        UserError: no heatmap, one that is not finite, or more cells than pixels.
    """
    if heatmap is None:
        raise UserError("saliency_patches needs a heatmap [h, w]: give heatmap= (for example the heatmap of another explanation)")
    check_choice("level", level, ("cell", "pixel"))
    if count is not None and cells_per_region is not None:
        raise UserError(f"give count or cells_per_region, not both: received count={count} and cells_per_region={cells_per_region}")
    values = _as_tensor(heatmap, "the heatmap", "[h, w] with finite values").float()
    if values.ndim != 2 or 0 in values.shape or not values.isfinite().all():
        raise UserError(f"the heatmap is {describe(values)}: expected [h, w] with finite values")
    height, width = image.shape[1:]
    cells = (height, width) if level == "pixel" else (side, side)
    if side < 1 or cells[0] > height or cells[1] > width:
        raise UserError(f"{side}x{side} cells do not fit an image of {width}x{height} pixels: give a smaller side")
    total = cells[0] * cells[1]
    published = 8 if level == "cell" else total // min(112, total)
    cells_per_region = published if cells_per_region is None else cells_per_region
    check_whole("cells_per_region", cells_per_region, 1, total)
    if values.shape != cells:
        values = F.interpolate(values[None, None], size=cells, mode="bilinear", align_corners=False)[0, 0]
    ranking = values.flatten().argsort(descending=True, stable=True)
    groups = torch.empty(total, dtype=torch.int64)
    groups[ranking] = torch.arange(total) // cells_per_region if count is None else torch.arange(total) * min(count, total) // total
    upscaled = F.interpolate(groups.view(1, 1, *cells).double(), size=(height, width), mode="nearest")[0, 0].long()
    requested = count or (112 if level == "pixel" and cells_per_region == published else total // cells_per_region)
    return Regions(upscaled, "saliency_patches", requested)


def from_masks(
    masks: Any, image: Tensor | None = None, variant: Literal["fixed", "smdl", "lima"] = "fixed", smallest: float = 0.0005
) -> Regions:
    """Make a partition from overlapping masks, such as those of a Segment Anything model, by the published rules.

    Each pair of masks i < j that overlap is taken in turn. The mask of whose pixels the overlap is the larger share keeps the
    overlap; mask j keeps it where both shares are equal. Masks of at most ``smallest`` of the image are then dropped. The pixels
    that no mask covers, the remainder, become one more region, the last.

    Args:
        masks: bool [R, H, W] or a list of [H, W], in the generator's order.
        image: float32 [3, H, W]; needed by variant "lima".
        variant: "fixed" makes the remainder a region if it has a pixel. "smdl" is the same: the published code made a region of an
            empty remainder too, which no partition has. "lima" makes it a region only if it is not all black; a black remainder,
            which hiding with black cannot change, joins the last mask.
        smallest: share of the image up to which a mask is dropped; published 0.05 %.

    Raises:
        UserError: no masks, masks that are not [R, H, W], or an unknown variant.
    """
    stack = _as_tensor(masks, "masks", "bool [R, H, W] with at least one mask")
    if stack.ndim != 3 or 0 in stack.shape:
        raise UserError(f"masks are {describe(stack)}: expected bool [R, H, W] with at least one mask")
    check_choice("variant", variant, ("fixed", "smdl", "lima"))
    if variant == "lima" and image is None:
        raise UserError("variant 'lima' looks at the colour of what no mask covers: give the image")
    if image is not None and image.shape[1:] != stack.shape[1:]:
        raise UserError(f"masks are {describe(stack)}, the image is {describe(image)}: give masks at the image's own resolution")
    owned = _without_overlaps(stack.bool().contiguous().clone())
    kept = owned[owned.flatten(1).sum(1) > smallest * owned[0].numel()]
    labels = torch.full(stack.shape[1:], -1, dtype=torch.int64)
    for index, mask in enumerate(kept):
        labels[mask] = index
    remainder = labels < 0
    if variant == "lima" and len(kept) and image is not None and not (image[:, remainder] > 0).any():
        labels[remainder] = len(kept) - 1
    return Regions(labels, "masks", len(stack))


def partition(labels: Any) -> Tensor:
    """Renumber region ids as 0 to R-1, in ascending order of the given ids. Negative ids, unassigned pixels, become the last region.

    Args:
        labels: integers [H, W].

    Returns:
        int64 [H, W].

    Raises:
        UserError: not a two-dimensional array of integers.
    """
    labels = _as_tensor(labels, "the label map", "integers [H, W]")
    if labels.ndim != 2 or 0 in labels.shape or labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
        raise UserError(f"the label map is {describe(labels)}: expected integers [H, W]")
    labels = labels.long()
    given, ids = labels.clamp(min=-1).unique(return_inverse=True)
    if int(given[0]) == -1:  # the unassigned pixels sorted first, and belong last
        ids = (ids - 1) % len(given)
    return ids.contiguous()


def _from_user(value: Any, image: Tensor) -> Regions:
    array = value if isinstance(value, Tensor | np.ndarray | list) else None
    if array is None:
        raise UserError(
            f"regions are {describe(value)}: expected one of {', '.join(REGIONS)}, an int label map [H, W] or bool masks [R, H, W]"
        )
    tensor = _as_tensor(array, "the regions", "an int label map [H, W] or bool masks [R, H, W]")
    if tensor.ndim == 3 and tensor.dtype == torch.bool:
        return from_masks(tensor, image)
    return Regions(tensor.cpu())


def _as_tensor(value: Any, what: str, expected: str) -> Tensor:
    def single(item: Any) -> Tensor:
        # a copy, because torch takes neither read-only nor flipped arrays
        return torch.as_tensor(item.copy() if isinstance(item, np.ndarray) else item).cpu()

    try:
        return torch.stack([single(item) for item in value]) if isinstance(value, list | tuple) else single(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{what} cannot be read ({error}): expected {expected}") from None


def _call_method(method: Callable[..., Any], image: Tensor, name: str, options: Mapping[str, Any]) -> Any:
    signature = inspect.signature(method)
    try:
        signature.bind(image, **options)
    except TypeError as error:
        known = list(signature.parameters)[1:]
        meant = "".join(did_you_mean(option, known) for option in options if option not in known)
        raise UserError(f"region method {name} does not take these options ({error}): expected some of {', '.join(known)}{meant}") from None
    check_types(f"regions {name}", method, {option: value for option, value in options.items() if option != "count"})
    count, parameter = options.get("count"), signature.parameters.get("count")
    if count is not None or ("count" in options and parameter is not None and parameter.annotation in (int, "int")):
        check_whole("count", count, 1, image.shape[1] * image.shape[2])
        options = {**options, "count": int(count)}  # type: ignore[arg-type]
    made = method(image, **options)
    is_asked = "count" in options or (parameter is not None and isinstance(parameter.default, int))
    return _counted(made) if isinstance(made, Regions) and is_asked else made


def _counted(made: Regions) -> Regions:
    """The regions with a note, after a warning, where their number is far from the one asked for."""
    asked = min(made.requested or made.count, made.labels.numel())
    if _is_near(made.count, asked):
        return made
    note = f"{made.count} regions where {asked} were asked for, the nearest that {made.method} can make of this image"
    warnings.warn(f"{note}: ask for another number, or use grid", stacklevel=4)
    return replace(made, note="; ".join(filter(None, (made.note, note))))


def _is_near(made: int, asked: int) -> bool:
    return abs(made / asked - 1) <= _NEAR


def _nearest(count: int | None, cuts: Iterable[Tensor]) -> Tensor:
    """The first label map with about count regions, or else the one whose number of regions is nearest; the first without a count."""
    best, best_off = None, math.inf
    for labels in cuts:
        made = len(labels.unique())
        off = 0.0 if count is None else abs(math.log(made / count))
        if best is None or off < best_off:
            best, best_off = labels, off
        if count is None or _is_near(made, count):
            break
    assert best is not None
    return best


def _as_many(count: int, cut: Callable[[int], Tensor | None]) -> Tensor:
    """Cut by an algorithm that makes about the number that it is asked for. Other numbers are tried until about count come out.

    Args:
        count: number of regions wanted. It is asked for first, so that a result which is near enough is the algorithm's own.
        cut: number asked for -> labels, or None where the image cannot hold as many.
    """

    def tried() -> Iterable[Tensor]:
        low, high, asked = 1, 64 * count, count
        for _ in range(_TRIES):
            labels = cut(asked)
            made = 0 if labels is None else len(labels.unique())
            if labels is not None:
                yield labels
            if labels is not None and 8 * made < count:
                return  # this is due to the image, not to the number
            if labels is None or made > count:
                high = asked - 1
            else:
                low = asked + 1
            if low > high:
                return
            guess = round(asked * count / made) if made else 0
            asked = guess if low <= guess <= high else math.isqrt(low * high)

    return _nearest(count, tried())


def _without_overlaps(masks: Tensor) -> Tensor:
    """Apply the published rule to each pair of masks, bool [R, H, W], in place."""
    flat = masks.flatten(1)
    for i in range(len(flat)):
        for j in range(i + 1, len(flat)):
            overlap = flat[i] & flat[j]
            shared = int(overlap.sum())
            if shared == 0:
                continue
            loser = j if shared * int(flat[j].sum()) > shared * int(flat[i].sum()) else i
            flat[loser] &= ~overlap
    return masks


def _merged(image: Tensor, labels: np.ndarray, count: int | None) -> Tensor:
    """Merge the smallest region into the adjacent one with the nearest mean colour, until count are left."""
    flat = partition(torch.from_numpy(labels.astype(np.int64)))
    total = int(flat.max()) + 1
    if count is None or total <= count:
        return flat
    ids = flat.numpy()
    areas = np.bincount(ids.ravel(), minlength=total).astype(np.float64)
    sums = np.stack([np.bincount(ids.ravel(), weights=channel.ravel(), minlength=total) for channel in image.cpu().numpy()], axis=1)
    neighbours: list[set[int]] = [set() for _ in range(total)]
    for first, second in ((ids[:, :-1], ids[:, 1:]), (ids[:-1], ids[1:])):
        border = first != second
        for a, b in np.unique(np.stack([first[border], second[border]], axis=1), axis=0):
            neighbours[a].add(int(b))
            neighbours[b].add(int(a))
    parent = np.arange(total)
    alive = set(range(total))
    while len(alive) > count:
        small = min(alive, key=lambda region: (areas[region], region))
        colour = sums[small] / areas[small]
        near = min(neighbours[small], key=lambda other: (float(((sums[other] / areas[other] - colour) ** 2).sum()), other))
        parent[small] = near
        areas[near] += areas[small]
        sums[near] += sums[small]
        for other in neighbours[small]:
            neighbours[other].discard(small)
            if other != near:
                neighbours[other].add(near)
                neighbours[near].add(other)
        alive.remove(small)
    while (parent[parent] != parent).any():
        parent = parent[parent]
    return torch.from_numpy(parent[ids])


def _seeds_fit(width: int, height: int, count: int, levels: int) -> bool:
    """Whether the image holds two levels of OpenCV's SEEDS, with a block or more in each direction. Else OpenCV ends the process."""
    down = int(math.sqrt(max(count, 10) * height / width))
    across = down * width // height
    if down < 1 or across < 1:
        return False
    for level in range(max(levels, 2), 1, -1):
        block_width, block_height = width / across / 2 ** (level - 1), height / down / 2 ** (level - 1)
        if block_width >= 1 and block_height >= 1:
            tops = (width // (math.ceil(block_width) * 2 ** (level - 1)), height // (math.ceil(block_height) * 2 ** (level - 1)))
            return min(tops) >= 1
    return False


def slico_library() -> str:
    """The library that makes SLICO superpixels here."""
    return "scikit-image" if _ximgproc() is None else "OpenCV"


def _ximgproc() -> Any:
    """OpenCV's module of superpixels; None where OpenCV is not there, or lacks its contrib modules. A plain OpenCV over it empties it."""
    try:
        import cv2
    except ImportError:
        return None
    found = getattr(cv2, "ximgproc", None)
    return found if hasattr(found, "createSuperpixelSLIC") and hasattr(found, "createSuperpixelSEEDS") else None


def _uint8(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray((_hwc(image) * 255).round().astype(np.uint8))


def _hwc(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.detach().cpu().permute(1, 2, 0).numpy())


REGIONS: dict[str, Callable[..., Regions]] = {
    "slico": slico,
    "seeds": seeds,
    "grid": grid,
    "slic": slic,
    "felzenszwalb": felzenszwalb,
    "quickshift": quickshift,
    "watershed": watershed,
    "saliency_patches": saliency_patches,
}
