"""How many processes there are and what they compute on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


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
