"""Fewer tokens behind a block: what a reducer is given, and what it says became of each token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_vision.layers.attention import Attended


class Reduction(NamedTuple):
    """A stream with fewer tokens, and what became of those that were there.

    Attributes:
        x: B N' C, with the first `prefix` tokens as they were.
        places: B K: for each patch token that goes on, which of the arriving ones it is; one that
            stands for several is listed with the one whose position it takes.
        carriers: B P: for each arriving patch token, which of the K carries it on; -1 for none. Its
            own state is put back in the end where a model reads every patch.
        sizes: B K: how many patches each stands for; None where tokens are dropped only.
    """

    x: Tensor
    places: Tensor
    carriers: Tensor
    sizes: Tensor | None = None


class Reducer(nn.Module, ABC):
    """Decides which tokens go on after the attention of one block.

    Attributes:
        proportional: later attention counts a token that stands for several patches that often.
        drops: some tokens are carried on by none.
    """

    proportional = False
    drops = True

    @abstractmethod
    def forward(
        self, x: Tensor, attended: Attended, prefix: int, sizes: Tensor | None
    ) -> Reduction | None:
        """Drop or merge tokens.

        Args:
            x: the stream, B N C; the first `prefix` tokens are never dropped.
            attended: queries, keys and values of this block.
            sizes: B (N - prefix): how many patches each stands for; None when one each.

        Returns:
            The shorter stream, or None when nothing is to be saved.
        """

    @property
    @abstractmethod
    def fused(self) -> int:
        """How many of the last tokens stand for several patches, for drawings."""


class InTurn(Reducer):
    """Two reducers in one block: the second sees the tokens that the first lets go on."""

    def __init__(self, first: Reducer, second: Reducer) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.proportional = first.proportional or second.proportional
        self.drops = first.drops or second.drops

    @property
    def fused(self) -> int:
        """Those of the second."""
        return self.second.fused

    def forward(
        self, x: Tensor, attended: Attended, prefix: int, sizes: Tensor | None
    ) -> Reduction | None:
        """See `Reducer.forward`.

        The second sees a token that stands for several with the queries, keys and values of the
        one whose place it takes.
        """
        first: Reduction | None = self.first(x, attended, prefix, sizes)
        if first is None:
            second: Reduction | None = self.second(x, attended, prefix, sizes)
            return second
        left = _left(attended, first.places, prefix)
        second = self.second(first.x, left, prefix, first.sizes)
        if second is None:
            return first
        on = second.carriers.gather(1, first.carriers.clamp_min(0))
        return Reduction(
            second.x,
            first.places.gather(1, second.places),
            torch.where(first.carriers < 0, first.carriers, on),
            second.sizes,
        )


def with_reducer(present: nn.Module | None, reducer: Reducer) -> Reducer:
    """What stands in a block's place for a reducer when `reducer` joins what is there."""
    return InTurn(present, reducer) if isinstance(present, Reducer) else reducer


def take(x: Tensor, places: Tensor) -> Tensor:
    """Tokens of B N C at `places` (B K): B K C.

    Whole rows are copied from the flat list of tokens, which is several times as fast on a CPU as
    to gather each number by its own index.
    """
    batch, count = places.shape
    first = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    rows = x.flatten(0, 1).index_select(0, (places + first).flatten())
    return rows.view(batch, count, x.shape[-1])


def behind(places: Tensor, prefix: int) -> Tensor:
    """Places of patches (B K) as places in the sequence, with the first `prefix` before them."""
    first = torch.arange(prefix, device=places.device).expand(places.shape[0], -1)
    return torch.cat([first, places + prefix], dim=1)


def _left(attended: Attended, places: Tensor, prefix: int) -> Attended:
    """Queries, keys and values (B H N D) of the first tokens and of the patches at `places`."""
    stay = behind(places, prefix)
    index = stay[:, None, :, None]
    q, k, v = (
        t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[-1]))
        for t in (attended.q, attended.k, attended.v)
    )
    return Attended(take(attended.branch, stay), q, k, v)
