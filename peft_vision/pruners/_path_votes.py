"""In which order paths may lose their vote in the final sum: the least useful first.

The blocks run once; what a sum of fewer paths says is then a matter of the norm and the head, so
that all paths can be judged again after each that has gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_vision.layers.votes import ENTRY, Votes
from peft_vision.pruners._path_probe import Entered, Probe

Share = dict[int, Tensor]
"""path -> what it adds to the sum, B R D."""

Scores = dict[int, float]


class Ballot:
    """What every path adds to the sum of every calibration batch.

    Args:
        votes: put into the probe where it has none.
    """

    def __init__(self, probe: Probe, votes: Votes) -> None:
        self.probe = probe
        if probe.trunk.votes is None:
            probe.trunk.votes = votes
        self.votes: Votes = probe.trunk.votes
        with torch.no_grad():
            self.shares = [self._shares(batch) for batch in probe.batches]

    def _shares(self, batch: Entered) -> Share:
        self.votes.ledger = {}
        try:
            self.probe.finish(batch, 0, self.probe.start(batch))
            return self.votes.ledger
        finally:
            self.votes.ledger = None

    @property
    def paths(self) -> list[int]:
        """Those that vote and add something."""
        return sorted(self.shares[0])

    def order(self, rank: str, among: Collection[int]) -> list[int]:
        """Of these paths the least useful first, judged again after each one's vote is taken."""
        rules: dict[str, Callable[[list[int], list[int]], Scores]] = {
            "leave_one_out": self._harms,
            "taylor": self._taylor,
            "influence": self._influence,
        }
        order: list[int] = []
        while free := self._free(order, among):
            scores = rules[rank](order, free)
            order.append(min(free, key=lambda path: scores[path]))
        return order

    def _free(self, silent: Sequence[int], among: Collection[int]) -> list[int]:
        """Those that may lose their vote: one branch keeps it, for what enters knows no image."""
        left = [path for path in self.paths if path not in silent]
        several = sum(path != ENTRY for path in left) > 1
        return [path for path in left if path in among and (several or path == ENTRY)]

    def _left(self, silent: Sequence[int]) -> Iterator[tuple[int, Entered, Share]]:
        """Number, batch, and the shares that are left of it."""
        for number, (batch, shares) in enumerate(zip(self.probe.batches, self.shares, strict=True)):
            yield number, batch, {path: s for path, s in shares.items() if path not in silent}

    @torch.no_grad()
    def _harms(self, silent: list[int], free: list[int]) -> Scores:
        """By the harm that taking one's vote does."""
        scores = dict.fromkeys(free, 0.0)
        for path in free:
            for number, batch, left in self._left([*silent, path]):
                output = self.probe.read(batch, torch.stack(list(left.values())).sum(0))
                scores[path] += self.probe.harm(number, output)
        return scores

    def _taylor(self, silent: list[int], free: list[int]) -> Scores:
        """By |d answer / d w| at w = 1, per image and then summed."""
        scores = dict.fromkeys(free, 0.0)
        for number, batch, left in self._left(silent):
            with torch.enable_grad():
                whole = torch.stack(list(left.values())).sum(0).clone().requires_grad_()
                answers = self.probe.answers(number, self.probe.read(batch, whole))
                (gradient,) = torch.autograd.grad(answers.sum(), [whole])
            for path in free:
                per_image = (gradient * left[path]).double().flatten(1).sum(1)
                scores[path] += float(per_image.abs().sum())
        return scores

    def _influence(self, silent: list[int], free: list[int]) -> Scores:
        """By 1 - cos(the sum, the sum without it)."""
        scores = dict.fromkeys(free, 0.0)
        for _, _, left in self._left(silent):
            whole = torch.stack(list(left.values())).sum(0).double()
            for path in free:
                cosine = F.cosine_similarity(whole, whole - left[path].double(), dim=-1)
                scores[path] += float((1 - cosine).mean(1).sum())
        return scores


def by_length(paths: Sequence[int]) -> list[int]:
    """The shortest first, then what enters the blocks; for where there are no data."""
    branches = sorted(path for path in paths if path != ENTRY)
    return [*branches[:-1], *([ENTRY] if ENTRY in paths else [])]
