"""PEFT's optimizers for low-rank updates: as asked for, and refused where there are none."""

from __future__ import annotations

from typing import Any

import peft.optimizers
import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision.data.image_set import TensorSet
from peft_vision.errors import BadSetting
from peft_vision.tasks.classification import Classification
from peft_vision.training.fit import fit
from peft_vision.training.optimizers import is_from_peft, peft_optimizer
from peft_vision.training.settings import TrainSettings
from tests.families import timm_vit

QUIET: dict[str, Any] = {"loggers": [], "device": "cpu", "progress": False, "batch_size": 8}


def adapted(method: str = "lora", **settings: Any) -> Any:
    torch.manual_seed(0)
    return pv.wrap(timm_vit(depth=1), method, **{"r": 4, **settings})


def samples() -> TensorSet:
    labels = torch.arange(24) % 3
    pixels = 0.3 * torch.randn(24, 3, 32, 32)
    pixels[torch.arange(24), labels] += 1
    return TensorSet(pixels, labels)


def test_all_of_them_are_offered() -> None:
    made = {n.split("_")[1] for n in peft.optimizers.__all__ if n.startswith("create_")}
    assert all(is_from_peft(name) for name in made)
    assert made <= set(TrainSettings.model_fields["optimizer"].annotation.__args__)


@pytest.mark.parametrize("name", ["loraplus", "lorafa", "riemannian"])
def test_a_run_learns_and_checkpoints(name: str, tmp_path: Any) -> None:
    model = adapted()
    settings = TrainSettings(epochs=6, optimizer=name, learning_rate=1e-2, **QUIET)
    figures = fit(model, Classification(), samples(), samples(), settings, run_dir=tmp_path)
    assert figures["top1"] > 0.6
    again = fit(adapted(), Classification(), samples(), samples(), settings, run_dir=tmp_path)
    assert again["top1"] == figures["top1"], "a finished run is loaded, not trained again"


def test_the_second_matrix_learns_faster_by_the_ratio_asked_for() -> None:
    model = adapted()
    settings = TrainSettings(optimizer="loraplus", learning_rate=1e-3, learning_rate_ratio=8.0)
    optimizer = peft_optimizer(model, settings)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if "lora_A" in name or ("head.weight" in name and parameter.requires_grad):
            assert rates[id(parameter)] == pytest.approx(1e-3)
        elif "lora_B" in name:
            assert rates[id(parameter)] == pytest.approx(8e-3)


def test_the_first_matrix_is_frozen() -> None:
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    settings = TrainSettings(epochs=1, optimizer="lorafa", learning_rate=1e-2, **QUIET)
    fit(model, Classification(), samples(), None, settings)
    moved = {
        n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])
    }
    assert moved == {name for name in before if "lora_B" in name}


@pytest.mark.parametrize("name", ["loraplus", "lorafa", "riemannian"])
def test_models_without_low_rank_updates_are_refused(name: str) -> None:
    settings = TrainSettings(optimizer=name, **QUIET)
    for model, has in ((nn.Linear(2, 2), "no adapter"), (adapted("vera"), "VERA")):
        with pytest.raises(BadSetting, match=has):
            fit(model, Classification(), samples(), None, settings)


def test_pairs_only() -> None:
    settings = TrainSettings(optimizer="lorafa", **QUIET)
    with pytest.raises(BadSetting, match="two trained matrices"):
        peft_optimizer(adapted("dora"), settings)
