"""timm's ConViT: attention by position and by content, weighed by a gate for each head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import joined, plain, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.convit",)

TOKENS = "its attention weighs each pair of patches by where the two stand on the whole grid"


def gated(attention: Any, x: Tensor) -> Tensor:
    """Gated positional self-attention, B N C."""
    count = x.shape[1]
    if attention.rel_indices is None or attention.rel_indices.shape[1] != count:
        attention.rel_indices = attention.get_rel_indices(count)
    q, k = split(attention.qk(x), 2, attention.num_heads)
    (v,) = split(attention.v(x), 1, attention.num_heads)
    content = (q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)
    place = attention.pos_proj(attention.rel_indices).permute(0, 3, 1, 2).softmax(dim=-1)
    gate = attention.gating_param.sigmoid().view(1, -1, 1, 1)
    weights = (1.0 - gate) * content + gate * place
    weights = attention.attn_drop(weights / weights.sum(dim=-1, keepdim=True))
    return project(attention, joined(weights @ v))


GATED = AttentionParts(
    qkv=("qk", "v"),
    pieces=(2, 1),
    out="proj",
    head_dim=None,
    heads=("num_heads",),
    per_head=(("gating_param", 0), ("pos_proj", 0)),
    forward=gated,
)
PLAIN = AttentionParts(qkv=("qkv",), out="proj", head_dim=None, heads=("num_heads",), forward=plain)


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.convit import GPSA, MHSA

    return {GPSA: GATED, MHSA: PLAIN}.get(type(module))


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_convit", WORDS)
