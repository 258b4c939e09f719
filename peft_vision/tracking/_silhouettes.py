"""Outlines and surfaces of drawn objects, and the waves that they move by."""

from __future__ import annotations

from typing import Any

import numpy as np

from peft_vision.tracking.boxes import Array
from peft_vision.tracking.crops import Frame

Random = np.random.Generator
Table = np.ndarray[Any, np.dtype[np.uint8]]

TEXTURE = 96
"""Side of a surface in pixels; it spans -1 to 1 across and down in the object's own units."""

_CORNERS = 64
_LEAST_CONTRAST = 22.0
_TRIES = 12


def silhouette(random: Random) -> Array:
    """A closed outline around 0, its farthest point 1 from there: 64 2.

    An ellipse, a polygon of 3 to 7 rounded corners, or a smooth blob, one as often as the other.
    """
    angle: Array = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    kind = random.integers(3)
    if kind == 0:
        radius: Array = np.ones(_CORNERS)
    elif kind == 1:
        radius = _rounded_polygon(angle, int(random.integers(3, 8)))
    else:
        radius = np.ones(_CORNERS)
        for order in range(2, 6):
            height, phase = random.normal() * 0.28 / order, random.uniform(0, 2 * np.pi)
            radius += height * np.cos(order * angle + phase)
        radius = np.clip(radius, 0.35, None)
    outline = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    outline[:, 1] *= random.uniform(0.55, 1.0)
    return np.asarray(outline / np.linalg.norm(outline, axis=1).max(), dtype=np.float64)


def surface(photograph: Frame, random: Random) -> Frame:
    """A patch of a photograph with some contrast, in changed colors: 96 96 3."""
    import cv2

    height, width = photograph.shape[:2]
    best, most = photograph[:TEXTURE, :TEXTURE], -1.0
    for _ in range(_TRIES):
        side = int(random.uniform(0.12, 0.5) * min(height, width)) + 16
        top, left = random.integers(height - side), random.integers(width - side)
        patch = photograph[top : top + side, left : left + side]
        contrast = float(patch.std())
        if contrast > most:
            best, most = patch, contrast
        if most > _LEAST_CONTRAST:
            break
    small: Frame = cv2.resize(best, (TEXTURE, TEXTURE), interpolation=cv2.INTER_AREA)
    return recolored(small, colors(random, strength=1.0))


def colors(random: Random, strength: float) -> tuple[list[int], Table]:
    """A change of colors: the order of the channels, and a table 256 3 of values.

    Args:
        random: draws it.
        strength: 0: nothing changes, 1: every channel gets a range of its own.
    """
    order = [int(channel) for channel in random.permutation(3)]
    gray = np.linspace(0, 1, 256)[:, None]
    low = random.uniform(0, 90, 3) * strength
    high = 255 - random.uniform(0, 110, 3) * strength
    if random.random() < 0.2 * strength:
        low, high = high, low
    curve = gray ** np.exp(random.normal(0, 0.3 * strength))
    return order, np.clip(low + (high - low) * curve, 0, 255).astype(np.uint8)


def recolored(image: Frame, change: tuple[list[int], Table]) -> Frame:
    """An image in other colors: H W 3."""
    import cv2

    order, table = change
    found: Frame = cv2.LUT(np.ascontiguousarray(image[..., order]), table[None])
    return found


def wave(random: Random, length: int, periods: tuple[float, float]) -> Array:
    """A smooth curve of three sines, its values within -1 and 1: `length` values.

    Args:
        random: draws it.
        length: number of frames.
        periods: shortest and longest period in frames.
    """
    frames = np.arange(length)
    weights = random.uniform(0.3, 1.0, 3)
    low, high = np.log(periods)
    period = np.exp(random.uniform(low, high, 3))
    phase = random.uniform(0, 2 * np.pi, 3)
    sines = np.sin(2 * np.pi * frames[:, None] / period + phase)
    return np.asarray(sines @ (weights / weights.sum()), dtype=np.float64)


def _rounded_polygon(angle: Array, corners: int) -> Array:
    """Radius of a regular polygon whose corners are blended into its circle."""
    step = 2 * np.pi / corners
    inside = np.mod(angle, step) - step / 2
    flat = np.cos(step / 2) / np.cos(inside)
    return np.asarray(0.85 * flat + 0.15, dtype=np.float64)
