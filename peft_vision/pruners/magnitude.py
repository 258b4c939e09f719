"""Magnitude pruning of heads and hidden units: the baseline that others have to beat.

The weights nearest to zero go first (Han et al., 2015), whole heads and whole MLP units at a
time, so that the model becomes physically smaller. With calibration images it is the loss of output
that counts, once what stays has been fitted again, instead of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from peft_vision.backbones.sites import Backbone, HeadsSite, HiddenSite
from peft_vision.errors import BadSetting
from peft_vision.method import Evidence, Method, Stage, check_range
from peft_vision.plan import Decisions, pack_indices, unpack_indices
from peft_vision.pruners._refit_scores import refit_scores


@dataclass(frozen=True)
class Magnitude(Method):
    """Remove the heads and hidden units with the smallest weights, ranked over the whole model.

    Heads are ranked among heads and units among units (their scales differ); a score is the L2 norm
    of everything that belongs to the unit, each matrix normalized by the mean over its block, so
    that no block is emptied only because its weights are small. One of each stays in every block.
    """

    ratio: float = 0.3
    """Share of the hidden units that `wrap` removes, in [0, 1]; for heads see `head_exponent`."""

    heads: bool = True
    """Remove attention heads."""

    hidden: bool = True
    """Remove MLP hidden units."""

    head_exponent: float = 3.0
    """Of the heads, ratio ** head_exponent go (1 to 10): heads are few and each is worth more."""

    multiple: int = 8
    """Hidden units stay in multiples of this (1 to 256): kernels are much slower on odd widths."""

    score: str = "auto"
    """"weights": the norm of what belongs to a unit. "images": the least error of the block's
    output without it. "auto": by images where there are some."""

    stage: ClassVar[Stage] = Stage.WIDTH
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "params", "latency_ms"})

    def __post_init__(self) -> None:
        check_range("ratio", self.ratio, 0.0, 1.0)
        check_range("head_exponent", self.head_exponent, 1.0, 10.0)
        check_range("multiple", self.multiple, 1, 256)
        if self.score not in ("auto", "weights", "images"):
            raise BadSetting(f"score is {self.score!r}; auto, weights or images works.")

    @property
    def strength(self) -> float:
        """The ratio."""
        return self.ratio

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per site, the members that stay, as a bit set."""
        decisions: Decisions = {}
        for kind, wanted in (("heads", self.heads), ("hidden", self.hidden)):
            if not wanted:
                continue
            backbone.require(kind)
            sites: Sequence[HeadsSite | HiddenSite] = getattr(backbone, kind)
            scores = evidence.once(
                ("magnitude", kind, self.score), partial(self._scores, backbone, sites, evidence)
            )
            group = int(self.multiple) if kind == "hidden" else 1
            share = strength if kind == "hidden" else strength**self.head_exponent
            for site, kept in zip(sites, _kept(scores, share, group), strict=True):
                if len(kept) < site.count:
                    decisions[site.key] = pack_indices(kept, of=site.count)
        return decisions

    def _scores(
        self, backbone: Backbone, sites: Sequence[HeadsSite | HiddenSite], evidence: Evidence
    ) -> list[Tensor]:
        if self.score == "images" and evidence.batches is None:
            raise BadSetting("score is 'images', and no images were given: pass data.")
        if self.score == "weights" or evidence.batches is None or backbone.tokens is None:
            return [_score(site) for site in sites]
        return refit_scores(backbone, sites, evidence.batches)

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Cut the members that go."""
        members: list[HeadsSite | HiddenSite] = [*backbone.heads, *backbone.hidden]
        sites = {site.key: site for site in members}
        for key, packed in decisions.items():
            sites[key].keep(unpack_indices(packed))


def _score(site: HeadsSite | HiddenSite) -> Tensor:
    total = sum(
        (w.double() ** 2).sum(1) / (w.double() ** 2).sum(1).mean().clamp_min(1e-30)
        for w in site.weights()
    )
    return torch.as_tensor(total).cpu()


def _kept(scores: Sequence[Tensor], strength: float, group: int) -> list[list[int]]:
    """Members that stay, per site, when the lowest `strength` of all members go.

    Members are removed in groups of `group`, the lowest of a site together, ranked by their mean;
    so
    what stays is a multiple wherever the site was one. One group stays in every site.
    """
    groups = []
    for site, score in enumerate(scores):
        order = _order(score)
        pieces = [order[i : i + group] for i in range(0, len(order), group)]
        groups += [
            (sum(float(score[i]) for i in piece) / len(piece), site, place, piece)
            for place, piece in enumerate(pieces[:-1])
            if len(piece) == group
        ]
    ranked = sorted(groups)
    going = ranked[: math.floor(strength * len(ranked) + 1e-9)]
    gone = {(site, i) for _, site, _, piece in going for i in piece}
    return [
        [i for i in range(len(score)) if (site, i) not in gone] for site, score in enumerate(scores)
    ]


def _order(score: Tensor) -> list[int]:
    return [int(i) for i in torch.argsort(score, stable=True)]
