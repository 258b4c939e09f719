"""Token reorganization (EViT; Liang et al., ICLR 2022): inattentive patches leave on the way.

At a few depths, between attention and MLP, the patches that the class token attends to least are
dropped, or fused into one token. The fused attention kernel stays: only the class token's row of
the attention map is recomputed beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peft_vision.backbones.sites import Backbone, TokensSite
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.attention import Attended
from peft_vision.layers.trunk import Reducer, Reduction
from peft_vision.method import Evidence, Method, Stage, check_range
from peft_vision.plan import Decisions


@dataclass(frozen=True)
class TokenReorganization(Method):
    """Keep a share of the patches at given depths, by the attention of the class token."""

    keep_rate: float = 0.7
    """Share of the patches that stay at each depth, in (0, 1]."""

    at: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Depths at which patches leave, as shares of the model's depth, each in [0, 1)."""

    fuse: bool = True
    """Fuse the patches that leave into one token, weighted by their attention."""

    stage: ClassVar[Stage] = Stage.TOKENS
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "latency_ms"})

    def __post_init__(self) -> None:
        check_range("keep_rate", self.keep_rate, 1e-6, 1.0)
        if not self.at or any(not 0 <= depth < 1 for depth in self.at):
            raise BadSetting(f"at is {self.at!r}; it has to be one or more depths in [0, 1).")

    @property
    def strength(self) -> float:
        """One minus the keep rate."""
        return 1.0 - self.keep_rate

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per block that reduces, the keep rate."""
        site = _tokens(backbone)
        if strength <= 0:
            return {}
        depth = len(backbone.blocks)
        present = site.trunk_if_any()
        taken = set(present.reducers) if present is not None else set()
        indices = sorted({min(depth - 1, round(share * depth)) for share in self.at})
        return {
            f"blocks.{i}.tokens": {"keep_rate": 1.0 - strength, "fuse": self.fuse}
            for i in indices
            if str(i) not in taken
        }

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Open the blocks' trunk and put a reducer into each block named."""
        if not decisions:
            return
        trunk = _tokens(backbone).trunk()
        for key, decision in decisions.items():
            if not isinstance(decision, dict):
                raise UnsupportedSite(f"{key}: not a decision on tokens: {decision!r}.")
            reducer = ClassAttentionReducer(
                float(decision["keep_rate"]),  # type: ignore[arg-type]
                fuse=bool(decision["fuse"]),
            )
            trunk.reducers[key.split(".")[1]] = reducer


def _tokens(backbone: Backbone) -> TokensSite:
    backbone.require("tokens")
    site = backbone.tokens
    if site is None or site.class_tokens != 1:
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} has no class token whose attention could rank "
            "patches."
        )
    if site.pooling != "class":
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} pools by {site.pooling}: dropping patches would "
            "change what the head reads. Models that read the class token alone are supported."
        )
    return site


class ClassAttentionReducer(Reducer):
    """Keeps the ceil(keep_rate * N) patches that the class token attends to most."""

    def __init__(self, keep_rate: float, *, fuse: bool) -> None:
        super().__init__()
        self.keep_rate = keep_rate
        self.fuse = fuse

    @property
    def fused(self) -> int:
        """One when the rest is fused."""
        return int(self.fuse)

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"keep_rate={self.keep_rate:g}, fuse={self.fuse}"

    def forward(
        self, x: Tensor, attended: Attended, prefix: int, sizes: Tensor | None
    ) -> Reduction | None:
        """See `Reducer.forward`; the patches that stay keep their order."""
        patches = x.shape[1] - prefix
        count = min(patches, max(1, math.ceil(self.keep_rate * patches - 1e-9)))
        if count + self.fused >= patches:  # nothing would be saved
            return None
        scores = class_attention(attended.q, attended.k)[:, prefix:]
        kept = scores.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
        order = torch.arange(count, device=x.device).expand_as(kept)
        carriers = torch.full_like(scores, -1, dtype=torch.long).scatter(1, kept, order)
        parts = [x[:, :prefix], _take(x[:, prefix:], kept)]
        if self.fuse:
            left = scores.scatter(1, kept, 0.0)
            parts.append(left.unsqueeze(1).to(x.dtype) @ x[:, prefix:])
            kept = torch.cat([kept, left.argmax(dim=1, keepdim=True)], dim=1)
        return Reduction(torch.cat(parts, dim=1), kept, carriers)


def class_attention(q: Tensor, k: Tensor) -> Tensor:
    """The class token's attention to all tokens, mean over heads: B N, in float32 or wider.

    The same as the class row of the full map, at a cost of N x heads x head_dim.
    """
    row = (q[:, :, :1].to(_wide(q)) @ k.to(_wide(k)).transpose(-2, -1)) * q.shape[-1] ** -0.5
    scores: Tensor = row.softmax(dim=-1).mean(dim=1).squeeze(1)
    return scores


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _take(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
