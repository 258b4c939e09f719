"""The followers without learning: a textured square is found again, and a still box stays."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, zoom

from peft_vision.tracking import metrics
from peft_vision.tracking.following import follow
from peft_vision.tracking.sequences import TrackingSequence
from tests.tracking.moving_square import InMemory

pytest.importorskip("cv2")
baselines = pytest.importorskip("benchmarks.tracking_baselines")

STEPS = 24


def texture(side: int, seed: int) -> np.ndarray:
    """Blobs a few pixels wide, S S 3."""
    noise = np.random.default_rng(seed).normal(size=(side, side, 3))
    smooth = gaussian_filter(noise, (2, 2, 0))
    return np.clip(128 + 50 * smooth / smooth.std(), 0, 255)


def sequence(growth: float = 1.0) -> TrackingSequence:
    """A square of 32 px that goes diagonally, in front of a background that stays."""
    ground, square = texture(200, 1), texture(32, 2)
    frames, boxes = [], []
    for t in range(STEPS):
        side = round(32 * growth ** (t / STEPS))
        shown = zoom(square, (side / 32, side / 32, 1), order=1)
        x, y = 20 + 4 * t, 30 + 3 * t
        frame = ground.copy()
        frame[y : y + side, x : x + side] = shown[:side, :side]
        frames.append(frame.astype(np.uint8))
        boxes.append([x, y, side, side])
    return TrackingSequence(
        "square", InMemory(frames), np.array(boxes, float), np.ones(STEPS, dtype=bool)
    )


@pytest.mark.parametrize(("growth", "least"), [(1.0, 0.98), (1.5, 0.9)])
def test_correlation_follows_a_square_that_moves_and_grows(growth, least):
    moving = sequence(growth)
    found = follow(baselines.Correlation(), moving)
    overlaps = metrics.overlaps(found.boxes, moving.boxes)
    assert overlaps.mean() > least, overlaps
    assert overlaps[-1] > least - 0.1
    assert metrics.distances(found.boxes, moving.boxes).max() < 4
    assert (found.scores[1:] > 0.7).all()


def test_correlation_is_exact_where_nothing_moves():
    moving = sequence()
    tracker = baselines.Correlation()
    tracker.start(moving.frames.read(0), moving.boxes[0])
    for _ in range(3):
        box, score = tracker.step(moving.frames.read(0))
    assert box == pytest.approx(moving.boxes[0], abs=0.05)
    assert score == pytest.approx(1, abs=0.01)


def test_a_target_without_texture_or_at_the_border_is_no_trouble():
    tracker, gray = baselines.Correlation(), np.full((60, 80, 3), 128, dtype=np.uint8)
    tracker.start(gray, np.array([10.0, 10, 20, 20]))
    box, score = tracker.step(gray)
    assert box == pytest.approx([10, 10, 20, 20], abs=0.01)
    assert score == 0
    frame = texture(64, 3).astype(np.uint8)
    tracker.start(frame, np.array([-10.0, 50, 30, 60]))  # reaches out on two sides
    for _ in range(5):
        box, score = tracker.step(frame)
    assert np.isfinite(box).all()
    assert (box[2:] > 0).all()


def test_a_still_box_stays():
    moving = sequence()
    found = follow(baselines.Still(), moving)
    assert (found.boxes == moving.boxes[0]).all()
    # after 8 frames of 4 pixels the box and the square have nothing in common
    assert metrics.otb(found.boxes, moving.boxes).figures["SUC"] < 0.25
