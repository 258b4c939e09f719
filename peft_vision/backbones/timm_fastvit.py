"""timm's FastViT: convolutions that are merged at the end, and attention late."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import attend, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = ("timm.models.fastvit",)

TOKENS = "its blocks convolve the image of all patches: tokens cannot leave"


def over_image(attention: Any, x: Tensor) -> Tensor:
    """Attention between all places, B C H W."""
    q, k, v = split(attention.qkv(x.flatten(2).transpose(1, 2)), 3, attention.num_heads)
    y = project(attention, attend(attention, q, k, v)).transpose(1, 2)
    return y.unflatten(-1, x.shape[2:])  # type: ignore[no-any-return, no-untyped-call]


IMAGE = AttentionParts(qkv=("qkv",), out="proj", heads=("num_heads",), forward=over_image)
MLP = MlpParts(up=("fc1",), down="fc2")


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.fastvit import Attention

    return IMAGE if type(module) is Attention else None


def _mlp(module: nn.Module) -> MlpParts | None:
    from timm.models.fastvit import ConvMlp

    return MLP if type(module) is ConvMlp else None


WORDS = _stages.Words(attention=_attention, mlp=_mlp, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_fastvit", WORDS)
