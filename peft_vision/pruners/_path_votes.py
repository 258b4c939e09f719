"""In which order paths may lose their vote in the final sum: the least useful first.

The blocks run once; what a sum of fewer paths says is then a matter of the norm and the head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_vision.layers.votes import ENTRY, Votes
from peft_vision.pruners._path_probe import Entered, Probe

Share = dict[int, Tensor]
"""path -> what it adds to the sum, B R D."""


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

    def greedy(self) -> list[int]:
        """By the harm that taking one's vote does, taken again after each."""
        order: list[int] = []
        while free := _free([path for path in self.paths if path not in order]):
            harms = {path: self._harm([*order, path]) for path in free}
            order.append(min(free, key=lambda path: harms[path]))
        return order

    @torch.no_grad()
    def _harm(self, silent: Sequence[int]) -> float:
        total = 0.0
        for number, (batch, shares) in enumerate(zip(self.probe.batches, self.shares, strict=True)):
            left = [share for path, share in shares.items() if path not in silent]
            output = self.probe.read(batch, torch.stack(left).sum(0))
            total += self.probe.harm(number, output)
        return total

    def taylor(self) -> list[int]:
        """By |d answer / d w| at w = 1, per image and then the mean."""
        scores = dict.fromkeys(self.paths, 0.0)
        for batch, shares in zip(self.probe.batches, self.shares, strict=True):
            with torch.enable_grad():
                whole = torch.stack(list(shares.values())).sum(0).clone().requires_grad_()
                answers = self.probe.answers(self.probe.read(batch, whole))
                (gradient,) = torch.autograd.grad(answers.sum(), [whole])
            for path, share in shares.items():
                per_image = (gradient * share).double().flatten(1).sum(1)
                scores[path] += float(per_image.abs().sum())
        return _one_shot(scores)

    def influence(self) -> list[int]:
        """By 1 - cos(the sum, the sum without it)."""
        scores = dict.fromkeys(self.paths, 0.0)
        for shares in self.shares:
            whole = torch.stack(list(shares.values())).sum(0).double()
            for path, share in shares.items():
                cosine = F.cosine_similarity(whole, whole - share.double(), dim=-1)
                scores[path] += float((1 - cosine).mean(1).sum())
        return _one_shot(scores)


def by_length(paths: Sequence[int]) -> list[int]:
    """The shortest first, then what enters the blocks; for where there are no data."""
    branches = sorted(path for path in paths if path != ENTRY)
    return [*branches[:-1], *([ENTRY] if ENTRY in paths else [])]


def _one_shot(scores: dict[int, float]) -> list[int]:
    order: list[int] = []
    ranked = sorted(scores, key=lambda path: scores[path])
    for path in ranked:
        if path in _free([other for other in ranked if other not in order]):
            order.append(path)
    return order


def _free(left: Sequence[int]) -> list[int]:
    """Those that may lose their vote: one branch keeps it, for what enters knows no image."""
    several = sum(path != ENTRY for path in left) > 1
    return [path for path in left if several or path == ENTRY]
