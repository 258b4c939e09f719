"""Magnitude pruning of heads, hidden units and channels: the baseline that others have to beat.

The weights nearest to zero go first (Han et al., 2015), whole heads, whole MLP units and whole
channels at a time, so that the model becomes physically smaller. With calibration images it is the
loss of output that counts, once what stays has been fitted again, instead of the weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from peft_vision.backbones.channels import keep_channels
from peft_vision.backbones.sites import Backbone, HeadsSite, HiddenSite, device_of
from peft_vision.calibration import give_bias, lacks_bias
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.named_parts import part_of
from peft_vision.layers.train_linear import require_cuttable
from peft_vision.method import Evidence, Method, Stage, check_range
from peft_vision.plan import Decisions, pack_indices, unpack_indices
from peft_vision.pruners._channel_scores import STEPS, Scored, channel_scores, has_channels
from peft_vision.pruners._head_scores import check_score, images_by, named_scores, require_heads
from peft_vision.pruners._refit_scores import refit_scores

AUTO = "auto"


@dataclass(frozen=True)
class Magnitude(Method):
    """Remove the heads, units and channels with the smallest weights, ranked over the whole model.

    Heads are ranked among heads, units among units, channels among channels (their scales differ);
    a score is the L2 norm of everything that belongs to the unit, each matrix normalized by the
    mean over its block, so that no block is emptied only because its weights are small. One of
    each stays in every block.
    """

    ratio: float = 0.3
    """Share of the hidden units and of the channels that `wrap` removes, in [0, 1]; for heads see
    `head_exponent`."""

    heads: bool = True
    """Remove attention heads."""

    hidden: bool = True
    """Remove MLP hidden units."""

    channels: bool = True
    """Remove channels of convolutions, and units of linears in models that are not known by name:
    where the model has convolutions beyond its patches."""

    head_exponent: float = 3.0
    """Of the heads, ratio ** head_exponent go (1 to 10): heads are few and each is worth more."""

    multiple: int | str = "auto"
    """Hidden units and channels stay in multiples of this (1 to 256): kernels are much slower on
    odd widths. "auto": 8; of hidden units 32, where the model is on a CUDA device."""

    score: str = "auto"
    """"weights": the norm of what belongs to a unit. "images": the least error of the block's
    output without it; for a channel, what the next layers vary by because of it. "auto": by images
    where there are some. Or the name of a score of `peft_vision.importance`, or "mean_rank", for
    the heads; all else is then ranked as by "auto"."""

    stage: ClassVar[Stage] = Stage.WIDTH
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "params", "latency_ms"})

    def __post_init__(self) -> None:
        check_range("ratio", self.ratio, 0.0, 1.0)
        check_range("head_exponent", self.head_exponent, 1.0, 10.0)
        if self.multiple != AUTO:
            if isinstance(self.multiple, str):
                raise BadSetting(f"multiple is {self.multiple!r}; auto or a number works.")
            check_range("multiple", self.multiple, 1, 256)
        check_score(self.score)

    @property
    def strength(self) -> float:
        """The ratio."""
        return self.ratio

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per site, the members that stay, as a bit set.

        And whether the linear that reads them is given a bias, where it is fitted and has none.
        """
        require_heads(self.score, backbone, used=self.heads)
        decisions: Decisions = {}
        present = [kind for kind in ("heads", "hidden") if getattr(backbone, kind)]
        for kind in present:
            if not getattr(self, kind):
                continue
            sites: Sequence[HeadsSite | HiddenSite] = getattr(backbone, kind)
            scores = evidence.once(
                ("magnitude", kind, self.score), partial(self._scores, backbone, sites, evidence)
            )
            device, fitted = device_of(backbone.model), _is_fitted(backbone, evidence)
            hidden = [_multiple(self.multiple, device, site.count) for site in sites]
            share = strength if kind == "hidden" else strength**self.head_exponent
            kept_of = _kept(scores, share, hidden if kind == "hidden" else [1] * len(sites))
            for site, kept in zip(sites, kept_of, strict=True):
                if len(kept) < site.count:
                    bias: Decisions = {"bias": True} if fitted and lacks_bias(site) else {}
                    decisions[site.key] = pack_indices(kept, of=site.count) | bias
        traced = self._traced(backbone, evidence)
        for alike in traced.sites:
            decisions |= _thinned(alike, strength, _multiple(self.multiple))
        if not traced.sites and not any(getattr(self, kind) for kind in present):
            self._refuse(backbone, traced.why)
        return decisions

    def _traced(self, backbone: Backbone, evidence: Evidence) -> _Traced:
        """Channels; none for a plain ViT, which is not run for them."""
        if not self.channels:
            return _Traced(why="channels is off")
        if not has_channels(backbone):
            return _Traced(why="it has no convolution beyond its patches")

        def look() -> _Traced:
            try:
                return _Traced(channel_scores(backbone, images_by(self.score, evidence)))
            except UnsupportedSite as error:
                return _Traced(why=str(error).removesuffix("."))

        return evidence.once(("magnitude", "channels", self.score), look)

    def _refuse(self, backbone: Backbone, channels: str) -> None:
        """Say why there is nothing to remove."""
        off = [kind for kind in ("heads", "hidden") if not getattr(self, kind)]
        reasons = {
            kind: f"{kind} is off" if kind in off else backbone.missing.get(kind, "none was found")
            for kind in ("heads", "hidden")
        } | {"channels": channels}
        said = "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items())
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} has nothing to remove by magnitude. {said}."
        )

    def _scores(
        self, backbone: Backbone, sites: Sequence[HeadsSite | HiddenSite], evidence: Evidence
    ) -> list[Tensor]:
        heads = [site for site in sites if isinstance(site, HeadsSite)]
        named = named_scores(self.score, backbone, heads, evidence) if heads else None
        if named is not None:
            return named
        images = images_by(self.score, evidence)
        if images is None or backbone.tokens is None:
            return [_score(site) for site in sites]
        return refit_scores(backbone, sites, images)

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Cut the members that go; channels first, while every weight is where it was."""
        traced: Decisions = {
            key: value
            for key, value in decisions.items()
            if isinstance(value, dict) and "members" in value
        }
        members: list[HeadsSite | HiddenSite] = [*backbone.heads, *backbone.hidden]
        sites = {site.key: site for site in members}
        for key in decisions.keys() - traced.keys():
            require_cuttable(*_cut(sites[key]))
        if traced:
            keep_channels(backbone, traced)
        for key, packed in decisions.items():
            if key in traced:
                continue
            sites[key].keep(unpack_indices(packed))
            if isinstance(packed, dict) and packed.get("bias"):
                give_bias(sites[key])


@dataclass(frozen=True)
class _Traced:
    """Channels that are comparable, list by list; or why there are none."""

    sites: list[list[Scored]] = field(default_factory=list)
    why: str = ""


def _cut(site: HeadsSite | HiddenSite) -> list[object]:
    """The layers that lose rows or columns with a member."""
    if isinstance(site, HeadsSite):
        return [part_of(site.attention, name) for name in (*site.parts.qkv, site.parts.out)]
    return [part_of(site.mlp, name) for name in (*site.parts.up, site.parts.down)]


def _score(site: HeadsSite | HiddenSite) -> Tensor:
    total = sum(
        (w.double() ** 2).sum(1) / (w.double() ** 2).sum(1).mean().clamp_min(1e-30)
        for w in site.weights()
    )
    return torch.as_tensor(total).cpu()


def _is_fitted(backbone: Backbone, evidence: Evidence) -> bool:
    """Whether what stays is fitted again afterwards."""
    return evidence.batches is not None and evidence.fits and backbone.tokens is not None


def _multiple(asked: int | str, device: torch.device | None = None, count: int = 0) -> int:
    """What a number of units, or of channels (no device), stays a multiple of.

    Where the device decides, narrow layers go in finer steps, so that a budget is met.
    """
    if asked != AUTO:
        return int(asked)
    multiple = 32 if device is not None and device.type == "cuda" else 8
    while multiple > 8 and count < STEPS * multiple:
        multiple //= 2
    return multiple


def _thinned(alike: Sequence[Scored], strength: float, multiple: int) -> Decisions:
    """Decisions on channels, when the lowest `strength` of all that are comparable go."""
    groups = [one.group(multiple) for one in alike]
    kept_of = _kept([one.score for one in alike], strength, groups)
    return {
        one.site.key: one.site.decision(kept)
        for one, kept in zip(alike, kept_of, strict=True)
        if len(kept) < one.site.count
    }


def _kept(scores: Sequence[Tensor], strength: float, sizes: Sequence[int]) -> list[list[int]]:
    """Members that stay, per site, when the lowest `strength` of all members go.

    Members are removed in groups (`sizes`, per site), the lowest of a site together, ranked by
    their mean. The first group is what a site has beyond a multiple, so that what stays is one
    wherever anything went. One whole group stays everywhere.
    """
    groups = []
    for site, (score, group) in enumerate(zip(scores, sizes, strict=True)):
        order = _order(score)
        starts = [0, *range(len(order) % group or group, len(order), group)]
        groups += [
            (sum(float(score[i]) for i in piece) / len(piece), site, place, piece)
            for place, (start, end) in enumerate(itertools.pairwise(starts))
            for piece in [order[start:end]]
        ]
    ranked = sorted(groups)
    going = ranked[: math.floor(strength * len(ranked) + 1e-9)]
    gone = {(site, i) for _, site, _, piece in going for i in piece}
    return [
        [i for i in range(len(score)) if (site, i) not in gone] for site, score in enumerate(scores)
    ]


def _order(score: Tensor) -> list[int]:
    return [int(i) for i in torch.argsort(score, stable=True)]
