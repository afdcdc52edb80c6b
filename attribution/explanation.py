"""Explanation: the order of the regions by importance, the prediction along this order, and how both were computed."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from attribution.checks import check_choice, check_number, is_whole
from attribution.errors import UserError, describe
from attribution.files import whole_file
from attribution.regions import Regions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 1
_MAX_FILE_VALUES = 2**28  # limit for one array of a file: a hostile header cannot make us allocate more


_HARDLY = 0.05  # probability below which curves of a class are mostly those of other things


@dataclass(frozen=True, eq=False)
class Explanation:
    """The result of a search or an attribution method for one image and one class.

    A search yields regions, their order and the probabilities of the target along it. An attribution method yields a pixel map and
    no order; ``ranked_over`` ranks given regions by the map.

    Attributes:
        image: float32 [3, H, W] in [0, 1], the image explained, at the resolution of the regions.
        target: index of the class explained.
        class_names: names of all C classes.
        probabilities: float32 [C], for the whole image.
        regions: the partition of the image into R regions; None for an attribution method.
        order: int64 [R], region ids, most important first; None for an attribution method.
        insertion_scores: float32 [R+1], probability of the target with only the first k regions shown, k = 0 to R.
        deletion_scores: float32 [R+1], probability of the target with the first k regions hidden.
        pixel_map: float32 [H, W], the map of an attribution method, signed or not; None for a search.
        evaluations: number of images that the search or method forwarded.
        provenance: how it was computed (model, weights digest, fill, settings, versions, seed, seconds; the layer that a method used),
            as JSON types.
    """

    image: Tensor
    target: int
    class_names: tuple[str, ...]
    probabilities: Tensor
    regions: Regions | None = None
    order: Tensor | None = None
    insertion_scores: Tensor | None = None
    deletion_scores: Tensor | None = None
    pixel_map: Tensor | None = None
    evaluations: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def target_name(self) -> str:
        """Name of the class explained."""
        return self.class_names[self.target]

    @property
    def confidence(self) -> float:
        """Probability of the target for the whole image."""
        return float(self.probabilities[self.target])

    @property
    def predicted(self) -> tuple[int, ...]:
        """The classes predicted for the whole image: the most probable one or, of independent labels, all above 0.5."""
        if self.provenance.get("labels") == "independent":
            return tuple((self.probabilities > 0.5).nonzero()[:, 0].tolist())
        return (int(self.probabilities.argmax()),)

    @property
    def note(self) -> str:
        """What a reader must know: that the target is hardly seen in the image, that the search forwarded too few images, or that no
        independent label is predicted and the most probable is explained; else empty.
        """
        if self.is_hardly_seen:
            return f"the model hardly sees {self.target_name!r} in this image, p = {self.confidence:.2g}: the order says little"
        if self.is_hardly_searched:
            images = f"{self.evaluations} image{'' if self.evaluations == 1 else 's'}"
            return f"the search forwarded {images}, too few for a search: the order says little"
        if self.predicted or self.target != int(self.probabilities.argmax()):
            return ""
        return "no label is above 0.5: the most probable is explained"

    @property
    def is_hardly_seen(self) -> bool:
        """Whether the target, of classes of which one is right, is not predicted and has a probability below 0.05."""
        one_right = self.provenance.get("labels") != "independent"
        return one_right and self.target not in self.predicted and self.confidence < _HARDLY

    @property
    def is_hardly_searched(self) -> bool:
        """Whether the search by budget had no order and no prior to begin with, and forwarded fewer images than a quarter of the
        regions.
        """
        settings = self.provenance.get("settings", {})
        begun = settings.get("prior") is not None or "start" in settings.get("search_options", {})
        few = self.regions is not None and self.evaluations < self.regions.count / 4
        return few and settings.get("search") == "budget" and not begun

    @property
    def fill_confidence(self) -> float:
        """Probability of the target with every region hidden, so that the model sees only the fill."""
        return float(self._need(self.insertion_scores, "insertion scores")[0])

    @property
    def fill_is_informative(self) -> bool:
        """Whether the fill alone reaches half of the confidence. Insertion scores then say little: try another fill."""
        return self.fill_confidence >= 0.5 * self.confidence

    @property
    def area(self) -> Tensor:
        """float32 [R+1], exact share of the pixels that the model sees in the first k regions, k = 0 to R."""
        shares = self._need_regions().area[self._need(self.order, "order")]
        return torch.cat([shares.new_zeros(1), shares.cumsum(0)]).float().clamp(max=1)

    @property
    def insertion_auc(self) -> float:
        """Area under the insertion scores over ``area``, by the trapezoidal rule; higher is better."""
        return self._auc(self._need(self.insertion_scores, "insertion scores"))

    @property
    def deletion_auc(self) -> float:
        """Area under the deletion scores over ``area``, by the trapezoidal rule; lower is better."""
        return self._auc(self._need(self.deletion_scores, "deletion scores"))

    @property
    def gains(self) -> Tensor:
        """float32 [R], marginal gain of region order[k]: the change of (insertion - deletion) probability when it joins the first k."""
        difference = self._need(self.insertion_scores, "insertion scores") - self._need(self.deletion_scores, "deletion scores")
        return difference.diff()

    @property
    def heatmap(self) -> Tensor:
        """float32 [H, W] in [0, 1], by where the explanation comes from.

        A search: ``to_pixels("gain")``. A ranking without scores (``ranked_over``): ``to_pixels("rank")``. An attribution method:
        the positive part of its map, divided by its maximum.
        """
        if self.order is not None:
            return self.to_pixels("rank" if self.insertion_scores is None else "gain")
        positive = self._need(self.pixel_map, "pixel map").clamp(min=0)
        top = positive.max()
        return positive / top if top > 0 else positive

    @property
    def values(self) -> Tensor:
        """float32 [H, W], the map that metrics evaluate: an attribution method's pixel map, signed or not; a search's heatmap."""
        return self.heatmap if self.pixel_map is None else self.pixel_map

    def to_pixels(self, convention: Literal["gain", "rank"] = "gain") -> Tensor:
        """The order as a pixel map: every pixel has the value of its region.

        Args:
            convention: how regions get values. "gain" (SMDL): starting from 0, each region in the order subtracts its absolute
                marginal gain; the values are shifted and scaled to [0, 1], or all 0 if no region has a gain. "rank":
                (R - position) / R, which is 1 for the first region.

        Returns:
            float32 [H, W] in [0, 1].
        """
        check_choice("convention", convention, ("gain", "rank"))
        order, regions = self._need(self.order, "order"), self._need_regions()
        if convention == "gain":
            along = -self.gains.double().abs().cumsum(0)
            along = along - along.min()
            along = along / along.max() if along.max() > 0 else along
        else:
            along = 1 - torch.arange(len(order), dtype=torch.float64) / len(order)
        by_region = torch.empty_like(along)
        by_region[order] = along
        return by_region.float()[regions.labels]

    def regions_needed(self, confidence: float) -> int | None:
        """The smallest k for which the first k regions alone give the target this probability; None if no k does."""
        check_number("confidence", confidence, 0, 1)
        reached = (self._need(self.insertion_scores, "insertion scores") >= confidence).nonzero()
        return int(reached[0, 0]) if len(reached) else None

    def minimal_regions(self, confidence: float) -> Tensor | None:
        """The ids of the first regions that alone give the target this probability, as few as possible: int64 [k], or None."""
        needed = self.regions_needed(confidence)
        return None if needed is None else self._need(self.order, "order")[:needed]

    def ranked_over(self, regions: Regions | Tensor) -> Explanation:
        """The same explanation as an order of given regions: by the mean of its map over each region, highest first.

        Ties go to the lowest region id. Insertion and deletion scores are left out, because they belong to another order; the
        metrics compute them.

        Args:
            regions: a partition of the image, or its label map int64 [H, W].

        Raises:
            UserError: regions of another size than the map.
        """
        regions = regions if isinstance(regions, Regions) else Regions(regions)
        order = order_of_means(self.pixel_map if self.pixel_map is not None else self.to_pixels("rank"), regions.labels)
        return replace(self, regions=regions, order=order, insertion_scores=None, deletion_scores=None)

    def plot(self, **options: Any) -> Figure:
        """Draw the explanation; ``options`` are those of ``attribution.figures.explanation.plot_explanation``."""
        from attribution.figures.explanation import plot_explanation

        return plot_explanation(self, **options)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.plot().savefig(buffer, format="png", dpi=80)
        return buffer.getvalue()

    def __repr__(self) -> str:
        parts = [f"{self.target_name} {self.confidence:.3f}"]
        if self.note:
            parts.append(self.note)
        if "layer" in self.provenance:
            parts.append(f"layer {self.provenance['layer']}")
        if self.regions is not None:
            parts.append(f"{self.regions.count} regions")
        if self.insertion_scores is not None:
            parts.append(f"insertion {self.insertion_auc:.3f}, deletion {self.deletion_auc:.3f}")
        parts.append(f"{self.evaluations} evaluations")
        return f"Explanation({', '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Explanation):
            return NotImplemented
        if self._plain() != other._plain():
            return False
        mine, theirs = self._arrays(), other._arrays()
        return mine.keys() == theirs.keys() and all(np.array_equal(mine[k], theirs[k], equal_nan=True) for k in mine)

    __hash__ = None  # type: ignore[assignment]

    def save(self, path: str | Path) -> None:
        """Write everything to one npz file, completely or not at all. ``load`` returns an equal explanation."""
        with whole_file(Path(path)) as temporary, temporary.open("wb") as file:
            arrays: dict[str, Any] = {"header": np.array(json.dumps(self._plain())), **self._arrays()}
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Explanation:
        """Read a file that ``save`` wrote. Nothing in it is executed.

        Raises:
            UserError: the file is missing, damaged, or not a saved explanation.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            arrays = _read_arrays(path)
            plain = json.loads(str(arrays.pop("header")))
            if plain.pop("format") != FORMAT:
                raise UserError(f"{path} was written by a newer version of this library: upgrade to read it")
            tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in arrays.items()}
            if tensors["image"].dtype == torch.uint8:
                tensors["image"] = tensors["image"].float() / 255
            method, requested, *seen = plain.pop("regions")
            window = tuple(seen[0]) if seen and seen[0] is not None else None
            labels = tensors.pop("labels", None)
            explanation = cls(
                regions=None if labels is None else Regions(labels, method, requested, seen=window),
                class_names=tuple(plain.pop("class_names")),
                **tensors,
                **plain,
            )
            explanation._check()
        except UserError:
            raise
        except Exception as error:  # a damaged or hostile file can raise any exception inside the decoders
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise UserError(f"{path} is not a saved explanation, or is damaged ({reason})") from None
        return explanation

    def _plain(self) -> dict[str, Any]:
        cut = self.regions
        regions = (None, None, None) if cut is None else (cut.method, cut.requested, cut.seen)
        plain = {
            "format": FORMAT,
            "target": self.target,
            "class_names": self.class_names,
            "evaluations": self.evaluations,
            "regions": regions,
            "provenance": self.provenance,
        }
        return json.loads(json.dumps(plain))

    def _arrays(self) -> dict[str, np.ndarray]:
        tensors: Mapping[str, Tensor | None] = {
            "image": _compact(self.image),
            "probabilities": self.probabilities,
            "labels": None if self.regions is None else self.regions.labels,
            "order": self.order,
            "insertion_scores": self.insertion_scores,
            "deletion_scores": self.deletion_scores,
            "pixel_map": self.pixel_map,
        }
        return {name: value.detach().cpu().numpy() for name, value in tensors.items() if value is not None}

    def _check(self) -> None:
        """Refuse parts of a file that do not fit together."""
        channels, height, width = self.image.shape
        floats = (self.image, self.probabilities, self.insertion_scores, self.deletion_scores, self.pixel_map)
        ok = channels == 3 and all(value is None or value.dtype == torch.float32 for value in floats)
        ok = ok and is_whole(self.target) and is_whole(self.evaluations) and isinstance(self.provenance, dict)
        ok = ok and all(isinstance(name, str) for name in self.class_names)
        ok = ok and (self.regions is None or (isinstance(self.regions.method, str) and _is_count(self.regions.requested)))
        ok = ok and len(self.class_names) == len(self.probabilities) and 0 <= self.target < len(self.class_names)
        if self.regions is not None:
            ok = ok and self.regions.labels.shape == (height, width)
            if self.order is not None:
                ok = ok and self.order.dtype == torch.int64 and self.order.sort().values.equal(torch.arange(self.regions.count))
                for scores in (self.insertion_scores, self.deletion_scores):
                    ok = ok and (scores is None or scores.shape == (self.regions.count + 1,))
        if self.pixel_map is not None:
            ok = ok and self.pixel_map.shape == (height, width)
        if not ok:
            raise ValueError("its parts do not fit together")
        for name in ("image", "probabilities", "insertion_scores", "deletion_scores"):  # a map may hold NaN: its figure says how many
            if (values := getattr(self, name)) is not None and not values.isfinite().all():
                raise ValueError(f"its {name.replace('_', ' ')} are not all finite")

    def _auc(self, scores: Tensor) -> float:
        return float(torch.trapezoid(scores.double(), self.area.double()))

    def _need_regions(self) -> Regions:
        if self.regions is None:
            raise UserError("this explanation is a pixel map without regions: call ranked_over(regions) first")
        return self.regions

    def _need(self, value: Tensor | None, name: str) -> Tensor:
        if value is None:
            raise UserError(f"this explanation has no {name}: expected one of a region search, received a map ({describe(self.pixel_map)})")
        return value


def _is_count(value: Any) -> bool:
    return value is None or is_whole(value)


def order_of_means(values: Tensor, labels: Tensor) -> Tensor:
    """Rank regions by the mean of a map [H, W] in each, ties by the lowest id: int64 [R], highest first."""
    if values.shape != labels.shape:
        raise UserError(f"regions are {list(labels.shape)}, the map is {list(values.shape)}: give regions of the same image")
    sizes = torch.bincount(labels.flatten())
    sums = torch.zeros(len(sizes), dtype=torch.float64).scatter_add_(0, labels.flatten(), values.double().flatten())
    return (sums / sizes).argsort(descending=True, stable=True)


def _compact(image: Tensor) -> Tensor:
    """The image as uint8 if that is exact, as for most photos; else unchanged."""
    rounded = (image * 255).round()
    return rounded.to(torch.uint8) if torch.equal(rounded / 255, image) else image


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file, refused if one would be larger than its entry in the file or than the limit."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, dtype = read_header[np.lib.format.read_magic(file)](file)
            size = math.prod(shape) * dtype.itemsize
            if size > entry.file_size or entry.file_size > 8 * _MAX_FILE_VALUES:
                raise ValueError(f"{entry.filename} would unpack to {max(size, entry.file_size):,} bytes")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
