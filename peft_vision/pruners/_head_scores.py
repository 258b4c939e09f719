"""How much heads count: by weights, by images, or by a score that the evidence is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_vision.backbones.sites import Backbone, HeadsSite
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.base_weights import base_weight
from peft_vision.layers.contributions import contributions
from peft_vision.layers.head_surgery import weights_by_head
from peft_vision.method import Evidence, score_names

OWN = ("auto", "weights", "images")
"""A pruner's own rankings; every other score is found by name."""


def check_score(score: str) -> None:
    """Refuse a setting `score` that names no ranking.

    Raises:
        BadSetting: it is neither a pruner's own nor the name of a score of heads.
    """
    if score not in (known := (*OWN, *score_names())):
        raise BadSetting(f"score is {score!r}; possible: {', '.join(known)}.")


def require_heads(score: str, backbone: Backbone, *, used: bool = True) -> None:
    """Refuse a named score where there are no heads that it could rank.

    Args:
        used: heads may go at all.

    Raises:
        BadSetting: there are none.
    """
    if score not in OWN and not (used and backbone.heads):
        why = "there are none here" if used else "they all stay"
        raise BadSetting(f"score is {score!r}, which ranks attention heads, and {why}.")


def images_by(score: str, evidence: Evidence) -> Iterable[Any] | None:
    """The images that a pruner's own ranking goes by; None where it goes by the weights.

    Raises:
        BadSetting: images are asked for, and there are none.
    """
    if score == "images" and evidence.batches is None:
        raise BadSetting("score is 'images', and no images were given: pass data.")
    return None if score == "weights" else evidence.batches


def named_scores(
    score: str, backbone: Backbone, sites: Sequence[HeadsSite], evidence: Evidence
) -> list[Tensor] | None:
    """Per site, what its heads are worth by the score of that name; None for a pruner's own.

    Raises:
        BadSetting: the score is measured on images, and there are none.
        UnsupportedSite: it cannot be computed for this model.
    """
    if score in OWN:
        return None
    if evidence.heads is None:
        raise BadSetting(
            f"score is {score!r}, and this evidence has no scores of heads: "
            "Evidence(batches, heads=peft_vision.importance.as_evidence)."
        )
    ask = partial(evidence.heads, score, backbone, evidence.batches)
    table = evidence.once(("importance", score), ask)
    found = [table[site.block, : site.count] for site in sites]
    for site, row in zip(sites, found, strict=True):
        if bool(row.isnan().any()):
            raise UnsupportedSite(f"The score {score!r} says nothing of some heads of {site.key}.")
    return found


def head_scores(
    score: str, backbone: Backbone, sites: Sequence[HeadsSite], evidence: Evidence
) -> list[Tensor]:
    """Importance of each head: by a named score, by what it adds on data, or by its weights."""
    named = named_scores(score, backbone, sites, evidence)
    if named is not None:
        return named
    images = images_by(score, evidence)
    if images is None:
        return [_weight_score(site) for site in sites]
    outputs = [(getattr(s.attention, s.parts.out), s.count) for s in sites]
    return contributions(backbone.model, outputs, images)


def _weight_score(site: HeadsSite) -> Tensor:
    total = torch.zeros(site.count, dtype=torch.float64)
    for weight in weights_by_head(site.attention, site.parts, base_weight):
        square = weight.double().cpu().square().sum(1)
        total += square / square.mean().clamp_min(1e-30)
    return total


def standardized(score: Tensor) -> Tensor:
    """Scores of one module with mean 0 and deviation 1: their logs where all are positive."""
    values = score.log() if bool((score > 1e-12).all()) else score
    return (values - values.mean()) / values.std(correction=0).clamp_min(1e-6)
