"""Frames from a folder of images, a video file or a camera."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from peft_vision.data.images import decode
from peft_vision.errors import DataError
from peft_vision.tracking._opencv import opencv, silent
from peft_vision.tracking.crops import Frame
from peft_vision.tracking.sequences import Frames

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
"""Endings of image files, in lower case."""

_NUMBERED = re.compile(r"(.*?)(\d+)")
_SLACK = 0.01  # containers of whole videos announce a frame or two that are not there
_SHOWN = 5


class ImageFiles(Frames):
    """The frames of a folder, one image file each."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Keep the files in the order given; nothing is read."""
        self.files = tuple(files)

    def __len__(self) -> int:
        """How many files."""
        return len(self.files)

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.files[index])

    def read(self, index: int) -> Frame:
        """Decode one file: H W 3, uint8, RGB.

        Raises:
            DataError: the file is missing or cannot be decoded.
        """
        file = self.files[index]
        try:
            return np.array(decode(file.read_bytes()))
        except FileNotFoundError as error:
            raise DataError(f"A frame is missing: there is no file {file}.") from error
        except UnidentifiedImageError as error:
            raise DataError(f"The frame {file} cannot be read: it is no image.") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"The frame {file} cannot be read: {error}.") from error


class VideoFile(Frames):
    """The frames of a video file, as OpenCV decodes and turns them.

    Frames that are read one after another come fast. To go back, the video is decoded from its
    beginning again: jumps by time stamps miss by frames in videos whose frame rate varies.

    Attributes:
        rate: frames per second of the video; 0 where the file does not say.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a video and find its end.

        Raises:
            DataError: there is no such file, it cannot be decoded, or it breaks off.
            MissingExtra: OpenCV is not installed.
        """
        self.path = Path(path)
        self._cv2 = opencv()
        if not self.path.is_file():
            raise DataError(f"There is no video {self.path}.")
        self._capture = self._opened()
        self.rate = _rate(self._cv2, self._capture)
        self._length = self._counted()
        self._capture, self._next = self._opened(), 0

    def __len__(self) -> int:
        """How many frames can be decoded."""
        return self._length

    def name(self, index: int) -> str:
        """The file and the number of the frame."""
        return f"{self.path}, frame {index}"

    def read(self, index: int) -> Frame:
        """Decode one frame: H W 3, uint8, RGB.

        Raises:
            DataError: there is no such frame.
        """
        if index < self._next:
            self._capture, self._next = self._opened(), 0
        with silent(self._cv2):
            while self._next < index and self._capture.grab():
                self._next += 1
            found, image = self._capture.read() if self._next == index else (False, None)
        if not found:
            raise DataError(f"{self.path} has no frame {index}: it ends after {self._next} frames.")
        self._next += 1
        return _rgb(self._cv2, image)

    def _opened(self) -> Any:
        cv2 = self._cv2
        ffmpeg = cv2.CAP_FFMPEG in cv2.videoio_registry.getStreamBackends()
        with silent(cv2):
            # Other backends would take the digits in a file's name for a pattern of image files.
            capture = cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG if ffmpeg else cv2.CAP_ANY)
            if capture.isOpened():
                return capture
        raise DataError(
            f"{self.path} cannot be decoded as a video. Possible: a file that FFmpeg plays, such "
            "as .mp4, .avi or .mkv, or a folder of image files."
        )

    def _counted(self) -> int:
        """The number of frames; they are decoded for it only where the container is wrong."""
        announced = int(self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT))
        with silent(self._cv2):
            if announced > 0:
                self._capture.set(self._cv2.CAP_PROP_POS_FRAMES, announced - 1)
                if self._capture.grab() and not self._capture.grab():
                    return announced
        self._capture, found = self._opened(), 0
        with silent(self._cv2):
            while self._capture.grab():
                found += 1
        if not found:
            raise DataError(f"{self.path} has no frame that can be decoded.")
        if found < announced * (1 - _SLACK) - 2:
            raise DataError(
                f"{self.path} breaks off: {found} of {announced} frames can be decoded. Copy the "
                "file again, or cut it there."
            )
        return found


def open_frames(source: str | Path) -> Frames:
    """The frames of a video file or of a folder of images.

    The images of a folder are put in order of the numbers at the end of their names, where all of
    them have one behind the same beginning (2.jpg is before 10.jpg), else in order of their names.
    Numbers may go up by any step, but always by the same.

    Raises:
        DataError: there is nothing of that name, the folder has no images, or a number is missing
            or there twice; the video cannot be decoded.
        MissingExtra: a video, and OpenCV is not installed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return ImageFiles(_in_order(path))
    if not path.exists():
        raise DataError(
            f"There is no {source}. Possible: a video file, a folder of images, or the index of a "
            "camera."
        )
    if path.suffix.lower() in IMAGES:
        raise DataError(f"{source} is one image. Pass the folder that holds all frames.")
    return VideoFile(path)


def stream(source: str | Path | int) -> Iterator[Frame]:
    """Frames one after another, from what `open_frames` takes or from a camera by its index.

    A camera's frames go on until it is switched off or the iterator is closed.

    Raises:
        DataError: as `open_frames`, or there is no such camera.
    """
    if isinstance(source, int):
        yield from _camera(source)
        return
    frames = open_frames(source)
    for index in range(len(frames)):
        yield frames.read(index)


def _camera(index: int) -> Iterator[Frame]:
    cv2 = opencv()
    with silent(cv2):
        capture = cv2.VideoCapture(index)
        found, image = capture.read() if capture.isOpened() else (False, None)
    if not found:
        raise DataError(
            f"There is no camera {index} that gives a picture. Cameras are counted from 0; another "
            "program may be using it."
        )
    try:
        while found:
            yield _rgb(cv2, image)
            with silent(cv2):
                found, image = capture.read()
    finally:
        capture.release()


def _in_order(folder: Path) -> list[Path]:
    files = [
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGES and not file.name.startswith(".") and file.is_file()
    ]
    if not files:
        inside = sorted(child.name for child in folder.iterdir() if child.is_dir())[:_SHOWN]
        hint = f" Its folders: {', '.join(inside)}." if inside else ""
        raise DataError(f"{folder} has no image files ({', '.join(sorted(IMAGES))}).{hint}")
    names = {file: _NUMBERED.fullmatch(file.stem) for file in files}
    numbers = {file: int(name[2]) for file, name in names.items() if name}
    if len(numbers) < len(files) or len({name[1] for name in names.values() if name}) > 1:
        return sorted(files)
    files.sort(key=lambda file: numbers[file])
    _refuse_gap(folder, files, [numbers[file] for file in files])
    return files


def _refuse_gap(folder: Path, files: Sequence[Path], numbers: Sequence[int]) -> None:
    step = min((after - before for before, after in pairwise(numbers)), default=1)
    for place, (before, after) in enumerate(pairwise(numbers)):
        if before == after:
            pair = f"{files[place].name} and {files[place + 1].name}"
            raise DataError(f"{folder} has frame {before} twice: {pair}.")
        if after - before != step:
            missing = before + step
            raise DataError(
                f"{folder} has no frame {missing}: {files[place].name} is followed by "
                f"{files[place + 1].name}. Numbers of frames go up by the same step, here {step}."
            )


def _rate(cv2: Any, capture: Any) -> float:
    rate = float(capture.get(cv2.CAP_PROP_FPS))
    return rate if np.isfinite(rate) and rate > 0 else 0.0


def _rgb(cv2: Any, image: Any) -> Frame:
    frame: Frame = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return frame
