"""Files of results: in the form of each toolkit, read back as they were, never half written."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from peft_vision.errors import CannotWrite, DataError, OutputExists, UnknownName
from peft_vision.tracking import metrics, submission
from peft_vision.tracking.following import Followed
from peft_vision.tracking.sequence_set import SequenceSet
from peft_vision.tracking.sequences import TrackingSequence
from tests.tracking.moving_square import path, sequence

KINDS = ["got10k", "lasot", "lasot_ext", "trackingnet", "tnl2k", "otb", "folder", "demo"]


def followed(name: str, count: int = 6, shift: float = 3) -> Followed:
    boxes = path(count)
    boxes[1:, 0] += shift
    return Followed(name, boxes, np.linspace(1, 0.5, count), np.linspace(0.1, 0.02, count))


def set_of(kind: str, *names: str, count: int = 6, dialect: str = "otb") -> SequenceSet:
    return SequenceSet(kind, "test", [sequence(name, path(count)) for name in names], dialect)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back(kind, tmp_path):
    given = followed("cat-1")
    submission.write_results([given, followed("dog-2")], tmp_path / "out", kind)
    boxes, seconds = submission.read_result(tmp_path / "out", "cat-1", kind)
    assert boxes == pytest.approx(given.boxes, abs=0.00051)
    assert seconds == pytest.approx(given.seconds, abs=1e-8)


def test_got10k_has_a_folder_per_sequence(tmp_path):
    submission.write_archive([followed("GOT-10k_Test_000001")], tmp_path / "it.zip", "got10k")
    with zipfile.ZipFile(tmp_path / "it.zip") as archive:
        assert sorted(archive.namelist()) == [
            "GOT-10k_Test_000001/GOT-10k_Test_000001_001.txt",
            "GOT-10k_Test_000001/GOT-10k_Test_000001_time.txt",
        ]
        files = (archive.read(name).decode() for name in sorted(archive.namelist()))
        lines, times = (text.splitlines() for text in files)
    assert len(lines) == len(times) == 6
    assert lines[0] == ",".join(f"{value:.3f}" for value in path(6)[0])  # the box that was given
    assert times[0] == "0.10000000"


def test_trackingnet_has_boxes_alone_and_the_same_results_are_the_same_file(tmp_path):
    for name in ("one.zip", "two.zip"):
        submission.write_archive([followed("abc_0")], tmp_path / name, "trackingnet")
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.namelist() == ["abc_0.txt"]
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


@pytest.mark.parametrize(("kind", "first"), [("lasot", 1), ("otb", 1), ("lasot_ext", 0)])
def test_files_count_from_where_the_ground_truth_does(kind, first, tmp_path):
    submission.write_results([followed("cat-1")], tmp_path / "out", kind)
    row = np.loadtxt(tmp_path / "out" / "cat-1.txt", delimiter=",")[0]
    assert row == pytest.approx(path(6)[0] + np.array([first, first, 0, 0]), abs=0.00051)


def test_figures_of_stored_results_are_those_of_the_boxes(tmp_path):
    data = set_of("lasot", "cat-1", "dog-2")
    submission.write_results([followed("cat-1"), followed("dog-2", shift=9)], tmp_path, "lasot")
    found = submission.figures_of(tmp_path, data)
    expected = metrics.mean(
        [metrics.otb(followed("a", shift=shift).boxes, path(6)) for shift in (3, 9)]
    )
    assert found.figures == pytest.approx(expected.figures)
    assert (found.sequences, found.frames, found.scored, found.skipped) == (2, 12, 2, {})
    rest = np.tile(np.linspace(0.1, 0.02, 6)[1:], 2)  # the start is not a frame of tracking
    assert found.fps == pytest.approx(1 / rest.mean())
    assert found.fps_mean_of_rates == pytest.approx((1 / rest).mean())
    other = submission.figures_of(tmp_path, data, "trackingnet")
    assert (other.dialect, set(other.figures)) == ("trackingnet", {"SUC", "P", "P_norm"})
    with pytest.raises(UnknownName, match="got10k"):
        submission.figures_of(tmp_path, data, "got10")


def test_results_of_others_are_read_and_broken_ones_are_listed(tmp_path):
    data = set_of("lasot", "tabs", "longer", "shorter", "words", "three", "empty", "none")
    rows = path(8) + np.array([1, 1, 0, 0])
    np.savetxt(tmp_path / "tabs.txt", rows[:6], delimiter="\t")
    np.savetxt(tmp_path / "longer.txt", rows[[0, 1, 2, 3, 4, 5, 5, 5]], delimiter=",")
    np.savetxt(tmp_path / "shorter.txt", rows[:5], delimiter=",")
    (tmp_path / "words.txt").write_text("a,b,c,d\n")
    (tmp_path / "three.txt").write_text("1,2,3\n4,5,6\n")
    (tmp_path / "empty.txt").write_text("\n")
    found = submission.figures_of(tmp_path, data)
    assert list(found.per_sequence) == ["tabs", "longer"]
    assert (found.fps, found.fps_mean_of_rates) == (None, None)
    said = found.skipped
    assert sorted(said) == ["empty", "none", "shorter", "three", "words"]
    assert "(5, 4)" in said["shorter"]
    assert "3 numbers per line" in said["three"]
    with pytest.raises(DataError, match=r"No sequence of .* could be evaluated.*nobody"):
        submission.figures_of(tmp_path, set_of("lasot", "nobody"))


def test_got10k_scores_what_is_covered_in_part_in_one_pool(tmp_path):
    truth, boxes = np.tile([10.0, 10, 20, 20], (4, 1)), np.tile([10.0, 10, 20, 10], (4, 1))
    plain = sequence("a", truth)
    extra = {"cover": np.array([8, 8, 0, 1])}
    covered = TrackingSequence("b", plain.frames, truth, plain.visible, extra)
    hidden = TrackingSequence("c", plain.frames, truth, plain.visible, {"cover": np.zeros(4)})
    data = SequenceSet("got10k", "val", [plain, covered, hidden], "got10k")
    done = [
        Followed(name, found, np.ones(4), np.ones(4))
        for name, found in (("a", boxes), ("b", truth), ("c", truth))
    ]
    submission.write_results(done, tmp_path, "got10k")
    found = submission.figures_of(tmp_path, data)
    assert found.figures == {"AO": pytest.approx((3 * 0.5 + 2) / 5), "SR50": 0.4, "SR75": 0.4}
    assert found.per_sequence["a"]["AO"] == 0.5
    assert "No frame after the first" in found.skipped["c"]


def test_what_was_there_stays_when_writing_fails(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExists):
        submission.write_results([followed("a")], tmp_path / "out", "otb")
    submission.write_archive([followed("a")], tmp_path / "it.zip", "got10k")
    before = (tmp_path / "it.zip").read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CannotWrite, match="No space left"):
        submission.write_archive([followed("b")], tmp_path / "it.zip", "got10k")
    with pytest.raises(CannotWrite, match="No space left"):
        submission.write_results([followed("b")], tmp_path / "out", "otb", overwrite=True)
    assert (tmp_path / "it.zip").read_bytes() == before
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["it.zip", "out"]


@pytest.mark.parametrize("names", [["a/b"], ["../up"], [".hidden"], [""], ["a", "a"]])
def test_names_that_are_no_files_are_refused(names, tmp_path):
    with pytest.raises(DataError, match=r"name of a file|are named"):
        submission.write_results([followed(name) for name in names], tmp_path / "out", "otb")
    assert not (tmp_path / "out").exists()
