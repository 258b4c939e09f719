"""How many processes there are, what they compute on, and what they tell each other."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from torch import nn


def on_accelerator(device: str) -> bool:
    """Whether to train on a GPU or its like: where there is one, unless "cpu" is asked for."""
    import torch

    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return device == "auto" and not forced and torch.accelerator.is_available()


def joined(device: str) -> PartialState:
    """Join the other processes of an `accelerate launch` or `torchrun`, or be alone.

    accelerate connects processes without a GPU only when it is told that they have none.
    """
    from accelerate import PartialState

    return PartialState() if on_accelerator(device) else PartialState(cpu=True)


def smallest(numbers: list[int], device: torch.device) -> list[int]:
    """The smallest of each number over all processes; every process has to call it."""
    import torch
    from torch import distributed

    told = torch.tensor(numbers, device=device)
    distributed.all_reduce(told, op=distributed.ReduceOp.MIN)
    found: list[int] = told.tolist()
    return found


def average_gradients(model: nn.Module) -> None:
    """Make the gradients of all processes their mean, as DistributedDataParallel does."""
    import torch
    from torch import distributed

    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.div_(distributed.get_world_size())
        distributed.all_reduce(parameter.grad)
