"""Multi-head self-attention as named parts of somebody's module.

A family says once what its attention module calls things (`AttentionParts`); everything here reads
those names. Tensors: ``x`` is B N C, heads are B H N D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.layers.named_parts import holder_of, inputs_of, part_of, put_part
from peft_vision.layers.surgery import (
    keep_features,
    keep_inputs,
    keep_outputs,
    select_parameter,
    weight_of,
)

Rotate = Callable[[nn.Module, Tensor, Any], Tensor]
"""(attention module, B H N D queries or keys, the family's rope) -> rotated; prefix tokens stay."""


@dataclass(frozen=True)
class AttentionParts:
    """The names of the parts of an attention module. Plain data and module-level functions only.

    Attributes:
        qkv: one fused linear, or the three of queries, keys and values.
        out: the output projection.
        biases: separate query, key and value biases beside a fused linear without bias.
        q_norm: norm over head_dim on queries, if any; `k_norm` on keys.
        norm: norm over all heads' outputs before `out`, if any.
        gate: linear whose sigmoid multiplies the heads' outputs before `out`, if any.
        heads: attributes that hold the number of heads.
        width: attributes that hold heads x head_dim.
        dropout: Dropout module, or attribute holding the probability, on the attention weights.
        out_dropout: Dropout module after `out`, if any.
        rotate: applies rotary positions to queries or keys, for families that have them.
        unrotated: attribute that holds how many of the first tokens have no position, if any.
        pieces: how often each of `qkv` runs through all heads. Where it is not said, a fused linear
            does so three times and separate ones once; one that has queries, keys and values of a
            head side by side does so once, too.
        follow: (name, pieces) of norms over what these linears give.
        per_head: (name, axis) of what else has an entry for each head: a tensor along an axis, a
            layer in its outputs, a tuple of sizes at a place. What is None is skipped.
        heads_last: `out` reads the first features of all heads, then the second ones, and so on.
        caches: dictionaries of what was computed from any of these; emptied when heads go.
        forward: computes the module's output where its own forward cannot with fewer heads.

    Where a module is cut and not opened, these may name parts of parts, with dots. Without
    `head_dim` the first of `heads` says how many heads there are.
    """

    qkv: tuple[str, ...]
    out: str
    head_dim: str | None = "head_dim"
    biases: tuple[str, str, str] | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    norm: str | None = None
    gate: str | None = None
    heads: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    dropout: str | None = None
    out_dropout: str | None = None
    rotate: Rotate | None = None
    unrotated: str | None = None
    pieces: tuple[int, ...] | None = None
    follow: tuple[tuple[str, int], ...] = ()
    per_head: tuple[tuple[str, int], ...] = ()
    heads_last: bool = False
    caches: tuple[str, ...] = ()
    forward: Callable[..., Any] | None = None


def head_dim(attention: nn.Module, parts: AttentionParts) -> int:
    """Width of one head, as the output projection sees it."""
    if parts.head_dim is None:
        return inputs_of(part_of(attention, parts.out)) // head_count(attention, parts)
    return int(part_of(attention, parts.head_dim))


def head_count(attention: nn.Module, parts: AttentionParts) -> int:
    """How many heads there are now, read from the output projection where that says it."""
    if parts.head_dim is None:
        return int(part_of(attention, parts.heads[0]))
    return inputs_of(part_of(attention, parts.out)) // head_dim(attention, parts)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, normed and rotated: three of B H N D.

    Args:
        rows: queries of this many first tokens only, none of which may have a rotary position.
    """
    width = head_dim(attention, parts)
    thirds = _thirds(attention, parts, x, rows)
    q, k, v = (_heads_of(t, width) for t in thirds)
    if parts.q_norm is not None:
        q = getattr(attention, parts.q_norm)(q)
    if parts.k_norm is not None:
        k = getattr(attention, parts.k_norm)(k)
    if parts.rotate is not None and rope is not None:
        q = parts.rotate(attention, q, rope) if rows is None else q
        k = parts.rotate(attention, k, rope)
        q, k = q.type_as(v), k.type_as(v)
    return q, k, v


def _heads_of(flat: Tensor, width: int) -> Tensor:
    heads: Tensor = flat.unflatten(-1, (-1, width)).transpose(1, 2)  # type: ignore[no-untyped-call]
    return heads


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
    if rows is None or type(fused) is not nn.Linear:
        projected = fused(x) if together is None else fused(x) + together
        q, k, v = projected.chunk(3, dim=-1)
        return (q if rows is None else q[:, :rows]), k, v
    together = fused.bias if together is None else together
    width = fused.out_features // 3
    both = F.linear(x, fused.weight[width:], None if together is None else together[width:])
    q = F.linear(first, fused.weight[:width], None if together is None else together[:width])
    return q, *both.chunk(2, dim=-1)


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

    Args:
        key_bias: B N, added to the logits of each key: the log of how many patches it stands for.
    """
    probability = _dropout(attention, parts) if attention.training else 0.0
    if key_bias is not None:
        masks["attn_mask"] = key_bias[:, None, None, :].to(q.dtype)
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


def pieces_of(parts: AttentionParts) -> tuple[int, ...]:
    """How often each of the linears of queries, keys and values runs through all heads."""
    return parts.pieces or ((3,) if len(parts.qkv) == 1 else (1,) * len(parts.qkv))


def weights_by_head(attention: nn.Module, parts: AttentionParts) -> list[Tensor]:
    """Every weight that belongs to a head, one row per head: tensors of H x anything."""
    count = head_count(attention, parts)
    found = []
    for name, pieces in zip(parts.qkv, pieces_of(parts), strict=True):
        weight = weight_of(part_of(attention, name))
        found += [piece.reshape(count, -1) for piece in weight.chunk(pieces)]
    read = weight_of(part_of(attention, parts.out)).transpose(0, 1)
    if parts.heads_last:
        read = read.unflatten(0, (-1, count)).transpose(0, 1)  # type: ignore[no-untyped-call]
    return [*found, read.reshape(count, -1)]


def keep_heads(attention: nn.Module, parts: AttentionParts, heads: Sequence[int]) -> None:
    """Keep whole heads, in place; the width of a head and the softmax scale stay."""
    width, count = head_dim(attention, parts), head_count(attention, parts)
    rows = _entries(heads, count, count * width)
    for name, pieces in zip(parts.qkv, pieces_of(parts), strict=True):
        layer = part_of(attention, name)
        size = count * width * pieces if parts.pieces is None else len(weight_of(layer))
        keep_outputs(layer, _entries(heads, count, size, pieces))
    _keep_optional(attention, parts, rows)
    _keep_beside(attention, parts, heads, count)
    read = [i * count + head for i in range(width) for head in heads] if parts.heads_last else rows
    keep_inputs(part_of(attention, parts.out), read)
    for name in parts.heads:
        put_part(attention, name, len(heads))
    for name in parts.width:
        put_part(attention, name, part_of(attention, name) * len(heads) // count)


def _entries(heads: Sequence[int], count: int, size: int, pieces: int = 1) -> list[int]:
    """Where these heads are among `size` features that run through all heads `pieces` times."""
    width = size // (pieces * count)
    return [
        (piece * count + head) * width + i
        for piece in range(pieces)
        for head in heads
        for i in range(width)
    ]


def _keep_optional(attention: nn.Module, parts: AttentionParts, rows: Sequence[int]) -> None:
    for name in parts.biases or ():
        if getattr(attention, name) is not None:
            select_parameter(attention, name, rows)
    if parts.norm is not None:
        keep_features(getattr(attention, parts.norm), rows)
    if parts.gate is not None and getattr(attention, parts.gate) is not None:
        keep_outputs(getattr(attention, parts.gate), rows)


def _keep_beside(
    attention: nn.Module, parts: AttentionParts, heads: Sequence[int], count: int
) -> None:
    for name, pieces in parts.follow:
        norm = part_of(attention, name)
        keep_features(norm, _entries(heads, count, len(norm.weight), pieces))
    for name, axis in parts.per_head:
        value = part_of(attention, name)
        if isinstance(value, Tensor):
            select_parameter(*holder_of(attention, name), heads, axis)
        elif isinstance(value, nn.Module):
            keep_outputs(value, _entries(heads, count, len(weight_of(value))))
        elif isinstance(value, tuple):
            put_part(attention, name, (*value[:axis], len(heads), *value[axis + 1 :]))
        elif isinstance(value, int):
            put_part(attention, name, len(heads))
    for name in parts.caches:
        getattr(attention, name).clear()


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
    **masks: Any,
) -> Attended:
    """The branch of a family's attention module, or of one of ours that stands in its place.

    Args:
        x: the normed stream, B N C.
        rows: the output of this many first tokens only (see `project`).
        key_bias: see `attend`.
    """
    if isinstance(module, OwnAttention):
        return module.branch(x, rope, rows=rows, key_bias=key_bias, **masks)
    q, k, v = project(module, parts, x, rope, rows)
    heads = attend(module, parts, q, k, v, key_bias, **masks)
    asked = x if rows is None else x[:, :rows]
    return Attended(finish(module, parts, heads, asked), q, k, v)


class OwnAttention(nn.Module, ABC):
    """A module of ours in the place of a family's attention module, which it keeps inside.

    Attributes:
        attention: the family's module, whose linears are the ones in use. `parts`: its names.
    """

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
        **masks: Any,
    ) -> Attended:
        """See `branch_of`."""

    def forward(self, x: Tensor, rope: Any = None, **masks: Any) -> Tensor:
        """The branch's output, B N C."""
        return self.branch(x, rope, **masks).branch

    def keep_heads(self, heads: Sequence[int]) -> None:
        """Keep whole heads, in place; what this module holds of its own for a head follows."""
        keep_heads(self.attention, self.parts, heads)


def attention_inside(module: nn.Module) -> nn.Module:
    """The family's attention module, where one of ours stands in its place; else itself."""
    return module.attention if isinstance(module, OwnAttention) else module


class OpenAttention(OwnAttention):
    """Somebody's attention module, computed from its parts.

    For families whose own forward assumes that heads x head_dim equals the width of the stream, and
    therefore breaks when heads are removed. Input and output B N C.
    """

    def branch(
        self,
        x: Tensor,
        rope: Any = None,
        *,
        rows: int | None = None,
        key_bias: Tensor | None = None,
        **masks: Any,
    ) -> Attended:
        """See `branch_of`."""
        return branch_of(self.attention, self.parts, x, rope, rows=rows, key_bias=key_bias, **masks)
