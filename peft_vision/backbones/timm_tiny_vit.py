"""timm's TinyViT: convolutions, then attention within windows."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = ("timm.models.tiny_vit",)

TOKENS = (
    "its blocks attend within windows, which are squares of the whole image: tokens cannot leave"
)

WINDOWS = AttentionParts(
    qkv=("qkv",),
    pieces=(1,),
    out="proj",
    head_dim=None,
    heads=("num_heads",),
    width=("out_dim",),
    per_head=(("attention_biases", 0),),
    caches=("attention_bias_cache",),
)
MLP = MlpParts(up=("fc1",), down="fc2")


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.tiny_vit import Attention

    return WINDOWS if type(module) is Attention else None


def _mlp(module: nn.Module) -> MlpParts | None:
    from timm.models.tiny_vit import NormMlp

    return MLP if type(module) is NormMlp else None


WORDS = _stages.Words(attention=_attention, mlp=_mlp, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_tiny_vit", WORDS)
