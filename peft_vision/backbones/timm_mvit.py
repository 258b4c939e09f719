"""timm's MViT v2: queries, keys and values pooled by a convolution that heads share."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.mvitv2",)

TOKENS = (
    "its attention pools queries, keys and values as images of all patches: tokens cannot leave"
)

SCALES = AttentionParts(qkv=("qkv",), out="proj", heads=("num_heads",), width=("dim_out",))
POOLED_FIRST = "its heads share the pooled image that they read"
UNSHARED = "a convolution of its own pools each of its heads"


def _attention(module: nn.Module) -> AttentionParts | str | None:
    from timm.models.mvitv2 import MultiScaleAttention, MultiScaleAttentionPoolFirst

    if type(module) is MultiScaleAttention:
        return UNSHARED if module.unshared else SCALES
    return POOLED_FIRST if type(module) is MultiScaleAttentionPoolFirst else None


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_mvit", WORDS)
