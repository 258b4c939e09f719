"""timm's MaxViT, MaxxViT, CoAtNet and CoAtNeXt: convolutions, and attention in blocks and grids."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.maxxvit",)

TOKENS = (
    "its attention runs within blocks and grids of an image that convolutions see whole: tokens "
    "cannot leave"
)

BIASES = (
    ("rel_pos.mlp.fc2", 0),
    ("rel_pos.num_heads", 0),
)
"""Of a bias that an MLP gives; the two kinds of tables differ in which axis is the heads'."""


def _attention(module: Any) -> AttentionParts | None:
    from timm.layers import RelPosBiasTf
    from timm.models.maxxvit import Attention2d, AttentionCl

    if type(module) not in (Attention2d, AttentionCl):
        return None
    axis = 0 if isinstance(module.rel_pos, RelPosBiasTf) else 1
    return AttentionParts(
        qkv=("qkv",),
        pieces=(1,) if module.head_first else (3,),
        out="proj",
        head_dim="dim_head",
        heads=("num_heads",),
        per_head=(
            *BIASES,
            ("rel_pos.relative_position_bias_table", axis),
            ("rel_pos.bias_shape", 2 * axis),
        ),
    )


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_maxxvit", WORDS)
