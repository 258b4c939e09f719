"""Somebody's attention module, computed by a function that knows how with any number of heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.attention import Attended, OwnAttention


class ComputedAttention(OwnAttention):
    """For modules whose own forward assumes that heads x head_dim equals the width of the stream.

    `parts.forward` computes the same from the module's parts; it takes what the module takes.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the family's module would give."""
        if self.parts.forward is None:
            raise AssertionError("only for parts that say how the module is computed")
        return self.parts.forward(self.attention, *args, **kwargs)

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
        """Refused: such modules attend within windows, or to what their block hands them.

        Raises:
            UnsupportedSite: always.
        """
        raise UnsupportedSite(
            f"{type(self.attention).__name__} cannot be run on a sequence of tokens alone."
        )
