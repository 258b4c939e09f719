"""Which ranks a budget buys: every layer's options from dear to cheap, and one order over all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from peft_vision.decomposers._scheme import Rank

STEEP = 16
"""From twice this rank on, ranks go down by more than 1: a step is at most 1/16 of the rank."""

LARGEST = 8
"""The largest step; kernels like their channels in eights."""


@dataclass(frozen=True)
class Rung:
    """One option: its cost in multiply-accumulates, and minus the log of the energy it keeps."""

    rank: Rank
    macs: int
    lost: float | None


@dataclass(frozen=True)
class Ladder:
    """A layer's options, each cheaper than the one before it and than the `dense` layer."""

    key: str
    dense: int
    rungs: tuple[Rung, ...]


def lower(rank: int) -> int:
    """The next rank below, at least 1."""
    step = 1
    while 2 * step * STEEP <= rank and step < LARGEST:
        step *= 2
    return max(1, (rank - 1) // step * step)


def descent(
    full: Rank, cost: Callable[[Rank], int], energies: Sequence[Tensor] | None
) -> list[Rung]:
    """From full rank down to 1, each time by the step that loses least energy for what it saves.

    Args:
        energies: per rank, of its components; without them all ranks go down at one pace.
    """
    if energies is None:
        return _even_descent(full, cost)
    kept = [_kept(energy) for energy in energies]
    rungs = [Rung(full, cost(full), 0.0)]
    while True:
        now = rungs[-1]
        found = [
            Rung(rank, macs, sum(k[r] for k, r in zip(kept, rank, strict=True)))
            for place in range(len(full))
            for rank, macs in _cheaper(now, place, cost)
        ]
        if not found:
            return rungs
        rungs.append(min(found, key=lambda rung: _slope(now, rung)))


def _even_descent(full: Rank, cost: Callable[[Rank], int]) -> list[Rung]:
    rank, rungs = full, [Rung(full, cost(full), None)]
    while any(r > 1 for r in rank):
        share = max(lower(r) / r for r in rank if r > 1)
        rank = tuple(max(1, min(lower(r), math.ceil(r * share))) if r > 1 else 1 for r in rank)
        rungs.append(Rung(rank, cost(rank), None))
    return rungs


def _cheaper(now: Rung, place: int, cost: Callable[[Rank], int]) -> Iterator[tuple[Rank, int]]:
    """The nearest lower rank at one place that costs less than what stands there now.

    At full rank a factor may be left out, so that the first steps down can cost more.
    """
    rank = now.rank
    while rank[place] > 1:
        rank = (*rank[:place], lower(rank[place]), *rank[place + 1 :])
        macs = cost(rank)
        if macs < now.macs:
            yield rank, macs
            return


def _kept(energy: Tensor) -> list[float]:
    """Minus the log of the share that the first r components hold, for r = 0, 1, ..."""
    values = [max(0.0, float(value)) for value in energy]
    total = sum(values)
    if total <= 0:
        return [0.0] * (len(values) + 1)
    shares = [min(1.0, part / total) for part in accumulate(values)]
    return [math.inf, *(-math.log(max(share, 1e-12)) for share in shares)]


def _slope(now: Rung, then: Rung) -> float:
    assert now.lost is not None
    assert then.lost is not None
    return (then.lost - now.lost) / max(now.macs - then.macs, 1e-9)


def ladder(key: str, dense: int, rungs: Sequence[Rung]) -> Ladder:
    """The options that are cheaper than the layer itself, and than every option before them."""
    best, kept = dense, []
    for rung in rungs:
        if rung.macs < best:
            best = rung.macs
            kept.append(rung)
    return Ladder(key, dense, tuple(kept))


def climb(ladders: Sequence[Ladder], strength: float) -> dict[str, Rank]:
    """The ranks at a strength in [0, 1], which is the share of what can be saved that is saved.

    Where energies are known, layers go one after the other, in the order of what each loses for
    what it saves between two points of its convex hull: a layer just below its break-even rank
    has lost much and saved nothing, so that few layers should stand there. Otherwise every layer
    gives the same share.
    """
    if strength <= 0:
        return {}
    if any(rung.lost is None for ladder in ladders for rung in ladder.rungs):
        return _even(ladders, strength)
    steps = sorted(
        (priority, place, number, saved)
        for place, one in enumerate(ladders)
        for number, (priority, saved) in enumerate(_steps(one))
    )
    allowed = strength * sum(saved for *_, saved in steps) * (1 + 1e-12)
    reached: dict[str, Rank] = {}
    spent = 0
    for _, place, number, saved in steps:
        spent += saved
        if spent > allowed:
            break
        reached[ladders[place].key] = ladders[place].rungs[number].rank
    return {one.key: reached[one.key] for one in ladders if one.key in reached}


def _even(ladders: Sequence[Ladder], strength: float) -> dict[str, Rank]:
    reached = {}
    for one in ladders:
        goal = one.dense - strength * (one.dense - one.rungs[-1].macs) * (1 - 1e-12)
        fitting = [rung for rung in one.rungs if rung.macs <= goal]
        reached[one.key] = (fitting or one.rungs[-1:])[0].rank
    return reached


def _steps(one: Ladder) -> list[tuple[float, int]]:
    """(priority, saving) of each step down; the steps between two hull points share theirs."""
    points = [Rung((), one.dense, 0.0), *one.rungs]
    found: list[tuple[float, int]] = []
    while len(found) < len(one.rungs):
        here = len(found)
        slopes = [_slope(points[here], then) for then in points[here + 1 :]]
        best = min(slopes)
        until = here + 1 + max(place for place, slope in enumerate(slopes) if slope == best)
        found += [(best, points[n].macs - points[n + 1].macs) for n in range(here, until)]
    return found
