"""Adapters that share out a budget while they train are told of every step.

PEFT leaves that to the training loop: its tuners have an `update_and_allocate` to be called
between a step and the clearing of its gradients.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import nn
from transformers import TrainerCallback

from peft_vision.errors import JobFailed


@runtime_checkable
class Allocates(Protocol):
    """A tuner of PEFT's that moves a budget between layers."""

    def update_and_allocate(self, global_step: int) -> None:
        """Once a step, while its gradients are there."""


class Allocation(TrainerCallback):
    """Tells the tuner of a model how long the run is, and of each step."""

    def __init__(self, tuner: Allocates) -> None:
        self.tuner = tuner

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the length of the run.

        Raises:
            JobFailed: the run goes on from a checkpoint, which lacks what the budget goes by.
        """
        allocator = getattr(self.tuner, "rankallocator", None)
        if allocator is None:
            return
        if state.global_step:
            raise JobFailed(
                "This adapter shares out its ranks by averages over all steps, which checkpoints "
                "do not hold. Train it in one go: --restart, or another output folder."
            )
        allocator.set_total_step(state.max_steps)
        allocator.peft_config.total_step = state.max_steps

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Settle: what lost its ranks is zero and stays in place, so that shapes are the plan's."""
        allocator = getattr(self.tuner, "rankallocator", None)
        if allocator is not None and allocator.peft_config.rank_pattern:
            pattern = allocator.peft_config.rank_pattern
            allocator.mask_using_rank_pattern(getattr(self.tuner, "model"), pattern)  # noqa: B009
            allocator.peft_config.rank_pattern = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the budget; parts that lose theirs are set to zero."""
        self.tuner.update_and_allocate(state.global_step)


def allocation_of(model: nn.Module) -> Allocation | None:
    """The callback for a model whose adapter shares out a budget; None for all others."""
    tuner = getattr(model, "base_model", None)
    return Allocation(tuner) if isinstance(tuner, Allocates) else None
