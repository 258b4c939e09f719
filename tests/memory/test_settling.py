"""`memory` in a recipe, from `finetune`: chosen once, said, kept, refused where it cannot be."""

from __future__ import annotations

import json

import pytest
import torch

from peft_vision.errors import BadSetting
from peft_vision.finetuning import finetune
from peft_vision.memory import settling
from peft_vision.memory.estimate import estimate_memory, rehearsal_of
from peft_vision.recipe import load_recipe

RECIPE = """
model:
  name: vit_tiny_patch16_224
  pretrained: false
  kwargs: {{img_size: 32, patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}}
method: {{name: lora, r: 4}}
data: {{train: {data}}}
memory: {memory}
train: {{max_steps: 2, batch_size: 16, learning_rate: 3e-3, loggers: [], device: cpu}}
output: {output}
"""


class Stop(Exception):
    """As if the process had been killed."""


@pytest.fixture
def recipe(tmp_path, image_folder):
    """A recipe whose memory is a little less than it takes."""
    content = {"data": image_folder(), "output": tmp_path / "out", "memory": "24GB"}
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(**content))
    peak = estimate_memory(load_recipe(file, ["train.precision=fp32"])).peak
    file.write_text(RECIPE.format(**{**content, "memory": f"{(peak - 50_000) / 1e6}MB"}))
    return file


def test_it_is_chosen_once_and_kept_with_the_run(recipe, tmp_path, monkeypatch):
    from peft_vision.training.trainer import VisionTrainer

    save, said = VisionTrainer._save_checkpoint, []

    def save_and_die(self, *args):
        save(self, *args)
        raise Stop

    monkeypatch.setattr(VisionTrainer, "_save_checkpoint", save_and_die)
    with pytest.raises(Stop):
        finetune(recipe, ["train.save_every=1"], say=said.append)
    monkeypatch.undo()
    lines = [line for line in said if line.startswith("memory ")]
    assert len(lines) == 1
    assert "chosen: train.gradient_checkpointing=" in lines[0]
    chosen = json.loads((tmp_path / "out" / ".run" / settling.RECORD).read_text())
    monkeypatch.setattr(settling, "fit_to", None)  # is not asked again
    done = finetune(recipe, ["train.save_every=1"], say=said.append)
    assert done.resumed == 1
    train = load_recipe(done.output / "recipe.yaml").recipe.train
    assert {"gradient_checkpointing": train.gradient_checkpointing} == chosen


def test_what_cannot_fit_is_refused_before_the_data_are_opened(recipe, tmp_path):
    few = ["train.gradient_checkpointing=false", "train.micro_batch=16", "train.norms=full"]
    words = ["memory=760MB", "data.train=/nowhere/at/all", *few]
    with pytest.raises(BadSetting, match="these changes come to"):
        finetune(recipe, words)
    assert not (tmp_path / "out").exists()


def test_without_memory_nothing_is_rehearsed_on_a_cpu(recipe, monkeypatch):
    plain = load_recipe(recipe, ["memory=null"]).recipe
    assert not settling.is_asked(plain)
    assert settling.is_asked(plain.model_copy(update={"memory": "24GB"}))
    on_gpu = plain.model_copy(update={"train": plain.train.model_copy(update={"device": "auto"})})
    monkeypatch.setattr(settling, "_on_cuda", lambda recipe: recipe.train.device == "auto")
    assert settling.is_asked(on_gpu)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert settling.is_asked(on_gpu)
    assert not settling.is_asked(on_gpu, processes=2)


def test_a_gpu_that_is_too_small_refuses_unless_forced(recipe, monkeypatch):
    plain = load_recipe(recipe, ["memory=null"]).recipe
    rehearsal = rehearsal_of(plain, 3)

    class Card:
        total_memory = 700_000_000

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Small Card")
    with pytest.raises(BadSetting, match=r"(?s)Small Card is 0\.65 GiB.*--force"):
        settling.settle(plain, rehearsal, force=False, say=print)
    assert settling.settle(plain, rehearsal, force=True, say=print) == {}


def test_methods_that_need_numbers_are_rehearsed_when_the_model_is_there(recipe, tmp_path):
    said: list[str] = []
    words = ["memory=24GB", "methods=[magnitude]", "train.max_steps=1"]
    assert finetune(recipe, words, say=said.append).metrics["steps"] == 1
    assert any("nothing has to be changed" in line for line in said)
