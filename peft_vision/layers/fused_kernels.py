"""What the fused attention kernels ask for: one width, and no mask. Heads are B H N D."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EVEN = 8
"""Kernels take widths that are multiples of this."""


def takes_no_mask(q: Tensor) -> bool:
    """Whether the fastest kernel for these queries has no place for a mask (flash attention)."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)


def with_bias_inside(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Queries, keys and values whose attention is that with a bias on the keys, and the scale.

    One more feature of queries is constant, and that of a key is its bias; zeros fill up the rest.
    The output is as much wider than v, and zero there.

    Args:
        key_bias: B N, added to the logits of each key.
    """
    scale = q.shape[-1] ** -0.5
    ones = q.new_ones(*q.shape[:-1], 1)
    bias = (key_bias / scale)[:, None, :, None].to(k.dtype).expand(*k.shape[:-1], 1)
    width = -(-max(q.shape[-1] + 1, v.shape[-1]) // EVEN) * EVEN
    q, k = widened(torch.cat([q, ones], -1), width), widened(torch.cat([k, bias], -1), width)
    return q, k, widened(v, width), scale


def widened(heads: Tensor, width: int) -> Tensor:
    """With zeros behind the features that are there."""
    return F.pad(heads, (0, width - heads.shape[-1]))
