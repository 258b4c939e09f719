"""Queries and keys as sites: how wide they are in each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from peft_vision.backbones.sites import Backbone
from peft_vision.errors import UnsupportedSite
from peft_vision.layers.attention import OwnAttention, attention_inside, is_free
from peft_vision.layers.attention_parts import AttentionParts, head_count, head_dim, query_dim
from peft_vision.layers.head_surgery import keep_queries
from peft_vision.layers.narrow_attention import NarrowAttention


@dataclass(frozen=True)
class QueriesSite:
    """The queries and keys of one attention module, whose products alone matter.

    Attributes:
        owner: the block; `attribute` names its attention module.
    """

    key: str
    owner: nn.Module
    attribute: str
    parts: AttentionParts
    block: int

    @property
    def attention(self) -> nn.Module:
        """The family's attention module."""
        return attention_inside(getattr(self.owner, self.attribute))

    @property
    def count(self) -> int:
        """How many heads there are."""
        return head_count(self.attention, self.parts)

    @property
    def width(self) -> int:
        """How many features of a head are compared."""
        return query_dim(self.attention, self.parts)

    @property
    def mates(self) -> list[int] | None:
        """With which other feature each one is rotated; None where nothing is."""
        if self.parts.rotate is None or self.parts.mates is None:
            return None
        return self.parts.mates(self.attention, head_dim(self.attention, self.parts))

    def why_not(self) -> str:
        """What keeps features from being removed, in words; empty when nothing does."""
        if self.parts.pieces is not None or self.parts.forward is not None:
            return f"{type(self.attention).__name__} is not computed from queries and keys alone"
        norms = (self.parts.q_norm, self.parts.k_norm)
        found = [getattr(self.attention, name) for name in norms if name is not None]
        if any(norm is not None and not isinstance(norm, nn.Identity) for norm in found):
            return "queries and keys are normed over all of their features"
        if self.parts.rotate is not None and self.parts.mates is None:
            return "which features are rotated together is not known"
        module = getattr(self.owner, self.attribute)
        if self.mates is not None and not is_free(module):
            return (
                f"its queries are rotated, and {type(module).__name__} stands in its place; "
                "cut them first"
            )
        return ""

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep these features of each head's queries and keys, in place.

        Args:
            kept: of each head, as many.

        Raises:
            UnsupportedSite: none would be left, heads are not as many, or a layer has no rule.
        """
        if len(kept) != self.count:
            raise UnsupportedSite(
                f"{self.key} had {len(kept)} heads when its features were ranked and has "
                f"{self.count} now. Cut queries and keys in one call and heads in a second one."
            )
        if not kept or not kept[0] or len({len(features) for features in kept}) > 1:
            raise UnsupportedSite(f"{self.key}: one feature at least stays, in all heads alike.")
        module: nn.Module = getattr(self.owner, self.attribute)
        if isinstance(module, OwnAttention) and self.mates is None:
            module.keep_queries(kept)
            return
        module = self.attention
        keep_queries(module, self.parts, kept)
        places = None
        if self.mates is not None:
            device = next(module.parameters()).device
            places = torch.tensor([list(features) for features in kept], device=device)
        setattr(self.owner, self.attribute, NarrowAttention(module, self.parts, places))


def queries_in(backbone: Backbone) -> tuple[QueriesSite, ...]:
    """A site for each attention module, whether its features can be removed or not."""
    return tuple(
        QueriesSite(f"blocks.{s.block}.queries", s.owner, s.attribute, s.parts, s.block)
        for s in backbone.heads
    )
