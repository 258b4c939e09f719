"""Where a patch stands, and of which kind it is, told apart (LoRAT; Lin et al., ECCV 2024).

One frozen table of positions is shared by several image streams; a trainable row is added to every
token of a kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]


def resized(rows: Tensor, grid: Grid, to: Grid) -> Tensor:
    """A table of positions for another grid: bicubic, in float32 or wider, not antialiased.

    Args:
        rows: one row per patch, from the top left: N D with N = height x width of `grid`.
    """
    if grid == to:
        return rows
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    maps = wide.t().reshape(1, -1, *grid)
    maps = F.interpolate(maps, size=to, mode="bicubic", align_corners=False)
    return maps.flatten(2).squeeze(0).t().contiguous().to(rows.dtype)


def top_left(rows: Tensor, grid: Grid, to: Grid) -> Tensor:
    """The rows of the top left part of a table: N D of `grid` become M D of the smaller `to`."""
    return rows.reshape(*grid, -1)[: to[0], : to[1]].flatten(0, 1)


def joined(tables: Sequence[Any]) -> Any:
    """Rotary tables of several grids one after the other: tensors ... N D, or tuples of them."""
    if isinstance(tables[0], tuple):
        return tuple(joined(parts) for parts in zip(*tables, strict=True))
    return torch.cat(list(tables), dim=-2)


class TypeRows(nn.Module):
    """Adds to every patch a trainable row that says of which kind it is.

    Takes the place of a module whose output holds the patches, and calls it. For one image, the
    ordinary way through a model, the last row is added: that of the last kind of the last stream.

    Attributes:
        inner: the module whose place it has taken.
        type_embed: one row per kind of token, all streams after one another: K D.
        grids: rows and columns of the patches of each stream; the last one has the whole table.
        kinds: how many kinds of tokens each stream has.
        prefix: how many tokens come before the patches in what `inner` gives.
        channels_first: `inner` gives a map B D H W instead of a sequence ... N D.
    """

    def __init__(
        self,
        inner: nn.Module,
        width: int,
        grids: Sequence[Grid],
        kinds: Sequence[int],
        *,
        prefix: int = 0,
        channels_first: bool = False,
        **like: Any,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.type_embed = nn.Parameter(torch.zeros(sum(kinds), width, **like))
        self.grids = tuple(grids)
        self.kinds = tuple(kinds)
        self.prefix = prefix
        self.channels_first = channels_first

    @property
    def weight(self) -> Tensor:
        """What stands for the weight of `inner`, for models that read it instead of calling.

        A table of positions is read in order to resize it on the fly; a convolution's weight, for
        its dtype.
        """
        weight: Tensor = self.inner.weight  # type: ignore[assignment]
        return weight if self.channels_first else self._add(weight)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"grids={list(self.grids)}, kinds={list(self.kinds)}"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What `inner` gives, with the last row added to the patches."""
        return self._add(self.inner(*args, **kwargs))

    def _add(self, x: Tensor) -> Tensor:
        row = self.type_embed[-1].to(x.dtype)
        if self.channels_first:
            return x + row[:, None, None]
        rows = row.expand(x.shape[-2] - self.prefix, -1)
        return x + F.pad(rows, (0, 0, self.prefix, 0))

    def fit(self, stream: int, rows: Tensor) -> None:
        """Keep a frozen table of its own for one stream, in place of a part of the shared one."""
        self.register_buffer(f"table_{stream}", rows.detach().clone())

    def spatial(self, stream: int, table: Tensor) -> Tensor:
        """Positions of one stream's patches: N D, from the shared table of the last grid."""
        own = self._buffers.get(f"table_{stream}")
        return top_left(table, self.grids[-1], self.grids[stream]) if own is None else own

    def rows(self, stream: int, kinds: Tensor | None) -> Tensor:
        """The rows of one stream's tokens.

        Args:
            kinds: which kind each patch is of within the stream, whole numbers B H W; None: the
                first kind.

        Returns:
            1 1 D, or B N D where kinds are given.
        """
        first = sum(self.kinds[:stream])
        own = self.type_embed[first : first + self.kinds[stream]]
        return own[None, :1] if kinds is None else F.embedding(kinds.flatten(1).long(), own)


def without_rows(module: nn.Module) -> nn.Module:
    """The module whose place type rows have taken; any other one as it is."""
    return module.inner if isinstance(module, TypeRows) else module
