"""timm's DaViT: attention within windows, and between groups of channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import joined, plain, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.davit",)

TOKENS = (
    "its blocks attend within windows, which are squares of the whole image, and convolve it: "
    "tokens cannot leave"
)


def channels(attention: Any, x: Tensor) -> Tensor:
    """Attention between the channels of a group, B N C."""
    q, k, v = split(attention.qkv(x), 3, attention.num_heads)
    weights = (k.transpose(-2, -1) * attention.scale @ v).softmax(dim=-1)
    return project(attention, joined(q @ weights.transpose(-2, -1)))


def channels2(attention: Any, x: Tensor) -> Tensor:
    """The same with keys and values in their usual places, B N C."""
    q, k, v = split(attention.qkv(x), 3, attention.groups)
    scale = x.shape[1] if attention.dynamic_scale else attention.head_dim
    weights = (q.transpose(-2, -1) * scale**-0.5 @ k).softmax(dim=-1)
    return project(attention, joined(v @ weights.transpose(-2, -1)))


WINDOWS = AttentionParts(
    qkv=("qkv",), out="proj", head_dim=None, heads=("num_heads",), forward=plain
)
CHANNELS = AttentionParts(
    qkv=("qkv",), out="proj", head_dim=None, heads=("num_heads",), forward=channels
)
CHANNELS2 = AttentionParts(
    qkv=("qkv",), out="proj", head_dim=None, heads=("groups",), forward=channels2
)


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.davit import ChannelAttention, ChannelAttentionV2, WindowAttention

    known = {WindowAttention: WINDOWS, ChannelAttention: CHANNELS, ChannelAttentionV2: CHANNELS2}
    return known.get(type(module))


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_davit", WORDS)
