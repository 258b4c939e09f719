"""Boxes as tensors and arrays: conversions, overlap, the cells that a box covers.

Corners are x1 y1 x2 y2, sizes x y w h with the top left corner; both continuous, so that the box of
a whole image W x H is 0 0 W H.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

EDGE = 1e-4
"""A box that reaches less than this share of a cell into it does not cover it."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def corners(boxes: Array) -> Array:
    """X y w h -> x1 y1 x2 y2: ... 4."""
    boxes = np.asarray(boxes, dtype=np.float64)
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def sizes(boxes: Array) -> Array:
    """X1 y1 x2 y2 -> x y w h: ... 4."""
    boxes = np.asarray(boxes, dtype=np.float64)
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def clipped(boxes: Array, width: float, height: float) -> Array:
    """Corners moved into the image: ... 4."""
    return np.clip(boxes, 0.0, np.array([width, height, width, height], dtype=np.float64))


def areas(boxes: Tensor) -> Tensor:
    """Areas of corners ... 4; zero where a box is turned inside out."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of corners, pair by pair: ... 4 and ... 4 -> ..."""
    return _overlap(first, second)[0]


def giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalized IoU in [-1, 1] (Rezatofighi et al., CVPR 2019), pair by pair."""
    found, union = _overlap(first, second)
    low = torch.minimum(first[..., :2], second[..., :2])
    high = torch.maximum(first[..., 2:], second[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    tiny = torch.finfo(hull.dtype).eps
    return found - (hull - union) / hull.clamp(min=tiny)


def covered(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cells of a grid (rows, columns) that boxes reach into: B 4 -> B rows columns, bool.

    Args:
        boxes: corners as shares of the image's width and height; a part outside covers nothing.
    """
    rows, columns = grid
    across = _reached(boxes[:, 0] * columns, boxes[:, 2] * columns, columns)
    down = _reached(boxes[:, 1] * rows, boxes[:, 3] * rows, rows)
    return down[:, :, None] & across[:, None, :]


def _reached(low: Tensor, high: Tensor, count: int) -> Tensor:
    cells = torch.arange(count, device=low.device)
    first, end = torch.floor(low + EDGE)[:, None], torch.ceil(high - EDGE)[:, None]
    return (cells >= first) & (cells < end) & (high > low)[:, None]


def _overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and the union."""
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    union = areas(first) + areas(second) - both
    return both / union.clamp(min=torch.finfo(union.dtype).eps), union
