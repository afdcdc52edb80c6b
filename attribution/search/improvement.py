"""Local search on an order: neighbours change places, and windows of the order are filled again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from attribution.search.chains import TIE, best_chain, chain_of, mean_along
from attribution.search.sets import Sets

# All five were chosen on development images (see budget.py).
PLACES_IN_A_WINDOW = 12  # consecutive places of the order that are filled again together
WINDOWS_AT_ONCE = 2  # windows filled again in one round, their images in one batch; more where large batches cost little
LEAST_ROOM = 0.3  # windows whose room for F is less than this share of the largest room are not drawn
MOST_SWEEPS = 16  # sweeps over neighbours in a round
ROUNDS_WITHOUT_NEWS = 30  # the search ends after this many rounds in a row that forwarded no image


def swap_neighbours(sets: Sets, order: list[int], first: int) -> bool:
    """One sweep over pairs of neighbours, from place ``first`` on: a pair changes places where that raises F. Edits the order.

    A swap changes one prefix. F of all prefixes of the order must be known.

    Returns:
        Whether any pair changed places.
    """
    chain = chain_of(order)
    places = [at for at in range(first, sets.size - 1, 2) if sets.room(chain[at + 1]) > TIE]
    swapped = [[chain[at], chain[at] | 1 << order[at + 1], chain[at + 2]] for at in places]
    better = _gains(sets, [(new, chain[at : at + 3]) for new, at in zip(swapped, places, strict=True)])
    for at, gain in zip(places, better, strict=True):
        if gain:
            order[at], order[at + 1] = order[at + 1], order[at]
    return any(better)


def _gains(sets: Sets, changes: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
    """Which pieces of chains (new, old) raise the mean of F. Second halves are forwarded only for pieces that still can."""
    sets.first_half([subset for new, _ in changes for subset in new])
    hopeful = [mean_along(sets, new) > mean_along(sets, old) + TIE for new, old in changes]
    sets.know([subset for (new, _), hope in zip(changes, hopeful, strict=True) if hope for subset in new])
    return [hope and mean_along(sets, new) > mean_along(sets, old) + TIE for (new, old), hope in zip(changes, hopeful, strict=True)]


def rebuild(sets: Sets, order: list[int], windows: Sequence[tuple[int, int]], backward: bool) -> None:
    """Fill windows of the order again by greedy search, in place. A window that does not gain stays as it was.

    Args:
        sets: what is known; the images that this needs are forwarded.
        order: F of all its prefixes must be known.
        windows: (start, stop) each; they do not overlap. The candidates of all are forwarded together.
        backward: from the last place of each window to the first, or from the first to the last.
    """
    chain = chain_of(order)
    left = [sorted(order[start:stop], reverse=backward) for start, stop in windows]
    placed: list[list[int]] = [[] for _ in windows]
    here = [chain[stop] if backward else chain[start] for start, stop in windows]
    while busy := [at for at, regions in enumerate(left) if len(regions) > 1]:
        steps = [[here[at] ^ 1 << region for region in left[at]] for at in busy]
        for at, group, best in zip(busy, steps, sets.best(steps), strict=True):
            placed[at].append(left[at].pop(best))
            here[at] = group[best]
    for (start, stop), rest, chosen in zip(windows, left, placed, strict=True):
        filled = rest + chosen[::-1] if backward else chosen + rest
        new = chain_of([*order[:start], *filled])[start:]
        if mean_along(sets, new) > mean_along(sets, chain[start : stop + 1]) + TIE:
            order[start:stop] = filled


def improve(sets: Sets, order: Sequence[int], seed: int = 0) -> Iterator[list[int]]:
    """Local search: in each round neighbours change places, then windows are filled again where F has most room to rise.

    Yields:
        The best order known after each step, until no further subset is found to evaluate.
    """
    sets.know(chain_of(order))
    best = best_chain(sets, order)
    yield list(best)
    generator = np.random.default_rng(seed)
    unchanged = 0
    while unchanged < ROUNDS_WITHOUT_NEWS:
        used = sets.used
        for _ in _swept(sets, best):
            yield list(best)
        if not any(sets.room(subset) > TIE for subset in chain_of(best)):
            return
        windows = _windows(sets, best, generator)
        rebuild(sets, best, windows, backward=bool(generator.integers(2)))
        best = best_chain(sets, best)
        yield list(best)
        unchanged = unchanged + 1 if sets.used == used else 0


def _swept(sets: Sets, order: list[int]) -> Iterator[None]:
    """Sweeps from places 0 and 1 in turn, until two in a row change nothing."""
    quiet = 0
    for sweep in range(MOST_SWEEPS):
        quiet = 0 if swap_neighbours(sets, order, sweep % 2) else quiet + 1
        yield
        if quiet == 2:
            return


def _windows(sets: Sets, order: Sequence[int], generator: np.random.Generator) -> list[tuple[int, int]]:
    """Draw windows (start, stop) that do not overlap, with probabilities in proportion to the room that F has to rise in them."""
    width = min(PLACES_IN_A_WINDOW, sets.size)
    starts = range(int(generator.integers(width)) - width, sets.size, width)
    tiles = [(max(0, start), min(sets.size, start + width)) for start in starts]
    tiles = [(start, stop) for start, stop in tiles if stop - start > 2]
    chain = chain_of(order)
    room = np.array([sum(sets.room(subset) for subset in chain[start + 1 : stop]) for start, stop in tiles])
    room = np.where(np.isfinite(room), room.clip(0), 1.0)
    room[room < LEAST_ROOM * room.max(initial=0)] = 0
    if not room.sum() > 0:
        return []
    most = max(WINDOWS_AT_ONCE, sets.together // PLACES_IN_A_WINDOW)
    drawn = generator.choice(len(tiles), size=min(most, int((room > 0).sum())), replace=False, p=room / room.sum())
    return [tiles[at] for at in sorted(drawn)]
