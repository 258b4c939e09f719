"""From folders of frames to a saved tracker: a recipe, a run that breaks off, two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import peft_vision as pv
from peft_vision.cli import app
from peft_vision.errors import DataError, RecipeError
from peft_vision.finetuning import finetune
from peft_vision.finetuning.pairs import PairsJob
from peft_vision.recipe import load_recipe, shipped
from peft_vision.training.trainer import VisionTrainer
from tests.tracking.moving_square import painted, path, write_folder

RECIPE = """
model:
  name: timm/test_vit
  pretrained: false
  kwargs: {{img_size: 64}}
method:
  name: lorat
  streams: [32, 64]
  kinds: [2, 1]
  readout: boxes
  init: trunc_normal
  std: 0.02
  r: 4
data:
  sources: {data}
  pairs: {pairs}
  validation_pairs: 16
  augmentation: {{color: 0.2}}
task: {{name: tracking, search_area: 5}}
train: {{epochs: 2, batch_size: 8, micro_batch: 4, learning_rate: 2e-3, save_every: 3, loggers: [],
        device: cpu, progress: false}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """A function that writes a recipe on three sequences of a moving rectangle."""
    for number in range(3):
        boxes = path(12) + np.array([5 * number, -4 * number, number, 0])
        write_folder(tmp_path / "data" / f"sequence-{number}", boxes)

    def write(pairs: int = 24, name: str = "recipe.yaml") -> Path:
        file = tmp_path / name
        file.write_text(RECIPE.format(data=tmp_path / "data", pairs=pairs))
        return file

    return write


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = ("adapter_model.safetensors", "parts.safetensors")
    return {k: v for file in files for k, v in load_file(folder / file).items()}


def test_a_tracker_is_trained_saved_and_follows(recipe: Any, tmp_path: Path) -> None:
    found = finetune(recipe(32), ["train.epochs=6"], output=tmp_path / "out")
    assert set(found.model.history.metrics) == {"iou", "auc", "success50"}
    lines = (tmp_path / "out" / "logs" / "log.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:2])
    tracker = pv.tracking.Tracker(found.model)
    assert tracker.geometry.search_area == 5
    boxes = path(12)
    tracker.start(painted(boxes[0]), boxes[0])
    box, score = tracker.step(painted(boxes[1]))
    assert box.shape == (4,)
    assert 0 < score < 1
    record = json.loads((tmp_path / "out" / "peft_vision.json").read_text())
    assert record["task"]["name"] == "tracking"
    assert record["metrics"]["iou"]["n"] == 16


def test_a_run_that_breaks_off_ends_with_the_same_weights(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe()
    finetune(file, output=tmp_path / "whole")
    step = VisionTrainer.training_step

    def breaks(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            raise SystemExit
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(VisionTrainer, "training_step", breaks)
        with pytest.raises(SystemExit):
            finetune(file, output=tmp_path / "broken")
    again = finetune(file, output=tmp_path / "broken")
    assert again.resumed == 3
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one.keys() == other.keys()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(recipe: Any, tmp_path: Path) -> None:
    """One pass at a time holds the same pairs in both, so losses are divided by the same counts."""
    file = recipe()
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / "ddp-2cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    run = subprocess.run(
        [*command, "-m", "peft_vision", "finetune", str(file), "-o", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    finetune(file, output=tmp_path / "one")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)


def test_memory_is_predicted_without_numbers(recipe: Any) -> None:
    found = pv.estimate_memory(recipe())
    two_passes = 2 * 4 * (4 * 3 * (32**2 + 64**2) + 8 * 4 + 16)
    assert found.parts["inputs"] == pytest.approx(two_passes, rel=0.01)
    assert found.image_size == (64, 64)


def test_weights_of_sources_and_what_is_set_aside(recipe: Any, tmp_path: Path) -> None:
    words = [f"data.sources=[{{root: {tmp_path}/data, weight: 2}}, {tmp_path}/data]"]
    job = PairsJob(load_recipe(recipe(), words).recipe)
    assert [(len(data.sequences), weight) for data, weight in job.train] == [(2, 2.0), (2, 1.0)]
    assert [len(data.sequences) for data, _ in job.validation] == [1, 1]
    names = {s.name for data, _ in job.train for s in data.sequences}
    assert names.isdisjoint(s.name for data, _ in job.validation for s in data.sequences)


def test_it_trains_on_the_training_split_unless_told_otherwise(recipe: Any, tmp_path: Path) -> None:
    """Without a split, evaluation takes the test sequences; training must not."""
    data = tmp_path / "parted"
    for split, count in (("train", 3), ("test", 2)):
        for number in range(count):
            write_folder(data / split / f"{split}-{number}", path(6))
    said = PairsJob(load_recipe(recipe(), [f"data.sources={data}"]).recipe)
    names = {
        s.name for sources in (said.train, said.validation) for d, _ in sources for s in d.sequences
    }
    assert names == {"train-0", "train-1", "train-2"}
    assert "2 of folder/train" in said.notes[0]
    told = [f"data.sources=[{{root: {data}, split: test}}]", f"data.validation={data}"]
    other = PairsJob(load_recipe(recipe(), told).recipe)
    assert [s.name for s in other.train[0][0].sequences] == ["test-0", "test-1"]
    assert other.validation[0][0].split == "test"
    drawn = PairsJob(load_recipe("demo/tracking").recipe)
    assert {d.split for d, _ in (*drawn.train, *drawn.validation)} == {"train"}
    single = tmp_path / "otb" / "Dog"
    write_folder(single / "img", path(3))
    (single / "groundtruth_rect.txt").write_text("1,1,5,5\n" * 3)
    with pytest.raises(DataError, match="otb has no split to train on; it has test"):
        PairsJob(load_recipe(recipe(), [f"data.sources={tmp_path / 'otb'}"]).recipe)


def test_mistakes_in_a_recipe(recipe: Any, tmp_path: Path) -> None:
    file = recipe()
    mistakes = {
        "data.gab=3": r"there is no setting data.gab. Did you mean gap\?",
        "data.sources=[]": "data.sources",
        "data.sources.0.weight=0": "data.sources",
        "task.window=1": "task.window is 1",
        "task.label_smoothing=0.1": "there is no setting task.label_smoothing",
        "task={name: classification}": "the task classification needs data.train",
        "data={train: somewhere}": r"the task tracking needs data.sources \(folders of sequences\)",
    }
    for word, message in mistakes.items():
        with pytest.raises(RecipeError, match=message):
            load_recipe(file, [word])
    with pytest.raises(DataError, match="nowhere"):
        finetune(file, [f"data.sources={tmp_path}/nowhere"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    single = tmp_path / "single"
    write_folder(single, path(4))
    found = CliRunner().invoke(app, ["finetune", str(file), f"data.sources={single}"])
    assert found.exit_code == 2
    assert "none can be set aside" in found.output


@pytest.mark.parametrize("name", sorted(n for n in shipped() if n.startswith("tracking/")))
def test_recipes_that_ship_have_the_published_settings(name: str) -> None:
    recipe = load_recipe(name).recipe
    template, search = recipe.methods[0].settings["streams"]
    large = search == 378
    assert (template, recipe.task.geometry.search_area) == ((196, 5.0) if large else (112, 4.0))
    assert recipe.train.epochs * recipe.data.pairs == 170 * 131_072
    assert {s.kind for s in recipe.data.sources} == {"lasot", "trackingnet", "got10k", "coco"}
    assert recipe.train.batch_size == 128
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.drop_path == {"b": 0, "l": 0.1, "g": 0.4}[name.split("/")[1][0]]
