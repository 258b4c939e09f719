"""Text files of numbers and folders of numbered frames, as all layouts have them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np

from peft_vision.data.image_folder import EXTENSIONS
from peft_vision.errors import DataError
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.crops import Frame
from peft_vision.tracking.frames import ImageFiles
from peft_vision.tracking.sequences import Flags, Frames

_SEPARATORS = str.maketrans(",;\t", "   ")
_LAST_NUMBER = re.compile(r"(\d+)\.[^.]*$")
_ROW = "x, y, width, height per line, in pixels"


@dataclass(frozen=True)
class Numbered(Sequence[str]):
    """Names of files that count up: no look at the disk is needed.

    Attributes:
        pattern: of a name, as "{:08d}.jpg".
        first: number of the first file.
        length: how many there are.
    """

    pattern: str
    first: int
    length: int

    def __len__(self) -> int:
        """How many files there are."""
        return self.length

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        """The name of file number `index`, counted from 0."""
        numbers = range(self.first, self.first + self.length)[index]
        if isinstance(numbers, int):
            return self.pattern.format(numbers)
        return [self.pattern.format(number) for number in numbers]


class FolderFrames(Frames):
    """Image files of one folder; only their names are kept, as there may be millions.

    Args:
        folder: holds the files.
        names: of the files, in order.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        """How many files."""
        return len(self.names)

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.folder / self.names[index])

    def read(self, index: int) -> Frame:
        """Decode one file: H W 3, uint8, RGB.

        Raises:
            DataError: the file is missing or cannot be decoded.
        """
        return ImageFiles([self.folder / self.names[index]]).read(0)


def text_of(file: Path) -> str:
    """The content of a text file.

    Raises:
        DataError: it is missing or no text.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}.") from error


def boxes_of(file: Path, origin: float = 0.0) -> Array:
    """Rows x y w h of a groundtruth file, N 4; a row that is not finite is all NaN.

    Args:
        file: numbers between commas, tabs, semicolons or spaces; lines at the end may be empty.
        origin: what the file calls the first pixel; 0 or 1.

    Raises:
        DataError: it is missing, empty, or a line does not hold four numbers.
    """
    lines = text_of(file).translate(_SEPARATORS).rstrip().splitlines()
    rows = [line.split() for line in lines]
    if not rows:
        raise DataError(f"{file} is empty. It has to hold {_ROW}.")
    for number, row in enumerate(rows, 1):
        if len(row) != 4:
            raise DataError(
                f"Line {number} of {file} holds {len(row)} numbers ({' '.join(row)[:60]!r}). "
                f"It has to hold {_ROW}."
            )
    try:
        boxes = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{file} is not all numbers: {error}. It has to hold {_ROW}.") from error
    boxes[~np.isfinite(boxes).all(axis=1)] = np.nan
    boxes[:, :2] -= origin
    return boxes


def labels_of(file: Path, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Whole numbers, one per frame: one per line, or all in one line between commas.

    Raises:
        DataError: the file is missing, or there are other things or another number of them.
    """
    words = text_of(file).translate(_SEPARATORS).split()
    try:
        labels = np.array([int(float(word)) for word in words], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{file} is not all whole numbers: {error}.") from error
    if len(labels) < count:
        raise DataError(f"{file} has {len(labels)} labels for {count} frames; one each is needed.")
    return labels[:count]


def with_area(boxes: Array) -> Flags:
    """Which rows x y w h are known and have an area."""
    fine = np.isfinite(boxes) & (np.nan_to_num(boxes) > [-np.inf, -np.inf, 0, 0])
    return np.asarray(fine.all(axis=1), dtype=np.bool_)


def images_in(folder: Path) -> list[str]:
    """Names of the images of a folder, in the order of the numbers that they end in.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder of frames {folder}.")
    found = [
        name
        for name in os.listdir(folder)  # noqa: PTH208 -- a Path for each of millions takes seconds
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    ]
    if not found:
        raise DataError(
            f"{folder} has no frames. Files ending in {', '.join(EXTENSIONS[:6])} count as images."
        )
    return sorted(found, key=_order)


def number_of(name: str) -> int | None:
    """The number that the name of a file ends in, before its ending."""
    digits = _LAST_NUMBER.search(name)
    return int(digits[1]) if digits else None


def listed_frames(folder: Path) -> FolderFrames:
    """The frames of a folder, all there from the first to the last number.

    Raises:
        DataError: there is none, or one is missing in between.
    """
    names = images_in(folder)
    numbers = [number_of(name) for name in names]
    for place, (one, two) in enumerate(pairwise(numbers)):
        if one is not None and two is not None and two != one + 1:
            raise DataError(
                f"{folder} goes from {names[place]} to {names[place + 1]}: frames in between are "
                "missing."
            )
    return FolderFrames(folder, names)


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder by name, hidden ones left out; none where there is no such folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    return [folder / name for name in sorted(names)]


def require_same(name: str, frames: int, rows: int) -> None:
    """Check that there is one row per frame.

    Raises:
        DataError: there is not.
    """
    if frames != rows:
        raise DataError(
            f"{name} has {frames} frames and {rows} rows of groundtruth; one row per frame is "
            "needed."
        )


def _order(name: str) -> tuple[str, int, str]:
    digits = _LAST_NUMBER.search(name)
    if digits is None:
        return name, -1, name
    return name[: digits.start()], int(digits[1]), name
