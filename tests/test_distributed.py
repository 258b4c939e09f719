"""Two processes learn what one does when the global batch is the same, also cut and killed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
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
CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"
PROBE = """
import os
import signal

import torch

from peft_vision.cli import main
from peft_vision.training import sharding
from peft_vision.training.trainer import VisionTrainer

put_together, one_pass = sharding.put_together, VisionTrainer._one_pass


def told(model):
    sharding.close(model)
    cut = [type(p.data).__name__ for p in model.parameters()]
    print(f"{len(list(sharding._shards(model)))} units of {set(cut)}", flush=True)
    put_together(model)


def limited(self, model, piece, count):
    step, second = self.state.global_step, self.args.process_index == 1
    if second and step == int(os.environ.get("KILLED_AT", "1000")):
        os.kill(os.getpid(), signal.SIGKILL)
    late = step >= int(os.environ.get("FULL_FROM", "1000"))
    if second and late and len(piece["labels"]) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    return one_pass(self, model, piece, count)


sharding.put_together, VisionTrainer._one_pass = told, limited
main()
"""


def start(config: str, *command: str, **environment: str) -> subprocess.Popen[str]:
    """Have accelerate start processes, in a group of their own."""
    launch = ("accelerate.commands.launch", "--config_file", str(CONFIGS / config))
    return subprocess.Popen(
        [sys.executable, "-m", *launch, "--main_process_port", free_port(), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def ended(process: subprocess.Popen[str], *, well: bool = True) -> str:
    """What processes said; none is left behind."""
    try:
        said, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        launcher = psutil.Process(process.pid)
        for one in (*launcher.children(recursive=True), launcher):
            one.kill()
        process.communicate()
        raise
    assert (process.returncode == 0) is well, said
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
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    command = (str(probe), "finetune", str(recipe), "--output", str(both))
    # One of them runs out of memory in the second step: both halve their passes.
    said = ended(start("ddp-2cpu.yaml", *command, FULL_FROM="1"))
    assert "2 processes (gloo)" in said
    assert said.count("Out of memory with 4 images at a time, after step 1.") == 1
    notes = (both / "logs" / "log.jsonl").read_text().count('{"step": 1, "micro_batch": 2}')
    assert notes == 1
    finetune(recipe, output=alone)
    learned_the_same(alone, both)
    metrics = [
        json.loads((out / "peft_vision.json").read_text())["metrics"] for out in (both, alone)
    ]
    assert metrics[0]["top1"] == metrics[1]["top1"]


@pytest.mark.slow
def test_sharded_processes_learn_the_same_when_one_is_killed(tmp_path, image_folder):
    recipe, probe = tmp_path / "recipe.yaml", tmp_path / "probe.py"
    recipe.write_text(RECIPE.format(data=image_folder(images=7)))
    probe.write_text(PROBE)
    alone, both = tmp_path / "alone", tmp_path / "both"
    command = ("fsdp2-2cpu.yaml", str(probe), "finetune", str(recipe), "--output", str(both))

    said = ended(start(*command, KILLED_AT="4"), well=False)
    assert "Signal 9 (SIGKILL) received" in said
    assert not (both / "peft_vision.json").exists()

    said = ended(start(*command))
    assert "Resuming the unfinished run" in said
    assert "from step 3" in said
    assert said.count("3 units of {'DTensor'}") == 2, said
    finetune(recipe, output=alone)
    learned_the_same(alone, both)


def learned_the_same(alone: Path, both: Path) -> None:
    one, two = losses(alone), losses(both)
    assert list(one) == list(two) == list(range(1, 13))
    assert one[12] < one[1]
    assert [two[step] for step in two] == pytest.approx([one[step] for step in one], rel=1e-3)
    ours, theirs = (load_file(out / "adapter_model.safetensors") for out in (both, alone))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-3) for name in theirs)


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
