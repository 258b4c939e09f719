"""timm's EfficientViT of Microsoft Research: heads that feed each other."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.mlp import MlpParts

MODULES = ("timm.models.efficientvit_msra",)

TOKENS = "its blocks convolve the image of all patches: tokens cannot leave"

CASCADE = "each of its heads reads what the one before it gave (cascaded groups)"
MLP = MlpParts(up=("pw1.conv",), down="pw2.conv", between=("pw1.bn",))


def _attention(module: nn.Module) -> str | None:
    from timm.models.efficientvit_msra import CascadedGroupAttention

    return CASCADE if type(module) is CascadedGroupAttention else None


def _mlp(module: nn.Module) -> MlpParts | None:
    from timm.models.efficientvit_msra import ConvMlp

    return MLP if type(module) is ConvMlp else None


WORDS = _stages.Words(attention=_attention, mlp=_mlp, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_efficientvit", WORDS)
