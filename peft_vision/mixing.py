"""Spending one budget on several methods: in which proportion, found by trial on images.

A trial is a whole candidate that meets the budget; what is compared is how far its answers are from
the dense model's. Labels are not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_vision.tasks.classification import logits_of

T = TypeVar("T")

Mix = tuple[float, ...]
"""How strongly each method acts, relative to the others; one for each, above 0."""

STEPS = (1.0, 0.5)
"""Powers of two by which a proportion is varied, coarse before fine."""


def best_mix(
    count: int, attempt: Callable[[Mix], tuple[float, T | None]], trials: int
) -> tuple[Mix, T | None]:
    """The mix whose candidate does the least damage, by pattern search from equal parts.

    Args:
        count: methods that share the budget.
        attempt: mix -> (damage, candidate); infinite where no candidate meets the budget.
        trials: at most so many attempts.
    """
    start: Mix = (1.0,) * count
    damage, found = attempt(start)
    tried, best = {start}, (damage, start, found)
    for step in STEPS:
        moved = True
        while moved:
            moved = False
            for mix in _around(best[1], step):
                if mix in tried or len(tried) >= trials:
                    continue
                tried.add(mix)
                damage, found = attempt(mix)
                if damage < best[0]:
                    best, moved = (damage, mix, found), True
                    break
    return best[1], best[2]


def _around(mix: Mix, step: float) -> list[Mix]:
    """Mixes with one proportion changed against the rest; of two methods, one ratio."""
    varied = range(1, len(mix)) if len(mix) == 2 else range(len(mix))
    return [
        tuple(_rounded(w * 2**power) if i == place else w for i, w in enumerate(mix))
        for place in varied
        for power in (step, -step)
    ]


def _rounded(weight: float) -> float:
    """The same figure whichever way it was reached."""
    return float(2.0 ** (round(2 * math.log2(weight)) / 2))


@torch.no_grad()
def divergence(model: nn.Module, wanted: Sequence[Tensor], images: Sequence[Tensor]) -> float:
    """Mean Kullback-Leibler divergence of a classifier's answers from the dense one's, in nats.

    Args:
        wanted: the dense model's logits, B C each. `images`: the batches, B 3 H W each.
    """
    total, seen = 0.0, 0
    for logits, batch in zip(wanted, images, strict=True):
        given = functional.log_softmax(logits_of(model(batch)).float(), dim=-1)
        taught = functional.log_softmax(logits.float(), dim=-1)
        total += float(functional.kl_div(given, taught, log_target=True, reduction="sum"))
        seen += len(batch)
    return total / seen
