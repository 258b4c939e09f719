"""Sequences that are drawn: parts of real photographs move over other photographs.

"demo/tracking" needs no download. The photographs come inside of the packages scikit-image,
scikit-learn (china.jpg and flower.jpg, CC BY 2.0) and elpv-dataset (CC BY-NC-SA 4.0, no commercial
use) and are not part of peft_vision. A photograph is in one split only, as background and as
texture. Every sequence is a function of split, number and settings, and a frame is drawn when it is
read.

Each has one target: an ellipse, rounded polygon or blob with a patch of a photograph on it, that
moves, turns, and changes its size and shape smoothly over a background that moves slowly. Other
things look like it (its surface in another outline, or its outline with another surface), pass in
front of it, and the light changes. What the figures of a tracker on it say about real videos is
little: it shows that training and evaluation work.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import numpy as np

from peft_vision.errors import DataError, MissingExtra
from peft_vision.tracking._drawn_settings import SyntheticSettings
from peft_vision.tracking._photographs import PICTURES, photographs
from peft_vision.tracking._scene import Scene, within
from peft_vision.tracking._staging import staged
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.crops import Frame
from peft_vision.tracking.sequence_set import LazySequences, SequenceSet
from peft_vision.tracking.sequences import Frames, TrackingSequence

__all__ = ["SyntheticSettings", "read"]

NAME = "demo/tracking"
DIALECT = "otb"
SPLITS = tuple(PICTURES)

_LEVELS = (0.0, 0.15, 0.30, 0.45, 0.60, 0.75, 0.90, 1.0)
"""Cover of GOT-10k: 0 where nothing is seen, then one more for each of these that is passed."""


DEFAULT = SyntheticSettings()


class DrawnFrames(Frames):
    """Frames of a scene, drawn one at a time."""

    def __init__(self, title: str, scene: Scene, length: int) -> None:
        self.title, self.scene, self.length = title, scene, length

    def __len__(self) -> int:
        """How many there are."""
        return self.length

    def read(self, index: int) -> Frame:
        """Draw frame number `index`: H W 3.

        Raises:
            DataError: there is no such frame.
        """
        if not 0 <= index < self.length:
            raise DataError(f"{self.title} has {self.length} frames; {index} was asked for.")
        return self.scene.frame(index)

    def name(self, index: int) -> str:
        """The sequence and the number of the frame."""
        return f"{self.title}, frame {index}"


def read(split: str | None = None, settings: SyntheticSettings = DEFAULT) -> SequenceSet:
    """The drawn sequences of a split; None: test. They are made when they are asked for.

    Raises:
        DataError: there is no such split.
        MissingExtra: a package that is needed is not installed.
    """
    chosen = split or "test"
    if chosen not in SPLITS:
        raise DataError(f"{NAME} has no split {chosen!r}; it has {', '.join(SPLITS)}.")
    if importlib.util.find_spec("cv2") is None:
        raise MissingExtra(
            f"{NAME} is drawn with OpenCV, which is not installed. Install it with: "
            'pip install "peft-vision[demo,track]"'
        )
    photographs(chosen)
    count = settings.train if chosen == "train" else settings.test
    names = [f"{chosen}-{number:04d}" for number in range(count)]
    lazily = LazySequences(names, partial(_made, chosen, settings))
    return SequenceSet("demo", chosen, lazily, DIALECT)


def _made(split: str, settings: SyntheticSettings, index: int) -> TrackingSequence:
    length = settings.train_length if split == "train" else settings.test_length
    random = np.random.default_rng([SPLITS.index(split), index])
    scene = staged(photographs(split), length, settings, random)
    windows = [scene.target.window(number) for number in range(length)]
    inside = np.array([within(window, settings.width, settings.height) for window in windows])
    boxes = _boxes(inside.astype(np.float64))
    seen = np.array([scene.share_seen(number) for number in range(length)])
    name = f"{split}-{index:04d}"
    return TrackingSequence(
        name,
        DrawnFrames(name, scene, length),
        boxes,
        seen > settings.least_seen,
        {"cover": _cover(seen), "seen": seen},
    )


def _boxes(inside: Array) -> Array:
    boxes = np.concatenate([inside[:, :2], inside[:, 2:] - inside[:, :2]], axis=1)
    boxes[(boxes[:, 2:] <= 0).any(axis=1)] = np.nan
    return boxes


def _cover(seen: Array) -> np.ndarray[Any, np.dtype[np.int64]]:
    levels = np.searchsorted(_LEVELS, seen, side="left")
    return np.where(seen >= 1, len(_LEVELS), levels).astype(np.int64)
