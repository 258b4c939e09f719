"""Frames and boxes that users hand in, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peft_vision.errors import BadSetting
from peft_vision.tracking.boxes import Array, clipped, corners
from peft_vision.tracking.crops import Frame


def checked_start(frame: Frame, box: Sequence[float] | Array) -> Array:
    """The box of a target as an array x y w h.

    Raises:
        BadSetting: the frame is not H W 3 of uint8, or the box is not four finite numbers, has no
            area, or lies outside of the frame.
    """
    height, width = checked_frame(frame).shape[:2]
    wanted = "a box is x, y, width, height in pixels"
    try:
        values = np.array(box, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise BadSetting(f"The box is {box!r}; {wanted}.") from error
    if values.shape != (4,):
        found = f"{len(values)} numbers" if values.ndim == 1 else f"an array of {values.shape}"
        raise BadSetting(f"The box is {found}; {wanted}: four numbers.")
    said = ", ".join(f"{value:g}" for value in values)
    if not np.isfinite(values).all():
        raise BadSetting(f"The box is {said}; {wanted}, all of them finite.")
    if (values[2:] <= 0).any():
        raise BadSetting(f"The box {said} has no area; {wanted}, the last two above 0.")
    inside = clipped(corners(values), width, height)
    if not (inside[:2] < inside[2:]).all():
        raise BadSetting(f"The box {said} lies outside of the frame, which is {width} x {height}.")
    return values


def checked_frame(frame: Frame) -> Frame:
    """A frame that may be written to, as torch wants it.

    Raises:
        BadSetting: it is not H W 3 of uint8, or empty.
    """
    known = isinstance(frame, np.ndarray)
    if not known or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        found = f"{frame.dtype} of {frame.shape}" if known else type(frame).__name__
        raise BadSetting(f"A frame is a numpy array H W 3 of uint8, RGB; this one is {found}.")
    if not frame.size:
        raise BadSetting(f"The frame has no pixels: {frame.shape}.")
    return frame if frame.flags.writeable else frame.copy()
