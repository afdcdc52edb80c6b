"""The protocol of a perturbation curve: steps, fill, output, axis; and the published protocols by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from attribution.checks import check_choice, check_whole, did_you_mean
from attribution.errors import UserError, describe
from attribution.fills import DEFAULT_FILL, MODEL_MEAN, Fill, fill_label, is_drop, is_named, parse_fill, plain_fill
from attribution.task import Output


@dataclass(frozen=True)
class Protocol:
    """How a curve is measured.

    Attributes:
        steps: "regions": each step reveals or hides one region. "pixels": each step reveals or hides an equal share of the pixels.
        count: number of pixel steps, at most one for each pixel; region steps do not use it.
        fill: what hidden pixels show. Whatever ``make_fill`` takes; "model_mean" (zero after the classifier's normalisation);
            "linear" (imputed from the pixels that are shown, noise 0.01, see ``evaluation.metrics.imputation``); or "drop" (the tokens
            of hidden patches leave a vision transformer's sequence; only region steps, with regions that follow its patches).
        output: the score that is followed, "probability" or "logit" of the target.
        axis: "area", the exact share of the pixels that the model sees (not those that it crops away); or "black_unrevealed", LiMA's,
            which never counts pixels that are black in the image: with b the share of the other pixels, insertion runs from 0 to b and
            deletion from 1 - b to 1.

    Raises:
        UserError: a value other than these, or "black_unrevealed" with a fill that is not black.
    """

    steps: Literal["regions", "pixels"] = "regions"
    count: int = 50
    fill: Fill = DEFAULT_FILL
    output: Output = "probability"
    axis: Literal["area", "black_unrevealed"] = "area"

    def __post_init__(self) -> None:
        check_choice("steps", self.steps, ("regions", "pixels"))
        check_choice("output", self.output, ("probability", "logit"))
        check_choice("axis", self.axis, ("area", "black_unrevealed"))
        check_whole("count", self.count, 1)
        object.__setattr__(self, "count", int(self.count))
        object.__setattr__(self, "fill", parse_fill(self.fill))
        if is_drop(self.fill) and self.steps == "pixels":
            raise UserError("fill 'drop' with pixel steps: it hides whole patches; expected steps='regions'")
        if self.axis == "black_unrevealed" and not is_named(self.fill, ("black",)):
            raise UserError(f"axis 'black_unrevealed' with fill {describe(self.fill)}: expected fill 'black', or axis 'area'")

    def label(self) -> str:
        """A short text for tables, such as "regions, black, p" or "50 pixel steps, model_mean, logit"."""
        steps = "regions" if self.steps == "regions" else f"{self.count} pixel steps"
        output = "p" if self.output == "probability" else "logit"
        return f"{steps}, {fill_label(self.fill)}, {output}" + (", black unrevealed" if self.axis == "black_unrevealed" else "")

    def settings(self) -> dict[str, Any]:
        """All that changes a number, as plain JSON types; an image as fill stands as the digest of its pixels."""
        count = self.count if self.steps == "pixels" else None
        return {"steps": self.steps, "count": count, "fill": plain_fill(self.fill), "output": self.output, "axis": self.axis}


PROTOCOLS: dict[str, Protocol] = {
    "lima": Protocol(),
    "smdl": Protocol(steps="pixels", count=10, fill=MODEL_MEAN),
    "smdl-baselines": Protocol(steps="pixels", count=50, fill=MODEL_MEAN),
    "lima-compat": Protocol(axis="black_unrevealed"),
}


def as_protocol(protocol: Protocol | str) -> Protocol:
    """A protocol by its key in ``PROTOCOLS``, or as it is.

    Raises:
        UserError: anything else.
    """
    if isinstance(protocol, str) and protocol in PROTOCOLS:
        return PROTOCOLS[protocol]
    if not isinstance(protocol, Protocol):
        raise UserError(
            f"protocol is {describe(protocol)}: expected one of {', '.join(PROTOCOLS)}, or a Protocol{did_you_mean(protocol, PROTOCOLS)}"
        )
    return protocol
