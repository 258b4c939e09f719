"""timm's NesT: attention within blocks of the image, which are merged stage by stage."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import attended, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.nest",)

TOKENS = "its blocks of patches are squares of the whole image: tokens cannot leave"


def nested(attention: Any, x: Tensor) -> Tensor:
    """Attention within blocks, B T N C; the heads stand innermost behind it."""
    q, k, v = split(attention.qkv(x), 3, attention.num_heads)
    heads = attended(attention, q, k, v)
    return project(attention, heads.permute(0, 1, 3, 4, 2).flatten(-2))


NESTED = AttentionParts(
    qkv=("qkv",),
    out="proj",
    head_dim=None,
    heads=("num_heads",),
    heads_last=True,
    forward=nested,
)


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.nest import Attention

    return NESTED if type(module) is Attention else None


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_nest", WORDS)
