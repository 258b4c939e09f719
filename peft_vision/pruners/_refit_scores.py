"""What a head or a hidden unit is worth on images: how much is lost when the rest is fitted again.

For a linear that reads values of covariance S, the least error of its output after the members G
have gone is tr(W_G ((S^-1)_GG)^-1 W_G^T): the rule of Optimal Brain Surgeon (Hassibi and Stork,
1993) for whole groups of inputs. It is taken as a share of its sum over the block: how large the
stream is that a branch is added to says little of what depends on the branch.
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
    spread = seen.covariance
    ridge = RIDGE * spread.diagonal().mean().clamp_min(1e-30)
    inverse = torch.linalg.inv(spread + ridge * torch.eye(len(spread), dtype=spread.dtype))
    size = len(spread) // count
    if size == 1:
        alone: Tensor = weight.square().sum(0) / inverse.diagonal()
        return alone
    groups = torch.stack([inverse[i : i + size, i : i + size] for i in range(0, len(spread), size)])
    columns = weight.reshape(len(weight), count, size).permute(1, 2, 0)  # members, inputs, outputs
    together: Tensor = (columns * torch.linalg.solve(groups, columns)).sum((1, 2))
    return together
