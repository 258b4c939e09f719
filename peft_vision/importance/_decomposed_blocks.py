"""Two parts of an activation on their way through blocks, and through what reads the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones.assembly import is_linear
from peft_vision.backbones.sites import Backbone
from peft_vision.importance._ahead import read
from peft_vision.importance._decomposition import (
    Pair,
    affine,
    attended,
    rest_first,
    through,
)
from peft_vision.layers.absent import Absent
from peft_vision.layers.attention import at_scale, attention_inside
from peft_vision.layers.attention_parts import AttentionParts, head_count, head_dim, thirds_of
from peft_vision.layers.block import BlockParts
from peft_vision.layers.bottleneck import inside
from peft_vision.layers.gates import Gated
from peft_vision.layers.linear_mlp import LinearMlp
from peft_vision.layers.mlp import MlpParts
from peft_vision.layers.mlp_path import bent, halves
from peft_vision.layers.trunk import Trunk


def block_through(block: nn.Module, parts: BlockParts, x: Pair, rope: Any) -> Pair:
    """Through a whole block, B N C."""
    module = getattr(block, parts.attention)
    if isinstance(module, Absent):
        return mlp_through(block, parts, Pair(x.relevant, module(x.rest)))
    normed = through(getattr(block, parts.norm1), x)
    heads = heads_through(attention_inside(module), parts.attention_parts, normed, rope)
    return mlp_through(block, parts, x.plus(reader_through(block, parts, heads)))


def heads_through(attention: nn.Module, parts: AttentionParts, x: Pair, rope: Any) -> Pair:
    """From the normed stream to what the linear behind the heads reads, B N F."""
    q, k, v = _projected(attention, parts, x)
    for name, which in ((parts.q_norm, "q"), (parts.k_norm, "k")):
        if name is not None and which == "q":
            q = through(getattr(attention, name), q)
        elif name is not None:
            k = through(getattr(attention, name), k)
    rotate = parts.rotate
    if rotate is not None and rope is not None:
        q, k = (t.each(lambda s: rotate(attention, s, rope).type_as(s)) for t in (q, k))
    y = attended(q, k, v).each(lambda heads: heads.transpose(1, 2).flatten(2))
    if parts.norm is not None:
        y = through(getattr(attention, parts.norm), y)
    gate = None if parts.gate is None else getattr(attention, parts.gate)
    return y if gate is None else _product(y, through(gate, x))


def reader_through(block: nn.Module, parts: BlockParts, heads: Pair) -> Pair:
    """From the heads' outputs to what the branch adds to the stream, B N C."""
    attention = attention_inside(getattr(block, parts.attention))
    y = through(getattr(attention, parts.attention_parts.out), heads)
    return _scaled(block, parts.after1, y)


def mlp_through(block: nn.Module, parts: BlockParts, x: Pair) -> Pair:
    """Through the second half of a block, B N C."""
    module = getattr(block, parts.mlp)
    if isinstance(module, Absent):
        return Pair(x.relevant, module(x.rest))
    normed = through(getattr(block, parts.norm2), x)
    own = inside(module) is module and not isinstance(module, LinearMlp)
    y = _units_through(module, parts.mlp_parts, normed) if own else through(module, normed)
    return x.plus(_scaled(block, parts.after2, y))


def _projected(attention: nn.Module, parts: AttentionParts, x: Pair) -> list[Pair]:
    """Queries, keys and values, B H N D."""
    layers = [getattr(attention, name) for name in parts.qkv]
    beside = [getattr(attention, name) for name in parts.biases or ()]
    if len(layers) == 3:
        thirds = [through(layer, x) for layer in layers]
    else:
        bias = torch.cat(beside) if beside and beside[0] is not None else 0.0
        whole = affine(lambda t: layers[0](t) + bias, x)
        sizes = thirds_of(attention, parts)
        thirds = [
            Pair(*t) for t in zip(*(torch.split(part, sizes, -1) for part in whole), strict=True)
        ]
    count, width = head_count(attention, parts), head_dim(attention, parts)

    def split(flat: Tensor) -> Tensor:
        heads: Tensor = flat.unflatten(-1, (count, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
        return heads

    q, k, v = (third.each(split) for third in thirds)
    return [q.each(lambda t: at_scale(t, width)), k, v]


def _product(y: Pair, gate: Pair) -> Pair:
    """Through y sigmoid(gate): a product bends, and the rest goes first."""
    rest = y.rest * gate.rest.sigmoid()
    return Pair(y.total * gate.total.sigmoid() - rest, rest)


def _units_through(mlp: nn.Module, parts: MlpParts, x: Pair) -> Pair:
    products = [through(getattr(mlp, name), x) for name in parts.up]
    rest = bent(mlp, parts, halves(parts, [product.rest for product in products]))
    total = bent(mlp, parts, halves(parts, [product.total for product in products]))
    hidden = Pair(total - rest, rest)
    if parts.norm is not None:
        hidden = through(getattr(mlp, parts.norm), hidden)
    return through(getattr(mlp, parts.down), hidden)


def _scaled(block: nn.Module, names: tuple[str, ...], y: Pair) -> Pair:
    """Through what a branch passes before it is added: scales, which have no constant."""
    for name in names:
        part = getattr(block, name)
        if part is not None:
            y = y.each(part if isinstance(part, nn.Module) else part.mul)
    return y


@torch.no_grad()
def read_through(backbone: Backbone, trunk: Trunk, x: Pair, image: Tensor) -> Pair:
    """From the sequence behind the blocks to the model's answer, B ...

    Both parts go through the model's own forward as two halves of a batch; a rule stands at every
    layer on their way, and what lies between (choosing a token, averaging) is linear. A pool by
    attention is taken as one function that bends.

    Args:
        image: 1 3 H W, any (see `read`).
    """
    pooling = None if backbone.tokens is None else backbone.tokens.pooling
    if pooling == "attention":
        return rest_first(lambda t: read(backbone, trunk, t, image), x)
    with ExitStack() as stack:
        here: list[bool] = []  # whether the blocks are behind; nothing before them is decomposed
        marks = trunk.register_forward_hook(lambda *_: here.append(True))
        stack.callback(marks.remove)
        for layer in _layers(backbone.model, trunk):
            stack.callback(layer.register_forward_hook(_by_rule(here)).remove)
        both = read(backbone, trunk, torch.cat(list(x)), image)
    return Pair(*both.chunk(2))


def _layers(module: nn.Module, trunk: Trunk) -> Iterator[nn.Module]:
    """The layers of a model outside of its blocks: linears, and what has nothing inside."""
    for child in module.children():
        if child is trunk:
            continue
        whole = is_linear(child) or isinstance(child, Gated)
        if whole or not any(True for _ in child.children()):
            yield child
        else:
            yield from _layers(child, trunk)


def _by_rule(here: list[bool]) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, given: tuple[Any, ...], _: Any) -> Tensor | None:
        if not here:
            return None
        here.pop()  # the rule calls the module itself
        try:
            return torch.cat(list(through(module, Pair(*given[0].chunk(2)))))
        finally:
            here.append(True)

    return hook
