"""Evaluating a tracker: figures, files, what is left out, and the command line."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import peft_vision as pv
from peft_vision.cli import app
from peft_vision.errors import BadSetting, DataError, OutputExists, UnknownName
from peft_vision.tracking import metrics
from peft_vision.tracking.evaluation import evaluate
from peft_vision.tracking.geometry import Geometry
from peft_vision.tracking.sequence_set import LazySequences, SequenceSet
from peft_vision.tracking.sequences import TrackingSequence
from peft_vision.tracking.submission import figures_of
from peft_vision.tracking.tracker import Tracker
from tests.tracking.moving_square import painted, path, seeing, sequence, tiny_tracker, write_folder


class Shifted:
    """Says where the target was in the first frame, and two pixels to the right for each later."""

    def start(self, frame, box):
        self.box = np.array(box, dtype=np.float64)

    def step(self, frame):
        self.box = self.box + np.array([2, 0, 0, 0])
        return self.box, 0.5


def set_of(*sequences: TrackingSequence, kind: str = "folder", dialect: str = "otb") -> SequenceSet:
    return SequenceSet(kind, "test", list(sequences), dialect)


def unlabeled(name: str) -> TrackingSequence:
    whole = sequence(name, path(5))
    return TrackingSequence(name, whole.frames, whole.boxes[:1], whole.visible[:1])


def broken(name: str) -> TrackingSequence:
    return sequence(name, path(5), [*(sequence(name, path(4)).frames.frames), None])


def expected(count: int) -> metrics.Scored:
    start = path(count)[:1]
    moved = start + np.arange(count)[:, None] * np.array([2.0, 0, 0, 0])
    return metrics.otb(moved, path(count))


def test_figures_of_a_follower_are_those_of_its_boxes():
    found = evaluate(Shifted(), set_of(sequence("a", path(10)), sequence("b", path(20))))
    mean = metrics.mean([expected(10), expected(20)])
    assert found.figures == pytest.approx(mean.figures)
    assert found.per_sequence["b"] == pytest.approx(expected(20).figures)
    assert found.curves["success"].values == pytest.approx(mean.curves["success"].values)
    assert (found.sequences, found.scored, found.frames) == (2, 2, 30)
    assert (found.dialect, found.kind, found.data, found.batch) == ("otb", "folder", "folder", 1)
    assert found.fps_mean_of_rates >= found.fps > 0
    assert (found.skipped, found.unlabeled, found.notes) == ({}, (), ())
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["figures"] == found.figures
    assert len(plain["curves"]["precision"]["values"]) == 51


def test_a_tracker_that_sees_scores_high_and_several_at_once_score_the_same():
    data = set_of(*(sequence(f"s{n}", path(30)[:n]) for n in (9, 12, 10)))
    tracker = seeing(Tracker(tiny_tracker(), device="cpu"))
    found = evaluate(tracker, data)
    assert found.figures["SUC"] > 0.7
    assert found.figures["P"] == 1.0
    together = evaluate(tracker, data, batch=2)
    assert together.figures == pytest.approx(found.figures)
    assert together.batch == 2


def test_a_model_in_memory_is_taken():
    found = evaluate(tiny_tracker(), set_of(sequence("a", path(4))), device="cpu")
    assert 0 <= found.figures["SUC"] <= 1


def test_a_broken_sequence_is_listed_and_the_others_are_scored(tmp_path):
    data = set_of(sequence("a", path(5)), broken("b"), sequence("c", path(5)))
    data.broken["d"] = "its ground truth is not numbers"
    found = evaluate(Shifted(), data, output=tmp_path / "out")
    assert list(found.per_sequence) == ["a", "c"]
    assert found.skipped == {"d": "its ground truth is not numbers", "b": "frame 4 is broken"}
    assert not (tmp_path / "out" / "results" / "b.txt").exists()

    def opened(index: int) -> TrackingSequence:
        if index == 1:
            raise DataError("no such file")
        return sequence("xyz"[index], path(5))

    lazy = SequenceSet("folder", "train", LazySequences("xyz", opened), "otb")
    found = evaluate(Shifted(), lazy)
    assert (list(found.per_sequence), found.skipped) == (["x", "z"], {"y": "no such file"})
    with pytest.raises(DataError, match=r"No sequence of folder could be evaluated.*frame 4"):
        evaluate(Shifted(), set_of(broken("a")))


def test_everything_is_written_at_once_and_can_be_scored_again(tmp_path):
    data, out = set_of(sequence("a", path(6)), sequence("b", path(9))), tmp_path / "out"
    found = evaluate(Shifted(), data, output=out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert json.loads((out / "figures.json").read_text()) == found.to_json()
    assert sorted(p.name for p in (out / "results").glob("*.txt")) == ["a.txt", "b.txt"]
    assert {p.stem for p in out.glob("*.png")} == set(found.curves)
    again = figures_of(out / "results", data)
    assert again.figures == pytest.approx(found.figures)
    with pytest.raises(OutputExists):
        evaluate(Shifted(), data, output=out)
    evaluate(Shifted(), set_of(sequence("c", path(6))), output=out, overwrite=True)
    assert [p.name for p in (out / "results").glob("*.txt")] == ["c.txt"]


def test_without_labels_only_the_archive_is_written_and_it_is_said(tmp_path):
    data = set_of(unlabeled("one"), unlabeled("two"), kind="got10k", dialect="got10k")
    with pytest.raises(BadSetting, match=r"labels of first frames alone.*--output"):
        evaluate(Shifted(), data)
    found = evaluate(Shifted(), data, output=tmp_path / "out")
    assert (found.figures, found.curves, found.scored) == ({}, {}, 0)
    assert found.unlabeled == ("one", "two")
    assert "no figures" in found.notes[0]
    assert "submission.zip holds 2 sequences" in found.notes[1]
    with zipfile.ZipFile(tmp_path / "out" / "submission.zip") as archive:
        assert len(archive.read("two/two_001.txt").decode().splitlines()) == 5
    assert not list((tmp_path / "out").glob("*.png"))
    partly = set_of(unlabeled("one"), broken("b"), kind="trackingnet", dialect="trackingnet")
    found = evaluate(Shifted(), partly, output=tmp_path / "partly")
    assert "lacks 1 that were left out" in found.notes[1]


def test_what_makes_no_sense_is_refused_before_anything_is_followed(tmp_path):
    data = set_of(sequence("a", path(3)))
    plain = pv.create_model("timm/test_vit", pretrained=False, num_classes=0, img_size=64)
    with pytest.raises(BadSetting, match=r"is not a tracker.*streams="):
        evaluate(plain, data)
    with pytest.raises(UnknownName, match="got10k"):
        evaluate(Shifted(), data, dialect="got10")
    with pytest.raises(BadSetting, match="batch is 0"):
        evaluate(Shifted(), data, batch=0)
    with pytest.raises(BadSetting, match="one sequence at a time"):
        evaluate(Shifted(), data, batch=2)
    with pytest.raises(BadSetting, match="the sequences are given"):
        evaluate(Shifted(), data, kind="lasot")
    with pytest.raises(BadSetting, match="images, not videos"):
        evaluate(Shifted(), set_of(sequence("a", path(1))))
    with pytest.raises(DataError, match="Two sequences are named a"):
        evaluate(Shifted(), set_of(sequence("a", path(3)), sequence("a", path(4))))
    with pytest.raises(DataError, match="does not exist"):
        evaluate(Shifted(), tmp_path / "nowhere")


def test_visibility_counts_for_lasot_and_not_for_others():
    hidden = sequence("a", path(10))
    hidden.visible[5:] = False
    seen = seeing(Tracker(tiny_tracker(), device="cpu"))
    of = {kind: evaluate(seen, set_of(hidden, kind=kind)).figures for kind in ("lasot", "folder")}
    assert (of["lasot"]["P"], of["folder"]["P"]) == (0.5, 1.0)
    extension = evaluate(seen, set_of(hidden, kind="lasot_ext")).figures
    assert (extension["P"], extension["P_norm"], of["lasot"]["P_norm"]) == (0.5, 1.0, 0.5)


# The command line.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model, folder = tiny_tracker(), tmp_path_factory.mktemp("saved") / "tracker"
    model.history.task = Geometry().to_json()
    pv.merge(model).save_pretrained(folder)
    return folder


def write_images(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(painted(path(2)[0])).save(folder / name / "0.png")


def said(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


def test_a_saved_tracker_is_evaluated_as_one(saved, tmp_path):
    write_folder(tmp_path / "data" / "one", path(6))
    write_folder(tmp_path / "data" / "two", path(5))
    (tmp_path / "data" / "two" / "0004.png").write_bytes(b"no image")
    data, out = tmp_path / "data", tmp_path / "out"
    code, text = said("evaluate", saved, "--data", data, "-o", out, "--device", "cpu")
    assert code == 0, text
    figures = json.loads((out / "figures.json").read_text())["figures"]
    assert f"{100 * figures['SUC']:.2f} %" in text
    assert "Left out: 1 sequences two:" in text
    assert text.index("Left out") > text.index("P_norm")
    code, text = said(
        "evaluate", saved, "--data", data, "--json", "--dialect", "trackingnet", "--batch-size", 2,
        "--kind", "folder",
    )  # fmt: skip
    assert code == 0, text
    found = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert (found["dialect"], found["batch"], found["sequences"]) == ("trackingnet", 2, 1)
    code, text = said("evaluate", saved, "--data", data, "-o", out)
    assert (code, "--overwrite" in text) == (2, True)


def test_options_of_the_other_sort_of_model_are_refused(saved, tmp_path):
    write_folder(tmp_path / "one", path(3))
    code, text = said("evaluate", saved, "--data", tmp_path, "--skip-bad-images")
    assert code == 2
    assert "--skip-bad-images is for a model that classifies images" in text
    plain = pv.create_model("timm/test_vit", pretrained=False, num_classes=3, img_size=64)
    pv.compress(plain, target_flops=0.9, methods=["magnitude"]).save_pretrained(tmp_path / "plain")
    code, text = said(
        "evaluate", tmp_path / "plain", "--data", tmp_path, "--kind", "lasot", "-o", tmp_path / "o"
    )
    assert code == 2
    assert "--kind, --output are for a model that tracks, and this one is not a tracker" in text
    write_images(tmp_path / "images")
    code, text = said("evaluate", "nowhere", "--data", tmp_path / "images", "--dialect", "otb")
    assert (code, "There is no folder nowhere" in text) == (2, True)
