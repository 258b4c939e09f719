"""What is left of a branch that was removed from a block: at most a constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Absent(nn.Module):
    """Stands where a block's attention or MLP was, so that the block can tell it is gone.

    Attributes:
        offset: D values that are added to the stream instead (the branch's mean), or None. Behind
            LayerScale: it is added as it is.
    """

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.offset = None if width is None else nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """The stream (B N D) as it goes on."""
        return x if self.offset is None else x + self.offset.to(x.dtype)
