"""Published costs are met, and a closed form that shares nothing with our counter agrees."""

from __future__ import annotations

import pytest

from benchmarks.published_macs import Case, cases, closed_form, row

CASES = cases()
SAMPLE = [case for case in CASES if case.setting in (
    "keep_rate=0.7", "keep_rate=0.3", "ratio=13/196", "ratio=22/196", "ratio=8/196",
    "DiffRate's numbers",
)]  # fmt: skip


def name(case: Case) -> str:
    return f"{case.model} {case.setting}"


def test_nothing_published_is_left_out() -> None:
    assert len(CASES) == 10 + 10 + 8 + 8 + 3 + 2


@pytest.mark.parametrize("case", SAMPLE, ids=name)
def test_the_counter_agrees_with_the_closed_form_and_with_what_was_published(case: Case) -> None:
    """The latter within 1 %, beyond what the printed figure was rounded by."""
    found = row(case)
    got, published = found["counted"], found["published"]
    assert got == pytest.approx(found["closed_form"] + found["extras"], rel=1e-6)
    assert found["extras"] < 0.007 * got
    assert abs(got - published) < 0.01 * published + found["rounding"]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_closed_form_meets_every_published_figure(case: Case) -> None:
    whole = closed_form(case.model, [196] * len(case.left))
    published = case.published if case.published >= 1 else case.published * whole
    assert closed_form(case.model, case.left) == pytest.approx(published, rel=0.007)
