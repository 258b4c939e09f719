"""Boxes drawn into a video and written down; a failure leaves what was there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from peft_vision.errors import CannotWrite, DataError
from peft_vision.tracking import open_frames
from peft_vision.tracking._opencv import opencv
from peft_vision.tracking.crops import Frame
from peft_vision.tracking.frames import VideoFile
from peft_vision.tracking.video import drawn, write_results, writing_video
from tests.tracking.moving_square import noise, painted, path


def write(file: Path, frames: list[Frame]) -> None:
    with writing_video(file) as add:
        for frame in frames:
            add(frame)


def test_a_box_is_where_it_is_drawn() -> None:
    frame = np.zeros((120, 160, 3), np.uint8)
    image = drawn(frame, np.array([30.2, 40.4, 50.0, 20.0]))
    ys, xs = np.nonzero(image[..., 1] == 255)
    assert [xs.min(), xs.max(), ys.min(), ys.max()] == pytest.approx([30, 80, 40, 60], abs=1)
    assert not image[45:55, 35:75].any()
    assert not frame.any()
    scored = drawn(frame, np.array([30.2, 40.4, 50.0, 20.0]), 0.87)
    assert scored[:38].any()
    low = drawn(frame, np.array([30.0, 0.0, 50.0, 20.0]), 0.87)
    assert low[3:18, 32:78].any()


@pytest.mark.parametrize(
    "box", [[-1e9, 5, 2e9, 9], [500, 500, 3, 3], [float("nan")] * 4, [1, 1, 1e12, 2]]
)
def test_boxes_out_of_sight(box: list[float]) -> None:
    assert drawn(noise(0), np.array(box), 0.5).shape == (120, 160, 3)


@pytest.mark.parametrize("shape", [(160, 120), (97, 63)])
def test_a_video_there_and_back(tmp_path: Path, shape: tuple[int, int]) -> None:
    file = tmp_path / "out.mp4"
    frames = [painted(box, *shape) for box in path(7) * 0.5]
    with writing_video(file, 12.5) as add:
        for frame in frames:
            add(frame)
        assert not file.exists()
    found = open_frames(file)
    assert isinstance(found, VideoFile)
    assert (len(found), found.rate) == (7, 12.5)
    for number, frame in enumerate(frames):
        even = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
        assert found.read(number).shape == even.shape
        assert np.abs(found.read(number).astype(float) - even).mean() < 6
    assert [child.name for child in tmp_path.iterdir()] == ["out.mp4"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "out.mp4"
    file.write_text("mine")
    with pytest.raises(DataError, match="Frame 1 is 80 x 120 and those before are 160 x 120"):
        write(file, [noise(0), noise(0)[:, :80]])
    with pytest.raises(CannotWrite, match="0 of 0 frames"):
        write(file, [])
    assert file.read_text() == "mine"
    assert [child.name for child in tmp_path.iterdir()] == ["out.mp4"]
    with pytest.raises(CannotWrite, match="Could not write"):
        write(tmp_path / "no" / "out.mp4", [noise(0)])


def test_a_codec_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf:
        def __init__(self, *_: object) -> None: ...

        def isOpened(self) -> bool:  # noqa: N802
            return False

        def release(self) -> None: ...

    monkeypatch.setattr(opencv(), "VideoWriter", Deaf)
    with pytest.raises(CannotWrite, match=r"cannot encode 160 x 120.*\.txt"):
        write(tmp_path / "out.mp4", [noise(0)])
    assert not any(tmp_path.iterdir())


def test_frames_that_did_not_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV says nothing when the disk is full; the number of frames does."""
    whole = opencv().VideoWriter

    class Forgetful:
        def __init__(self, *given: object) -> None:
            self.inner, self.count = whole(*given), 0

        def isOpened(self) -> bool:  # noqa: N802
            return True

        def write(self, image: object) -> None:
            self.count += 1
            if self.count < 3:
                self.inner.write(image)

        def release(self) -> None:
            self.inner.release()

    monkeypatch.setattr(opencv(), "VideoWriter", Forgetful)
    with pytest.raises(CannotWrite, match="2 of 5 frames arrived"):
        write(tmp_path / "out.mp4", [noise(seed) for seed in range(5)])


def test_lines_as_got10k_wants_them(tmp_path: Path) -> None:
    file = tmp_path / "out.txt"
    write_results(file, np.array([[1, 2.5, 3.14159, 4], [0.0004, 0, 10, 1e3]]))
    assert file.read_text() == "1.000,2.500,3.142,4.000\n0.000,0.000,10.000,1000.000\n"
    with pytest.raises(CannotWrite):
        write_results(tmp_path / "no" / "out.txt", np.zeros((1, 4)))
    assert [child.name for child in tmp_path.iterdir()] == ["out.txt"]
