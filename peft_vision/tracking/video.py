"""What a tracker found, drawn into a video or written down as text."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from peft_vision.errors import CannotWrite, DataError
from peft_vision.files import writing
from peft_vision.tracking._opencv import opencv, silent
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.crops import Frame

RATE = 30.0
"""Frames per second of a video whose source does not say how many it has."""

_GREEN = (0, 255, 0)
_CODEC = "mp4v"


def drawn(frame: Frame, box: Array, score: float | None = None) -> Frame:
    """A copy of a frame with a box in it, and a score above the box.

    Args:
        frame: H W 3, uint8, RGB.
        box: x y w h. Without any finite place nothing is drawn.

    Raises:
        MissingExtra: OpenCV is not installed.
    """
    cv2 = opencv()
    image: Frame = frame.copy()
    values = np.asarray(box, dtype=np.float64)
    if not np.isfinite(values).all():
        return image
    thick = max(1, round(min(frame.shape[:2]) / 240))
    far = 4 * max(frame.shape[:2])  # what is drawn out there is not seen
    x, y, w, h = np.clip(values, -far, far)
    low, high = (round(x), round(y)), (round(x + w), round(y + h))
    cv2.rectangle(image, low, high, _GREEN, thick)
    if score is not None:
        above = (max(low[0], 0), low[1] - 2 * thick)
        place = above if above[1] > 12 * thick else (above[0], min(high[1], frame.shape[0]) - thick)
        font = cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(image, f"{score:.2f}", place, font, 0.4 * thick, _GREEN, thick, cv2.LINE_AA)
    return image


@contextlib.contextmanager
def writing_video(path: Path, rate: float = RATE) -> Iterator[Callable[[Frame], None]]:
    """Write an .mp4 file: what is yielded takes one frame after another.

    The file appears when the block ends without an error; an older one is intact until then. Videos
    have even sides: of an odd one, the last row or column of pixels is left out.

    Args:
        rate: frames per second.

    Raises:
        CannotWrite: the place is not writable, the disk is full, or OpenCV lacks the codec.
        DataError: the frames differ in size.
        MissingExtra: OpenCV is not installed.
    """
    beside = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
    with writing(path):
        try:
            beside.touch()  # an error of the system says more than OpenCV does
            film = _Film(beside, path, rate)
            yield film.add
            film.close()
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def write_results(path: Path, boxes: Array) -> None:
    """Write one line per frame, x,y,w,h with three decimals, as GOT-10k wants them.

    Raises:
        CannotWrite: the place is not writable or the disk is full; an older file is intact.
    """
    lines = "".join(",".join(f"{value:.3f}" for value in row) + "\n" for row in boxes)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            beside.write_text(lines, encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


class _Film:
    """A video that is being written."""

    def __init__(self, file: Path, named: Path, rate: float) -> None:
        self._cv2 = opencv()
        self._file, self._named, self._rate = file, named, rate
        self._writer: Any = None
        self._shape: tuple[int, ...] = ()
        self._count = 0

    def add(self, frame: Frame) -> None:
        if self._writer is None:
            self._open(frame)
        if frame.shape != self._shape:
            sizes = [f"{width} x {height}" for height, width in (frame.shape[:2], self._shape[:2])]
            raise DataError(
                f"Frame {self._count} is {sizes[0]} and those before are {sizes[1]}; a video has "
                "one size. Write the boxes into a .txt file instead."
            )
        with silent(self._cv2):
            self._writer.write(self._cv2.cvtColor(frame, self._cv2.COLOR_RGB2BGR))
        self._count += 1

    def close(self) -> None:
        """Finish the file, and read its length: OpenCV does not say when writing failed."""
        cv2, found = self._cv2, 0
        with silent(cv2):
            if self._writer is not None:
                self._writer.release()
                found = int(cv2.VideoCapture(str(self._file)).get(cv2.CAP_PROP_FRAME_COUNT))
        if not found or found != self._count:
            raise CannotWrite(
                f"Could not write {self._named}: {found} of {self._count} frames arrived. The disk "
                "may be full."
            )

    def _open(self, frame: Frame) -> None:
        cv2, (height, width) = self._cv2, frame.shape[:2]
        with silent(cv2):
            code = cv2.VideoWriter_fourcc(*_CODEC)
            self._writer = cv2.VideoWriter(str(self._file), code, self._rate, (width, height))
        if not self._writer.isOpened():
            raise CannotWrite(
                f"Could not write {self._named}: this OpenCV cannot encode {width} x {height} "
                f"frames as {_CODEC}. Write the boxes into a .txt file instead, or install "
                "opencv-python-headless from PyPI."
            )
        self._shape = frame.shape
