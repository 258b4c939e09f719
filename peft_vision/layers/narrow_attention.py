"""Attention whose queries and keys are narrower than its values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.layers.attention import Attended, branch_of
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.head_surgery import keep_heads
from peft_vision.layers.housed_attention import HousedAttention, bias_of, mask_of
from peft_vision.layers.surgery import select_parameter


class NarrowAttention(HousedAttention):
    """Somebody's attention module, computed from its parts.

    For families whose own forward takes queries, keys and values to be of one width.

    Attributes:
        places: H n: where in a head the features that are left of queries and keys were. With it
            they are put back among zeros before they are rotated; None without rotary positions.
    """

    places: Tensor | None

    def __init__(
        self, attention: nn.Module, parts: AttentionParts, places: Tensor | None = None
    ) -> None:
        super().__init__(attention, parts)
        self.register_buffer("places", places)
        self.train(attention.training)

    @property
    def free(self) -> bool:
        """Where the linears inside say everything."""
        return self.places is None

    def keep_heads(self, heads: Sequence[int]) -> None:
        """Keep whole heads, in place."""
        keep_heads(self.attention, self.parts, heads)
        if self.places is not None:
            select_parameter(self, "places", heads)

    def keep_queries(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep some of the features that are left, in place."""
        super().keep_queries(kept)
        if self.places is not None:
            index = torch.tensor([list(features) for features in kept], device=self.places.device)
            self.places = self.places.gather(1, index)

    def branch(
        self,
        x: Tensor,
        rope: Any = None,
        *,
        rows: int | None = None,
        key_bias: Tensor | None = None,
        whole: bool = False,
        **masks: Any,
    ) -> Attended:
        """See `branch_of`."""
        mask = mask_of(bias_of(masks.get("attn_mask"), None, x), rows)
        return branch_of(
            self.attention,
            self.parts,
            x,
            rope,
            rows=rows,
            key_bias=key_bias,
            places=self.places,
            attn_mask=mask,
        )
