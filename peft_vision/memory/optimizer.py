"""What an optimizer holds, and what its step takes, on fake tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_vision.memory.tracker import OPTIMIZER, PeakTracker
from peft_vision.training.optimizers import is_from_peft, peft_optimizer
from peft_vision.training.settings import TrainSettings

SMALL = 4096
"""Tensors of fewer elements keep 32-bit states in bitsandbytes' 8-bit optimizers."""

PAGED = 100_000
"""Tensors of at least so many elements have their states paged out when the GPU is full."""

BLOCK8 = 256
"""Elements of an 8-bit state that share a scale."""

UNVERIFIED_OPTIMIZERS = {
    "adamw_8bit": ("8-bit states are computed from bitsandbytes' rules, not run",),
    "paged_adamw_8bit": ("pages of the optimizer state are taken to leave the GPU in time",),
    "adafactor": ("the states of adafactor are computed, not run",),
}

Step = Callable[[], None]


def step_of(model: nn.Module, settings: TrainSettings, tracker: PeakTracker) -> Step:
    """Have the optimizer's state made, and give the step that uses it; gradients are left as None.

    Raises:
        BadSetting: the optimizer does not take the model's parameters.
    """
    if is_from_peft(settings.optimizer):
        return _by_running(peft_optimizer(model, settings), settings, tracker)
    trained = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "sgd":
        return _by_running(torch.optim.SGD(trained, settings.learning_rate), settings, tracker)
    if settings.optimizer == "adamw":
        # Fused, as the Trainer has it on a GPU.
        adamw = torch.optim.AdamW(trained, settings.learning_rate, fused=True)
        return _by_running(adamw, settings, tracker)
    states = [state for p in trained for state in STATES[settings.optimizer](p)]
    tracker.hold(OPTIMIZER, states)

    def step() -> None:
        _clip(trained, settings)
        states.clear()

    return step


def _by_running(optimizer: Optimizer, settings: TrainSettings, tracker: PeakTracker) -> Step:
    """States by a first step on gradients that are dropped again."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        if not group.get("fused") and "foreach" in group:
            group["foreach"] = True  # the default for tensors on a GPU
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    with tracker.phase(OPTIMIZER):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        _clip(trained, settings)
        optimizer.step()

    return step


def _clip(trained: list[nn.Parameter], settings: TrainSettings) -> None:
    if settings.clip_gradient:
        nn.utils.clip_grad_norm_(trained, settings.clip_gradient)


def _eight_bit(parameter: Tensor) -> list[Tensor]:
    """Two states of one byte an element and their scales."""
    if parameter.numel() < SMALL:
        return [torch.empty(parameter.shape) for _ in range(2)]
    scales = math.ceil(parameter.numel() / BLOCK8)
    kinds = [(parameter.shape, torch.uint8), ((scales,), torch.float32)]
    return [torch.empty(shape, dtype=dtype) for shape, dtype in kinds for _ in range(2)]


def _paged(parameter: Tensor) -> list[Tensor]:
    states = _eight_bit(parameter)
    return states[2:] if parameter.numel() >= PAGED else states


def _factored(parameter: Tensor) -> list[Tensor]:
    """Row and column statistics of matrices, one figure an element for all else."""
    if parameter.ndim < 2:
        return [torch.empty(parameter.shape)]
    *rows, last = parameter.shape
    return [torch.empty(rows), torch.empty(*rows[:-1], last)]


STATES: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "adamw_8bit": _eight_bit,
    "paged_adamw_8bit": _paged,
    "adafactor": _factored,
}
