"""What a head or a hidden unit is worth on images: how much is lost when the rest is fitted again.

For a linear that reads values of covariance S, the least error of its output after the members G
have gone is tr(W_G ((S^-1)_GG)^-1 W_G^T): the rule of Optimal Brain Surgeon (Hassibi and Stork,
1993) for whole groups of inputs. Members go one after the other, and what is left is fitted again
each time: of two that say the same, one is worth nothing, but not both. A score is the share that a
member takes of what a branch varies by: how large the stream is that a branch is added to says
little of what depends on the branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_vision.backbones.sites import Backbone, HeadsSite, HiddenSite
from peft_vision.calibration import Moments, Walk, consumer_of
from peft_vision.layers.block import branch_scale
from peft_vision.layers.surgery import weight_of
from peft_vision.layers.votes import Half

Members = HeadsSite | HiddenSite
RIDGE = 1e-3
PACE = 32
"""One in so many members goes at a time: of 1,536 units, half then leave an error 0.3 % above that
of taking 8 at a time, in half of the time (random features)."""


def refit_scores(
    backbone: Backbone, sites: Sequence[Members], batches: Iterable[Any]
) -> list[Tensor]:
    """Per site, a score for each member, in float64.

    Args:
        sites: of one kind, in the order of their blocks.
        batches: see `Walk`.

    Raises:
        UnsupportedSite: the blocks cannot be run from their parts.
    """
    walk, scores = Walk(backbone, batches), []
    parts = walk.trunk.parts
    for site in sites:
        while walk.index < site.block:
            walk.advance()
        consumer = consumer_of(site)
        seen = walk.moments(consumer)[0]
        half: Half = "attention" if isinstance(site, HeadsSite) else "mlp"
        weight = weight_of(consumer).double().cpu()
        scale = branch_scale(walk.block, parts, half, weight.shape[0]).double().cpu()
        if seen is None:
            raise AssertionError(f"{site.key}: the linear that reads it was not called")
        score = _score(seen, scale[:, None] * weight, site.count)
        scores.append(score / score.sum().clamp_min(1e-30))
    return scores


def _score(seen: Moments, weight: Tensor, count: int) -> Tensor:
    """What the output (weight: O F) loses when a member goes after all that score less."""
    spread = seen.covariance
    size = len(spread) // count
    ridge = RIDGE * spread.diagonal().mean().clamp_min(1e-30)
    inverse = torch.linalg.inv(spread + ridge * torch.eye(len(spread), dtype=spread.dtype))
    left, reached = torch.arange(count), torch.zeros((), dtype=torch.float64)
    scores = torch.zeros(count, dtype=torch.float64)
    while len(left) > 0:
        alone = _alone(inverse, weight, size)
        order = alone.argsort(stable=True)
        together = max(1, len(left) // PACE)
        going, stay = order[:together], order[together:].sort().values
        gone, kept = _inputs(going, size), _inputs(stay, size)
        block, columns = inverse[gone][:, gone], weight[:, gone]
        taken = torch.linalg.solve(block, columns.t())  # G O
        loss = (columns.t() * taken).sum()
        parts = loss * alone[going] / alone[going].sum().clamp_min(1e-300)
        scores[left[going]] = parts.cummax(0).values.clamp_min(reached)
        reached = scores[left[going]].max()
        across = inverse[kept][:, gone]
        weight = weight[:, kept] - (across @ taken).t()
        inverse = inverse[kept][:, kept] - across @ torch.linalg.solve(block, across.t())
        left = left[stay]
    return scores


def _inputs(members: Tensor, size: int) -> Tensor:
    """The inputs that belong to members, each of which owns `size` in a row."""
    return (members[:, None] * size + torch.arange(size)).flatten()


def _alone(inverse: Tensor, weight: Tensor, size: int) -> Tensor:
    """What goes with each member if it goes next."""
    if size == 1:
        squared: Tensor = weight.square().sum(0) / inverse.diagonal()
        return squared
    count = len(inverse) // size
    places = range(0, len(inverse), size)
    groups = torch.stack([inverse[i : i + size, i : i + size] for i in places])
    columns = weight.reshape(len(weight), count, size).permute(1, 2, 0)  # members, inputs, outputs
    together: Tensor = (columns * torch.linalg.solve(groups, columns)).sum((1, 2))
    return together
