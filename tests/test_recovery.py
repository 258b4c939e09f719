"""Recovery teaches what was lost, and does no harm where nothing was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peft_vision as pv
from peft_vision.cost import unwrap
from peft_vision.recovery import recover
from peft_vision.training.settings import TrainSettings

Tiny = Callable[..., nn.Module]


def settings(rate: float, epochs: int = 1) -> TrainSettings:
    return TrainSettings(
        epochs=epochs,
        batch_size=6,
        learning_rate=rate,
        loggers=[],
        progress=False,
        precision="fp32",
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in unwrap(model).state_dict().items()}


def same(model: Any, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in weights(model).items())


def test_training_that_harms_is_taken_back(
    tiny_timm: Tiny, image_folder: Callable[..., Path]
) -> None:
    dense = tiny_timm(num_classes=3)
    data = str(image_folder())
    model: Any = pv.compress(dense, target_flops=0.9, methods="magnitude").model
    recover(model, dense, data, settings=settings(1e-3, 8))  # by now it knows the colors
    taught, before = copy.deepcopy(model), weights(model)
    harmful = settings(3.0)
    figures = recover(model, dense, data, settings=harmful)
    assert figures["kept"] == 0.0
    assert same(model, before)
    assert model.history.metrics["loss"]["value"] == figures["loss"]
    worse = recover(taught, dense, data, settings=harmful, keep_better=False)
    assert "kept" not in worse
    assert worse["loss"] > figures["loss"]
    assert not same(taught, before)


def test_training_that_helps_is_kept(tiny_timm: Tiny, image_folder: Callable[..., Path]) -> None:
    dense = tiny_timm(num_classes=3)
    model: Any = pv.compress(dense, target_flops=0.6, methods="magnitude").model
    before = weights(model)
    figures = recover(model, dense, str(image_folder()), settings=settings(1e-3, 4))
    assert figures["kept"] == 1.0
    assert not same(model, before)
