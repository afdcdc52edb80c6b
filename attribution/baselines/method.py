"""Method: an entry of ``METHODS``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from attribution.baselines.options import option_names
from attribution.checks import check_choice

Family = Literal["gradient", "cam", "perturbation", "transformer", "control"]


@dataclass(frozen=True)
class Method:
    """An attribution method.

    Attributes:
        function: (task, **options) -> float map.
        family: what it works on, and the colour and marker of its figures.
        domain: what the map lies on, the model "input" [h, w] or the "image" [H, W].
        stochastic: whether the result depends on the seed.
        from_input: whether the gradient at the input is all that it takes from the model, so that no layer is looked at.

    Raises:
        UserError: another family or domain.
    """

    function: Callable[..., Tensor]
    family: Family
    domain: Literal["input", "image"] = "input"
    stochastic: bool = False
    from_input: bool = False

    def __post_init__(self) -> None:
        check_choice("family", self.family, get_args(Family))
        check_choice("domain", self.domain, ("input", "image"))

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that it takes."""
        return option_names(self.function)

    @property
    def summary(self) -> str:
        """One line that says what it computes."""
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")

    @property
    def black_box(self) -> bool:
        """Whether it sees scores only, and so explains any callable."""
        return self.family in ("perturbation", "control")

    @property
    def needs_layers(self) -> bool:
        """Whether it looks at single layers, or changes them."""
        return not self.black_box and not self.from_input

    @property
    def looks_inside(self) -> bool:
        """Whether it follows the whole network from scores to input; under DiFull it then sees the head's own cell alone."""
        return self.family in ("gradient", "transformer")
