"""Attention of ours that is called in the family's own way, whatever the family's library."""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.attention import OwnAttention
from peft_vision.layers.attention_parts import AttentionParts

POSITIONS = ("rope", "position_embeddings")


class HousedAttention(OwnAttention, ABC):
    """An `OwnAttention` that a block may call as it calls the module inside.

    Blocks of transformers pass an attention mask after the tokens and take (output, weights) back;
    those of timm pass keywords and take the output.

    Attributes:
        paired: the family's module returns (output, weights).
    """

    def __init__(self, attention: nn.Module, parts: AttentionParts) -> None:
        super().__init__(attention, parts)
        self.paired = type(attention).__module__.startswith("transformers.")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The branch's output B N C, or a pair of it and None.

        Raises:
            UnsupportedSite: attention was to be causal.
        """
        if kwargs.get("is_causal"):
            raise UnsupportedSite(
                f"{type(self).__name__} lets every token see all others and was called as causal "
                "attention. Call the model without is_causal."
            )
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        second = args[1] if len(args) > 1 else None
        rope = next((kwargs[n] for n in POSITIONS if kwargs.get(n) is not None), None)
        if not self.paired:
            return self.called(x, rope if second is None else second, kwargs.get("attn_mask"))
        mask = kwargs.get("attention_mask") if second is None else second
        if mask is not None and mask.dtype == torch.bool and torch.compiler.is_exporting():
            mask = None  # transformers then makes one that hides nothing, to look at no number
        return self.called(x, rope, mask), None

    def called(self, x: Tensor, rope: Any, mask: Tensor | None) -> Tensor:
        """The output alone, for a block that asks for nothing else.

        Args:
            mask: true, or a number added to the logits, where a query may see a key; broadcasts to
                B H N N.
        """
        return self.branch(x, rope, attn_mask=mask).branch


def mask_of(mask: Tensor | None, rows: int | None) -> Tensor | None:
    """A mask that broadcasts to B H N N, for this many first queries; None for all."""
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., :rows, :]


def bias_of(mask: Tensor | None, key_bias: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to logits, as attention kernels take it: the mask, or the bias of the keys.

    Args:
        mask: broadcasts to B H N N. `key_bias`: B N; takes the mask's place, see `attend`.
    """
    if key_bias is not None:
        return key_bias[:, None, None, :].to(q.dtype)
    return mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
