"""What operations that sum over elements do to colorings: reductions, norms, products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from peft_vision.backbones._channel_calls import Call, Colorings, Rules, joined, unknown
from peft_vision.backbones._channel_labels import (
    Coloring,
    aligned,
    along,
    varying,
)

SUMS = Rules()


MEANS = ("mean", "var", "var_mean", "std", "std_mean")
EXTREMES = ("sum", "amax", "amin", "max", "min", "prod", "linalg_vector_norm", "norm", "logsumexp")


@SUMS.on(*MEANS, *EXTREMES, "argmax", "argmin", "any", "all")
def _(call: Call) -> Any:
    x, colorings = call.first()
    dims = _dims(call.given.get("dim"), x.dim())
    keep = bool(call.given.get("keepdim"))
    found: Colorings = []
    for c in colorings:
        left = _reduced(call, c, dims)
        if left is not None:
            gone = () if keep else tuple(dims)
            found.append(left.squeeze(gone) if gone else left)
    return [found for _ in call.out] if isinstance(call.out, tuple | list) else found


def _dims(given: Any, dims: int) -> list[int]:
    if given is None or (isinstance(given, Sequence) and not given):
        return list(range(dims))
    return [d % dims for d in (given if isinstance(given, Sequence) else [given])]


def _reduced(call: Call, c: Coloring, dims: list[int]) -> Coloring | None:
    """What a reduction leaves of a coloring, with dimensions of 1; None where nothing is left."""
    mixed = [d for d in varying(c) if d in dims]
    if not mixed:
        return c
    if len(mixed) == len(varying(c)):
        if call.name in MEANS:
            call.atoms.mark(c, "normed")
        else:
            call.freeze(c, why=f"{call.name} runs over channels")
        return None
    one = c
    for d in mixed:
        one = one.take([0], axis=d)
    call.atoms.tie(c, one)
    return one


@SUMS.on("_softmax", "_safe_softmax", "_log_softmax", "softmax", "cumsum", "flip", "roll", "sort")
def _(call: Call) -> Any:
    x, colorings = call.first()
    named = call.given.get("dims", call.given.get("dim"))
    dims, kept = _dims(named, x.dim()), []
    for c in colorings:
        if not any(d in dims for d in varying(c)):
            kept.append(c)
        elif (left := _reduced(call, c, dims)) is not None:
            kept.append(left)
    return [kept for _ in call.out] if isinstance(call.out, tuple | list) else kept


@SUMS.on("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit")
@SUMS.on("cudnn_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update", "batch_norm")
def _(call: Call) -> list[Colorings]:
    if call.given.get("training", call.given.get("train", False)):
        for c in call.first()[1]:
            if any(d != 1 for d in varying(c)):
                call.atoms.mark(c, "normed")
    return [_by_channel(call, "weight", "bias", "running_mean", "running_var")]


def _by_channel(call: Call, *names: str) -> Colorings:
    """The first argument, B C ..., meets parameters of C values."""
    x, colorings = call.first()
    wide = tuple(n if d == 1 else 1 for d, n in enumerate(x.shape))
    given = (call.given.get(name) for name in names)
    scales = [
        (wide, [along(c, 1, x.dim()) for c in call.known(t)])
        for t in given
        if isinstance(t, Tensor)
    ]
    return joined(call.atoms, [(tuple(x.shape), colorings), *scales])


@SUMS.on("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _(call: Call) -> list[Colorings]:
    x, colorings = call.first()
    normed = range(x.dim() - len(call.given["normalized_shape"]), x.dim())
    for c in colorings:
        if any(d in normed for d in varying(c)):
            call.atoms.mark(c, "normed")
    scales = (call.given.get(name) for name in ("weight", "bias"))
    operands = [(tuple(t.shape), call.known(t)) for t in (x, *scales) if isinstance(t, Tensor)]
    return [joined(call.atoms, operands)]


@SUMS.on("native_group_norm", "group_norm")
def _(call: Call) -> list[Colorings]:
    _, colorings = call.first()
    if int(call.given.get("group", call.given.get("num_groups", 1))) > 1:
        call.freeze(*colorings, why="a norm over groups of channels")
    for c in colorings:
        call.atoms.mark(c, "normed")
    return [_by_channel(call, "weight", "bias")]


FACTORS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
}
"""What the arguments are called that are multiplied."""


@SUMS.on(*FACTORS)
def _(call: Call) -> Colorings:
    x, y = (t for name, t in call.given.items() if name in FACTORS[call.name])
    found = _product_of(call, x, y, y.dim() - 2)
    return _with_bias(call, call.given["self"], found) if "add" in call.name else found


@SUMS.on("linear")
def _(call: Call) -> Colorings:
    x, weight = call.given["input"], call.given["weight"]
    return _with_bias(call, call.given.get("bias"), _product_of(call, x, weight, 1))


def _with_bias(call: Call, bias: Tensor | None, found: Colorings) -> Colorings:
    if bias is None:
        return found
    return joined(call.atoms, [(call.shape, found), (tuple(bias.shape), call.known(bias))])


def _product_of(call: Call, x: Tensor, y: Tensor, inner: int) -> Colorings:
    """The product of x (... M K) and a matrix that is summed over its dimension `inner`."""
    mine, other = _sorted_out(call, x, x.dim() - 1), _sorted_out(call, y, inner)
    consume(call, x, y, mine[0], other[0])
    dims, column = len(call.shape), 2 * y.dim() - 3 - inner
    result = [aligned(c, dims) for c in mine[1]]
    if not call.is_data(x):
        call.atoms.mark(np.concatenate([c.ravel() for c in mine[1]] or [_NONE]), "produced")
    for c in other[1]:
        if varying(c) != (column,):
            call.freeze(c, why="products in batches")
            continue
        if not call.is_data(y):
            call.atoms.mark(c, "produced")
        result.append(along(c.ravel(), dims - 1, dims))
    return result


_NONE = np.zeros(0, dtype=np.int64)


def _sorted_out(call: Call, t: Tensor, inner: int) -> tuple[Coloring | None, Colorings]:
    """The coloring along the summed dimension, and the others; what is mixed, is frozen."""
    summed, rest = None, []
    batched = t.dim() == 3 and any(name in call.name for name in ("bmm",))
    for c in call.known(t):
        if varying(c) == (inner,):
            summed = c.ravel()
        elif inner in varying(c) or (batched and 0 in varying(c)):
            call.freeze(c, why="channels are split into heads or groups")
        else:
            rest.append(c)
    return summed, rest


def consume(call: Call, x: Tensor, y: Tensor, a: Coloring | None, b: Coloring | None) -> None:
    """Sum over channels: those of an activation meet those of a weight, or both are frozen."""
    if a is not None and b is not None and call.is_data(x) != call.is_data(y):
        call.atoms.tie(a, b)
        call.atoms.mark(a, "consumed")
        return
    why = "activations multiply activations" if call.is_data(y) else "a layer of a fixed size"
    call.freeze(*(c for c in (a, b) if c is not None), why=why)


@SUMS.on("convolution", "_convolution")
def _(call: Call) -> Colorings:
    x, w, groups = call.given["input"], call.given["weight"], int(call.given["groups"])
    turned = bool(call.given["transposed"])
    if call.is_data(w):
        return unknown(call)
    arriving = _only(call, x, 1)
    outer, inner = _only(call, w, 1 if turned else 0), _only(call, w, 0 if turned else 1)
    if groups == 1:
        consume(call, x, w, arriving, inner)
        if outer is not None:
            call.atoms.mark(outer, "produced")
    elif turned:
        call.freeze(
            *(c for c in (arriving, outer, inner) if c is not None), why="a grouped transposition"
        )
        outer = None
    else:
        outer = _grouped(call, (arriving, outer, inner), groups)
    found = [] if outer is None else [along(outer, 1, x.dim())]
    bias = call.given.get("bias")
    if not isinstance(bias, Tensor):
        return found
    wide = tuple(n if d == 1 else 1 for d, n in enumerate(call.shape))
    return joined(
        call.atoms,
        [(call.shape, found), (wide, [along(c, 1, x.dim()) for c in call.known(bias)])],
    )


def _only(call: Call, t: Tensor, dim: int) -> Coloring | None:
    """The coloring along `dim` alone; those of activations along others are frozen."""
    found = None
    for c in call.known(t):
        if varying(c) == (dim,):
            found = c.ravel()
        elif len(varying(c)) > 1 or call.is_data(t) or varying(c)[0] > 1:
            call.freeze(c, why="a convolution runs over channels")
    return found


def _grouped(
    call: Call, parts: tuple[Coloring | None, Coloring | None, Coloring | None], groups: int
) -> Coloring | None:
    """A convolution in groups loses whole groups, or the same channels of each group."""
    arriving, outer, inner = parts
    present = [c for c in parts if c is not None]
    w = call.given["weight"]
    if outer is None:
        call.freeze(*present, why="a layer of a fixed size")
        return None
    leaving = outer.reshape(groups, -1)
    if call.by_group(w, groups):
        if inner is not None:
            call.freeze(inner, why="whole groups go")
        if arriving is None:
            call.freeze(outer, why="a layer of a fixed size")
            return None
        entering = arriving.reshape(groups, -1)
        call.atoms.tie(leaving, entering[:, :1])
        call.atoms.tie(entering, entering[:, :1])
        if w.shape[1] > 1:
            call.atoms.mark(outer, "produced")
            call.atoms.mark(arriving, "consumed")
        return outer
    call.atoms.tie(leaving, leaving[:1])
    call.atoms.mark(outer, "produced")
    if arriving is not None and inner is not None:
        entering = arriving.reshape(groups, -1)
        call.atoms.tie(entering, entering[:1])
        call.atoms.tie(entering[0], inner)
        call.atoms.mark(arriving, "consumed")
    else:
        call.freeze(*(c for c in (arriving, inner) if c is not None), why="a layer of a fixed size")
    return outer
