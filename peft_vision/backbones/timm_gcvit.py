"""timm's Global Context ViT: windows that look at themselves, and at the whole image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import attend, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.gcvit",)

TOKENS = (
    "its blocks attend within windows, which are squares of the whole image: tokens cannot leave"
)

GLOBAL = (
    "the queries of its heads come from one map of the whole image, which other blocks read too"
)


def windows(attention: Any, x: Tensor, q_global: Tensor | None = None) -> Tensor:
    """Attention within windows, B N C."""
    q, k, v = split(attention.qkv(x), 3, attention.num_heads)
    bias = attention.rel_pos.get_bias()
    return project(attention, attend(attention, q, k, v, bias))


LOCAL = AttentionParts(
    qkv=("qkv",),
    out="proj",
    head_dim=None,
    heads=("num_heads",),
    per_head=(("rel_pos.relative_position_bias_table", 1), ("rel_pos.bias_shape", 2)),
    forward=windows,
)


def _attention(module: nn.Module) -> AttentionParts | str | None:
    from timm.models.gcvit import WindowAttentionGlobal

    if type(module) is not WindowAttentionGlobal:
        return None
    return GLOBAL if module.use_global else LOCAL


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_gcvit", WORDS)
