"""The search for sizes, on curves that are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from peft_vision.memory.sizes import divisors, fewest, largest


def curve(base: float, slope: float, bend: float = 0.0):
    def run(count: int):
        peak = int(base + slope * count + bend * count**2)
        return SimpleNamespace(peak=peak, fits=lambda size: peak <= size)

    return run


@pytest.mark.parametrize("bend", [0.0, 0.01])
@pytest.mark.parametrize("start", [1, 16, 300])
@pytest.mark.parametrize("size", [50, 101, 1000, 10**7])
def test_the_largest_that_fits(size, start, bend):
    run = curve(100, 7, bend)
    found = largest(run, start, size, most=256)
    if bend == 0:
        assert found == max((n for n in range(1, 257) if run(n).peak <= size), default=0)
    assert found == 0 or run(found).peak <= size


@pytest.mark.parametrize("size", [0, 300, 555, 700, 963, 1000, 2000])
def test_the_fewest_that_are_enough(size):
    run = curve(1000, -17)
    found = fewest(run, 40, size)
    expected = next((n for n in range(1, 40) if run(n).peak <= size), None)
    assert (None if found is None else found[0]) == expected


def test_divisors():
    assert divisors(16) == [1, 2, 4, 8, 16]
