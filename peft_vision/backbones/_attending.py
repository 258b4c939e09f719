"""Attention from the parts of modules whose own forward cannot do with fewer heads.

Tensors: N tokens, H heads of D features each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def split(flat: Tensor, pieces: int, heads: int) -> tuple[Tensor, ...]:
    """... N (pieces H D) -> `pieces` of ... H N D."""
    apart: Tensor = flat.unflatten(-1, (pieces, heads, -1))  # type: ignore[no-untyped-call]
    return tuple(piece.transpose(-3, -2) for piece in apart.unbind(-3))


def joined(heads: Tensor) -> Tensor:
    """... H N D -> ... N (H D)."""
    return heads.transpose(-3, -2).flatten(-2)


def attended(attention: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention with the module's own scale and dropout: ... H N D.

    Args:
        bias: added to the logits, broadcast to ... H N N.
    """
    dropout = getattr(attention, "attn_drop", None)
    probability = float(dropout.p) if attention.training and dropout is not None else 0.0
    before = q.shape[:-3]  # kernels, and what exports them, know one axis before the heads
    q, k, v = (heads.reshape(-1, *heads.shape[-3:]) for heads in (q, k, v))
    heads = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=probability, scale=float(attention.scale)
    )
    return heads.reshape(*before, *heads.shape[-3:])


def attend(attention: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same, heads side by side: ... N (H D)."""
    return joined(attended(attention, q, k, v, bias))


def project(attention: Any, x: Tensor) -> Tensor:
    """Through the output projection, and the dropout behind it if there is one."""
    y: Tensor = attention.proj(x)
    dropout = getattr(attention, "proj_drop", None)
    return y if dropout is None else dropout(y)


def biased(attention: Any, x: Tensor) -> Tensor:
    """Queries, keys and values by a linear whose biases are held apart: ... N 3HD."""
    flat: Tensor = attention.qkv(x)
    if attention.q_bias is None:
        return flat
    return flat + torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def plain(attention: Any, x: Tensor) -> Tensor:
    """Self-attention from one fused linear, over the last but one axis: ... N C."""
    q, k, v = split(attention.qkv(x), 3, attention.num_heads)
    return project(attention, attend(attention, q, k, v))
