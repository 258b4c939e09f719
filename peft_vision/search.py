"""Finding strengths that meet a budget: bisection on one scalar, then filling site by site.

Nothing here knows a method, a model or a unit: a candidate is a set of decisions, and a function
says what it costs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft_vision.budget import LEAST
from peft_vision.plan import Decisions

Decide = Callable[[float], list[Decisions]]
"""Strength in [0, 1] -> decisions of each method."""

Price = Callable[[list[Decisions]], float]
"""Decisions of each method -> cost."""

ENOUGH = 0.996
"""A candidate this near to the limit is not improved any more."""

GOOD = 0.99
"""A candidate this near is not improved site by site; that is for steps too coarse otherwise."""

ROUNDS = 40


@dataclass(frozen=True)
class Found:
    """The best candidate.

    Attributes:
        decisions: per method.
        strength: of the first search, before filling.
        cost: what the candidate costs. `smallest`: what full strength costs.
        tried: how many candidates were priced.
    """

    decisions: list[Decisions]
    strength: float
    cost: float
    smallest: float
    tried: int


class _Counted:
    """Prices each candidate once: on a staircase many strengths decide the same."""

    def __init__(self, price: Price) -> None:
        self.price = price
        self.known: dict[str, float] = {}

    def __call__(self, decisions: list[Decisions]) -> float:
        key = json.dumps(decisions)
        if key not in self.known:
            self.known[key] = self.price(decisions)
        return self.known[key]

    @property
    def tried(self) -> int:
        return len(self.known)


def search(decide: Decide, price: Price, limit: float, *, exact: bool = True) -> Found:
    """The largest candidate that costs at most `limit`.

    Cost has to be non-increasing in strength. After the common strength is bracketed, single
    kinds of sites and then single sites are given back strength while the limit holds, so that
    the result is as fine as the finest site allows.

    Args:
        exact: False for a cost that is measured rather than counted: then nothing is filled (many
            noisy trials would pick a lucky one), and full strength need not be the cheapest.

    Returns:
        The candidate; its cost is above `limit` only when nothing cheaper exists.
    """
    counted = _Counted(price)
    strongest, full = 1.0, decide(1.0)
    smallest = counted(full)
    if smallest > limit and not exact:
        strongest, full, smallest = _cheapest(decide, counted, limit, smallest)
    if smallest > limit:
        return Found(full, strongest, smallest, smallest, counted.tried)
    nothing = decide(0.0)
    cost = counted(nothing)
    if cost <= limit:
        return Found(nothing, 0.0, cost, smallest, counted.tried)
    high = (strongest, smallest)
    strength, best, cost = _bracket((decide, counted, limit), (0.0, cost), high, full)
    for group in _groups(best):
        if cost > (ENOUGH if len(group[1]) > 1 else GOOD) * limit or not exact:
            break
        best, cost = _give_back((decide, counted, limit), strength, best, cost, group)
    return Found(best, strength, cost, smallest, counted.tried)


def _cheapest(
    decide: Decide, price: Price, limit: float, full: float
) -> tuple[float, list[Decisions], float]:
    """The strength below 1 that first fits, or else the cheapest: tiny layers can be slower."""
    tried = [(full, 1.0)]
    for strength in (0.9, 0.8, 0.7, 0.6, 0.5):
        cost = price(decide(strength))
        tried.append((cost, strength))
        if cost <= limit:
            break
    cost, strength = min(tried)
    return strength, decide(strength), cost


def _bracket(
    problem: tuple[Decide, Price, float],
    low: tuple[float, float],
    high: tuple[float, float],
    best: list[Decisions],
) -> tuple[float, list[Decisions], float]:
    """Narrow (strength, cost) brackets: `low` costs too much, `high` fits."""
    decide, price, limit = problem
    for turn in range(ROUNDS):
        if high[1] > ENOUGH * limit or high[0] - low[0] < 1e-6:
            break
        strength = _between(low, high, limit, halve=turn % 3 == 2)
        candidate = decide(strength)
        cost = price(candidate)
        if cost <= limit:
            high, best = (strength, cost), candidate
        else:
            low = (strength, cost)
    return high[0], best, high[1]


def _between(
    low: tuple[float, float], high: tuple[float, float], limit: float, *, halve: bool
) -> float:
    """Where the line between the brackets meets the limit; every third turn the middle."""
    span = high[0] - low[0]
    if halve or low[1] <= high[1]:
        return low[0] + span / 2
    aimed = low[0] + span * (low[1] - 0.999 * limit) / (low[1] - high[1])
    return min(max(aimed, low[0] + 0.02 * span), high[0] - 0.02 * span)


Group = tuple[int, frozenset[str]]
"""(method, sites)"""


def _groups(decisions: list[Decisions]) -> list[Group]:
    """Sites that may be given back strength together: by kind, then one by one, deepest first.

    Late sites change the cost least, so they fill gaps that early ones cannot.
    """
    kinds: list[Group] = []
    single: list[Group] = []
    for method, decided in enumerate(decisions):
        by_kind: dict[str, list[str]] = {}
        for key in decided:
            by_kind.setdefault(key.rpartition(".")[2], []).append(key)
        kinds += [(method, frozenset(keys)) for keys in by_kind.values()]
        single += [(method, frozenset([key])) for key in reversed(list(decided))]
    return kinds + single


def _give_back(
    problem: tuple[Decide, Price, float],
    strength: float,
    best: list[Decisions],
    cost: float,
    group: Group,
) -> tuple[list[Decisions], float]:
    decide, price, limit = problem
    low, high = 0.0, strength
    for _ in range(14):
        if cost > ENOUGH * limit or high - low < 1e-4 * strength:
            break
        middle = (low + high) / 2
        candidate = _mixed(best, decide(middle), group)
        now = price(candidate) if candidate != best else cost
        if now <= limit:
            high = middle
            if now > cost:
                best, cost = candidate, now
        else:
            low = middle
    return best, cost


def _mixed(best: Sequence[Decisions], weaker: Sequence[Decisions], group: Group) -> list[Decisions]:
    method, keys = group
    mixed = [dict(decided) for decided in best]
    for key in keys:
        mixed[method].pop(key, None)
        if key in weaker[method]:
            mixed[method][key] = weaker[method][key]
    ordered = {k: mixed[method][k] for k in best[method] if k in mixed[method]}
    mixed[method] = ordered
    return mixed


def meets(cost: float, limit: float) -> bool:
    """Whether a cost lies in (LEAST, 1.00] of the limit."""
    return LEAST * limit < cost <= limit
