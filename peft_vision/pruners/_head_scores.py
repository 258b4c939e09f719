"""How much the heads of an attention module count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peft_vision.backbones.sites import HeadsSite
from peft_vision.layers.base_weights import base_weight
from peft_vision.layers.contributions import contributions
from peft_vision.layers.head_surgery import weights_by_head
from peft_vision.method import Evidence


def head_scores(model: nn.Module, sites: Sequence[HeadsSite], evidence: Evidence) -> list[Tensor]:
    """Importance of each head: by what it adds on data, else by the norm of its weights."""
    if evidence.batches is not None:
        outputs = [(getattr(s.attention, s.parts.out), s.count) for s in sites]
        return contributions(model, outputs, evidence.batches)
    return [_weight_score(site) for site in sites]


def _weight_score(site: HeadsSite) -> Tensor:
    total = torch.zeros(site.count, dtype=torch.float64)
    for weight in weights_by_head(site.attention, site.parts, base_weight):
        square = weight.double().cpu().square().sum(1)
        total += square / square.mean().clamp_min(1e-30)
    return total


def standardized(score: Tensor) -> Tensor:
    """Log scores of one module with mean 0 and deviation 1."""
    logs = score.clamp_min(1e-12).log()
    return (logs - logs.mean()) / logs.std(correction=0).clamp_min(1e-6)
