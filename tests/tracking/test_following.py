"""A tracker through sequences: rows, times, and broken sequences that stop nobody else."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from peft_vision.errors import BadSetting
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.crops import Frame
from peft_vision.tracking.following import follow, follow_all, places
from peft_vision.tracking.tracker import Tracker
from tests.tracking.moving_square import (
    InMemory,
    noise,
    painted,
    path,
    seeing,
    sequence,
    tiny_tracker,
)


class Standing:
    """A box that never moves; each step takes a millisecond at least."""

    def start(self, frame: Frame, box: Array) -> None:
        self.box = box

    def step(self, frame: Frame) -> tuple[Array, float]:
        time.sleep(0.001)
        return self.box, 0.5


class Slow(InMemory):
    """Frames that take long to decode."""

    def read(self, index: int) -> Frame:
        time.sleep(0.02)
        return super().read(index)


@pytest.fixture(scope="module")
def tracker() -> Tracker:
    torch.manual_seed(0)
    return Tracker(tiny_tracker(), device="cpu")


def broken_ones() -> list[Any]:
    boxes = path(5)
    frames: list[Frame | None] = [painted(box) for box in boxes]
    nan = np.vstack([np.full((1, 4), np.nan), boxes[1:]])
    flat = np.vstack([[[3.0, 4.0, 0.0, 5.0]], boxes[1:]])
    away = np.vstack([[[900.0, 4.0, 9.0, 5.0]], boxes[1:]])
    return [
        sequence("good", boxes),
        sequence("torn", boxes, [*frames[:3], None, frames[4]]),
        sequence("nan", nan, frames),
        sequence("flat", flat, frames),
        sequence("away", away, frames),
        sequence("empty", np.zeros((0, 4)), []),
        sequence("short", path(3)),
        sequence("long", path(9)),
    ]


BROKEN = {
    "torn": "frame 3 is broken",
    "nan": "first box is [nan, nan, nan, nan]",
    "flat": "above 0",
    "away": "outside of the frame",
    "empty": "",
}


def test_one_sequence_from_its_first_box() -> None:
    boxes = path(6)
    found = follow(Standing(), sequence("one", boxes))
    assert (found.name, found.boxes.shape, found.scores.tolist()) == (
        "one",
        (6, 4),
        [1, *[0.5] * 5],
    )
    np.testing.assert_array_equal(found.boxes, np.tile(boxes[0], (6, 1)))
    assert found.boxes.dtype == np.float64
    only = follow(Standing(), sequence("test set", boxes[:1], [painted(box) for box in boxes]))
    assert len(only.boxes) == 6
    assert np.isnan(follow(Standing(), sequence("one frame", boxes[:1])).fps)


def test_decoding_takes_no_time() -> None:
    boxes = path(6)
    one = sequence("one", boxes)
    slow = type(one)(one.name, Slow([painted(box) for box in boxes]), one.boxes, one.visible)
    found = follow(Standing(), slow)
    assert (found.seconds[1:] >= 0.001).all()
    assert np.median(found.seconds) < 0.015
    assert found.fps == pytest.approx(5 / found.seconds[1:].sum())


def test_frames_in_a_row() -> None:
    boxes = path(4)
    found = list(places(Standing(), map(painted, boxes), boxes[0].tolist()))
    assert [place.index for place in found] == [0, 1, 2, 3]
    assert [place.score for place in found] == [1.0, 0.5, 0.5, 0.5]
    np.testing.assert_array_equal(found[2].frame, painted(boxes[2]))


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_broken_sequences_are_listed_and_the_others_go_on(tracker: Tracker, batch: int) -> None:
    done, broken = follow_all(tracker, broken_ones(), batch=batch)
    assert [found.name for found in done] == ["good", "short", "long"]
    assert [len(found.boxes) for found in done] == [5, 3, 9]
    assert list(broken) == list(BROKEN)
    for name, says in BROKEN.items():
        assert says in broken[name]
    for found in done:
        assert found.boxes.shape == (len(found.scores), 4)
        assert np.isfinite(found.boxes).all()
        assert (found.seconds > 0).all()


def test_side_by_side_is_one_after_another(tracker: Tracker) -> None:
    films = [
        sequence(str(n), path(4 + n), [noise(9 * n + t) for t in range(4 + n)]) for n in (0, 1, 2)
    ]
    alone, _ = follow_all(tracker, films)
    beside, _ = follow_all(tracker, films, batch=2)
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_a_model_that_sees_follows_to_the_end(tracker: Tracker) -> None:
    boxes = path(40)
    found = follow(seeing(Tracker(tracker.model, device="cpu")), sequence("around", boxes))
    assert np.abs(found.boxes - boxes).max() < 1.0


def test_a_bar_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    films = broken_ones()[:3]
    follow_all(Standing(), films, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "tracking" in err
    assert "8/15" in err  # five, three before the torn one, none
    follow_all(Standing(), films)
    assert capfd.readouterr() == ("", "")


def test_batches_that_cannot_be() -> None:
    with pytest.raises(BadSetting, match="batch is 0"):
        follow_all(Standing(), [], batch=0)
    with pytest.raises(BadSetting, match="A Standing follows one sequence at a time"):
        follow_all(Standing(), [], batch=2)
