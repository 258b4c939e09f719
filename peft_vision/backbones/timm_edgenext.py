"""timm's EdgeNeXt: convolutions, and attention between features."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.backbones.timm_xcit import CROSSED
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.edgenext",)

TOKENS = "its blocks convolve the image of all patches: tokens cannot leave"


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.edgenext import CrossCovarianceAttn

    return CROSSED if type(module) is CrossCovarianceAttn else None


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_edgenext", WORDS)
