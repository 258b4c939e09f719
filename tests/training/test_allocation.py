"""An adapter that shares out its ranks is told of every step, and ends with the ranks asked for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_vision as pv
from peft_vision.data.image_set import TensorSet
from peft_vision.errors import JobFailed
from peft_vision.tasks.classification import Classification
from peft_vision.training.allocation import allocation_of
from peft_vision.training.fit import fit
from peft_vision.training.settings import TrainSettings
from tests.families import images, timm_vit

SETTINGS = TrainSettings(
    epochs=4, batch_size=8, learning_rate=1e-2, loggers=[], device="cpu", progress=False
)


def samples() -> TensorSet:
    labels = torch.arange(16) % 3
    return TensorSet(torch.randn(16, 3, 32, 32) + labels[:, None, None, None], labels)


def adapted(name: str = "adalora", **settings: Any) -> Any:
    torch.manual_seed(0)
    return pv.wrap(timm_vit(depth=2), name, **settings)


def test_ranks_are_shared_out_and_the_folder_comes_back(tmp_path: Path) -> None:
    dense = timm_vit(depth=2)
    model = pv.wrap(copy.deepcopy(dense), "adalora", init_r=6, target_r=2)
    layers = [m for m in model.modules() if hasattr(m, "lora_E") and "default" in m.lora_E]
    fit(model, Classification(), samples(), None, SETTINGS)
    left = [int((layer.lora_E["default"] != 0).sum()) for layer in layers]
    assert sum(left) == 2 * len(layers)
    assert len(set(left)) > 1, "not the same for all"
    x = images(dense)
    model.save_pretrained(tmp_path / "out")
    torch.manual_seed(1)
    assert torch.equal(pv.load(tmp_path / "out", base=dense)(x), model(x))


def test_a_run_does_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    once = SETTINGS.model_copy(update={"max_steps": 2, "save_every": 2})
    fit(adapted(), Classification(), samples(), None, once, run_dir=tmp_path)
    with pytest.raises(JobFailed, match="Train it in one go"):
        fit(adapted(), Classification(), samples(), None, SETTINGS, run_dir=tmp_path)


def test_other_adapters_need_no_telling() -> None:
    assert allocation_of(adapted("vera")) is None
    assert allocation_of(adapted("adalora")) is not None
    assert allocation_of(torch.nn.Linear(2, 2)) is None
