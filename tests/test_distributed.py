"""Two processes learn what one does when the global batch is the same."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_vision.errors import BadSetting
from peft_vision.finetuning import finetune
from peft_vision.training.batches import GlobalBatches
from peft_vision.training.settings import TrainSettings, share_of

RECIPE = """
model:
  name: vit_tiny_patch16_224
  pretrained: false
  kwargs: {{img_size: 32, patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}}
method: {{name: lora, r: 4}}
data: {{train: {data}}}
train: {{epochs: 4, batch_size: 8, learning_rate: 5e-3, save_every: 3, loggers: [], device: cpu}}
"""
CONFIG = Path(__file__).parents[1] / "recipes" / "accelerate" / "ddp-2cpu.yaml"


def run(*command: str) -> str:
    """Run a command in its own group, and leave no process behind."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        said, _ = process.communicate(timeout=85)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, said
    return said


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def losses(output: Path) -> dict[int, float]:
    lines = map(json.loads, (output / "logs" / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path, image_folder):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(data=image_folder(images=7)))
    alone, both = tmp_path / "alone", tmp_path / "both"
    launch = ("accelerate.commands.launch", "--config_file", str(CONFIG))
    command = ("-m", "peft_vision", "finetune", str(recipe), "--output", str(both))
    said = run(*launch, "--main_process_port", free_port(), *command)
    assert "2 processes (gloo)" in said
    finetune(recipe, output=alone)

    one, two = losses(alone), losses(both)
    assert list(one) == list(two) == list(range(1, 13))
    assert one[12] < one[1]
    assert [two[step] for step in two] == pytest.approx([one[step] for step in one], rel=1e-3)
    ours, theirs = (load_file(out / "adapter_model.safetensors") for out in (both, alone))
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-3) for name in theirs)
    metrics = [
        json.loads((out / "peft_vision.json").read_text())["metrics"] for out in (both, alone)
    ]
    assert metrics[0]["top1"] == metrics[1]["top1"]


@pytest.mark.parametrize(("processes", "passes"), [(1, 1), (2, 1), (2, 2), (4, 3)])
def test_the_cut_of_a_global_batch_changes_no_global_batch(processes, passes):
    size, batch = 50, 24
    micro = batch // (processes * passes)
    whole = GlobalBatches(size, batch, 1, seed=3)
    parts = [GlobalBatches(size, micro, passes, r, processes, seed=3) for r in range(processes)]
    for epoch in (0, 1):
        for batches in (whole, *parts):
            batches.set_epoch(epoch)
        pieces = [list(part) for part in parts]
        for step, together in enumerate(whole):
            mine = [
                index
                for piece in pieces
                for one in piece[step * passes : (step + 1) * passes]
                for index in one
            ]
            assert mine == together


def test_an_epoch_sees_every_sample_and_epochs_differ():
    batches = GlobalBatches(10, 4, 1)
    first = [index for batch in batches for index in batch]
    assert len(first) == 12
    assert set(first) == set(range(10))
    batches.set_epoch(1)
    assert first != [index for batch in batches for index in batch]


def test_a_batch_larger_than_the_data_is_filled():
    assert [len(batch) for batch in GlobalBatches(3, 8, 1)] == [8]


def test_a_global_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(BadSetting, match=r"over 3 processes. A multiple of 3 works, such as 9"):
        share_of(TrainSettings(batch_size=8), 3)
    with pytest.raises(BadSetting, match="These do: 1, 2, 4"):
        share_of(TrainSettings(batch_size=8, micro_batch=3), 2)
    assert share_of(TrainSettings(batch_size=8, micro_batch=2), 2) == (2, 2)
