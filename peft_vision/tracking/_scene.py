"""A drawn scene: a background, a target, things like it and things in front of it, all moving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peft_vision.tracking._silhouettes import TEXTURE, Table
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.crops import Frame

Mask = np.ndarray[Any, np.dtype[np.uint8]]
Points = np.ndarray[Any, np.dtype[np.int32]]
Window = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, the last two not included."""


@dataclass(frozen=True)
class Thing:
    """An object that moves.

    Attributes:
        texture: 96 96 3.
        outline: K 2 in the object's units.
        poses: frame by frame 2 3: object's units to pixels.
    """

    texture: Frame
    outline: Array
    poses: Array

    def points(self, index: int) -> Points:
        """Corners of the mask in a frame, in whole pixels: K 2. The mask has them all."""
        pose = self.poses[index]
        points: Points = np.rint(self.outline @ pose[:, :2].T + pose[:, 2]).astype(np.int32)
        return points

    def window(self, index: int) -> Window:
        """Exact extent of the mask, also where it is outside of the frame."""
        points = self.points(index)
        left, top = (int(value) for value in points.min(axis=0))
        right, bottom = (int(value) for value in points.max(axis=0))
        return left, top, right + 1, bottom + 1

    def mask(self, index: int, window: Window) -> Mask:
        """1 where the object is, in a window of the frame."""
        import cv2

        # Filled whole and then cut: OpenCV rounds an outline that leaves the image elsewhere.
        left, top, right, bottom = whole = self.window(index)
        filled: Mask = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillPoly(filled, [self.points(index) - np.array([left, top], np.int32)], (1,))
        mask: Mask = np.zeros((window[3] - window[1], window[2] - window[0]), np.uint8)
        if _meet(whole, window):
            x0, y0, x1, y1 = _common(whole, window)
            part = filled[y0 - top : y1 - top, x0 - left : x1 - left]
            mask[y0 - window[1] : y1 - window[1], x0 - window[0] : x1 - window[0]] = part
        return mask

    def draw(self, index: int, frame: Frame) -> None:
        """Paint the object over a frame."""
        import cv2

        window = within(self.window(index), frame.shape[1], frame.shape[0])
        left, top, right, bottom = window
        if left >= right or top >= bottom:
            return
        half = TEXTURE / 2
        pose = self.poses[index]
        matrix = np.empty((2, 3))
        matrix[:, :2] = pose[:, :2] / half
        matrix[:, 2] = pose[:, 2] - pose[:, :2].sum(axis=1) - (left, top)
        warped = cv2.warpAffine(
            self.texture,
            matrix,
            (right - left, bottom - top),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        inside = self.mask(index, window).astype(np.bool_)
        np.copyto(frame[top:bottom, left:right], warped, where=inside[..., None])


@dataclass(frozen=True)
class Scene:
    """All that is needed to draw any frame.

    Attributes:
        photograph: behind everything.
        views: frame by frame 2 3: pixels of the frame to pixels of the photograph.
        behind: drawn before the target, `before`: drawn over it.
        tables: frame by frame 256: brightness.
        colors: change of the background's colors.
        soft: blur the frame a little, as a lens does.
    """

    size: tuple[int, int]
    photograph: Frame
    views: Array
    colors: tuple[list[int], Table]
    target: Thing
    behind: Sequence[Thing]
    before: Sequence[Thing]
    tables: Table
    soft: bool

    def frame(self, index: int) -> Frame:
        """Frame number `index`: H W 3."""
        import cv2

        height, width = self.size
        order, table = self.colors
        seen = cv2.warpAffine(
            self.photograph,
            self.views[index],
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        frame: Frame = cv2.LUT(np.ascontiguousarray(seen[..., order]), table[None])
        for thing in (*self.behind, self.target, *self.before):
            thing.draw(index, frame)
        if self.soft:
            frame = cv2.GaussianBlur(frame, (3, 3), 0)
        return cv2.LUT(frame, self.tables[index])  # type: ignore[no-any-return]

    def share_seen(self, index: int) -> float:
        """Share of the target's mask that is inside of the frame and not covered, 0 to 1."""
        height, width = self.size
        whole = self.target.window(index)
        part = within(whole, width, height)
        near = [thing for thing in self.before if _meet(thing.window(index), part)]
        if part == whole and not near:
            return 1.0
        if part[0] >= part[2] or part[1] >= part[3]:
            return 0.0
        mask = self.target.mask(index, part)
        for thing in near:
            mask &= 1 - thing.mask(index, part)
        return int(mask.sum()) / int(self.target.mask(index, whole).sum())


def within(window: Window, width: int, height: int) -> Window:
    """The part of a window inside of a frame; turned inside out where there is none."""
    return _common(window, (0, 0, width, height))


def poses(centers: Array, sizes: Array, angles: Array) -> Array:
    """Frame by frame 2 3, from object's units to pixels.

    Args:
        centers: N 2 in pixels. `sizes`: N 2, pixels per unit along the object's own axes.
        angles: N, radians.
    """
    cos, sin = np.cos(angles), np.sin(angles)
    turned = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], axis=1)
    return np.concatenate([turned * sizes[:, None, :], centers[:, :, None]], axis=2)


def _common(one: Window, other: Window) -> Window:
    left, top = max(one[0], other[0]), max(one[1], other[1])
    return left, top, min(one[2], other[2]), min(one[3], other[3])


def _meet(one: Window, other: Window) -> bool:
    across = one[0] < other[2] and other[0] < one[2]
    return across and one[1] < other[3] and other[1] < one[3]
