"""Learned tokens that accompany an image's own (Jia et al., "Visual Prompt Tuning", 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Prompts(nn.Module):
    """Tokens put behind the first ones of a sequence, the same for every image: P D.

    Attributes:
        count: how many, P.
    """

    def __init__(self, count: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, width))
        self.dropout = nn.Dropout(dropout)

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return int(self.tokens.shape[0])

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.count}, {self.tokens.shape[1]}"

    def forward(self, x: Tensor, prefix: int, present: int) -> Tensor:
        """The sequence with these tokens behind its first `prefix` ones.

        Args:
            x: the stream, B N D.
            present: how many other prompts stand there now; they go.
        """
        own = self.dropout(self.tokens).to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :prefix], own, x[:, prefix + present :]], dim=1)

    def draw(self, bound: float) -> None:
        """First values: uniform in [-bound, bound]."""
        nn.init.uniform_(self.tokens, -bound, bound)


def without(x: Tensor, prefix: int, present: int) -> Tensor:
    """The sequence (B N D) without the prompts behind its first `prefix` tokens."""
    return torch.cat([x[:, :prefix], x[:, prefix + present :]], dim=1) if present else x
