"""transformers' MobileViT: transformers between convolutions."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = ("transformers.models.mobilevit.modeling_mobilevit",)

TOKENS = (
    "its patches are unfolded from what convolutions give, and folded back: tokens cannot leave"
)

ATTENTION = AttentionParts(
    qkv=("attention.query", "attention.key", "attention.value"),
    out="output.dense",
    head_dim="attention.attention_head_size",
    heads=("attention.num_attention_heads",),
    width=("attention.all_head_size",),
)
HALVES = MlpParts(up=("intermediate.dense",), down="output.dense")


def _attention(module: nn.Module) -> AttentionParts | None:
    from transformers.models.mobilevit.modeling_mobilevit import MobileViTAttention

    return ATTENTION if type(module) is MobileViTAttention else None


def _mlp(module: nn.Module) -> None:
    return None


def _own_mlp(module: nn.Module) -> MlpParts | None:
    from transformers.models.mobilevit.modeling_mobilevit import MobileViTTransformerLayer

    return HALVES if type(module) is MobileViTTransformerLayer else None


WORDS = _stages.Words(attention=_attention, mlp=_mlp, own_mlp=_own_mlp, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "hf_mobilevit", WORDS)
