"""Laws of the drawn sequences."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("skimage")
pytest.importorskip("elpv_dataset")
pytest.importorskip("sklearn")

from peft_vision.errors import BadSetting, DataError, MissingExtra
from peft_vision.tracking import synthetic
from peft_vision.tracking._photographs import PICTURES
from peft_vision.tracking.reading import read_sequences
from peft_vision.tracking.synthetic import SyntheticSettings

SHORT = SyntheticSettings(train=20, test=12, train_length=24, test_length=40)
BLACK, WHITE = np.arange(256, dtype=np.uint8) * 0, np.full(256, 255, np.uint8)


def alone(scene):
    """The same scene with a white target and nothing else to be seen."""
    dark = np.zeros_like(scene.photograph)
    order, table = scene.colors
    white = replace(scene.target, texture=np.full_like(scene.target.texture, 255))
    return replace(
        scene,
        photograph=dark,
        colors=(order, np.zeros_like(table)),
        target=white,
        behind=(),
        before=(),
        soft=False,
        tables=np.tile(np.arange(256, dtype=np.uint8), (len(scene.tables), 1)),
    )


def test_a_box_is_the_exact_extent_of_what_is_drawn():
    found = synthetic.read("test", SHORT)
    for sequence in found.sequences[:6]:
        scene = alone(sequence.frames.scene)
        for index in (0, 17, 39):
            ys, xs = np.nonzero(scene.frame(index)[..., 0])
            drawn = [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
            np.testing.assert_array_equal(sequence.boxes[index], drawn)


def test_seen_is_the_share_that_shows():
    """Count white pixels with black things in front, against a scene with nothing in front."""
    found = synthetic.read("test", replace(SHORT, occluders=4))
    hidden = 0
    for sequence in found.sequences[:8]:
        scene = sequence.frames.scene
        bare = alone(scene)
        dark = [replace(thing, texture=np.zeros_like(thing.texture)) for thing in scene.before]
        covered = replace(bare, before=dark)
        for index in range(0, 40, 3):
            area = int(scene.target.mask(index, scene.target.window(index)).sum())
            shows = int((covered.frame(index)[..., 0] > 0).sum())
            assert sequence.extra["seen"][index] == pytest.approx(shows / area, abs=1e-9)
            assert sequence.visible[index] == (shows / area > 0.3)
            hidden += shows < 0.9 * area
    assert hidden >= 5, "something passes in front"


def test_cover_is_the_one_of_got10k():
    seen = np.array([0, 0.1, 0.15, 0.2, 0.5, 0.9, 0.95, 1.0])
    assert synthetic._cover(seen).tolist() == [0, 1, 1, 2, 4, 6, 7, 8]


def test_sequences_are_a_function_of_split_and_number():
    one, other = synthetic.read("train", SHORT), synthetic.read("train", SHORT)
    last = other.sequences[19]
    for index in (5, 3):
        first, again = one.sequences[index], other.sequences[index]
        np.testing.assert_array_equal(first.boxes, again.boxes)
        np.testing.assert_array_equal(first.frames.read(9), again.frames.read(9))
    np.testing.assert_array_equal(last.boxes, one.sequences[19].boxes)
    assert not np.array_equal(one.sequences[3].boxes, one.sequences[5].boxes)
    test = synthetic.read("test", SHORT).sequences[3]
    assert not np.array_equal(test.boxes[:24], one.sequences[3].boxes)


def test_no_photograph_is_in_both_splits():
    files = {s: {(p, f) for p, names in PICTURES[s].items() for f in names} for s in PICTURES}
    assert not files["train"] & files["test"]
    assert min(len(found) for found in files.values()) >= 8


def overlap(one, other):
    low = np.maximum(one[:2], other[:2])
    high = np.minimum(one[:2] + one[2:], other[:2] + other[2:])
    both = np.clip(high - low, 0, None).prod()
    return both / (one[2:].prod() + other[2:].prod() - both)


def test_the_start_is_good_and_standing_still_is_not():
    still, moved = [], []
    for sequence in synthetic.read("test", SyntheticSettings(test=16)).sequences:
        assert sequence.start.shape == (4,)
        assert sequence.visible[0]
        assert sequence.visible.mean() > 0.6
        assert np.isfinite(sequence.boxes).all()
        still.append(np.mean([overlap(sequence.start, box) for box in sequence.boxes]))
        centers = sequence.boxes[:, :2] + sequence.boxes[:, 2:] / 2
        steps = np.linalg.norm(np.diff(centers, axis=0), axis=1)
        moved.append(steps / np.sqrt(sequence.boxes[1:, 2:].prod(1)))
    assert np.mean(still) < 0.2
    steps = np.concatenate(moved)
    assert np.median(steps) > 0.02
    assert np.quantile(steps, 0.999) < 1.0, "a search image of four sides has it in it"


def test_frames_are_pictures():
    sequence = read_sequences("demo/tracking", split="train").sequences[0]
    frame = sequence.frames.read(0)
    assert (frame.shape, frame.dtype) == ((240, 320, 3), np.uint8)
    assert frame.std() > 5
    with pytest.raises(DataError, match="60 frames"):
        sequence.frames.read(60)
    assert "train-0000" in sequence.frames.name(3)


def test_what_is_asked_wrongly_is_said(monkeypatch):
    with pytest.raises(DataError, match="train, test"):
        read_sequences("demo/tracking", split="val")
    for wrong in (
        {"height": 10},
        {"test": 0},
        {"smallest": 1.0},
        {"light": 0.5},
        {"occluders": -1},
    ):
        with pytest.raises(BadSetting):
            SyntheticSettings(**wrong)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "cv2" else find(n))
    with pytest.raises(MissingExtra, match=r"pip install .peft-vision\[demo,track\]"):
        read_sequences("demo/tracking")
    synthetic.photographs.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "skimage" else find(n))
    with pytest.raises(MissingExtra, match="scikit-image"):
        read_sequences("demo/tracking")
