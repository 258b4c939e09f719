"""`kill -9` at a random step, the same command again: the same weights, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft_vision.errors import DamagedArtifact
from peft_vision.finetuning import finetune
from peft_vision.training import checkpoints
from peft_vision.training.logs import truncate_log
from peft_vision.training.run_folder import differences

RECIPE = """
model:
  name: vit_tiny_patch16_224
  pretrained: false
  kwargs: {{img_size: 32, patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3, drop_rate: 0.2,
            drop_path_rate: 0.2}}
method: {{name: lora, r: 4, dropout: 0.1}}
data: {{train: {data}, augmentation: {{rand_augment: {{operations: 2}}}}}}
train: {{epochs: 8, batch_size: 8, micro_batch: 4, learning_rate: 1e-2, save_every: 2}}
"""
STEPS = 24


def start(recipe: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "peft_vision", "finetune", str(recipe), *more]
    return subprocess.Popen(
        [*command, "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=80)
    assert process.returncode == 0, said
    return said


def entries(output: Path) -> list[dict[str, float]]:
    lines = (output / "logs" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps_done(output: Path) -> int:
    log = output / "logs" / "log.jsonl"
    return log.read_text().count('"loss"') if log.exists() else 0


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(tmp_path, image_folder):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(data=image_folder(images=8)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finetune(recipe, output=whole)

    victim = start(recipe, killed)
    wanted = random.randrange(4, STEPS - 4)
    while steps_done(killed) < wanted and victim.poll() is None:
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=20)
    assert victim.returncode == -signal.SIGKILL, f"it ended before step {wanted} could be seen"
    assert not (killed / "peft_vision.json").exists()
    reached = steps_done(killed)
    assert wanted <= reached < STEPS
    half_written = killed / ".run" / "checkpoint-98"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"cut")

    said = finished(start(recipe, killed))

    assert "Resuming the unfinished run" in said
    ours, theirs = (load_file(out / "adapter_model.safetensors") for out in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), f"killed at {wanted}"
    assert any(tensor.abs().sum() > 0 for name, tensor in ours.items() if "lora_B" in name)
    assert entries(killed) == entries(whole)
    assert not (killed / ".run").exists()
    records = [json.loads((out / "peft_vision.json").read_text()) for out in (killed, whole)]
    assert records[0]["metrics"] == records[1]["metrics"]


class Tiny(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.frozen = nn.Linear(4, width).requires_grad_(False)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 2)


def sealed(folder: Path, model: nn.Module) -> Path:
    checkpoints.save_tensors(model, folder)
    checkpoints.seal(folder)
    return folder


def test_a_checkpoint_holds_what_training_changes_and_nothing_else(tmp_path):
    model, other = Tiny(), Tiny()
    sealed(tmp_path / "checkpoint-1", model)
    stored = load_file(tmp_path / "checkpoint-1" / checkpoints.WEIGHTS)
    assert set(stored) == {
        *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
        *("norm.num_batches_tracked", "head.weight", "head.bias"),
    }
    checkpoints.load_tensors(other, tmp_path / "checkpoint-1")
    assert torch.equal(other.head.weight, model.head.weight)
    assert not torch.equal(other.frozen.weight, model.frozen.weight)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    sealed(tmp_path / "checkpoint-1", Tiny())
    with pytest.raises(DamagedArtifact, match="of another model"):
        checkpoints.load_tensors(Tiny(width=5), tmp_path / "checkpoint-1")


def test_incomplete_and_truncated_checkpoints_are_never_resumed_from(tmp_path):
    model = Tiny()
    sealed(tmp_path / "checkpoint-2", model)
    sealed(tmp_path / "checkpoint-10", model)
    checkpoints.save_tensors(model, tmp_path / "checkpoint-12")
    assert checkpoints.latest(tmp_path).name == "checkpoint-10"
    weights = tmp_path / "checkpoint-10" / checkpoints.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    assert checkpoints.latest(tmp_path).name == "checkpoint-2"
    checkpoints.remove_incomplete(tmp_path)
    assert [path.name for path in checkpoints.all_of(tmp_path)] == ["checkpoint-2"]


def test_the_newest_checkpoints_stay(tmp_path):
    for step in (1, 2, 10):
        sealed(tmp_path / f"checkpoint-{step}", Tiny())
    checkpoints.rotate(tmp_path, keep=2)
    assert [path.name for path in checkpoints.all_of(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]
    log.write_text("".join(lines) + '{"step": 4, "lo')
    truncate_log(log, 2)
    assert log.read_text() == "".join(lines[:2])


def test_differences_name_the_keys():
    old = {"train": {"epochs": 2, "seed": 0}, "output": "a"}
    new = {"train": {"epochs": 3, "seed": 0}, "output": "a", "extra": None}
    assert differences(old, new) == ["train.epochs: 2, now 3"]
