"""timm's MetaFormers: PoolFormer, ConvFormer, CAFormer."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import plain
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.metaformer",)

TOKENS = "its first stages mix the image of all patches by pooling or convolutions"


PLAIN = AttentionParts(
    qkv=("qkv",), out="proj", heads=("num_heads",), width=("attention_dim",), forward=plain
)


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.metaformer import Attention

    return PLAIN if type(module) is Attention else None


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_metaformer", WORDS)
