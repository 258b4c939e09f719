"""timm's Hiera, and the one in SAM 2: attention within units whose queries are pooled."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.hiera", "timm.models.hieradet_sam2")

TOKENS = (
    "its attention pools neighboring patches, which stand in a fixed order of the whole image: "
    "tokens cannot leave"
)

UNITS = AttentionParts(qkv=("qkv",), out="proj", heads=("heads",), width=("dim_out",))
DETECTOR = AttentionParts(qkv=("qkv",), out="proj", head_dim=None, heads=("num_heads",))


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.hiera import MaskUnitAttention
    from timm.models.hieradet_sam2 import MultiScaleAttention

    return {MaskUnitAttention: UNITS, MultiScaleAttention: DETECTOR}.get(type(module))


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_hiera", WORDS)
