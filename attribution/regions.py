"""Ways to cut an image into regions. Each returns one partition: an integer label map at the image's own resolution."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.checks import check_choice, check_whole
from attribution.errors import UserError, describe
from attribution.image import ImageSource, load_image

PUBLISHED_COUNT = 49  # 7x7 cells of 30 pixels at 224x224, SMDL and LiMA
_PUBLISHED_SIDE = 224


@dataclass(frozen=True, eq=False)
class Regions:
    """A partition of an image.

    Attributes:
        labels: int64 [H, W], ids 0 to R-1, every pixel in exactly one region, no region empty.
        method: name of the method that made it; "labels" or "masks" where it was given.
        requested: number of regions asked for; None where the method has no such number.

    Raises:
        UserError: labels that are no integers [H, W]. Other ids than 0 to R-1 are renumbered (see ``partition``).
    """

    labels: Tensor
    method: str = "labels"
    requested: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", partition(self.labels))

    @property
    def count(self) -> int:
        """R, the actual number of regions."""
        return int(self.labels.max()) + 1

    @property
    def area(self) -> Tensor:
        """float64 [R], exact share of the image's pixels in each region; sums to 1."""
        return torch.bincount(self.labels.flatten(), minlength=self.count).double() / self.labels.numel()

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

    Raises:
        UserError: an unknown name, options that the method does not take, or labels of another size.
    """
    if not (isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3):
        image = load_image(image)
    name = regions if isinstance(regions, str) else getattr(regions, "__name__", "callable")
    if isinstance(regions, str):
        if regions not in REGIONS:
            raise UserError(f"unknown regions {regions!r}: expected one of {', '.join(REGIONS)}, a label map, masks or a callable")
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
        rows = min(max(1, round(math.sqrt(count * height / width))), height)
        columns = min(max(1, round(count / rows)), width)
    rows, columns = columns if rows is None else rows, rows if columns is None else columns
    if rows is None or columns is None or not (0 < rows <= height and 0 < columns <= width):
        raise UserError(f"a grid of {rows}x{columns} cells does not fit an image of {height}x{width} pixels (rows x columns)")
    vertical = torch.arange(height) * rows // height
    horizontal = torch.arange(width) * columns // width
    return Regions(vertical[:, None] * columns + horizontal, "grid", requested or rows * columns)


def slico(image: Tensor, count: int | None = None, region_size: int | None = None, ruler: float = 20.0, iterations: int = 20) -> Regions:
    """SLICO superpixels (Achanta et al., PAMI 2012) by OpenCV, with the parameters published for SMDL and LiMA.

    Args:
        image: float32 [3, H, W] in [0, 1].
        count: about how many superpixels; sets region_size to sqrt(H W / count).
        region_size: side of a superpixel in pixels. Default: 30 at 224x224 (49 regions), scaled with the image.
        ruler: compactness of the first iteration.
        iterations: number of iterations, at least 1.

    Raises:
        UserError: OpenCV without its contrib modules, both count and region_size, or a region_size larger than the image.
    """
    if count is not None and region_size is not None:
        raise UserError(f"slico takes count or region_size, not both: received count={count} and region_size={region_size}")
    height, width = image.shape[1:]
    requested = None
    if region_size is None:
        requested = PUBLISHED_COUNT if count is None else count
        ideal = 30 * math.sqrt(height * width) / _PUBLISHED_SIDE if count is None else math.sqrt(height * width / count)
        region_size = max(1, min(round(ideal), height, width))  # OpenCV crashes on seeds farther apart than the image is wide
    check_whole("region_size", region_size, 1, min(height, width))
    check_whole("iterations", iterations, 1)
    ximgproc = _ximgproc("slico")
    slic = ximgproc.createSuperpixelSLIC(_uint8(image), ximgproc.SLICO, region_size, ruler)
    slic.iterate(iterations)
    return Regions(torch.from_numpy(slic.getLabels().astype(np.int64)), "slico", requested)


def seeds(image: Tensor, count: int = 50, levels: int = 3, iterations: int = 10) -> Regions:
    """SEEDS superpixels (Van den Bergh et al., ECCV 2012) by OpenCV, with the parameters published for LiMA.

    Args:
        image: float32 [3, H, W] in [0, 1].
        count: about how many superpixels (50 asked gives 49 at 224x224).
        levels: levels of blocks, 2 or more; fewer are used where the image is too narrow.
        iterations: number of iterations.

    Raises:
        UserError: OpenCV without its contrib modules, or an image too narrow for that number of superpixels.
    """
    height, width = image.shape[1:]
    while levels > 2 and not _seeds_fit(width, height, count, levels):
        levels -= 1
    if not _seeds_fit(width, height, count, levels):
        raise UserError(f"an image of {width}x{height} pixels is too small or narrow for {count} SEEDS superpixels: use grid or slico")
    algorithm = _ximgproc("seeds").createSuperpixelSEEDS(width, height, 3, count, levels)
    algorithm.iterate(_uint8(image), iterations)
    return Regions(torch.from_numpy(algorithm.getLabels().astype(np.int64)), "seeds", count)


def slic(image: Tensor, count: int = PUBLISHED_COUNT, compactness: float = 10.0, zero: bool = False) -> Regions:
    """SLIC superpixels (Achanta et al., PAMI 2012) by scikit-image. With zero=True it is SLICO, without OpenCV and with other labels.

    Args:
        image: float32 [3, H, W] in [0, 1].
        count: about how many superpixels.
        compactness: weight of distance in space against distance in colour.
        zero: adapt the compactness per superpixel (SLIC-zero).
    """
    from skimage.segmentation import slic as skimage_slic

    labels = skimage_slic(_hwc(image), n_segments=count, compactness=compactness, slic_zero=zero, start_label=0)
    return Regions(torch.from_numpy(labels.astype(np.int64)), "slic", count)


def felzenszwalb(
    image: Tensor, count: int | None = PUBLISHED_COUNT, scale: float = 50.0, sigma: float = 0.8, min_size: int | None = None
) -> Regions:
    """Graph-based segmentation (Felzenszwalb and Huttenlocher, IJCV 2004) by scikit-image, merged down to count regions.

    Args:
        image: float32 [3, H, W] in [0, 1].
        count: most regions. While there are more, the smallest region is merged into its neighbour with the nearest mean colour. None
            merges none.
        scale, sigma, min_size: as in scikit-image. By default min_size is 20 pixels, and less on small images.
    """
    from skimage.segmentation import felzenszwalb as skimage_felzenszwalb

    if min_size is None:
        min_size = min(20, image[0].numel() // (4 * PUBLISHED_COUNT))
    labels = skimage_felzenszwalb(_hwc(image), scale=scale, sigma=sigma, min_size=min_size)
    return Regions(_merged(image, labels, count), "felzenszwalb", count)


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
        kernel_size, max_dist, ratio: as in scikit-image. By default kernel_size is 4 and max_dist 20 pixels from 224x224 on, and
            less on small images.
    """
    from skimage.segmentation import quickshift as skimage_quickshift

    shrink = min(1.0, math.sqrt(image[0].numel()) / _PUBLISHED_SIDE)
    kernel_size = max(1.0, 4 * shrink) if kernel_size is None else kernel_size
    max_dist = max(2.0, 20 * shrink) if max_dist is None else max_dist
    labels = skimage_quickshift(_hwc(image).astype(np.float64), kernel_size=kernel_size, max_dist=max_dist, ratio=ratio, rng=0)
    return Regions(_merged(image, labels, count), "quickshift", count)


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

    labels = skimage_watershed(sobel(rgb2gray(_hwc(image))), markers=count, compactness=compactness)
    return Regions(torch.from_numpy(labels.astype(np.int64)), "watershed", count)


def saliency_patches(
    image: Tensor,
    heatmap: Any = None,
    side: int = 28,
    cells_per_region: int | None = None,
    count: int | None = None,
    level: Literal["cell", "pixel"] = "cell",
) -> Regions:
    """SMDL's prior allocation (Chen et al., ICLR 2024): cells of a grid are ranked by a heatmap, and each region gets the next ranks.

    Region 0 holds the most salient cells. Regions need not be contiguous. The least salient cells, where they are too few for a
    region of full size, become one more region.

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
    if count is None and cells_per_region is None and level == "pixel":
        count = min(112, total)
    if count is not None:
        cells_per_region = total // min(count, total)
    cells_per_region = 8 if cells_per_region is None else cells_per_region
    check_whole("cells_per_region", cells_per_region, 1, total)
    if values.shape != cells:
        values = F.interpolate(values[None, None], size=cells, mode="bilinear", align_corners=False)[0, 0]
    ranking = values.flatten().argsort(descending=True, stable=True)
    groups = torch.empty(total, dtype=torch.int64)
    groups[ranking] = (torch.arange(total) // cells_per_region).clamp(max=total // cells_per_region)
    upscaled = F.interpolate(groups.view(1, 1, *cells).double(), size=(height, width), mode="nearest")[0, 0].long()
    return Regions(upscaled, "saliency_patches", count or total // cells_per_region)


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
        raise UserError(f"region method {name} does not take these options ({error}): see help(attribution.regions)") from None
    count, parameter = options.get("count"), signature.parameters.get("count")
    if count is not None or ("count" in options and parameter is not None and parameter.annotation in (int, "int")):
        check_whole("count", count, 1, image.shape[1] * image.shape[2])
        options = {**options, "count": int(count)}  # type: ignore[arg-type]
    return method(image, **options)


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


def _ximgproc(method: str) -> Any:
    try:
        import cv2

        return cv2.ximgproc
    except (ImportError, AttributeError):
        raise UserError(
            f"regions={method!r} need OpenCV's contrib modules: pip uninstall opencv-python, then pip install "
            "opencv-contrib-python-headless; without them use slic, grid, felzenszwalb, quickshift or watershed"
        ) from None


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
