"""In which order branches of a residual stream may go: the least useful first."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from peft_vision.layers.absent import Absent
from peft_vision.pruners._path_probe import Branch, Probe
from peft_vision.pruners._path_scores import Score, Scores, harms
from peft_vision.pruners._path_stand_ins import Substitutes

Step = tuple[Branch, bool]
"""A branch that goes, and whether its mean stays."""


def may_go(branch: Branch, left: Collection[Branch]) -> bool:
    """Whether a branch of the same kind would be left: a network without any is not one."""
    return sum(other[1] == branch[1] for other in left) > 1


def one_shot(scores: Scores, left: Collection[Branch]) -> list[Branch]:
    """All that may go, by scores taken once."""
    order: list[Branch] = []
    remaining = set(left)
    for branch in sorted(scores, key=lambda b: scores[b]):
        if may_go(branch, remaining):
            order.append(branch)
            remaining.discard(branch)
    return order


def greedy(
    probe: Probe,
    candidates: Sequence[Branch],
    left: Collection[Branch],
    substitutes: Substitutes,
    *,
    score: Score = harms,
    empties: bool = False,
) -> list[Step]:
    """All that may go, scored again after each one that has gone and left its substitute.

    Args:
        left: every branch there is.
        score: by what the next one is chosen. By `harms`, a mean stays only where it is better than
            nothing; other scores do not see that far.
        empties: the last of a kind may go too.
    """
    order: list[Step] = []
    remaining = set(left)
    while True:
        free = [b for b in candidates if b in remaining and (empties or may_go(b, remaining))]
        if not free:
            return order
        ready = substitutes(probe, free)
        scores = score(probe, ready)
        best = min(free, key=lambda b: scores[b])
        stand_in = ready[best]
        # A mean that a few extreme tokens make can be worse than nothing.
        if score is harms and isinstance(stand_in, Absent) and stand_in.offset is not None:
            bare: dict[Branch, nn.Module] = {best: Absent()}
            if harms(probe, bare)[best] < scores[best]:
                stand_in = bare[best]
        probe.put(best, stand_in)
        remaining.discard(best)
        order.append((best, not isinstance(stand_in, Absent) or stand_in.offset is not None))
