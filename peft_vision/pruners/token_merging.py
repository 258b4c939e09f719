"""Token merging by similarity (Bolya et al., ICLR 2023): alike patches become one on the way.

In every block, between attention and MLP, the most similar pairs of patches between two sets are
replaced by their mean, weighted by how many patches each stands for. Their states, or as in the
paper their keys, tell what is alike; later attention counts a merged token as often as it stands
for patches. The sets are every other patch, or, as in PiToMe (Tran et al., NeurIPS 2024), the
patches that resemble most others, so that rare content is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_vision.backbones.sites import Backbone
from peft_vision.errors import BadSetting
from peft_vision.layers.attention import Attended
from peft_vision.layers.precision import in_full, wide
from peft_vision.layers.reduction import Reducer, Reduction, behind, take
from peft_vision.method import Evidence, Method, Stage, check_range
from peft_vision.plan import Decisions
from peft_vision.pruners._token_counts import (
    POOLED_FLOOR,
    blocks_with_attention,
    counts,
    curve,
    patches_of,
    put_reducers,
    reads_class_only,
    tokens_of,
)

MOST = 0.5
"""A pair leaves one token, so a block can merge away at most half of them."""

MARGIN = 0.75
"""PiToMe's margin in the first block; it falls to nothing at the last."""

SCHEDULES = ("constant", "decreasing", "curve")
METRICS = ("stream", "keys")


@dataclass(frozen=True)
class TokenMerging(Method):
    """Merge the patches that are most alike, a few in every block."""

    ratio: float = 0.05
    """Patches that each block merges away on average, as a share of those of the image, in
    [0, 0.5]; no block merges away more than half of what arrives."""

    schedule: Literal["constant", "decreasing", "curve"] = "constant"
    """How they are spread over the depth: the same number in each block, falling to none at the
    last block, or along the curve that DiffRate learned, which keeps as many on average."""

    start: float = 0.0
    """Depth from which patches are merged, as a share of the model's depth, in [0, 1)."""

    metric: Literal["stream", "keys"] = "stream"
    """What tells how alike two patches are, by the cosine: their states in the residual stream, or
    their keys, averaged over heads, as in the paper."""

    protect: bool = False
    """Merge only among the patches that resemble most others, as PiToMe does."""

    proportional: bool = True
    """Count a merged patch in later attention as often as it stands for patches."""

    stage: ClassVar[Stage] = Stage.TOKENS
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "latency_ms"})

    def __post_init__(self) -> None:
        check_range("ratio", self.ratio, 0.0, MOST)
        check_range("start", self.start, 0.0, 1.0 - 1e-9)
        for name, known in (("schedule", SCHEDULES), ("metric", METRICS)):
            if getattr(self, name) not in known:
                raise BadSetting(
                    f"{name} is {getattr(self, name)!r}; possible: {', '.join(known)}."
                )

    @property
    def strength(self) -> float:
        """The ratio, as a share of the most that can be merged."""
        return self.ratio / MOST

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per block that merges, the share of its patches that go, and the margin if protected."""
        site = tokens_of(backbone)
        if strength <= 0:
            return {}
        depth, before = len(backbone.blocks), patches_of(backbone)
        floor = 0.0 if reads_class_only(site) else POOLED_FLOOR
        possible = blocks_with_attention(backbone)
        shares = self._shares(strength * MOST, depth, floor, possible)
        decisions: Decisions = {}
        for block, left in enumerate(counts(shares, before, most=MOST)):
            if left < before:
                margin = MARGIN * (1 - block / depth) if self.protect else None
                decisions[f"blocks.{block}.merging"] = {
                    "share": (before - left) / before,
                    "margin": margin,
                    "by_keys": self.metric == "keys",
                    "proportional": self.proportional,
                }
            before = left
        return decisions

    def _shares(
        self, ratio: float, depth: int, floor: float, possible: Sequence[int]
    ) -> list[float]:
        """Share of the patches that is to be left behind each block."""
        first = min(depth - 1, round(self.start * depth))
        left = 1.0
        even: list[float] = []
        falling: list[float] = []
        for block in range(depth - first):
            left = max(1 - ratio * (block + 1), left / 2)
            even.append(left)
            weight = 1.0 if depth - first == 1 else 2 * (1 - block / (depth - first - 1))
            falling.append((falling[-1] if falling else 1.0) - ratio * weight)
        shares = {"constant": even, "decreasing": falling}.get(self.schedule)
        if shares is None:
            mean = (sum(even) - 1) / (len(even) - 1) if len(even) > 1 else even[0]
            shares = curve(min(1.0, max(0.0, mean)), len(even), floor)
        every = [*[1.0] * first, *shares]
        return [share if block in possible else 1.0 for block, share in enumerate(every)]

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Open the blocks' trunk and put a reducer into each block named."""
        put_reducers(backbone, decisions, SimilarityReducer)


class SimilarityReducer(Reducer):
    """Merges the pairs of patches that are most alike.

    Attributes:
        share: of the arriving patches that go, at most half.
        margin: patches that resemble others by more than this are the ones that may be merged
            (cosine, in [-1, 1]); None: every other patch.
        by_keys: their keys, averaged over heads, are compared; else their states.
    """

    drops = False

    def __init__(
        self, share: float, *, margin: float | None, by_keys: bool, proportional: bool
    ) -> None:
        super().__init__()
        self.by_keys = by_keys
        self.share = share
        self.margin = margin
        self.proportional = proportional

    @property
    def fused(self) -> int:
        """A merged patch has a place of its own."""
        return 0

    def extra_repr(self) -> str:
        """Settings, for printing."""
        metric = "keys" if self.by_keys else "stream"
        return f"share={self.share:g}, margin={self.margin}, metric={metric}"

    def forward(
        self, x: Tensor, attended: Attended, prefix: int, sizes: Tensor | None
    ) -> Reduction | None:
        """See `Reducer.forward`."""
        patches = x.shape[1] - prefix
        count = min(math.floor(self.share * patches + 0.5), patches // 2)
        if count < 1:
            return None
        states = attended.k[:, :, prefix:].mean(1) if self.by_keys else x[:, prefix:]
        metric = F.normalize(wide(states), dim=-1)
        sizes = metric.new_ones(x.shape[0], patches) if sizes is None else sizes
        with in_full(x):
            if self.margin is None:
                source, target = alternating(metric, count)
            else:
                source, target = protecting(metric, count, self.margin)
            return merged(x, sizes, prefix, source, target)


def alternating(metric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The patches that go and those that take them up, two of B x count.

    Every other patch looks for the one most alike among the rest; the `count` best pairs are taken.

    Args:
        metric: B P D, of length one.
    """
    alike, nearest = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(dim=-1)
    source = alike.topk(count, dim=1, sorted=False).indices
    return 2 * source, 2 * nearest.gather(1, source) + 1


def protecting(metric: Tensor, count: int, margin: float) -> tuple[Tensor, Tensor]:
    """As `alternating`, among the 2 x count patches of the highest energy.

    The energy of a patch is the mean of its likeness to all, where what is under the margin counts
    as nearly nothing: patches of a large, even background have it, and they alone are merged.
    """
    alike = metric @ metric.transpose(1, 2)
    far = (alike - margin).clamp_max(0).exp() - 1
    energy = torch.where(alike >= margin, alike, far).mean(dim=-1)
    crowded = energy.topk(2 * count, dim=1).indices
    source, others = crowded[:, ::2], crowded[:, 1::2]
    rows = take(alike, source)
    near = rows.gather(2, others.unsqueeze(1).expand(-1, count, -1)).argmax(dim=-1)
    return source, others.gather(1, near)


def merged(x: Tensor, sizes: Tensor, prefix: int, source: Tensor, target: Tensor) -> Reduction:
    """The patches at `source` (B R) merged into those at `target` (B R), none of which is one.

    Those at even places come before those at odd ones, so that taking every other one in the next
    block parts neighbors anew. Only what is merged is multiplied: a matrix of R columns adds it to
    the tokens that stay.
    """
    patches, left = sizes.shape[1], sizes.shape[1] - source.shape[1]
    places = torch.arange(patches, device=x.device)
    order = (places + places % 2 * patches).to(sizes.dtype).expand_as(sizes)
    order = order.scatter(1, source, 2.0 * patches)
    kept = order.topk(left, dim=1, largest=False, sorted=True).indices
    slots = torch.arange(-prefix, left, device=x.device)
    rank = torch.zeros_like(order, dtype=torch.long)
    rank = rank.scatter(1, kept, slots[prefix:].expand_as(kept))
    into = rank.gather(1, target)
    carriers = rank.scatter(1, source, into)
    share = (slots[:, None] == into[:, None, :]) * sizes.gather(1, source)[:, None, :]
    before = F.pad(sizes.gather(1, kept), (prefix, 0), value=1.0)
    after = before + share.sum(dim=-1)
    stays = take(x, behind(kept, prefix)) * (before / after).unsqueeze(-1).to(x.dtype)
    weights = (share / after.unsqueeze(-1)).to(x.dtype)
    joined = torch.baddbmm(stays, weights, take(x, source + prefix))
    return Reduction(joined, kept, carriers, after[:, prefix:])
