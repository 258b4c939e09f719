"""timm's Swin Transformers: v1, v2, and the v2 of C. Reich."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.backbones import _stages
from peft_vision.backbones._attending import biased, joined, project, split
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts

MODULES = (
    "timm.models.swin_transformer",
    "timm.models.swin_transformer_v2",
    "timm.models.swin_transformer_v2_cr",
)

TOKENS = (
    "its blocks attend within windows, which are squares of the whole image, and patches are "
    "merged by fours: tokens cannot leave"
)


def second(attention: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Swin v2's attention within windows, B N C: cosines, scaled per head, and a bias of an MLP."""
    q, k, v = split(biased(attention, x), 3, attention.num_heads)
    size = x.shape[1]
    table = attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads)
    bias = table[attention.relative_position_index.view(-1)].view(size, size, -1)
    bias = 16 * torch.sigmoid(bias.permute(2, 0, 1))
    return _cosines(attention, (q, k, v), attention.logit_scale, bias, mask)


def second_cr(attention: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same where the MLP gives the bias for every pair of a window, B N C."""
    q, k, v = split(attention.qkv(x), 3, attention.num_heads)
    bias = attention._relative_positional_encodings()[0]  # noqa: SLF001
    return _cosines(attention, (q, k, v), attention.logit_scale.view(-1, 1, 1), bias, mask)


def _cosines(
    attention: Any,
    qkv: tuple[Tensor, ...],
    log_scale: Tensor,
    bias: Tensor,
    mask: Tensor | None,
) -> Tensor:
    q, k, v = qkv
    scale = log_scale.clamp(max=math.log(100.0)).exp()
    logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale + bias
    if mask is not None:
        windows: Tensor = logits.unflatten(0, (-1, mask.shape[0]))  # type: ignore[no-untyped-call]
        logits = (windows + mask.unsqueeze(1)).flatten(0, 1)
    weights = attention.attn_drop(logits.softmax(dim=-1))
    return project(attention, joined(weights @ v))


FIRST = AttentionParts(
    qkv=("qkv",),
    out="proj",
    head_dim=None,
    heads=("num_heads",),
    per_head=(("relative_position_bias_table", 1),),
)
SECOND = AttentionParts(
    qkv=("qkv",),
    out="proj",
    head_dim=None,
    heads=("num_heads",),
    biases=("q_bias", "k_bias", "v_bias"),
    per_head=(("logit_scale", 0), ("cpb_mlp.2", 0)),
    forward=second,
)
SECOND_CR = AttentionParts(
    qkv=("qkv",),
    out="proj",
    head_dim=None,
    heads=("num_heads",),
    per_head=(("logit_scale", 0), ("meta_mlp.fc2", 0)),
    forward=second_cr,
)


def _attention(module: nn.Module) -> AttentionParts | None:
    from timm.models.swin_transformer import WindowAttention
    from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
    from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention

    known = {WindowAttention: FIRST, WindowAttentionV2: SECOND, WindowMultiHeadAttention: SECOND_CR}
    return known.get(type(module))


WORDS = _stages.Words(attention=_attention, tokens=TOKENS)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "timm_swin", WORDS)
