"""Frames from folders, videos and cameras, and what is wrong with those that are not."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peft_vision.errors import DataError, MissingExtra
from peft_vision.tracking.frames import ImageFiles, VideoFile, open_frames, stream
from tests.tracking.moving_square import painted, path, write_video

BOXES = path(12)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip01.mp4", [painted(box) for box in BOXES])


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing that OpenCV has to say reaches the terminal."""
    yield
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def images(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (8, 6), (10 * number, 0, 0)).save(folder / name)
    return folder


def reds(folder: Path) -> list[int]:
    return [int(frame[0, 0, 0]) // 10 for frame in stream(folder)]


def test_a_folder_is_in_order_of_its_numbers(tmp_path: Path) -> None:
    assert reds(images(tmp_path / "a", "10.png", "9.png", "8.png")) == [2, 1, 0]
    assert reds(images(tmp_path / "b", "f_2_0010.png", "f_2_0005.png", "f_2_0015.png")) == [1, 0, 2]
    assert reds(images(tmp_path / "c", "late.png", "early.bmp")) == [1, 0]
    assert reds(images(tmp_path / "d", "a2.png", "b1.png", "a10.png")) == [2, 0, 1]
    mixed = images(tmp_path / "e", "2.PNG", "1.png")
    (mixed / "groundtruth.txt").write_text("1,2,3,4")
    (mixed / "._1.png").write_bytes(b"not an image")
    assert reds(mixed) == [1, 0]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "no image files"),
        (["1.png", "2.png", "4.png", "5.png"], "no frame 3: 2.png is followed by 4.png"),
        (["x0.png", "x5.png", "x10.png", "x20.png"], "no frame 15.*step, here 5"),
        (["1.png", "01.png", "2.png"], "frame 1 twice"),
    ],
)
def test_folders_with_a_hole(tmp_path: Path, names: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        open_frames(images(tmp_path / "f", *names))


def test_folders_of_folders_name_them(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    with pytest.raises(DataError, match="Its folders: img"):
        open_frames(tmp_path)


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    folder = images(tmp_path / "f", "1.png", "2.png", "3.png")
    frames = open_frames(folder)
    (folder / "2.png").unlink()
    (folder / "3.png").write_bytes(b"\x89PNG, or so it says")
    assert frames.read(0).shape == (6, 8, 3)
    assert frames.read(0).flags.writeable
    with pytest.raises(DataError, match=r"A frame is missing.*2\.png"):
        frames.read(1)
    with pytest.raises(DataError, match=r"The frame .*3\.png cannot be read"):
        frames.read(2)
    assert frames.name(2).endswith("3.png")
    assert len(ImageFiles([])) == 0


def test_gray_and_transparent_images_are_rgb(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 7).save(tmp_path / "1.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 4)).save(tmp_path / "2.png")
    Image.fromarray(np.full((4, 4), 257 * 9, np.uint16)).save(tmp_path / "3.png")
    found = [frame[0, 0].tolist() for frame in stream(tmp_path)]
    assert found == [[7, 7, 7], [1, 2, 3], [9, 9, 9]]


def test_a_video_forward_backward_and_from_its_middle(video: Path) -> None:
    frames = open_frames(video)
    assert isinstance(frames, VideoFile)
    assert (len(frames), frames.rate) == (12, 25)
    forward = [frames.read(index) for index in range(12)]
    assert forward[0].dtype == np.uint8
    for box, frame in zip(BOXES, forward, strict=True):
        assert np.abs(frame.astype(float) - painted(box)).mean() < 6
    for index in (11, 0, 7, 3, 3, 4, 9):
        np.testing.assert_array_equal(frames.read(index), forward[index])
    for one, other in itertools.zip_longest(stream(video), forward):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(DataError, match="has no frame 12: it ends after 12 frames"):
        frames.read(12)
    np.testing.assert_array_equal(frames.read(2), forward[2])


def test_red_is_red_in_a_video(tmp_path: Path) -> None:
    red = np.zeros((32, 48, 3), np.uint8)
    red[..., 0] = 250
    frame = next(stream(write_video(tmp_path / "red.mp4", [red] * 3)))
    assert frame[..., 0].min() > 200
    assert frame[..., 1:].max() < 50


def test_what_is_no_video(tmp_path: Path, video: Path) -> None:
    text = tmp_path / "text01.mp4"
    text.write_bytes(b"hello " * 500)
    empty = tmp_path / "empty.avi"
    empty.touch()
    half = tmp_path / "half.mp4"
    half.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    for file in (text, empty, half):
        with pytest.raises(DataError, match=f"{file.name} cannot be decoded as a video"):
            open_frames(file)
    image = tmp_path / "1.png"
    Image.new("RGB", (8, 8)).save(image)
    with pytest.raises(DataError, match="Pass the folder"):
        open_frames(image)
    for wrong in (tmp_path / "none.mp4", "nowhere"):
        with pytest.raises(DataError, match="There is no"):
            open_frames(wrong)


def test_a_video_that_breaks_off(tmp_path: Path) -> None:
    """The file announces 40 frames, and its second half is zeros."""
    noisy = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    whole = write_video(tmp_path / "whole.mp4", list(noisy))
    data = bytearray(whole.read_bytes())
    start = data.index(b"mdat") + 4
    end = data.index(b"moov")
    data[start + (end - start) // 2 : end] = bytes(end - start - (end - start) // 2)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    with pytest.raises(DataError, match=r"breaks off: \d+ of 40 frames"):
        open_frames(broken)


def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(DataError, match="no camera 77"):
        next(stream(77))


def test_without_opencv(monkeypatch: pytest.MonkeyPatch, video: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtra, match=r"peft-vision\[track\]"):
        open_frames(video)
    assert reds(images(tmp_path / "f", "1.png", "2.png")) == [0, 1]
