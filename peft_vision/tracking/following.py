"""A tracker through whole sequences, with the time that each frame takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from peft_vision.errors import BadSetting, DataError
from peft_vision.tracking._lanes import Row, now, together
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.crops import Frame
from peft_vision.tracking.sequences import TrackingSequence
from peft_vision.tracking.tracker import Tracker

if TYPE_CHECKING:
    from rich.progress import Progress


class Follower(Protocol):
    """What can be taken through a sequence; boxes are x y w h in pixels, counted from 0."""

    def start(self, frame: Frame, box: Array) -> None:
        """Take the object in the box as the target."""

    def step(self, frame: Frame) -> tuple[Array, float]:
        """Find it in the next frame: box and confidence."""


@dataclass(frozen=True)
class Place:
    """Where the target is in one frame.

    Attributes:
        index: of the frame, from 0. `frame`: its pixels.
        box: x y w h. `score`: the confidence; 1 in the first frame, where the box was given.
        seconds: what start or step took.
    """

    index: int
    frame: Frame
    box: Array
    score: float
    seconds: float


@dataclass(frozen=True)
class Followed:
    """A sequence with what a tracker made of it.

    Attributes:
        name: of the sequence.
        boxes: N 4, x y w h; the first row is the box that was given.
        scores: N; the first is 1.
        seconds: N, time of each frame without reading and decoding it; the first is the start.
            Where several sequences went through the model together, each one's share.
    """

    name: str
    boxes: Array
    scores: Array
    seconds: Array

    @property
    def fps(self) -> float:
        """Frames per second, over all frames but the first; NaN where there is one frame."""
        taken = float(self.seconds[1:].sum())
        return (len(self.seconds) - 1) / taken if taken > 0 else float("nan")


def places(tracker: Follower, frames: Iterable[Frame], box: Array) -> Iterator[Place]:
    """Where the target is, frame by frame, from the first one on, in which it is in `box`."""
    given = np.asarray(box, dtype=np.float64)
    for index, frame in enumerate(frames):
        before = now()
        if index == 0:
            tracker.start(frame, given)
            found, score = given, 1.0
        else:
            found, score = tracker.step(frame)
        yield Place(index, frame, found, score, now() - before)


def follow(
    tracker: Follower, sequence: TrackingSequence, on_frame: Callable[[], None] | None = None
) -> Followed:
    """Take a tracker through one sequence, from the box of its first frame.

    Args:
        on_frame: called behind every frame.

    Raises:
        DataError: a frame cannot be read, or there is no box to start from.
        BadSetting: that box cannot be tracked.
    """
    frames = sequence.frames
    rows: list[Row] = []
    images = (frames.read(index) for index in range(len(frames)))
    for place in places(tracker, images, sequence.start):
        rows.append((place.box, place.score, place.seconds))
        if on_frame is not None:
            on_frame()
    if not rows:
        raise DataError(f"{sequence.name} has no frames.")
    return _followed(sequence.name, rows)


def follow_all(
    tracker: Follower,
    sequences: Sequence[TrackingSequence],
    *,
    batch: int = 1,
    progress: bool = False,
) -> tuple[list[Followed], dict[str, str]]:
    """Take a tracker through many sequences; a broken one is left out, and the others go on.

    Args:
        tracker: anything with start and step; a `Tracker` for `batch` above 1.
        batch: how many sequences go through the model together.
        progress: show a bar on standard error.

    Returns:
        What was followed, in the order given, and the sequences that were left out: name ->
        message.

    Raises:
        BadSetting: the batch is below 1, or above 1 for a tracker that takes one sequence.
    """
    if batch < 1:
        raise BadSetting(f"batch is {batch}; 1 or more sequences go through the model together.")
    if batch > 1 and not isinstance(tracker, Tracker):
        raise BadSetting(
            f"A {type(tracker).__name__} follows one sequence at a time: batch is {batch}, and 1 "
            "works. A peft_vision.tracking.Tracker takes several."
        )
    broken: dict[str, str] = {}
    done: list[Followed] = []
    with progress_bar() if progress else nullcontext() as bar:
        tell = _teller(bar, sequences)
        for first in range(0, len(sequences), batch):
            group = sequences[first : first + batch]
            if batch > 1 and isinstance(tracker, Tracker):
                lanes = together(tracker, group, tell)
                done += [_followed(n.sequence.name, n.rows) for n in lanes if n.broken is None]
                broken |= {n.sequence.name: n.broken for n in lanes if n.broken is not None}
            else:
                done += _alone(tracker, group[0], broken, tell)
    return done, broken


def _alone(
    tracker: Follower,
    sequence: TrackingSequence,
    broken: dict[str, str],
    tell: Callable[[], None],
) -> list[Followed]:
    try:
        return [follow(tracker, sequence, tell)]
    except (DataError, BadSetting) as error:
        broken[sequence.name] = str(error)
        return []


def _followed(name: str, rows: Sequence[Row]) -> Followed:
    boxes, scores, seconds = (np.array(part, dtype=np.float64) for part in zip(*rows, strict=True))
    return Followed(name, boxes, scores, seconds)


def progress_bar() -> Progress:
    """A bar on standard error that counts frames."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("tracking"), BarColumn(), MofNCompleteColumn(), Remaining())
    return Progress(*columns, console=Console(stderr=True))


def _teller(bar: Progress | None, sequences: Sequence[TrackingSequence]) -> Callable[[], None]:
    """What to call behind every frame."""
    if bar is None:
        return lambda: None
    total = sum(_length(sequence) for sequence in sequences)
    job = bar.add_task("tracking", total=total)
    return lambda: bar.advance(job)


def _length(sequence: TrackingSequence) -> int:
    try:
        return len(sequence.frames)
    except DataError:
        return 0
