"""timm's ViTs with a bias for every pair of patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import attend, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.vision_transformer_relpos",)

TOKENS = (
    "its attention has a bias for every pair of places on the grid, which tokens would take along"
)
WIDTH = "its blocks are not opened at their norms"
SHARED = "all blocks share one table of biases with an entry for each head"


def relative(attention: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    """Attention with a bias for every pair of tokens, B N C."""
    q, k, v = split(attention.qkv(x), 3, attention.num_heads)
    bias = attention.rel_pos.get_bias()
    return project(attention, attend(attention, attention.q_norm(q), attention.k_norm(k), v, bias))


RELATIVE = AttentionParts(
    qkv=("qkv",),
    out="proj",
    heads=("num_heads",),
    per_head=(
        ("rel_pos.mlp.fc2", 0),
        ("rel_pos.num_heads", 0),
        ("rel_pos.relative_position_bias_table", 1),
        ("rel_pos.bias_shape", 2),
    ),
    forward=relative,
)


def _attention(module: nn.Module) -> AttentionParts | str | None:
    from timm.models.vision_transformer_relpos import RelPosAttention

    if type(module) is not RelPosAttention:
        return None
    return SHARED if module.rel_pos is None else RELATIVE


WORDS = _stages.Words(attention=_attention, tokens=TOKENS, width=WIDTH)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_relpos", WORDS)
