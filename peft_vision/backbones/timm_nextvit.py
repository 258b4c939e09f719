"""timm's Next-ViT: convolutions, and attention to an image made smaller, in turns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import attend, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.nextvit",)

TOKENS = "its blocks convolve the image of all patches: tokens cannot leave"


def reduced(attention: Any, x: Tensor) -> Tensor:
    """Queries of all places, keys and values of some: B N C."""
    heads = attention.num_heads
    (q,) = split(attention.q(x), 1, heads)
    if attention.sr is not None:
        x = attention.norm(attention.sr(x.transpose(1, 2))).transpose(1, 2)
    (k,), (v,) = (split(layer(x), 1, heads) for layer in (attention.k, attention.v))
    return project(attention, attend(attention, q, k, v))


REDUCED = AttentionParts(qkv=("q", "k", "v"), out="proj", heads=("num_heads",), forward=reduced)


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.nextvit import EfficientAttention

    return REDUCED if type(module) is EfficientAttention else None


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_nextvit", WORDS)
