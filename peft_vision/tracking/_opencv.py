"""OpenCV, where it is installed, without its own lines on the terminal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from peft_vision.errors import MissingExtra

_QUIET = "-8"  # FFmpeg's name for no messages at all


def opencv() -> Any:
    """The module `cv2`.

    Raises:
        MissingExtra: it is not installed.
    """
    # FFmpeg's level is read once, when the first video is opened.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", _QUIET)
    try:
        import cv2
    except ImportError as error:
        raise MissingExtra(
            "Videos and cameras need OpenCV, which is not installed: "
            'pip install "peft-vision[track]". Frames as image files in a folder need nothing more.'
        ) from error
    return cv2


@contextlib.contextmanager
def silent(cv2: Any) -> Iterator[None]:
    """What OpenCV and FFmpeg would write on standard error is left out; our message is enough."""
    before = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(before)
