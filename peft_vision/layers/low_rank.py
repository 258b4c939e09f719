"""A frozen linear with a trained low-rank update, forward and backward by hand.

``y = x W'^T + b`` with ``W' = W + s U D``: W is out x in and frozen, D (down) r x in, U (up) out x
r. Autograd through ``linear(x, W, b) + s * linear(linear(x, D), U)`` writes two more tensors of the
size of y, takes six thin products per layer instead of four, and keeps x in each precision that it
was cast to. Here

* in full precision, with many tokens, U D is added to W (much less than the tokens) and one product
  gives y; the backward forms W' again.
* otherwise (W' in low precision would round the update away, and with few tokens it costs more than
  it saves) the update is added onto y, and onto the gradient of x, in place. Weights are cast when
  they are used; the casts are dropped at once and made again for the backward.
* x is kept in the precision of the product, once for all who are given the same tensor, and not at
  all where it can be computed again (`peft_vision.layers.recomputed`).

The second derivative is refused: asking for it raises a RuntimeError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_vision.layers.products import linear
from peft_vision.layers.recomputed import origin_of, without_autocast

CAST = "_peft_vision_cast"
UNUSED = (None,) * 4
"""Gradients of what `_LowRankLinear.forward` takes besides tensors."""


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> Tensor:
    """``x (W + s U D)^T + b``.

    Args:
        x: ... x in. `weight`: out x in, without gradient. `bias`: out.
        down: r x in. `up`: out x r. `scale`: s.

    Returns:
        ... x out, in the dtype of the product: autocast's, or that of x.
    """
    dtype = autocast_dtype(x) or x.dtype
    low = x if x.dtype == dtype else _cast_once(x, dtype)
    tokens, (wide, narrow) = x.numel() // x.shape[-1], weight.shape
    many = tokens * (wide + narrow) >= 2 * wide * narrow
    folded = many and dtype == weight.dtype == down.dtype == up.dtype
    kept: tuple[Tensor, ...] = (low.detach(),)
    again = None
    if torch.is_grad_enabled() and (down.requires_grad or (folded and up.requires_grad)):
        origin = origin_of(x)
        if origin is not None:
            kept, again = origin.sources, origin.again
            again.enter()
    result: Tensor = _LowRankLinear.apply(
        x, bias, down, up, weight, low.detach(), (kept, again, folded), scale
    )
    return result


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast would multiply `x` by a weight here; None when it would not."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class _LowRankLinear(torch.autograd.Function):
    """Gradients for x, bias, down and up; the weight gets none."""

    @staticmethod
    def forward(  # noqa: PLR0917 - torch passes them by position
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        weight: Tensor,
        low: Tensor,
        how: tuple[tuple[Tensor, ...], Any, bool],
        scale: float,
    ) -> Tensor:
        kept, ctx.again, ctx.folded = how
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (low.dtype, x.dtype)
        mid = None
        # Not a view, which the caller could not change in place; some attention adds its bias so.
        if ctx.folded:
            y = linear(low, torch.addmm(weight, up, down, alpha=scale), bias)
        else:
            y = linear(low, weight.to(low.dtype), bias)
            out = y.view(-1, y.shape[-1])
            mid = linear(low.reshape(-1, low.shape[-1]), down.to(low.dtype))
            torch.addmm(out, mid, up.to(low.dtype).t(), alpha=scale, out=out)
        needs_x = ctx.needs_input_grad[2] or (ctx.folded and ctx.needs_input_grad[3])
        ctx.save_for_backward(
            mid if ctx.needs_input_grad[3] else None,
            *(weight, down, up),
            *(kept if needs_x else ()),
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mid, weight, down, up, *kept = ctx.saved_tensors
        dtype, folded = ctx.dtypes[0], ctx.folded
        needs_x, needs_bias, needs_down, needs_up = ctx.needs_input_grad[:4]
        grad_down = grad_up = thin = None
        with without_autocast(grad):
            g, down_low = grad.reshape(-1, grad.shape[-1]), down.to(dtype)
            rows = _rows(ctx, kept) if kept else None
            if needs_up:
                mid = linear(rows, down_low) if mid is None and rows is not None else mid
                grad_up = (g.t() @ mid).mul_(ctx.scale).to(up.dtype)
            if needs_down or (needs_x and not folded):
                thin = linear(g, up.to(dtype).t().contiguous()).mul_(ctx.scale)
            if rows is not None and thin is not None and needs_down:
                # Of the two ways around, the one with the long side first is the faster product.
                grad_down = (rows.t() @ thin).t().to(down.dtype)
            rows = None
            grad_x = _grad_of_x(ctx, g, thin, (weight, down_low, up)) if needs_x else None
            grad_bias = g.sum(0) if needs_bias else None
        return grad_x, grad_bias, grad_down, grad_up, *UNUSED


def _rows(ctx: Any, kept: Sequence[Tensor]) -> Tensor:
    """The input again, tokens x in."""
    x = kept[0] if ctx.again is None else ctx.again.value(kept, ctx.dtypes[0])
    return x.reshape(-1, x.shape[-1])


def _grad_of_x(
    ctx: Any, g: Tensor, thin: Tensor | None, weights: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    weight, down, up = weights
    if ctx.folded or thin is None:
        grad = linear(g, torch.addmm(weight, up, down, alpha=ctx.scale).t())
    else:
        grad = linear(g, weight.to(g.dtype).t())
        torch.addmm(grad, thin, down, out=grad)
    return grad.view(ctx.shape).to(ctx.dtypes[1])


def _cast_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, the same tensor for all who are given the same `x`."""
    if x.grad_fn is None:  # somebody's own tensor may change unseen between two calls
        return x.detach().to(dtype)
    known, version = vars(x).get(CAST), x._version  # noqa: SLF001 - tells of changes in place
    if known is None or known[0] != version or known[1].dtype != dtype:
        known = (version, x.detach().to(dtype))
        vars(x)[CAST] = known
    cast: Tensor = known[1]
    return cast
