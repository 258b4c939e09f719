"""Multi-head self-attention as named parts of somebody's module.

A family says once what its attention module calls things (`AttentionParts`); everything here reads
those names. Tensors: ``x`` is B N C, heads are B H N D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.layers.attention_parts import (
    AttentionParts,
    head_count,
    head_dim,
    thirds_of,
)
from peft_vision.layers.fused_kernels import takes_no_mask, widened, with_bias_inside
from peft_vision.layers.head_surgery import keep_heads, keep_queries


def at_scale(q: Tensor, width: int) -> Tensor:
    """Queries whose products with keys, over the root of their own width, are what they were.

    Args:
        width: the one by whose root products were divided before queries were cut.
    """
    own = q.shape[-1]
    return q if own == width else q * (own / width) ** 0.5


class Attended(NamedTuple):
    """One attention branch at work: its output B R C, queries B H R D, keys and values B H N D.

    R is N, or the number of first tokens that alone were asked for.
    """

    branch: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


def project(
    attention: nn.Module,
    parts: AttentionParts,
    x: Tensor,
    rope: Any = None,
    rows: int | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, normed and rotated: three of B H N D.

    Queries and keys that were cut are narrower than values, and scaled for their own width.

    Args:
        rows: queries of this many first tokens only, none of which may have a rotary position.
        places: H n: where the features that are left of queries and keys were; the others are put
            back as zeros.
    """
    width, count = head_dim(attention, parts), head_count(attention, parts)
    thirds = _thirds(attention, parts, x, rows)
    q, k, v = (_heads_of(t, count) for t in thirds)
    if places is not None:
        q, k = _put_back(q, places, width), _put_back(k, places, width)
    if parts.q_norm is not None:
        q = getattr(attention, parts.q_norm)(q)
    if parts.k_norm is not None:
        k = getattr(attention, parts.k_norm)(k)
    if parts.rotate is not None and rope is not None:
        q = parts.rotate(attention, q, rope) if rows is None else q
        k = parts.rotate(attention, k, rope)
        q, k = q.type_as(v), k.type_as(v)
    return at_scale(q, width), k, v


def _heads_of(flat: Tensor, count: int) -> Tensor:
    heads: Tensor = flat.unflatten(-1, (count, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
    return heads


def _put_back(heads: Tensor, places: Tensor, width: int) -> Tensor:
    whole = heads.new_zeros(*heads.shape[:-1], width)
    return whole.scatter(-1, places[None, :, None].expand(heads.shape), heads)


def _thirds(
    attention: nn.Module, parts: AttentionParts, x: Tensor, rows: int | None
) -> Sequence[Tensor]:
    first = x if rows is None else x[:, :rows]
    layers = [getattr(attention, name) for name in parts.qkv]
    if len(layers) == 3:
        return [layer(t) for layer, t in zip(layers, (first, x, x), strict=True)]
    fused = layers[0]
    bias = None if parts.biases is None else [getattr(attention, name) for name in parts.biases]
    together = None if bias is None or bias[0] is None else torch.cat(bias)
    own, _, whole = sizes = thirds_of(attention, parts)
    if rows is None or type(fused) is not nn.Linear:
        projected = fused(x) if together is None else fused(x) + together
        q, k, v = torch.split(projected, sizes, dim=-1)
        return (q if rows is None else q[:, :rows]), k, v
    together = fused.bias if together is None else together
    both = F.linear(x, fused.weight[own:], None if together is None else together[own:])
    q = F.linear(first, fused.weight[:own], None if together is None else together[:own])
    return q, *torch.split(both, [own, whole], dim=-1)


def attend(
    attention: nn.Module,
    parts: AttentionParts,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    **masks: Any,
) -> Tensor:
    """Attention by the fused kernel, which takes `masks` (attn_mask, is_causal): B H N D.

    Queries and keys that are narrower than values get zeros beside them where numbers are computed:
    without, no fused kernel of a CPU takes them.

    Args:
        key_bias: B N, added to the logits of each key: the log of how many patches it stands for.
            A mask, but for kernels that take none: there it is one more feature.
    """
    probability = _dropout(attention, parts) if attention.training else 0.0
    width = v.shape[-1]
    if key_bias is not None and takes_no_mask(q):
        q, k, v, scale = with_bias_inside(q, k, v, key_bias)
        heads = F.scaled_dot_product_attention(q, k, v, dropout_p=probability, scale=scale)
        return heads[..., :width]
    if key_bias is not None:
        masks["attn_mask"] = key_bias[:, None, None, :].to(q.dtype)
    if q.shape[-1] < width and not q.is_meta and not torch.compiler.is_exporting():
        masks["scale"] = q.shape[-1] ** -0.5
        q, k = widened(q, width), widened(k, width)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=probability, **masks)


def before_output(attention: nn.Module, parts: AttentionParts, heads: Tensor, x: Tensor) -> Tensor:
    """From the heads' outputs (B H N D) to what the output linear reads (B N F)."""
    y: Tensor = heads.transpose(1, 2).flatten(2)
    if parts.norm is not None:
        y = getattr(attention, parts.norm)(y)
    if parts.gate is not None and getattr(attention, parts.gate) is not None:
        y = y * getattr(attention, parts.gate)(x).sigmoid()
    return y


def finish(attention: nn.Module, parts: AttentionParts, heads: Tensor, x: Tensor) -> Tensor:
    """From the heads' outputs (B H N D) to the branch's output (B N C)."""
    y: Tensor = getattr(attention, parts.out)(before_output(attention, parts, heads, x))
    return getattr(attention, parts.out_dropout)(y) if parts.out_dropout is not None else y


def _dropout(attention: nn.Module, parts: AttentionParts) -> float:
    if parts.dropout is None:
        return 0.0
    value = getattr(attention, parts.dropout)
    return float(value.p if isinstance(value, nn.Dropout) else value)


def branch_of(
    module: nn.Module,
    parts: AttentionParts,
    x: Tensor,
    rope: Any = None,
    *,
    rows: int | None = None,
    key_bias: Tensor | None = None,
    whole: bool = False,
    places: Tensor | None = None,
    **masks: Any,
) -> Attended:
    """The branch of a family's attention module, or of one of ours that stands in its place.

    Args:
        x: the normed stream, B N C.
        rows: the output of this many first tokens only (see `project`). `places`: see there.
        key_bias: see `attend`.
        whole: the queries of all tokens are asked for; else those of the first ones may be all that
            is given.
    """
    if isinstance(module, OwnAttention):
        return module.branch(x, rope, rows=rows, key_bias=key_bias, whole=whole, **masks)
    q, k, v = project(module, parts, x, rope, rows, places)
    heads = attend(module, parts, q, k, v, key_bias, **masks)
    asked = x if rows is None else x[:, :rows]
    return Attended(finish(module, parts, heads, asked), q, k, v)


class OwnAttention(nn.Module, ABC):
    """A module of ours in the place of a family's attention module, which it keeps inside.

    Attributes:
        attention: the family's module, whose linears are the ones in use. `parts`: its names.
    """

    @property
    def free(self) -> bool:
        """Whether another may take its place: it computes what the linears inside say, no more."""
        return False

    def __init__(self, attention: nn.Module, parts: AttentionParts) -> None:
        super().__init__()
        self.attention = attention
        self.parts = parts

    @abstractmethod
    def branch(
        self,
        x: Tensor,
        rope: Any = None,
        *,
        rows: int | None = None,
        key_bias: Tensor | None = None,
        whole: bool = False,
        **masks: Any,
    ) -> Attended:
        """See `branch_of`."""

    def forward(self, x: Tensor, rope: Any = None, **masks: Any) -> Tensor:
        """The branch's output, B N C."""
        return self.branch(x, rope, **masks).branch

    def keep_heads(self, heads: Sequence[int]) -> None:
        """Keep whole heads, in place; what this module holds of its own for a head follows."""
        keep_heads(self.attention, self.parts, heads)

    def keep_queries(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep some features of each head's queries and keys, in place (see `keep_queries`)."""
        keep_queries(self.attention, self.parts, kept)


def is_free(module: nn.Module) -> bool:
    """Whether a module of ours may take the place of this one without losing anything."""
    return not isinstance(module, OwnAttention) or module.free


def attention_inside(module: nn.Module) -> nn.Module:
    """The family's attention module, where one of ours stands in its place; else itself."""
    return module.attention if isinstance(module, OwnAttention) else module


class OpenAttention(OwnAttention):
    """Somebody's attention module, computed from its parts.

    For families whose own forward assumes that heads x head_dim equals the width of the stream, and
    therefore breaks when heads are removed. Input and output B N C.
    """

    @property
    def free(self) -> bool:
        """Yes."""
        return True

    def branch(
        self,
        x: Tensor,
        rope: Any = None,
        *,
        rows: int | None = None,
        key_bias: Tensor | None = None,
        whole: bool = False,
        **masks: Any,
    ) -> Attended:
        """See `branch_of`."""
        return branch_of(self.attention, self.parts, x, rope, rows=rows, key_bias=key_bias, **masks)
