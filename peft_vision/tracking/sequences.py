"""A sequence: frames with the box of one object in each of them, as far as it is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peft_vision.errors import DataError
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.crops import Frame

Flags = np.ndarray[Any, np.dtype[np.bool_]]


class Frames(ABC):
    """Frames that are read one at a time."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def read(self, index: int) -> Frame:
        """Frame number `index`, counted from 0: H W 3, uint8, RGB.

        Raises:
            DataError: it is missing or cannot be decoded.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call a frame in a message."""


@dataclass(frozen=True)
class TrackingSequence:
    """One object through frames.

    Attributes:
        name: unique within its data set; file names of results are made from it.
        frames: in order.
        boxes: x y w h, float64, counted from 0: one row per frame, or only the first row where a
            test set keeps the rest to itself. Unknown: NaN.
        visible: per row of `boxes`, whether the object is to be seen.
        extra: further figures per row, by name ("cover" of GOT-10k).
    """

    name: str
    frames: Frames
    boxes: Array
    visible: Flags
    extra: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    @property
    def labeled(self) -> bool:
        """Whether every frame has a row."""
        return len(self.boxes) == len(self.frames)

    @property
    def start(self) -> Array:
        """The box of the first frame, x y w h.

        Raises:
            DataError: there is none, or it has no area.
        """
        first = self.boxes[0] if len(self.boxes) else np.full(4, np.nan)
        if not np.isfinite(first).all() or (first[2:] <= 0).any():
            raise DataError(
                f"{self.name}: the first box is {first.tolist()}; a tracker starts from x, y, "
                "width, height, with width and height above 0."
            )
        return first
