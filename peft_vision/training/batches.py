"""Which images make which batch: a function of (seed, epoch) alone, cut into shares afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class GlobalBatches(Sampler[list[int]]):
    """Batches of indices for one process.

    The order of an epoch and its cut into global batches do not depend on how many processes there
    are or how far each accumulates: a global batch is dealt out in consecutive pieces of `micro`.
    The last batch is filled up from the start of the same order, so that all steps weigh the same.

    Args:
        size: number of samples.
        micro: images per process and pass.
        passes: passes per optimizer step.
        rank, processes: this process, of how many.
        seed: of the order.
    """

    def __init__(
        self, size: int, micro: int, passes: int, rank: int = 0, processes: int = 1, seed: int = 0
    ) -> None:
        self.size, self.micro, self.passes = size, micro, passes
        self.rank, self.processes, self.seed = rank, processes, seed
        self.epoch = 0
        self.batch_size = micro

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        return math.ceil(self.size / (self.micro * self.passes * self.processes))

    def set_epoch(self, epoch: int) -> None:
        """Use the order of epoch number `epoch`, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Passes per epoch of this process."""
        return self.steps * self.passes

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of the current epoch, `micro` indices each."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        wanted = self.steps * self.micro * self.passes * self.processes
        filled = (order * math.ceil(wanted / self.size))[:wanted]
        share = self.micro * self.passes
        for step in range(self.steps):
            begin = (step * self.processes + self.rank) * share
            for number in range(self.passes):
                start = begin + number * self.micro
                yield filled[start : start + self.micro]
