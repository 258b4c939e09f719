"""transformers' image encoders of Segment Anything, 1 and 2."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = (
    "transformers.models.sam.modeling_sam",
    "transformers.models.sam2.modeling_sam2",
)

TOKENS = "most of its blocks attend within windows, which are squares of the whole image"

FUSED = AttentionParts(qkv=("qkv",), out="proj", head_dim=None, heads=("num_attention_heads",))
MLP = MlpParts(up=("lin1",), down="lin2")


def _attention(module: nn.Module) -> AttentionParts | None:
    from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionSdpaAttention
    from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleAttention

    known = (SamVisionAttention, SamVisionSdpaAttention, Sam2MultiScaleAttention)
    return FUSED if type(module) in known else None


def _mlp(module: nn.Module) -> MlpParts | None:
    from transformers.models.sam.modeling_sam import SamMLPBlock

    return MLP if type(module) is SamMLPBlock else None


WORDS = _stages.Words(attention=_attention, mlp=_mlp, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "hf_sam", WORDS)
