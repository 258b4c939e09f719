"""timm's VOLO: outlooks, attention over the image, and class tokens at the end."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import attend, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = ("timm.models.volo",)

TOKENS = "its first blocks read the neighbors of every patch on the image: tokens cannot leave"


def outlook(attention: Any, x: Tensor) -> Tensor:
    """Each place gives weights for the pairs of places around it: B H W C."""
    batch, rows, columns, _ = x.shape
    heads, area = attention.num_heads, attention.kernel_size**2
    around = attention.unfold(attention.v(x).permute(0, 3, 1, 2))
    values = around.unflatten(1, (heads, -1, area)).permute(0, 1, 4, 3, 2)
    places = attention.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    logits = attention.attn(places).flatten(1, 2).unflatten(-1, (heads, area, area))
    weights = (logits.transpose(1, 2) * attention.scale).softmax(dim=-1)
    out = (attention.attn_drop(weights) @ values).permute(0, 1, 4, 3, 2)
    image = F.fold(
        out.reshape(batch, -1, out.shape[-1]),
        output_size=(rows, columns),
        kernel_size=attention.kernel_size,
        padding=attention.padding,
        stride=attention.stride,
    )
    return project(attention, image.permute(0, 2, 3, 1))


def over_image(attention: Any, x: Tensor) -> Tensor:
    """Attention between all places, B H W C."""
    q, k, v = split(attention.qkv(x.flatten(1, 2)), 3, attention.num_heads)
    y = attend(attention, q, k, v)
    return project(attention, y.unflatten(1, x.shape[1:3]))  # type: ignore[no-untyped-call]


OUTLOOK = AttentionParts(
    qkv=("v", "attn"),
    pieces=(1, 1),
    out="proj",
    head_dim=None,
    heads=("num_heads",),
    forward=outlook,
)
IMAGE = AttentionParts(
    qkv=("qkv",), out="proj", head_dim=None, heads=("num_heads",), forward=over_image
)
CLASS = AttentionParts(qkv=("q", "kv"), pieces=(1, 2), out="proj", heads=("num_heads",))


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.volo import Attention, ClassAttention, OutlookAttention

    return {OutlookAttention: OUTLOOK, Attention: IMAGE, ClassAttention: CLASS}.get(type(module))


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_volo", WORDS)
