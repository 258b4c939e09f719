"""Two followers that learned nothing: a template that is correlated, and a box that never moves.

What a trained tracker adds is what it has beyond these.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from peft_vision.tracking.boxes import Array
from peft_vision.tracking.crops import Frame

_SIDE = 48.0
"""The target is looked at as if its area were the square of this, in pixels."""


class Still:
    """The box of the first frame, in every frame."""

    def __init__(self) -> None:
        self._box = np.zeros(4)

    def start(self, frame: Frame, box: Array) -> None:
        """Keep the box."""
        self._box = np.array(box, dtype=np.float64)

    def step(self, frame: Frame) -> tuple[Array, float]:
        """Give it back, with full confidence."""
        return self._box.copy(), 1.0


class Correlation:
    """Normalized cross-correlation with the target as it was in the first frame.

    The template is never updated, as that of a tracker of template and search image. In each frame
    it is looked for around the last box at a few scales, in color; the best place, found to a part
    of a pixel, becomes the box.

    Args:
        area: side of the square that is searched, in units of the square root of the box's area.
        step: ratio of one scale to the next. `scales`: how many, odd.
        keep: what the correlation of another scale than the last is multiplied by, for each step.
        window: weight of a Hann window over places; near ones are preferred a little.
        damping: share of the last size in the new one.
    """

    def __init__(
        self,
        area: float = 3.0,
        step: float = 1.04,
        scales: int = 5,
        keep: float = 0.985,
        window: float = 0.1,
        damping: float = 0.5,
    ) -> None:
        self.area, self.window, self.damping = area, window, damping
        exponents = np.arange(scales) - scales // 2
        self._scales = [
            (float(step**exponent), float(keep ** abs(exponent))) for exponent in exponents
        ]
        self._box = np.zeros(4)
        self._template = np.zeros((1, 1, 3), dtype=np.float32)

    def start(self, frame: Frame, box: Array) -> None:
        """Cut the template.

        Args:
            box: x y w h in pixels, with an area.
        """
        self._box = np.array(box, dtype=np.float64)
        zoom = _SIDE / math.sqrt(self._box[2] * self._box[3])
        width, height = (max(4, round(side * zoom)) for side in self._box[2:])
        self._template = _cut(frame, self._middle, tuple(self._box[2:]), (width, height))

    def step(self, frame: Frame) -> tuple[Array, float]:
        """Find the place with the highest correlation: box, and correlation cut to [0, 1]."""
        best, place, chosen = -np.inf, (0.0, 0.0), 1.0
        certain = 0.0
        for scale, kept in self._scales:
            found, peak = self._at(frame, scale)
            value = found[1] * kept
            if value > best:
                best, place, chosen, certain = value, peak, scale, found[0]
        middle = self._middle + np.array(place)
        size = self._box[2:] * (self.damping + (1 - self.damping) * chosen)
        size = np.clip(size, 2.0, [frame.shape[1], frame.shape[0]])
        middle = np.clip(middle, 0.0, [frame.shape[1], frame.shape[0]])
        self._box = np.concatenate([middle - size / 2, size])
        return self._box.copy(), float(np.clip(certain, 0.0, 1.0))

    @property
    def _middle(self) -> Array:
        return np.asarray(self._box[:2] + self._box[2:] / 2)

    def _at(self, frame: Frame, scale: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """The best place at one scale: correlation, the same with the window; offset in pixels."""
        rows, columns = self._template.shape[:2]
        size = self._box[2:] * scale
        reach = self.area * _SIDE
        count = (int(columns + reach) // 2 * 2 + columns % 2, int(rows + reach) // 2 * 2 + rows % 2)
        pixel = size / np.array([columns, rows])  # of the frame, for one of the search image
        image = _cut(frame, self._middle, tuple(pixel * count), count)
        map_ = cv2.matchTemplate(image, self._template, cv2.TM_CCOEFF_NORMED)
        # Where image or template is of one color the correlation is no number, or 1 by convention.
        map_ = np.where(np.isfinite(map_) & (np.abs(map_) <= 1.001), map_, 0.0)
        if not self._template.std(axis=(0, 1)).any():
            map_ = np.zeros_like(map_)
        hann = np.outer(np.hanning(map_.shape[0] + 2), np.hanning(map_.shape[1] + 2))[1:-1, 1:-1]
        mixed = (1 - self.window) * map_ + self.window * hann
        y, x = np.unravel_index(int(mixed.argmax()), mixed.shape)
        across = x + _between(map_[y], int(x)) - (map_.shape[1] - 1) / 2
        down = y + _between(map_[:, x], int(y)) - (map_.shape[0] - 1) / 2
        return (float(map_[y, x]), float(mixed[y, x])), (
            float(across * pixel[0]),
            float(down * pixel[1]),
        )


def _cut(
    frame: Frame, middle: Array, size: tuple[float, ...], count: tuple[int, ...]
) -> np.ndarray:
    """A part of a frame with `middle` in its middle, in float32; the border goes on outside.

    Args:
        size: width and height in the frame. `count`: columns and rows of the result.
    """
    across, down = size[0] / count[0], size[1] / count[1]
    # From pixel i of the result, whose middle is i + 0.5, to where OpenCV counts middles as whole.
    x = middle[0] - size[0] / 2 + across / 2 - 0.5
    y = middle[1] - size[1] / 2 + down / 2 - 0.5
    matrix = np.array([[across, 0, x], [0, down, y]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    if max(across, down) > 1.5:  # a blur first, so that fine detail does not flicker
        frame = cv2.GaussianBlur(frame, (0, 0), sigmaX=across / 3, sigmaY=down / 3)
    cut = cv2.warpAffine(frame, matrix, tuple(count), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(cut, dtype=np.float32)


def _between(values: Array, at: int) -> float:
    """How far from a peak's place the top of the parabola through it and its neighbors is."""
    if at == 0 or at == len(values) - 1:
        return 0.0
    before, here, after = (float(values[at + offset]) for offset in (-1, 0, 1))
    bend = before - 2 * here + after
    return float(np.clip(0.5 * (before - after) / bend, -0.5, 0.5)) if bend < 0 else 0.0
