"""Readers on small folders in the layouts as they are published, odd cases included."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peft_vision.errors import DataError
from peft_vision.tracking._opencv import opencv
from peft_vision.tracking.datasets import (
    coco,
    folder,
    got10k,
    lasot,
    lasot_ext,
    otb,
    tnl2k,
    trackingnet,
)


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def frames(folder: Path, names: list[str]) -> None:
    """Gray frames, the brightness of each its place in the list."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (20, 16), (10 * number,) * 3).save(folder / name)


def eight(count: int, first: int = 1) -> list[str]:
    return [f"{number:08d}.jpg" for number in range(first, first + count)]


def gray(sequence, index: int) -> int:
    return round(float(sequence.frames.read(index).mean()) / 10)


def rows(count: int) -> str:
    return "".join(f"{1 + i},2,5,{6 + i}\n" for i in range(count))


def got(root: Path, split: str, name: str, count: int, lines: int) -> Path:
    frames(root / split / name, eight(count))
    put(root / split / name / "groundtruth.txt", rows(lines))
    listed = root / split / "list.txt"
    put(listed, (listed.read_text() if listed.exists() else "") + name + "\n")
    return root / split / name


def test_got10k_reads_labels_and_a_test_of_one_row(tmp_path):
    one = got(tmp_path, "val", "GOT-10k_Val_000001", 3, 3)
    put(one / "absence.label", "0\n1\n0\n")
    put(one / "cover.label", "8\n4\n0\n")
    put(one / "cut_by_image.label", "0\n0\n1\n")
    put(one / "meta_info.ini", "[METAINFO]\nobject_class: car\nresolution: (20, 16)\nurl: 5%\n")
    got(tmp_path, "test", "GOT-10k_Test_000001", 3, 1)

    found = got10k.read(tmp_path, "val")
    sequence = found.sequences[0]
    assert (found.split, found.dialect, sequence.labeled) == ("val", "got10k", True)
    np.testing.assert_array_equal(sequence.boxes[1], [2, 2, 5, 7])
    assert sequence.visible.tolist() == [True, False, False]
    assert sequence.extra["cover"].tolist() == [8, 4, 0]
    assert sequence.extra["cut"].tolist() == [0, 0, 1]
    assert sequence.extra["object_class"].tolist() == ["car"] * 3
    assert [gray(sequence, index) for index in range(3)] == [0, 1, 2]

    held = got10k.read(tmp_path, None)
    assert held.split == "test"
    assert len(held.sequences[0].boxes) == 1
    assert not held.sequences[0].labeled
    assert len(got10k.read(tmp_path / "test", None).sequences[0].frames) == 3


def test_got10k_training_looks_at_nothing_before_it_is_asked(tmp_path):
    put(tmp_path / "train" / "list.txt", "\n".join(f"GOT-10k_Train_{n:06d}" for n in range(9335)))
    found = got10k.read(tmp_path, "train")
    assert len(found) == 9335
    assert not found.broken
    with pytest.raises(DataError, match="GOT-10k_Train_000007"):
        found.sequences[7]
    got(tmp_path, "train", "GOT-10k_Train_000008", 2, 3)
    sequence = found.sequences[8]
    assert len(sequence.frames) == 3
    assert gray(sequence, 1) == 1
    with pytest.raises(DataError, match=r"00000003\.jpg"):
        sequence.frames.read(2)


def test_got10k_names_what_is_broken_and_keeps_the_rest(tmp_path):
    got(tmp_path, "val", "fine", 2, 2)
    got(tmp_path, "val", "short", 3, 2)
    got(tmp_path, "val", "empty", 0, 2)
    got(tmp_path, "val", "absent", 2, 2)
    (tmp_path / "val" / "absent" / "groundtruth.txt").unlink()
    gone = got(tmp_path, "val", "gap", 3, 2)
    (gone / "00000002.jpg").unlink()
    put(got(tmp_path, "val", "words", 2, 2) / "groundtruth.txt", "1,2,3,4\nx,2,3,4\n")
    put(got(tmp_path, "val", "three", 2, 2) / "groundtruth.txt", "1,2,3,4\n2,3,4\n")
    put(got(tmp_path, "val", "label", 2, 2) / "cover.label", "1\n")
    (got(tmp_path, "val", "bytes", 2, 2) / "groundtruth.txt").write_bytes(b"\xff\xfe\x00\x81")
    found = got10k.read(tmp_path, "val")
    assert [sequence.name for sequence in found.sequences] == ["fine"]
    for name, said in {
        "short": "3 frames and 2 rows",
        "empty": "no frames",
        "absent": "groundtruth.txt",
        "gap": "00000001.jpg to 00000003.jpg",
        "words": "not all numbers",
        "three": "Line 2",
        "label": "1 labels for 2",
        "bytes": "as text",
    }.items():
        assert said in found.broken[name]
    put(tmp_path / "val" / "list.txt", "short\n")
    with pytest.raises(DataError, match="none can be used"):
        got10k.read(tmp_path, "val")


def lasot_sequence(root: Path, name: str, count: int, lines: int, *, hidden=(), out=()) -> Path:
    folder = root / name.rpartition("-")[0] / name
    frames(folder / "img", eight(count))
    put(folder / "groundtruth.txt", rows(lines))
    put(folder / "nlp.txt", "a thing\n")
    for file, flagged in (("full_occlusion.txt", hidden), ("out_of_view.txt", out)):
        put(folder / file, ",".join(str(int(index in flagged)) for index in range(lines)))
    return folder


def test_lasot_counts_from_one_and_flags_in_one_line(tmp_path):
    lasot_sequence(tmp_path, "airplane-1", 4, 4, hidden=(1,), out=(3,))
    lasot_sequence(tmp_path, "monkey-17", 5, 3)
    lasot_sequence(tmp_path, "monkey-18", 5, 3)
    lasot_sequence(tmp_path, "zebra-2", 2, 2)
    put(tmp_path / "testing_set.txt", "airplane-1\nmonkey-17\nmonkey-18\nzebra-9\n")
    put(tmp_path / "training_set.txt", "zebra-2\n")
    found = lasot.read(tmp_path, None)
    assert found.split == "test"
    assert [sequence.name for sequence in found.sequences] == ["airplane-1", "monkey-17"]
    np.testing.assert_array_equal(found.sequences[0].boxes[2], [2, 1, 5, 8])
    assert found.sequences[0].visible.tolist() == [True, False, True, False]
    assert len(found.sequences[1].frames) == 3, "frames behind the last row are left out"
    assert "5 frames and 3 rows" in found.broken["monkey-18"]
    assert "zebra-9" in found.broken["zebra-9"]
    train = lasot.read(tmp_path, "train").sequences
    assert [gray(train[0], index) for index in range(2)] == [0, 1]
    (tmp_path / "training_set.txt").unlink()
    with pytest.raises(DataError, match=r"training_set\.txt"):
        lasot.read(tmp_path, "train")
    (tmp_path / "testing_set.txt").unlink()
    assert lasot.read(tmp_path, None).split == "all"


def test_the_extension_counts_from_zero(tmp_path):
    lasot_sequence(tmp_path, "atv-10", 2, 2, out=(1,))
    lasot_sequence(tmp_path, "atv-2", 2, 2)
    found = lasot_ext.read(tmp_path, None)
    assert [sequence.name for sequence in found.sequences] == ["atv-2", "atv-10"]
    np.testing.assert_array_equal(found.sequences[1].boxes[0], [1, 2, 5, 6])
    assert found.sequences[1].visible.tolist() == [True, False]


def test_trackingnet_sorts_by_number_and_has_chunks(tmp_path):
    for chunk, name, lines in (("TRAIN_0", "a", 11), ("TRAIN_11", "b", 11), ("TEST", "c", 1)):
        frames(tmp_path / chunk / "frames" / name, [f"{number}.jpg" for number in range(11)])
        put(tmp_path / chunk / "anno" / f"{name}.txt", rows(lines))
    put(tmp_path / "TRAIN_0" / "anno" / "packed.txt", rows(2))
    put(tmp_path / "TRAIN_0" / "zips" / "packed.zip", "")
    test = trackingnet.read(tmp_path, None)
    assert (test.split, test.dialect) == ("test", "trackingnet")
    assert [gray(test.sequences[0], index) for index in (0, 2, 10)] == [0, 2, 10]
    assert (len(test.sequences[0].frames), len(test.sequences[0].boxes)) == (11, 1)
    train = trackingnet.read(tmp_path, "train")
    assert [sequence.name for sequence in train.sequences] == ["a", "b"]
    assert gray(train.sequences[1], 10) == 10
    assert "zips" in train.broken["packed"]


def test_tnl2k_keeps_rows_that_are_not_known(tmp_path):
    frames(tmp_path / "Cat_1" / "imgs", ["0001.png", "0002.png", "0010.png"][:2])
    put(tmp_path / "Cat_1" / "groundtruth.txt", "1,2,3,4\nNaN,NaN,NaN,NaN\n")
    put(tmp_path / "Cat_1" / "language.txt", "a cat")
    sequence = tnl2k.read(tmp_path, None).sequences[0]
    assert sequence.visible.tolist() == [True, False]
    assert np.isnan(sequence.boxes[1]).all()
    (tmp_path / "TNL2K_test_subset").mkdir()
    (tmp_path / "Cat_1").rename(tmp_path / "TNL2K_test_subset" / "Cat_1")
    assert tnl2k.recognizes(tmp_path)
    assert tnl2k.read(tmp_path, None).split == "test"
    with pytest.raises(DataError, match="found: test"):
        tnl2k.read(tmp_path, "train")


def test_otb_has_odd_separators_ranges_and_two_targets(tmp_path):
    def of(name: str, files: dict[str, str], first: int, count: int) -> None:
        names = [f"{number:04d}.jpg" for number in range(first, first + count)]
        frames(tmp_path / name / "img", names)
        for file, text in files.items():
            put(tmp_path / name / file, text)

    of("Basket", {"groundtruth_rect.txt": "1,2,3,4\n5\t6\t7\t8\n9 10  11 12\n\n"}, 1, 3)
    of("David", {"groundtruth_rect.txt": "1,1,5,5\n" * 3}, 298, 5)
    two = {
        "groundtruth_rect.1.txt": "1,1,5,5\n2,2,5,5\n",
        "groundtruth_rect.2.txt": "3,3,5,5\n" * 2,
    }
    of("Jogging", two, 1, 2)
    of("Human4", {"groundtruth_rect.1.txt": "", "groundtruth_rect.2.txt": "7,7,5,5\n" * 2}, 1, 2)
    of("Hollow", {"groundtruth_rect.txt": "\n"}, 1, 2)
    found = otb.read(tmp_path, None)
    names = [sequence.name for sequence in found.sequences]
    assert names == ["Basket", "David", "Human4", "Jogging.1", "Jogging.2"]
    assert set(found.broken) == {"Hollow"}
    by_name = dict(zip(names, found.sequences, strict=True))
    expected = [[0, 1, 3, 4], [4, 5, 7, 8], [8, 9, 11, 12]]
    np.testing.assert_array_equal(by_name["Basket"].boxes, expected)
    assert [gray(by_name["David"], index) for index in range(3)] == [2, 3, 4]
    assert by_name["David"].frames.name(0).endswith("0300.jpg")
    assert by_name["Jogging.2"].boxes[0, 0] == 2
    assert by_name["Human4"].boxes[0, 0] == 6


def test_coco_gives_an_object_per_sequence(tmp_path):
    frames(tmp_path / "val2017", ["000000000007.jpg", "000000000009.jpg"])
    content = {
        "images": [
            {"id": 7, "file_name": "000000000007.jpg"},
            {"id": 9, "file_name": "000000000009.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "bbox": [1, 2, 3.5, 4], "iscrowd": 0},
            {"id": 2, "image_id": 7, "bbox": [0, 0, 9, 9], "iscrowd": 1},
            {"id": 3, "image_id": 7, "bbox": [5, 5, 0, 2], "iscrowd": 0},
        ],
    }
    put(tmp_path / "annotations" / "instances_val2017.json", json.dumps(content))
    found = coco.read(tmp_path, None)
    assert found.sequences.names == ["9-1", "7-3"]
    np.testing.assert_array_equal(found.sequences[0].boxes, [[1, 2, 3.5, 4]])
    assert gray(found.sequences[0], 0) == 1
    assert [bool(sequence.visible[0]) for sequence in found.sequences] == [True, False]
    assert [sequence.name for sequence in found.sequences[1:]] == ["7-3"]
    for text in ("[]", "{", '{"images": [], "annotations": [{"id": 1}]}'):
        put(tmp_path / "annotations" / "instances_val2017.json", text)
        with pytest.raises(DataError, match="instances_val2017"):
            coco.read(tmp_path, "val")


@pytest.mark.parametrize("place", [".", "img", "imgs", "frames"])
def test_a_folder_of_ones_own(tmp_path, place):
    frames(tmp_path / "ball" / place, ["9.png", "10.png", "11.png"])
    put(tmp_path / "ball" / "groundtruth.txt", "1.5, 2, 5, 6\nnan nan nan nan\n3;2;5;6\n")
    put(tmp_path / "broken" / "groundtruth.txt", "left,right\n")
    found = folder.read(tmp_path, None)
    assert (found.split, len(found), list(found.broken)) == ("all", 1, ["broken"])
    assert [gray(found.sequences[0], index) for index in range(3)] == [0, 1, 2]
    assert found.sequences[0].visible.tolist() == [True, False, True]
    single = folder.read(tmp_path / "ball", None)
    assert single.sequences[0].name == "ball"
    assert single.sequences[0].boxes[0, 0] == 1.5
    with pytest.raises(DataError, match="Line 1"):
        folder.read(tmp_path / "broken", None)


def test_a_video_of_ones_own(tmp_path):
    pytest.importorskip("cv2")
    cv2 = opencv()
    tmp_path.joinpath("a").mkdir()
    writer = cv2.VideoWriter(
        str(tmp_path / "a" / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48)
    )
    for level in range(4):
        writer.write(np.full((48, 64, 3), 50 * level, np.uint8))
    writer.release()
    put(tmp_path / "a" / "groundtruth.txt", "1,2,3,4\n")
    sequence = folder.read(tmp_path, None).sequences[0]
    assert len(sequence.frames) == 4
    assert abs(float(sequence.frames.read(2).mean()) - 100) < 5
    assert not sequence.labeled
