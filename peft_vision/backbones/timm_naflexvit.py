"""timm's NaFlexViT: ViTs on images of any size and shape."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.backbones.timm_vit import ATTENTION
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.naflexvit",)

TOKENS = "its patches come with a mask and with places of their own, which tokens would take along"
WIDTH = "its patches are embedded in several ways"


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.layers import Attention

    return ATTENTION if type(module) is Attention else None


WORDS = _stages.Words(attention=_attention, tokens=TOKENS, width=WIDTH)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_naflexvit", WORDS)
