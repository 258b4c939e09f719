"""Ranks of heads, and how far two scores agree on them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_vision.errors import BadSetting


def ranks(values: Tensor) -> Tensor:
    """Ranks of M numbers from 0 (smallest) to M - 1, ties sharing their mean rank; in float64."""
    below = (values[None, :] < values[:, None]).sum(1)
    same = (values[None, :] == values[:, None]).sum(1)
    return below.double() + (same.double() - 1) / 2


def mean_rank(scores: Mapping[str, Tensor]) -> Tensor:
    """Rank of each head among all heads, averaged over scores: L H in [0, 1], 1 = keep first.

    Each score ranks heads among heads of the whole model; how large its numbers are does not count.

    Raises:
        BadSetting: there is no score.
    """
    if not scores:
        raise BadSetting("There are no scores to take the mean rank of. One works.")
    there = heads_of(next(iter(scores.values())))
    last = max(int(there.sum()) - 1, 1)
    found = torch.full(there.shape, torch.nan, dtype=torch.float64)
    found[there] = torch.stack([ranks(s[there]) / last for s in scores.values()]).mean(0)
    return found


def heads_of(score: Tensor) -> Tensor:
    """Where there are heads: L H of true and false."""
    return ~score.isnan()


def kendall(a: Tensor, b: Tensor) -> float:
    """Kendall's tau-b of two scores: 1 for the same order, -1 for the reverse; ties count half-way.

    Args:
        a, b: of the same shape; places where either is NaN are left out.

    Returns:
        NaN where one of them does not distinguish anything.
    """
    both = heads_of(a) & heads_of(b)
    x, y = (torch.sign(v[both][:, None] - v[both][None, :]).double() for v in (a, b))
    untied = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / untied) if float(untied) > 0 else float("nan")
