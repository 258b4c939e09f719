"""Which sequence each pair of an epoch comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class PairOrder:
    """Sources by weight, and sequences within a source without replacement.

    Args:
        weights: of the sources, in relation to each other.
        lengths: how many sequences each has.
        count: pairs in an epoch.
        seed: decides, together with the epoch.
    """

    def __init__(
        self, weights: Sequence[float], lengths: Sequence[int], count: int, seed: int
    ) -> None:
        self.shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        self.lengths, self.count, self.seed = list(lengths), count, seed
        self._epoch: int | None = None
        self._sources: Numbers = np.empty(0, np.int64)
        self._sequences: Numbers = np.empty(0, np.int64)

    def place(self, epoch: int, index: int) -> tuple[int, int]:
        """The source of a pair, and the number of the sequence in it."""
        if epoch != self._epoch:
            self._draw(epoch)
        return int(self._sources[index]), int(self._sequences[index])

    def _draw(self, epoch: int) -> None:
        random = np.random.default_rng([abs(self.seed), epoch])
        self._sources = random.choice(len(self.shares), size=self.count, p=self.shares)
        self._sequences = np.empty(self.count, np.int64)
        for source, length in enumerate(self.lengths):
            mine = np.flatnonzero(self._sources == source)
            if len(mine):
                rounds = -(-len(mine) // length)
                order = np.concatenate([random.permutation(length) for _ in range(rounds)])
                self._sequences[mine] = order[: len(mine)]
        self._epoch = epoch
