"""Token reorganization (EViT; Liang et al., ICLR 2022): inattentive patches leave on the way.

At a few depths, or in every block, between attention and MLP, the patches that are attended to
least are dropped, or fused into one token. The fused attention kernel stays: only the rows of the
attention map that rank the patches are computed once more beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peft_vision.backbones.sites import Backbone, TokensSite
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.attention import Attended
from peft_vision.layers.precision import in_full, wide
from peft_vision.layers.reduction import Reducer, Reduction, behind, take
from peft_vision.layers.traits import Paced
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

SCORES = ("auto", "class", "value", "received")
SCHEDULES = ("drops", "every", "curve")


@dataclass(frozen=True)
class TokenReorganization(Method):
    """Keep the patches that are attended to most, a share of them at given depths."""

    keep_rate: float = 0.7
    """Share of the patches that stay at each depth, in (0, 1]; with the schedule `curve`, that stay
    behind a block on average, the first block aside."""

    at: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Depths at which patches leave, as shares of the model's depth, each in [0, 1)."""

    fuse: bool | None = None
    """Fuse the patches that leave into one token, weighted by their attention. By default where
    many leave at once, as with the schedule `drops`: of a few, little but noise would be left."""

    score: Literal["auto", "class", "value", "received"] = "auto"
    """What ranks the patches: the attention of the class token (and the distillation token), what
    they receive from all tokens on average, or either times the length of their values. `auto` is
    `class` where a class token is pooled, else `received`; `value` goes by the same rule."""

    schedule: Literal["drops", "every", "curve"] = "drops"
    """Where patches leave: at the depths of `at`; in every block but the first; or along the curve
    that DiffRate learned, raised to the power that leaves `keep_rate`."""

    warm_up: int = 0
    """Forward passes of training in which the keep rate falls from 1 to its value, by a cosine; one
    optimizer step is one pass unless gradients are accumulated. Evaluation is not affected."""

    stage: ClassVar[Stage] = Stage.TOKENS
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "latency_ms"})

    def __post_init__(self) -> None:
        check_range("keep_rate", self.keep_rate, 1e-6, 1.0)
        if not self.at or any(not 0 <= depth < 1 for depth in self.at):
            raise BadSetting(f"at is {self.at!r}; it has to be one or more depths in [0, 1).")
        for name, known in (("score", SCORES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise BadSetting(
                    f"{name} is {getattr(self, name)!r}; possible: {', '.join(known)}."
                )
        if isinstance(self.warm_up, bool) or not isinstance(self.warm_up, int) or self.warm_up < 0:
            raise BadSetting(f"warm_up is {self.warm_up!r}; it has to be a whole number from 0 up.")

    @property
    def strength(self) -> float:
        """One minus the keep rate."""
        return 1.0 - self.keep_rate

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per block that reduces, the share of the arriving patches that stay, and the ranking."""
        site = tokens_of(backbone)
        rows = self._rows(backbone, site)
        if strength <= 0:
            return {}
        return {
            f"blocks.{block}.tokens": {
                "keep_rate": rate,
                "fuse": self._fuses,
                "rows": rows,
                "by_value": self.score == "value",
                "warm_up": self.warm_up,
            }
            for block, rate in self._rates(backbone, site, 1.0 - strength).items()
        }

    @property
    def _fuses(self) -> bool:
        return self.schedule == "drops" if self.fuse is None else self.fuse

    def _rows(self, backbone: Backbone, site: TokensSite) -> int:
        """How many first tokens' attention ranks; 0 for the attention received from all."""
        if self.score == "class" and not site.class_tokens:
            raise UnsupportedSite(
                f"{type(backbone.model).__name__} has no class token whose attention could rank "
                "patches. score='received' works on every model."
            )
        pooled = site.class_tokens > 0 and site.pooling in ("class", "class+average")
        if self.score == "received" or not (pooled or self.score == "class"):
            return 0
        return site.class_tokens + site.distillation_tokens

    def _rates(self, backbone: Backbone, site: TokensSite, keep: float) -> dict[int, float]:
        """Per block that reduces, the share of the arriving patches that stay as they are."""
        depth, possible = len(backbone.blocks), blocks_with_attention(backbone)
        if self.schedule == "drops":
            wanted = {min(depth - 1, round(share * depth)) for share in self.at}
            blocks = {next((b for b in possible if b >= i), possible[-1]) for i in wanted}
            return dict.fromkeys(sorted(blocks), keep)
        if self.schedule == "every":
            return {block: keep for block in possible if block or depth == 1}
        shares = curve(keep, depth, 0.0 if reads_class_only(site) else POOLED_FLOOR)
        shares = [share if block in possible else 1.0 for block, share in enumerate(shares)]
        before, rates = patches_of(backbone), {}
        for block, left in enumerate(counts(shares, before, least=1 + int(self._fuses))):
            if left < before:
                rates[block] = (left - int(self._fuses)) / before
            before = left
        return rates

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Open the blocks' trunk and put a reducer into each block named."""
        put_reducers(backbone, decisions, AttentionReducer)


class AttentionReducer(Reducer, Paced):
    """Keeps the ceil(keep_rate * N) patches that are attended to most.

    Attributes:
        rows: how many first tokens' attention ranks the patches; 0: what they receive from all.
        by_value: times the length of each patch's value, head by head.
        warm_up: passes of training in which the keep rate falls from 1.
    """

    def __init__(
        self,
        keep_rate: float,
        *,
        fuse: bool,
        rows: int = 1,
        by_value: bool = False,
        warm_up: int = 0,
    ) -> None:
        super().__init__()
        self.keep_rate = keep_rate
        self.fuse = fuse
        self.rows = rows
        self.by_value = by_value
        self.warm_up = warm_up
        self.passes: Tensor | None
        self.register_buffer("passes", torch.zeros((), dtype=torch.long) if warm_up else None)

    @property
    def fused(self) -> int:
        """One when the rest is fused."""
        return int(self.fuse)

    @property
    def rate(self) -> float:
        """The keep rate now: in evaluation, and behind the warm-up, `keep_rate`."""
        if self.passes is None or not self.training:
            return self.keep_rate
        done = 0 if self.passes.is_meta else int(self.passes) - 1
        if done >= self.warm_up:
            return self.keep_rate
        left = (math.cos(math.pi * max(0, done) / self.warm_up) + 1) / 2
        return self.keep_rate + (1 - self.keep_rate) * left

    def advance(self) -> None:
        """One more pass of training."""
        if self.passes is not None:
            self.passes += 1

    def extra_repr(self) -> str:
        """Settings, for printing."""
        source = f"{self.rows} rows" if self.rows else "received"
        times = " x value" if self.by_value else ""
        return f"keep_rate={self.keep_rate:g}, fuse={self.fuse}, score={source}{times}"

    def forward(
        self, x: Tensor, attended: Attended, prefix: int, sizes: Tensor | None
    ) -> Reduction | None:
        """See `Reducer.forward`; the patches that stay keep their order."""
        patches = x.shape[1] - prefix
        count = min(patches, max(1, math.ceil(self.rate * patches - 1e-9)))
        if count + self.fused >= patches:  # nothing would be saved
            return None
        scores = attention_to(attended, self.rows, sizes, by_value=self.by_value)[:, prefix:]
        kept = scores.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
        order = torch.arange(count, device=x.device).expand_as(kept)
        carriers = torch.full_like(scores, -1, dtype=torch.long).scatter(1, kept, order)
        stays = take(x, behind(kept, prefix))
        sizes = None if sizes is None else sizes.gather(1, kept)
        if self.fuse:
            left = scores.scatter(1, kept, 0.0)
            with in_full(x):
                fused = left.unsqueeze(1).to(x.dtype) @ x[:, prefix:]
            stays = torch.cat([stays, fused], dim=1)
            kept = torch.cat([kept, left.argmax(dim=1, keepdim=True)], dim=1)
            sizes = None if sizes is None else torch.nn.functional.pad(sizes, (0, 1), value=1.0)
        return Reduction(stays, kept, carriers, sizes)


def attention_to(
    attended: Attended, rows: int = 1, sizes: Tensor | None = None, *, by_value: bool = False
) -> Tensor:
    """How much each token is attended to, mean over heads: B N, in float32 or wider, of sum one.

    Args:
        rows: the mean of the attention rows of this many first tokens, the same as in the full map;
            0: the row of the mean query, which ranks like the mean of all rows, at the cost of one.
        sizes: B P: how many patches each of the last P tokens stands for.
        by_value: times the length of each token's value, head by head, and of sum one again.
    """
    q, k, v = (wide(t) for t in attended[1:])
    asking = q[:, :, :rows] if rows else q.mean(dim=2, keepdim=True)
    with in_full(q):
        logits = (asking @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if sizes is not None:
        logits = logits + torch.nn.functional.pad(
            sizes.log(), (k.shape[2] - sizes.shape[1], 0)
        ).unsqueeze(1).unsqueeze(1)
    weights: Tensor = logits.softmax(dim=-1).mean(dim=2)
    if not by_value:
        return weights.mean(dim=1)
    weighted: Tensor = (weights * v.norm(dim=-1)).sum(dim=1)
    return weighted / weighted.sum(dim=-1, keepdim=True)
