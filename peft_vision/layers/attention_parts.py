"""What a family calls the parts of its attention modules, and how wide they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peft_vision.layers.named_parts import inputs_of, outputs_of, part_of
from peft_vision.layers.surgery import weight_of

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
        mates: which feature of a head each of so many turns with when it is rotated.
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
    mates: Callable[[nn.Module, int], list[int]] | None = None
    unrotated: str | None = None
    pieces: tuple[int, ...] | None = None
    follow: tuple[tuple[str, int], ...] = ()
    per_head: tuple[tuple[str, int], ...] = ()
    heads_last: bool = False
    caches: tuple[str, ...] = ()
    forward: Callable[..., Any] | None = None


def halves(width: int) -> list[int]:
    """Mates where the features of one half of a head turn with those of the other."""
    return [(i + width // 2) % width for i in range(width)]


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


def query_dim(attention: nn.Module, parts: AttentionParts) -> int:
    """Width of a head's queries and keys: that of its values, unless they were cut."""
    if parts.pieces is not None:
        return head_dim(attention, parts)
    rows = outputs_of(part_of(attention, parts.qkv[0])) // head_count(attention, parts)
    return rows if len(parts.qkv) == 3 else (rows - head_dim(attention, parts)) // 2


def thirds_of(attention: nn.Module, parts: AttentionParts) -> list[int]:
    """How many features are queries, keys and values in what a fused linear gives."""
    count = head_count(attention, parts)
    own = count * query_dim(attention, parts)
    return [own, own, count * head_dim(attention, parts)]


def pieces_of(parts: AttentionParts) -> tuple[int, ...]:
    """How often each of the linears of queries, keys and values runs through all heads."""
    return parts.pieces or ((3,) if len(parts.qkv) == 1 else (1,) * len(parts.qkv))


def head_widths(attention: nn.Module, parts: AttentionParts) -> list[tuple[int, ...]]:
    """Of each linear of queries, keys and values: a head's width in each run through all heads."""
    width, count = head_dim(attention, parts), head_count(attention, parts)
    if parts.pieces is not None:
        rows = [len(weight_of(part_of(attention, name))) for name in parts.qkv]
        return [(n // (p * count),) * p for n, p in zip(rows, parts.pieces, strict=True)]
    own = query_dim(attention, parts)
    return [(own, own, width)] if len(parts.qkv) == 1 else [(own,), (own,), (width,)]
