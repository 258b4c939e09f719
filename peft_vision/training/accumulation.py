"""One optimizer step in as many passes as memory asks for, agreed on by all processes.

A process that runs out of memory cannot leave a collective that the others have entered. So in the
first steps, and after every change, gradients stay at home until all processes have said that
theirs are there; from then on they travel while others are still computed. Where memory runs out
even so, or parameters are gathered while a pass goes on (FSDP2), the run stops and says from where
and with what it goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from peft_vision.errors import JobFailed
from peft_vision.layers.traits import Paced
from peft_vision.training.out_of_memory import Batch, Fitting, tried
from peft_vision.training.processes import average_gradients, smallest

if TYPE_CHECKING:
    from accelerate import Accelerator

CAREFUL = 3
"""Steps in a row that have to fit before gradients travel early."""


@dataclass(frozen=True)
class Accumulation:
    """How the passes of a step are made.

    Attributes:
        fitting: how many images at a time.
        sharded: parameters are cut over processes.
        one_pass: forward and backward of one piece, of how many there are; gives its share of the
            loss.
        again: forgets what a failed attempt left behind, other than gradients and counts.
    """

    fitting: Fitting
    accelerator: Accelerator
    sharded: bool
    one_pass: Callable[[nn.Module, Batch, int], Tensor]
    again: Callable[[], None]

    def step(self, model: nn.Module, batches: Sequence[Batch]) -> Tensor:
        """Gradients of all batches together in the parameters; gives the loss.

        Raises:
            JobFailed: one image at a time does not fit, or it is too late to agree on less.
        """
        counts = _counts(model)
        shared = self.accelerator.num_processes > 1
        while True:
            cut = self.fitting.cut(batches)
            careful = shared and not self.sharded and self.fitting.calm < CAREFUL
            loss, reason = tried(lambda: self._passes(model, cut, careful))  # noqa: B023
            if careful:
                reason = self._told(reason)
            if loss is not None and not reason:
                if careful:
                    average_gradients(model)
                self.fitting.calm += 1
                return loss
            model.zero_grad()
            for buffer, old in counts:
                buffer.copy_(old)
            self.fitting.shrink(reason)
            if shared and not careful:
                raise JobFailed(self.fitting.too_late(reason))
            self.again()

    def _passes(self, model: nn.Module, cut: Sequence[Batch], careful: bool) -> Tensor:
        losses = []
        for number, piece in enumerate(cut, 1):
            apart = careful or number < len(cut)
            with self.accelerator.no_sync(model) if apart else contextlib.nullcontext():
                losses.append(self.one_pass(model, piece, len(cut)))
        return torch.stack(losses).sum()

    def _told(self, reason: str) -> str:
        """Why memory did not suffice, here or on another process; empty when it did everywhere."""
        (fitted,) = smallest([0 if reason else 1], self.accelerator.device)
        return reason or ("" if fitted else "another process ran out of memory.")


def _counts(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What a forward pass of training changes, with copies: running figures and counters."""
    return [
        (buffer, buffer.clone())
        for module in model.modules()
        if isinstance(module, (_NormBase, Paced)) and module.training
        for buffer in module.buffers(recurse=False)
    ]
