"""Single blocks whose activations are computed again in the backward pass (Chen et al., 2016).

Libraries switch this on for all of their blocks at once. Here some of them keep the stream that
came in and nothing else; random numbers drawn inside are the same the second time. It is the
block's `forward` that runs again and not its call, so that hooks on the block run once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

FORWARD = "forward"


class RecomputedForward:
    """What stands for the forward of a block while it is recomputed."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own, whose class has it."""
        block = self.block
        if not block.training or not torch.is_grad_enabled():
            return type(block).forward(block, *args, **kwargs)
        again = {"use_reentrant": False, **kwargs}
        return checkpoint(type(block).forward, block, *args, **again)


def recompute(block: nn.Module, on: bool) -> None:
    """Keep what goes into `block` only, or all that it needs, as usual."""
    mine = isinstance(vars(block).get(FORWARD), RecomputedForward)
    if on and not mine:
        setattr(block, FORWARD, RecomputedForward(block))
    elif mine and not on:
        delattr(block, FORWARD)
