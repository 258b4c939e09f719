"""What every dialect of the metrics measures: overlap, distance of centers, and curves of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peft_vision.tracking.boxes import Array


@dataclass(frozen=True)
class Curve:
    """A share of frames, in [0, 1], for each threshold.

    Attributes:
        thresholds: overlap in [0, 1], pixels, or shares of the target's size; ascending.
        values: as many.
    """

    thresholds: Array
    values: Array


def overlaps(first: Array, second: Array, empty: float = 0.0) -> Array:
    """Intersection over union, row by row: N 4 and N 4 -> N.

    Where neither has an area it is `empty`. Counting pixels (right = x + w - 1, and sides one
    longer) gives the same for x, y, w, h.
    """
    low = np.maximum(first[:, :2], second[:, :2])
    high = np.minimum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:])
    both = np.clip(high - low, 0.0, None).prod(1)
    union = first[:, 2:].prod(1) + second[:, 2:].prod(1) - both
    found = np.divide(both, union, out=np.full_like(both, empty), where=union > 0)
    # x + w - x is not always w: without a bound, rounding would lift an overlap above 1.
    return np.asarray(np.minimum(found, 1.0))


def distances(predicted: Array, truth: Array, units: Array | None = None) -> Array:
    """Distance of centers, xy + (wh - 1) / 2: N, in pixels.

    Args:
        predicted: N 4. `truth`: N 4.
        units: N 2, width and height to divide by; NaN comes back where one is 0.
    """
    apart = (predicted[:, :2] - truth[:, :2]) + 0.5 * (predicted[:, 2:] - truth[:, 2:])
    if units is not None:
        apart = np.divide(apart, units, out=np.full_like(apart, np.nan), where=units > 0)
    return np.asarray(np.sqrt((apart**2).sum(1)))


def above(found: Array, thresholds: Array) -> Curve:
    """The share of `found` that is more than each threshold."""
    return Curve(thresholds, (found[:, None] > thresholds).mean(0))


def within(found: Array, thresholds: Array) -> Curve:
    """The share of `found` that is each threshold or less."""
    return Curve(thresholds, (found[:, None] <= thresholds).mean(0))


def area(values: Array) -> float:
    """Below evenly spaced values over [0, 1], by trapezoids, times 100."""
    return float(100 * ((values[1:] + values[:-1]) / 2).mean())
