"""What is left of a branch that was removed from a block: at most a constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Absent(nn.Module):
    """Stands where a block's attention or MLP was, so that the block can tell it is gone.

    What the class token is given by a branch has little in common with what patches are given, so
    that the first tokens have constants of their own.

    Attributes:
        offset: D values that are added to the stream instead (the branch's mean), or None. Behind
            LayerScale: it is added as it is. Zero until `fit`.
        first: P x D: what the first P tokens get instead of it; None where there are none.
    """

    def __init__(self, width: int | None = None, prefix: int = 0) -> None:
        super().__init__()
        self.offset = None if width is None else nn.Parameter(torch.zeros(width))
        own = width is not None and prefix > 0
        self.first = nn.Parameter(torch.zeros(prefix, width or 0)) if own else None

    def extra_repr(self) -> str:
        """What is left, for printing."""
        return "" if self.offset is None else f"offset of {self.offset.shape[0]}"

    def forward(self, x: Tensor) -> Tensor:
        """The stream (B N D) as it goes on."""
        added = self.added(x)
        return x if added is None else x + added

    def added(self, x: Tensor) -> Tensor | None:
        """What `forward` adds to the stream x, B N D; None where nothing is left."""
        if self.offset is None:
            return None
        rest = self.offset.to(x.dtype)
        if self.first is None:
            return rest.expand_as(x)
        first = self.first.to(x.dtype)[: x.shape[1]]
        others = rest.expand(x.shape[1] - first.shape[0], -1)
        return torch.cat([first, others]).expand_as(x)

    @torch.no_grad()
    def fit(self, added: Tensor) -> None:
        """Take the mean of what the branch added to the stream, B N D, for the offset.

        Where there is no room for an offset, nothing changes.
        """
        if self.offset is None:
            return
        own = 0 if self.first is None else self.first.shape[0]
        if self.first is not None:
            self.first[: added.shape[1]].copy_(added[:, :own].double().mean(0))
        if added.shape[1] > own:
            self.offset.copy_(added[:, own:].flatten(0, 1).double().mean(0))

    def drop(self) -> None:
        """Leave nothing, in place."""
        self.offset = self.first = None
