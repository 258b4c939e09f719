"""timm's XCiT: attention between features instead of patches."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import joined, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.backbones.timm_cait import LATE
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.xcit",)

TOKENS = (
    "its patches are convolved with their neighbors in every block, as an image of all of them: "
    "tokens cannot leave"
)


def crossed(attention: Any, x: Tensor) -> Tensor:
    """Attention between the features of a head, B N C."""
    q, k, v = split(attention.qkv(x), 3, attention.num_heads)
    q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)  # over the patches
    weights = (q.transpose(-2, -1) @ k * attention.temperature).softmax(dim=-1)
    weights = attention.attn_drop(weights)
    return project(attention, joined(v @ weights.transpose(-2, -1)))


CROSSED = AttentionParts(
    qkv=("qkv",),
    out="proj",
    head_dim=None,
    heads=("num_heads",),
    per_head=(("temperature", 0),),
    forward=crossed,
)


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.cait import ClassAttn
    from timm.models.xcit import XCA

    return {XCA: CROSSED, ClassAttn: LATE}.get(type(module))


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_xcit", WORDS)
