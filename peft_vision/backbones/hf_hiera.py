"""transformers' Hiera: attention within units whose queries are pooled."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = ("transformers.models.hiera.modeling_hiera",)

TOKENS = (
    "its attention pools neighboring patches, which stand in a fixed order of the whole image: "
    "tokens cannot leave"
)

UNITS = AttentionParts(
    qkv=("qkv",), out="proj", heads=("num_heads",), width=("hidden_size_output",)
)
MLP = MlpParts(up=("fc1",), down="fc2")


def _attention(module: nn.Module) -> AttentionParts | None:
    from transformers.models.hiera.modeling_hiera import HieraMaskUnitAttention

    return UNITS if type(module) is HieraMaskUnitAttention else None


def _mlp(module: nn.Module) -> MlpParts | None:
    from transformers.models.hiera.modeling_hiera import HieraMlp

    return MLP if type(module) is HieraMlp else None


WORDS = _stages.Words(attention=_attention, mlp=_mlp, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "hf_hiera", WORDS)
