"""timm's CaiT: heads that are mixed with each other, and a class token that comes late."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import attend, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.cait",)

TOKENS = (
    "the class token, by which patches could be ranked, joins them only behind the last block that "
    "they pass"
)

MIXED = "its heads are mixed by linears before and behind the softmax (talking heads)"


def late(attention: Any, x: Tensor) -> Tensor:
    """What the class token, the first one, reads of all: B 1 C, of B N C."""
    heads = attention.num_heads
    (q,) = split(attention.q(x[:, :1]), 1, heads)
    (k,), (v,) = (split(layer(x), 1, heads) for layer in (attention.k, attention.v))
    return project(attention, attend(attention, q, k, v))


LATE = AttentionParts(
    qkv=("q", "k", "v"), out="proj", head_dim=None, heads=("num_heads",), forward=late
)


def _attention(module: nn.Module) -> AttentionParts | str | None:
    from timm.models.cait import ClassAttn, TalkingHeadAttn

    known: dict[type, AttentionParts | str] = {ClassAttn: LATE, TalkingHeadAttn: MIXED}
    return known.get(type(module))


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_cait", WORDS)
