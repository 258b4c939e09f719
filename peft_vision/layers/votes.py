"""The residual stream as a sum of paths, each of which votes in the result (Chang et al., 2023)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Half = Literal["attention", "mlp"]


class Votes(nn.Module):
    """A second sum of what the branches add, each scaled: what the head reads in the end.

    The stream itself stays as it is; a scale of one everywhere gives the stream back.

    Attributes:
        scales: (2 x depth + 1) x D: of what enters the blocks, then attention and MLP of each.
        rows: how many first tokens vote; None when all do.
    """

    def __init__(self, depth: int, width: int, rows: int | None) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.ones(2 * depth + 1, width))
        self.rows = rows

    def begin(self, x: Tensor) -> Tensor:
        """The sum's first addend, from the stream that enters the blocks (B N D)."""
        return self._part(x) * self.scales[0].to(x.dtype)

    def add(self, total: Tensor, index: int, half: Half, branch: Tensor) -> Tensor:
        """The sum with what a branch of block `index` added to the stream (B N D)."""
        row = 1 + 2 * index + (half == "mlp")
        return total + self._part(branch) * self.scales[row].to(branch.dtype)

    def _part(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[:, : self.rows]
