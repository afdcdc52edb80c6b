"""Searches: functions from an objective to an order of its regions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from attribution.search.bidirectional import bidirectional_greedy, bidirectional_greedy_v1
from attribution.search.budget import budget_search
from attribution.search.greedy import greedy, lazy_greedy, stochastic_greedy

SEEDED = frozenset({"budget", "stochastic_greedy"})  # keys of SEARCHES that draw

SEARCHES: dict[str, Callable[..., Tensor]] = {
    "bidirectional": bidirectional_greedy,
    "budget": budget_search,
    "bidirectional_v1": bidirectional_greedy_v1,
    "greedy": greedy,
    "lazy_greedy": lazy_greedy,
    "stochastic_greedy": stochastic_greedy,
}
