"""timm's CrossViT: two streams of patches, whose class tokens read the other one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import attend, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.backbones.timm_vit import ATTENTION
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.crossvit",)

TOKENS = "two streams of patches run side by side, and each class token reads the other stream"


def crossed(attention: Any, x: Tensor) -> Tensor:
    """What the first token reads of all: B 1 C, of B N C."""
    heads = attention.num_heads
    (q,) = split(attention.wq(x[:, :1]), 1, heads)
    (k,), (v,) = (split(layer(x), 1, heads) for layer in (attention.wk, attention.wv))
    return project(attention, attend(attention, q, k, v))


CROSSED = AttentionParts(
    qkv=("wq", "wk", "wv"), out="proj", head_dim=None, heads=("num_heads",), forward=crossed
)


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.layers import Attention
    from timm.models.crossvit import CrossAttention

    return {CrossAttention: CROSSED, Attention: ATTENTION}.get(type(module))


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_crossvit", WORDS)
