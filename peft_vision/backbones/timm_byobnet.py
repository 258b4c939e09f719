"""timm's networks made of blocks, where they hold transformers: MobileViT, v1 and v2."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.backbones.timm_vit import ATTENTION
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.byobnet",)

TOKENS = (
    "its patches are unfolded from what convolutions give, and folded back: tokens cannot leave"
)


def _attention(module: nn.Module) -> AttentionParts | str | None:
    from timm.layers import Attention
    from timm.models.mobilevit import LinearSelfAttention

    if type(module) is LinearSelfAttention:
        return "its attention is linear, with one query for all patches and no heads"
    return ATTENTION if type(module) is Attention else None


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_byobnet", WORDS)
