"""timm's Visformer: convolutions first, then attention by 1 x 1 convolutions."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = ("timm.models.visformer",)

TOKENS = "its stages halve the image of all patches by convolutions: tokens cannot leave"

IMAGE = AttentionParts(qkv=("qkv",), out="proj", heads=("num_heads",))
POINTWISE = MlpParts(up=("conv1",), down="conv3")


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.visformer import Attention

    return IMAGE if type(module) is Attention else None


def _mlp(module: Any) -> MlpParts | None:
    from timm.models.visformer import SpatialMlp

    # A convolution in groups between the two mixes units, which then cannot go one by one.
    alone = type(module) is SpatialMlp and module.conv2 is None
    return POINTWISE if alone else None


WORDS = _stages.Words(attention=_attention, mlp=_mlp, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_visformer", WORDS)
