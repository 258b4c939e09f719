"""The largest batch, or the fewest recomputed blocks, that fit: few runs on a straight line.

Memory grows by nearly the same bytes with each image and falls by nearly the same with each
recomputed block. Two runs tell how much that is; what they predict is run, and corrected.
"""

from __future__ import annotations

from collections.abc import Callable

from peft_vision.memory.figures import MemoryEstimate

Run = Callable[[int], MemoryEstimate]
TRIES = 6


def largest(run: Run, start: int, size: int, most: int) -> int:
    """The largest number of images that fits, by exact runs; 0 where not even one does.

    Args:
        run: the estimate for so many images.
        start: the first number to try, at least 1.
        size: bytes there are. `most`: the largest number of interest.
    """
    known: dict[int, int] = {}

    def peak(count: int) -> int:
        if count not in known:
            known[count] = run(count).peak
        return known[count]

    low, high = 0, most + 1  # fits; does not fit
    for count in dict.fromkeys((min(start, most), 1 if start > 1 else min(2, most))):
        low, high = (max(low, count), high) if peak(count) <= size else (low, min(high, count))
    for _ in range(TRIES):
        if high - low <= 1:
            break
        one, two = min(known), max(known)
        slope = (known[two] - known[one]) / (two - one) or 1.0
        guess = int(one + (size - known[one]) / slope)
        count = min(max(guess, low + 1), high - 1)
        low, high = (count, high) if peak(count) <= size else (low, count)
    return low


def fewest(run: Run, most: int, size: int) -> tuple[int, MemoryEstimate] | None:
    """The smallest number from 1 to `most` - 1 that fits, and its estimate; None for none.

    Args:
        run: the estimate for a number; the more, the less memory.
        size: bytes there are.
    """
    first, last = run(1), run(most - 1)
    if not last.fits(size):
        return None
    if first.fits(size) or most == 2:
        return 1, first
    low, high, best = 1, most - 1, last  # does not fit; fits
    slope = (first.peak - last.peak) / (most - 2)
    for _ in range(TRIES):
        if high - low <= 1 or slope <= 0:
            break
        guess = 1 + -int(-(first.peak - size) // slope)
        count = min(max(guess, low + 1), high - 1)
        found = run(count)
        if found.fits(size):
            high, best = count, found
        else:
            low = count
    return high, best


def divisors(count: int) -> list[int]:
    """Of a whole number of at least 1, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [n for n in range(1, count + 1) if count % n == 0]
