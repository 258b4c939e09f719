"""Several sequences through one tracker at once, each in its lane."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from peft_vision.errors import BadSetting, DataError
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.crops import Frame
from peft_vision.tracking.inputs import checked_start
from peft_vision.tracking.sequences import TrackingSequence
from peft_vision.tracking.tracker import Tracker

Row = tuple[Array, float, float]
"""Box, confidence, seconds."""


@dataclass
class Lane:
    """A sequence on its way.

    Attributes:
        length: its number of frames. `box`: where it starts.
        rows: what was found so far.
        broken: why it goes no further; None while it does.
    """

    sequence: TrackingSequence
    length: int = 0
    box: Array = field(default_factory=lambda: np.full(4, np.nan))
    rows: list[Row] = field(default_factory=list)
    broken: str | None = None

    def first(self) -> Frame | None:
        """The first frame; None where the sequence cannot be started."""
        try:
            return self._started()
        except (DataError, BadSetting) as error:
            self.broken = str(error)
            return None

    def frame(self, index: int) -> Frame | None:
        """A later frame; None where the sequence has ended or is broken."""
        if self.broken is not None or index >= self.length:
            return None
        try:
            return self.sequence.frames.read(index)
        except DataError as error:
            self.broken = str(error)
            return None

    def _started(self) -> Frame:
        self.length = len(self.sequence.frames)
        if not self.length:
            raise DataError(f"{self.sequence.name} has no frames.")
        frame = self.sequence.frames.read(0)
        self.box = checked_start(frame, self.sequence.start)
        return frame


def together(
    tracker: Tracker, sequences: Sequence[TrackingSequence], tell: Callable[[], None]
) -> list[Lane]:
    """Take sequences through the model side by side; one that ends or breaks leaves the others.

    Args:
        tell: called behind every frame of every sequence.
    """
    lanes = [Lane(sequence) for sequence in sequences]
    first = [(lane, frame) for lane in lanes if (frame := lane.first()) is not None]
    if not first:
        return lanes
    going = [lane for lane, _ in first]
    boxes = np.stack([lane.box for lane in going])
    frames: list[Frame | None] = [frame for _, frame in first]
    before = now()
    tracker.start_all([frame for _, frame in first], boxes)
    _record(going, frames, boxes, np.ones(len(going)), now() - before, tell)
    for index in range(1, max(lane.length for lane in going)):
        frames = [lane.frame(index) for lane in going]
        if all(frame is None for frame in frames):
            break
        before = now()
        found, scores = tracker.step_all(frames)
        _record(going, frames, found, scores, now() - before, tell)
    return lanes


def now() -> float:
    """Seconds, when what was sent to a GPU is done."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()


def _record(
    lanes: Sequence[Lane],
    frames: Sequence[Frame | None],
    boxes: Array,
    scores: Array,
    seconds: float,
    tell: Callable[[], None],
) -> None:
    share = seconds / sum(frame is not None for frame in frames)
    for lane, frame, box, score in zip(lanes, frames, boxes, scores, strict=True):
        if frame is not None:
            lane.rows.append((box, float(score), share))
            tell()
