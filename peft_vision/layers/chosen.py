"""Products of attention for chosen tokens alone: queries in, and output rows added back.

Heads that choose come first in a module, those that serve every token come last, so that each kind
is one slice of the weights. ``places`` is B E R: which tokens head e of image b serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.layers.attention import at_scale
from peft_vision.layers.attention_parts import AttentionParts, head_count, head_dim, query_dim


def rows_of(kept: Tensor, first: int) -> Tensor:
    """Places of tokens from places of patches (B E C), the first tokens before them: B E R."""
    ahead = torch.arange(first, device=kept.device).expand(*kept.shape[:2], first)
    return torch.cat([ahead, kept + first], dim=-1)


def take_heads(heads: Tensor, chosen: Sequence[int]) -> Tensor:
    """Some heads of B H N D: a view where they are neighbors."""
    start, count = (chosen[0] if chosen else 0), len(chosen)
    if tuple(chosen) == tuple(range(start, start + count)):
        return heads[:, start : start + count]
    return heads[:, list(chosen)]


def mask_heads(mask: Tensor | None, heads: Sequence[int]) -> Tensor | None:
    """A mask that broadcasts to B H N N, of some heads."""
    return take_heads(mask, heads) if mask is not None and _per_head(mask) else mask


def mask_rows(mask: Tensor | None, places: Tensor, heads: Sequence[int]) -> Tensor | None:
    """A mask that broadcasts to B H N N, for the queries at `places` (B E R) of `heads`."""
    if mask is None or mask.dim() < 2 or mask.shape[-2] == 1:
        return mask_heads(mask, heads)
    mine = take_heads(mask, heads) if _per_head(mask) else mask
    every = mine.expand(*places.shape[:2], *mask.shape[-2:])
    return every.gather(2, places.unsqueeze(-1).expand(-1, -1, -1, mask.shape[-1]))


def mask_keys(mask: Tensor | None, places: Tensor) -> Tensor | None:
    """A mask that broadcasts to B H N N, for the keys at `places` (B H M)."""
    if mask is None:
        return None
    every = mask.expand(*places.shape[:2], *mask.shape[-2:])
    return every.gather(3, places.unsqueeze(2).expand(-1, -1, every.shape[2], -1))


def _per_head(mask: Tensor) -> bool:
    return mask.dim() == 4 and mask.shape[1] != 1


def projected(
    attention: nn.Module, parts: AttentionParts, x: Tensor, rope: Any, routed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the heads behind the first `routed`, keys and values of all: B H N D each."""
    count, start = head_count(attention, parts), routed * query_dim(attention, parts)
    whole = count * head_dim(attention, parts)
    layers = [getattr(attention, name) for name in parts.qkv]
    if len(layers) == 3:
        weight, bias = layers[0].weight[start:], layers[0].bias
        q = F.linear(x, weight, None if bias is None else bias[start:])
        k, v = layers[1](x), layers[2](x)
    else:
        together = _bias(attention, parts)
        own = count * query_dim(attention, parts)
        bias = None if together is None else together[start:]
        joined = F.linear(x, layers[0].weight[start:], bias)
        q, k, v = torch.split(joined, [own - start, own, whole], dim=-1)
    q, k, v = (_heads_of(t, n) for t, n in ((q, count - routed), (k, count), (v, count)))
    if parts.k_norm is not None:
        k = getattr(attention, parts.k_norm)(k)
    if parts.rotate is not None and rope is not None:
        k = parts.rotate(attention, k, rope).type_as(v)
    return _placed(attention, parts, q, rope).type_as(v), k, v


def head_queries(
    attention: nn.Module, parts: AttentionParts, x: Tensor, rope: Any, places: Tensor, first: int
) -> Tensor:
    """Queries of the first heads, each for its tokens alone: B E R D."""
    batch, heads, rows = places.shape
    width, channels = query_dim(attention, parts), x.shape[-1]
    layer = getattr(attention, parts.qkv[0])
    bias = layer.bias if len(parts.qkv) == 3 else _bias(attention, parts)
    weight = layer.weight[: heads * width].view(heads, width, channels)
    shift = None if bias is None else bias[: heads * width].view(heads, width)
    tokens, flat = x.reshape(-1, channels), flat_places(places, x.shape[1])
    if _in_caches(x):
        shifts = [None] * heads if shift is None else shift
        each = zip(flat.view(heads, -1), weight, shifts, strict=True)
        q = torch.stack([F.linear(tokens.index_select(0, i), w, b) for i, w, b in each])
    else:
        chosen = tokens.index_select(0, flat).view(heads, batch * rows, channels)
        q = torch.bmm(chosen, weight.transpose(1, 2))
        q = q if shift is None else q + shift.unsqueeze(1)
    q = q.view(heads, batch, rows, width).transpose(0, 1)
    if rope is None or parts.rotate is None:
        return _placed(attention, parts, q, None)
    patches = places[..., first:] - first
    return _placed(attention, parts, q, _positions(rope, patches))


def add_rows(
    out: nn.Linear, heads: Tensor, always: Tensor | None, places: Tensor, tokens: int
) -> Tensor:
    """The output projection: B N C.

    Args:
        out: a plain linear. `heads`: B E R D of the first heads. `always`: B S N D of the others.
        places: B E R. `tokens`: N.
    """
    batch, count, rows, width = heads.shape
    start = count * width
    if always is None:
        y = heads.new_zeros(batch, tokens, out.out_features)
        y = y if out.bias is None else y + out.bias
    else:
        y = F.linear(always.transpose(1, 2).flatten(2), out.weight[:, start:], out.bias)
    weight = out.weight[:, :start].t().unflatten(0, (count, width))  # type: ignore[no-untyped-call]
    read = heads.transpose(0, 1).reshape(count, batch * rows, width)
    flat = flat_places(places, tokens)
    if _in_caches(y):
        for one, values, w in zip(flat.view(count, -1), read, weight, strict=True):
            add_to(y, values @ w, one)
        return y
    return add_to(y, torch.bmm(read, weight).view(-1, y.shape[-1]), flat)


def _in_caches(x: Tensor) -> bool:
    """Whether heads are taken one by one: what one needs then stays in the caches of a CPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def add_to(y: Tensor, rows: Tensor, flat: Tensor) -> Tensor:
    """`rows` (M C) added to the tokens of y (B N C) at `flat` (M), in place."""
    return y.view(-1, y.shape[-1]).index_add_(0, flat, rows.to(y.dtype)).view(y.shape)


def flat_places(places: Tensor, tokens: int) -> Tensor:
    """Places B E R among the B N tokens of all images, member by member: E B R in a row."""
    images = torch.arange(places.shape[0], device=places.device) * tokens
    return (places + images[:, None, None]).transpose(0, 1).reshape(-1)


def put_heads(
    heads: Tensor, always: Tensor | None, places: Tensor, order: Sequence[int], tokens: int
) -> Tensor:
    """All heads for all tokens, zero where one does not serve: B H N D.

    Args:
        heads: B E R D, of the first of `order`. `always`: B S N D, of the others.
        order: head of the module that each is.
    """
    batch, count, _, width = heads.shape
    index = places.unsqueeze(-1).expand(-1, -1, -1, width)
    whole = heads.new_zeros(batch, count, tokens, width).scatter(2, index, heads)
    joined = whole if always is None else torch.cat([whole, always], dim=1)
    if tuple(order) == tuple(range(len(order))):
        return joined
    return joined[:, sorted(range(len(order)), key=order.__getitem__)]


def _bias(attention: nn.Module, parts: AttentionParts) -> Tensor | None:
    """The bias of a fused linear, or the three beside it."""
    own: Tensor | None = getattr(attention, parts.qkv[0]).bias
    beside = [getattr(attention, name) for name in parts.biases or ()]
    return torch.cat(beside) if beside and beside[0] is not None else own


def _placed(attention: nn.Module, parts: AttentionParts, q: Tensor, rope: Any) -> Tensor:
    if parts.q_norm is not None:
        q = getattr(attention, parts.q_norm)(q)
    if parts.rotate is not None and rope is not None:
        return parts.rotate(attention, q, rope)
    return at_scale(q, head_dim(attention, parts))


def _heads_of(flat: Tensor, count: int) -> Tensor:
    heads: Tensor = flat.unflatten(-1, (count, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
    return heads


def _positions(rope: Any, patches: Tensor) -> Any:
    """Rotary tables of the patches of each head (B E C): tables of N D become B E C D."""
    if isinstance(rope, tuple):
        return tuple(_positions(table, patches) for table in rope)
    if rope.dim() == 2:
        return rope[patches]
    per_head = rope.expand(patches.shape[0], patches.shape[1], -1, -1)
    return per_head.gather(2, patches.unsqueeze(-1).expand(-1, -1, -1, rope.shape[-1]))
