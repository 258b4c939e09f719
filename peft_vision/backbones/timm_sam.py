"""timm's image encoder of Segment Anything: windows, and a few blocks over all patches."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.vision_transformer_sam",)

TOKENS = "most of its blocks attend within windows, which are squares of the whole image"
WIDTH = "its neck and its windows read the stream as an image"

IMAGE = AttentionParts(qkv=("qkv",), out="proj", heads=("num_heads",))


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.vision_transformer_sam import Attention

    return IMAGE if type(module) is Attention else None


WORDS = _stages.Words(attention=_attention, tokens=TOKENS, width=WIDTH)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_sam", WORDS)
