"""What operations that only move elements do to colorings."""

from __future__ import annotations

from typing import Any

import numpy as np

from peft_vision.backbones._channel_calls import Call, Colorings, Rules, joined, pointwise
from peft_vision.backbones._channel_labels import (
    Coloring,
    aligned,
    along,
    compressed,
    reshaped,
    varying,
)

LAYOUT = Rules()
LAYOUT.on("hardswish", "_prelu_kernel", "masked_fill", "fill", "copy", "floor_divide")(pointwise)
"""What torch does not mark as working element by element."""


@LAYOUT.on("clone", "_to_copy", "detach", "alias", "contiguous", "lift_fresh", "dropout")
@LAYOUT.on("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "expand", "expand_as")
def _(call: Call) -> Colorings:
    _, colorings = call.first()
    return [aligned(c, len(call.shape)) for c in colorings]


@LAYOUT.on("empty", "zeros", "ones", "full", "arange", "scalar_tensor", "linspace", "eye")
@LAYOUT.on("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "empty_strided")
def _(call: Call) -> Colorings:
    return []


@LAYOUT.on("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten")
def _(call: Call) -> Colorings:
    x, colorings = call.first()
    laid = [reshaped(c, tuple(x.shape), call.shape) for c in colorings]
    clear: Colorings = []
    for n, c in enumerate(laid):
        others = [set(varying(o)) for m, o in enumerate(laid) if m != n]
        if any(set(varying(c)) & other for other in others) or c.size == 1:
            call.freeze(c, why="two kinds of channels share a dimension")
        else:
            clear.append(c)
    return clear


@LAYOUT.on("permute", "transpose", "t")
def _(call: Call) -> Colorings:
    x, colorings = call.first()
    order = list(range(x.dim()))
    if call.name == "permute":
        order = [d % x.dim() for d in call.given["dims"]]
    elif x.dim() > 1:
        a, b = call.given.get("dim0", 0) % x.dim(), call.given.get("dim1", 1) % x.dim()
        order[a], order[b] = b, a
    return [c.transpose(order) for c in colorings]


@LAYOUT.on("split", "split_with_sizes", "chunk", "unbind", "slice", "select", "narrow")
def _(call: Call) -> Any:
    x, colorings = call.first()
    dim = int(call.given.get("dim") or 0) % x.dim()
    several = isinstance(call.out, tuple | list)
    found: list[Colorings] = [[] for _ in (call.out if several else [0])]
    drop = call.name in ("select", "unbind")
    for c in colorings:
        if c.shape[dim] == 1:
            pieces = [c] * len(found)
        else:
            pieces = [c.take(place, axis=dim) for place in _places(call, x.shape[dim], dim)]
        for into, piece in zip(found, pieces, strict=True):
            one = compressed(piece.squeeze(dim) if drop else piece)
            if one.size == 1:
                call.freeze(one, why="a single channel is picked")
            else:
                into.append(one)
    return found if several else found[0]


def _places(call: Call, size: int, dim: int) -> list[list[int]]:
    """Which positions along the dimension each result holds."""
    given, everything = call.given, list(range(size))
    if call.name == "select":
        return [[int(given["index"]) % size]]
    if call.name == "slice":
        return [everything[slice(given.get("start"), given.get("end"), given.get("step") or 1)]]
    if call.name == "narrow":
        return [everything[int(given["start"]) :][: int(given["length"])]]
    places, start = [], 0
    for piece in call.out:
        length = 1 if call.name == "unbind" else int(piece.shape[dim])
        places.append(everything[start : start + length])
        start += length
    return places


@LAYOUT.on("cat", "concat", "stack")
def _(call: Call) -> Colorings:
    tensors, dims = list(call.given["tensors"]), len(call.shape)
    dim = int(call.given.get("dim") or 0) % dims
    stack = call.name == "stack"
    known = [
        [np.expand_dims(c, dim) if stack else c for c in call.known(t)]
        for t in tensors
        if t.dim() == dims - stack
    ]
    shapes = [list(t.shape) for t in tensors if t.dim() == dims - stack]
    if stack:
        shapes = [[*s[:dim], 1, *s[dim:]] for s in shapes]
    lengths = [s[dim] for s in shapes]
    inner = [tuple(1 if d == dim else n for d, n in enumerate(s)) for s in shapes]
    across = [[c for c in cs if c.shape[dim] == 1] for cs in known]
    result = joined(call.atoms, list(zip(inner, across, strict=True)))
    if any(c.shape[dim] > 1 for cs in known for c in cs):
        result.append(_concatenated(call, known, lengths, dim))
    return result


def _concatenated(call: Call, known: list[Colorings], lengths: list[int], dim: int) -> Coloring:
    """One coloring along `dim`; what has none, or varies along others too, is frozen."""
    pieces = []
    for colorings, length in zip(known, lengths, strict=True):
        clean = [c for c in colorings if c.shape[dim] > 1 and len(varying(c)) == 1]
        mixed = [c for c in colorings if c.shape[dim] > 1 and len(varying(c)) > 1]
        call.freeze(*mixed, why="channels in two dimensions are concatenated")
        if not clean:
            clean = [call.atoms.fresh(length)]
            call.freeze(clean[0], why="something of a fixed size is concatenated")
        pieces.append(clean[0].ravel())
    return along(np.concatenate(pieces), dim, len(call.shape))


SPATIAL = (
    "max_pool2d_with_indices",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "_adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "upsample_nearest2d",
    "_upsample_nearest_exact2d",
    "upsample_bilinear2d",
    "_upsample_bilinear2d_aa",
    "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
    "reflection_pad2d",
    "replication_pad2d",
    "avg_pool1d",
    "max_pool1d",
    "avg_pool3d",
    "max_pool3d_with_indices",
)


@LAYOUT.on(*SPATIAL)
def _(call: Call) -> Any:
    _, colorings = call.first()
    inner = 3 if "3d" in call.name else 1 if "1d" in call.name else 2
    kept = []
    for c in colorings:
        if all(size == 1 for size in c.shape[-inner:]):
            kept.append(c)
        else:
            call.freeze(c, why=f"{call.name} runs over channels")
    return [kept for _ in call.out] if isinstance(call.out, tuple | list) else kept


@LAYOUT.on("constant_pad_nd", "pad")
def _(call: Call) -> Colorings:
    x, colorings = call.first()
    changed = [d for d, (a, b) in enumerate(zip(x.shape, call.shape, strict=True)) if a != b]
    pads = list(call.given["pad"])
    changed += [x.dim() - 1 - n // 2 for n, size in enumerate(pads) if size]
    kept = []
    for c in colorings:
        if any(d in changed for d in varying(c)):
            call.freeze(c, why="channels are padded by a fixed number")
        else:
            kept.append(c)
    return kept


@LAYOUT.on("repeat")
def _(call: Call) -> Colorings:
    _, colorings = call.first()
    repeats = [int(n) for n in call.given["repeats"]]
    found = []
    for c in colorings:
        wide = aligned(c, len(repeats))
        times = [n if wide.shape[d] > 1 else 1 for d, n in enumerate(repeats)]
        found.append(np.tile(wide, times))
    return found
