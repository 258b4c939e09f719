"""The square image that a tracker sees around a box, and the way back from it.

A pixel (x, y) of the frame goes to (scale * x + shift); both are continuous, so pixel number i is
the interval from i to i + 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from peft_vision.tracking.boxes import Array

Frame = np.ndarray[Any, np.dtype[np.uint8]]
"""H W 3, RGB."""


@dataclass(frozen=True)
class Crop:
    """Which part of a frame becomes the image.

    Attributes:
        scale: output pixels per frame pixel, across and down.
        shift: in output pixels, across and down.
        side: of the square output, in pixels.
    """

    scale: tuple[float, float]
    shift: tuple[float, float]
    side: int

    @classmethod
    def around(cls, box: Sequence[float] | Array, area: float, side: int, least: float) -> Crop:
        """The crop with a box in its middle, of one scale across and down.

        Args:
            box: x y w h in the frame. `area`: see `Geometry`. `least`: smaller sides count as this.
        """
        x, y, w, h = (float(value) for value in box)
        middle = (x + w / 2, y + h / 2)
        w, h = max(w, least), max(h, least)
        margin = (area - 1) * (w + h) / 2
        scale = side / math.sqrt((w + margin) * (h + margin))
        return cls.centered(middle, (scale, scale), side)

    @classmethod
    def centered(cls, middle: tuple[float, float], scale: tuple[float, float], side: int) -> Crop:
        """The crop with a point of the frame in its middle."""
        shift = (side / 2 - scale[0] * middle[0], side / 2 - scale[1] * middle[1])
        return cls(scale, shift, side)

    def into(self, boxes: Array) -> Array:
        """Corners in the frame -> corners in the crop, in pixels: ... 4."""
        return np.asarray(boxes, np.float64) * (self.scale * 2) + (self.shift * 2)

    def back(self, boxes: Array) -> Array:
        """Corners in the crop, in pixels -> corners in the frame: ... 4."""
        return (np.asarray(boxes, np.float64) - (self.shift * 2)) / (self.scale * 2)


def mean_color(frame: Frame) -> tuple[float, float, float]:
    """Mean of each channel, 0 to 255: what is outside of a frame looks like this."""
    rows = frame.sum(axis=0, dtype=np.uint32)  # by whole rows: 30 times as fast as by pixels
    red, green, blue = (rows.sum(axis=0, dtype=np.float64) / (frame.size / 3)).tolist()
    return red, green, blue


def cut(frame: Frame, crop: Crop, fill: Sequence[float]) -> Tensor:
    """Sample a crop bilinearly: 3 S S, float32, 0 to 255.

    Args:
        fill: color of what is outside of the frame.
    """
    color = torch.tensor(list(fill), dtype=torch.float32)[:, None, None]
    across, x0, x1 = _places(crop, 0, frame.shape[1])
    down, y0, y1 = _places(crop, 1, frame.shape[0])
    if x0 >= x1 or y0 >= y1:
        return color.expand(3, crop.side, crop.side).contiguous()
    part = torch.from_numpy(frame[y0:y1, x0:x1].copy())  # frames of Pillow cannot be written to
    part = part.permute(2, 0, 1).float() - color
    xs = (across - x0) * 2 / (x1 - x0) - 1
    ys = (down - y0) * 2 / (y1 - y0) - 1
    grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1], dim=-1)
    found = functional.grid_sample(
        part[None], grid[None].float(), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return found[0] + color


def _places(crop: Crop, axis: int, size: int) -> tuple[Tensor, int, int]:
    """Where in the frame each output pixel is sampled, and the pixels that are needed for it."""
    middles = torch.arange(crop.side, dtype=torch.float64) + 0.5
    places = (middles - crop.shift[axis]) / crop.scale[axis]
    low, high = float(places[0]), float(places[-1])
    return places, max(0, math.floor(low) - 1), min(size, math.ceil(high) + 1)
