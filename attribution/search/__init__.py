"""Searches: functions from an objective to an order of its regions, most important first."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attribution.objective import BALANCED, PUBLISHED, ScoreWeights
from attribution.search.bidirectional import bidirectional_greedy, bidirectional_greedy_v1
from attribution.search.budget import budget_search, default_budget
from attribution.search.contract import Objective
from attribution.search.exact import exact_search
from attribution.search.greedy import greedy, lazy_greedy, stochastic_greedy


@dataclass(frozen=True)
class Search:
    """A search, with everything that its callers need to know. It is called like its function.

    ``explain`` offers ``pending``, ``seed``, ``evaluations`` and ``progress`` to every search, and passes on those that are parameters
    of the function.

    Attributes:
        function: (objective, *, options) -> distinct region ids, most important first. It may return fewer than R.
        weights: of the four scores where the user gives neither weights nor a published preset; the published ones by default.
        default_budget: (objective, pixels of the model input) -> ``evaluations`` where the user gives none; None leaves that to the
            function.
    """

    function: Callable[..., Any]
    weights: ScoreWeights = PUBLISHED
    default_budget: Callable[[Objective, int], int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "__signature__", inspect.signature(self.function))  # what inspect.signature(search) returns

    def __call__(self, objective: Objective, /, **options: Any) -> Any:
        """The order that the function finds."""
        return self.function(objective, **options)

    def taken(self, **offered: Any) -> dict[str, Any]:
        """Those of the arguments offered that the function has a parameter for."""
        return {name: value for name, value in offered.items() if name in self.options}

    @property
    def name(self) -> str:
        """Name of the function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the parameters after the objective."""
        named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(parameter.name for parameter in list(parameters)[1:] if parameter.kind in named)

    @property
    def stochastic(self) -> bool:
        """Whether the order depends on ``seed``."""
        return "seed" in self.options

    @property
    def budgeted(self) -> bool:
        """Whether the user chooses how many images it forwards, by ``evaluations``."""
        return "evaluations" in self.options


SEARCHES: dict[str, Search] = {
    "bidirectional": Search(bidirectional_greedy),
    "budget": Search(budget_search, weights=BALANCED, default_budget=default_budget),
    "bidirectional_v1": Search(bidirectional_greedy_v1),
    "greedy": Search(greedy),
    "lazy_greedy": Search(lazy_greedy),
    "stochastic_greedy": Search(stochastic_greedy),
    "exact": Search(exact_search, weights=BALANCED),
}
