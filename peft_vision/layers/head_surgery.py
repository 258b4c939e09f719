"""Heads, or features of their queries and keys, taken out of an attention module."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from peft_vision.layers.attention_parts import (
    AttentionParts,
    head_count,
    head_dim,
    head_widths,
    query_dim,
)
from peft_vision.layers.named_parts import holder_of, part_of, put_part
from peft_vision.layers.surgery import (
    keep_features,
    keep_inputs,
    keep_outputs,
    select_parameter,
    weight_of,
)


def weights_by_head(
    attention: nn.Module, parts: AttentionParts, read: Callable[[nn.Module], Tensor] = weight_of
) -> list[Tensor]:
    """Every weight that belongs to a head, one row per head: tensors of H x anything.

    Args:
        read: gives the weight of a layer, out x in.
    """
    count = head_count(attention, parts)
    found = []
    for name, widths in zip(parts.qkv, head_widths(attention, parts), strict=True):
        pieces = torch.split(read(part_of(attention, name)), [count * width for width in widths])
        found += [piece.reshape(count, -1) for piece in pieces]
    out = read(part_of(attention, parts.out)).transpose(0, 1)
    if parts.heads_last:
        out = out.unflatten(0, (-1, count)).transpose(0, 1)  # type: ignore[no-untyped-call]
    return [*found, out.reshape(count, -1)]


def keep_heads(attention: nn.Module, parts: AttentionParts, heads: Sequence[int]) -> None:
    """Keep whole heads, in place; the width of a head and the softmax scale stay."""
    width, count = head_dim(attention, parts), head_count(attention, parts)
    rows, asking = (_entries(heads, count, [each]) for each in (width, query_dim(attention, parts)))
    for name, widths in zip(parts.qkv, head_widths(attention, parts), strict=True):
        keep_outputs(part_of(attention, name), _entries(heads, count, widths))
    _keep_biases(attention, parts, asking, rows)
    _keep_optional(attention, parts, rows)
    _keep_beside(attention, parts, heads, count)
    read = [i * count + head for i in range(width) for head in heads] if parts.heads_last else rows
    keep_inputs(part_of(attention, parts.out), read)
    for name in parts.heads:
        put_part(attention, name, len(heads))
    for name in parts.width:
        put_part(attention, name, part_of(attention, name) * len(heads) // count)


def keep_queries(
    attention: nn.Module, parts: AttentionParts, kept: Sequence[Sequence[int]]
) -> None:
    """Keep some features of each head's queries and keys, in place.

    Args:
        kept: features of each head, as many of every head.
    """
    count, own = head_count(attention, parts), query_dim(attention, parts)
    rows = [head * own + i for head, features in enumerate(kept) for i in features]
    if len(parts.qkv) == 1:
        fused, width = part_of(attention, parts.qkv[0]), count * own
        values = range(2 * width, 2 * width + count * head_dim(attention, parts))
        keep_outputs(fused, [*rows, *(width + row for row in rows), *values])
    else:
        for name in parts.qkv[:2]:
            keep_outputs(part_of(attention, name), rows)
    _keep_biases(attention, parts, rows, None)


def _entries(heads: Sequence[int], count: int, widths: Sequence[int]) -> list[int]:
    """Where these heads are among features that run through all heads once for each width."""
    starts = [count * sum(widths[:number]) for number in range(len(widths))]
    return [
        start + head * width + i
        for start, width in zip(starts, widths, strict=True)
        for head in heads
        for i in range(width)
    ]


def _keep_biases(
    attention: nn.Module, parts: AttentionParts, asking: Sequence[int], values: Sequence[int] | None
) -> None:
    """Cut biases beside a fused linear: of queries and keys, and of values where some go."""
    for name, rows in zip(parts.biases or (), (asking, asking, values), strict=False):
        if rows is not None and getattr(attention, name) is not None:
            select_parameter(attention, name, rows)


def _keep_optional(attention: nn.Module, parts: AttentionParts, rows: Sequence[int]) -> None:
    if parts.norm is not None:
        keep_features(getattr(attention, parts.norm), rows)
    if parts.gate is not None and getattr(attention, parts.gate) is not None:
        keep_outputs(getattr(attention, parts.gate), rows)


def _keep_beside(
    attention: nn.Module, parts: AttentionParts, heads: Sequence[int], count: int
) -> None:
    for name, pieces in parts.follow:
        norm = part_of(attention, name)
        keep_features(norm, _entries(heads, count, [len(norm.weight) // (pieces * count)] * pieces))
    for name, axis in parts.per_head:
        value = part_of(attention, name)
        if isinstance(value, Tensor):
            select_parameter(*holder_of(attention, name), heads, axis)
        elif isinstance(value, nn.Module):
            keep_outputs(value, _entries(heads, count, [len(weight_of(value)) // count]))
        elif isinstance(value, tuple):
            put_part(attention, name, (*value[:axis], len(heads), *value[axis + 1 :]))
        elif isinstance(value, int):
            put_part(attention, name, len(heads))
    for name in parts.caches:
        getattr(attention, name).clear()
