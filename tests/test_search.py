"""The search for a budget, on costs that are known in closed form."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_vision.plan import Decisions
from peft_vision.search import GOOD, meets, search


class Fine:
    """Ten sites of 100 units each; strength is the share that goes, units cost 1, a site 20
    flat."""

    sites = 10
    units = 100

    def decide(self, strength: float) -> list[Decisions]:
        gone = int(strength * (self.units - 1))
        return [{f"s{i}.units": gone for i in range(self.sites)} if gone else {}]

    def price(self, decisions: list[Decisions]) -> float:
        return 20.0 * self.sites + sum(
            self.units - int(decisions[0].get(f"s{i}.units", 0))  # type: ignore[arg-type]
            for i in range(self.sites)
        )


@given(st.floats(250.0, 1199.0))
@settings(deadline=None)
def test_every_reachable_limit_is_met(limit: float) -> None:
    problem = Fine()
    found = search(problem.decide, problem.price, limit)
    assert problem.price(found.decisions) == found.cost
    assert found.cost <= limit
    assert meets(found.cost, limit)


def test_filling_is_finer_than_the_common_strength() -> None:
    """Ten sites move together in steps of 10; single sites close the gap to one unit."""
    problem = Fine()
    limit = 259.0
    found = search(problem.decide, problem.price, limit)
    assert found.cost > GOOD * limit
    assert len({int(v) for v in found.decisions[0].values()}) > 1  # type: ignore[arg-type]


def test_out_of_reach_reports_the_smallest() -> None:
    problem = Fine()
    found = search(problem.decide, problem.price, 100.0)
    assert found.cost == found.smallest == 200.0 + 10.0
    assert found.cost > 100.0


def test_a_limit_above_the_model_changes_nothing() -> None:
    problem = Fine()
    found = search(problem.decide, problem.price, 5000.0)
    assert found.decisions == [{}]
    assert found.strength == 0.0


@pytest.mark.parametrize("limit", [400.0, 800.0])
def test_two_methods_share(limit: float) -> None:
    one = Fine()

    def decide(strength: float) -> list[Decisions]:
        tokens: Decisions = {f"t{i}.tokens": strength for i in range(3)} if strength else {}
        return [*one.decide(strength), tokens]

    def price(decisions: list[Decisions]) -> float:
        tokens = 1.0
        for value in decisions[1].values():
            tokens *= 1 - 0.2 * float(value)  # type: ignore[arg-type]
        return one.price(decisions[:1]) * tokens

    found = search(decide, price, limit)
    assert meets(found.cost, limit)
    assert found.decisions[0]
    assert found.decisions[1]
