"""Local search on an order: neighbours change places, and windows are filled again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from attribution.search.sets import TIE, Sets

_WINDOW = 12  # places of an order that are filled again together
_LANES = 2  # windows filled again side by side
_LEAST_ROOM = 0.3  # of a window, against the one with most
_SWEEPS = 16  # of neighbours, at most in a row
_PATIENCE = 30  # rounds in which no new image was asked for


def swap_neighbours(sets: Sets, order: list[int], first: int) -> bool:
    """One odd or even sweep: neighbours at first, first + 2, ... change places where the one changed prefix gains, in place.

    Returns:
        Whether any did. All prefixes of the order must be known.
    """
    chain = sets.chain(order)
    places = [at for at in range(first, sets.size - 1, 2) if sets.room(chain[at + 1]) > TIE]
    swapped = [[chain[at], chain[at] | 1 << order[at + 1], chain[at + 2]] for at in places]
    better = _gains(sets, [(new, chain[at : at + 3]) for new, at in zip(swapped, places, strict=True)])
    for at, gain in zip(places, better, strict=True):
        if gain:
            order[at], order[at + 1] = order[at + 1], order[at]
    return any(better)


def _gains(sets: Sets, changes: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
    """Which pieces of chains (new, old) gain; second halves are forwarded for those that still can."""
    sets.first_half([subset for new, _ in changes for subset in new])
    hopeful = [sets.mean(new) > sets.mean(old) + TIE for new, old in changes]
    sets.know([subset for (new, _), hope in zip(changes, hopeful, strict=True) if hope for subset in new])
    return [hope and sets.mean(new) > sets.mean(old) + TIE for (new, old), hope in zip(changes, hopeful, strict=True)]


def rebuild(sets: Sets, order: list[int], windows: Sequence[tuple[int, int]], backward: bool) -> None:
    """Fill windows (start, stop) of the order again greedily, from their last place to the first or the other way, in place.

    The windows do not overlap; candidates of all are forwarded together. A window that does not gain stays.
    """
    chain = sets.chain(order)
    left = [sorted(order[start:stop], reverse=backward) for start, stop in windows]
    placed: list[list[int]] = [[] for _ in windows]
    here = [chain[stop] if backward else chain[start] for start, stop in windows]
    while busy := [at for at, regions in enumerate(left) if len(regions) > 1]:
        steps = [[here[at] ^ 1 << region for region in left[at]] for at in busy]
        for at, group, best in zip(busy, steps, sets.best(steps), strict=True):
            placed[at].append(left[at].pop(best))
            here[at] = group[best]
    for (start, stop), rest, found in zip(windows, left, placed, strict=True):
        filled = rest + found[::-1] if backward else found + rest
        new = sets.chain([*order[:start], *filled])[start:]
        if sets.mean(new) > sets.mean(chain[start : stop + 1]) + TIE:
            order[start:stop] = filled


def improve(sets: Sets, order: Sequence[int], seed: int = 0) -> Iterator[list[int]]:
    """Local search: neighbours change places, then windows are filled again where F has most room to rise.

    Yields:
        The best order known after each round, until no new set is found to try.
    """
    sets.know(sets.chain(order))
    found = sets.best_chain(order)
    yield list(found)
    generator = np.random.default_rng(seed)
    unchanged = 0
    while unchanged < _PATIENCE:
        used = sets.used
        for _ in _swept(sets, found):
            yield list(found)
        if not any(sets.room(subset) > TIE for subset in sets.chain(found)):
            return
        windows = _windows(sets, found, generator)
        rebuild(sets, found, windows, backward=bool(generator.integers(2)))
        found = sets.best_chain(found)
        yield list(found)
        unchanged = unchanged + 1 if sets.used == used else 0


def _swept(sets: Sets, order: list[int]) -> Iterator[None]:
    """Odd and even sweeps in turn, until two in a row change nothing."""
    quiet = 0
    for parity in range(_SWEEPS):
        quiet = 0 if swap_neighbours(sets, order, parity % 2) else quiet + 1
        yield
        if quiet == 2:
            return


def _windows(sets: Sets, order: Sequence[int], generator: np.random.Generator) -> list[tuple[int, int]]:
    """Windows that do not overlap, drawn by how much F could still rise in them."""
    width = min(_WINDOW, sets.size)
    starts = range(int(generator.integers(width)) - width, sets.size, width)
    tiles = [(max(0, start), min(sets.size, start + width)) for start in starts]
    tiles = [(start, stop) for start, stop in tiles if stop - start > 2]
    chain = sets.chain(order)
    room = np.array([sum(sets.room(subset) for subset in chain[start + 1 : stop]) for start, stop in tiles])
    room = np.where(np.isfinite(room), room.clip(0), 1.0)
    room[room < _LEAST_ROOM * room.max(initial=0)] = 0
    if not room.sum() > 0:
        return []
    drawn = generator.choice(len(tiles), size=min(_LANES, int((room > 0).sum())), replace=False, p=room / room.sum())
    return [tiles[at] for at in sorted(drawn)]
