"""Norms that keep what they gave, in low precision, in place of their input in full precision.

Under autocast the stream through a ViT's blocks is in 32 bits, and every norm keeps its own state
of it: 4 bytes a number. What the backward pass of a norm needs is the normalized value and one
factor per row, and what the linears behind it need is that value, too, scaled and shifted. Kept
once in autocast's dtype it serves them all with 2 bytes a number.

Outputs do not change. Gradients see a normalized value that is rounded as the linears' own inputs
are anyway. In full precision nothing would be gained, and nothing is done. The second derivative is
refused with a RuntimeError.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peft_vision.layers.low_rank import autocast_dtype
from peft_vision.layers.masked_norm import by_root_mean_square, masked_norm
from peft_vision.layers.recomputed import note, origin_of

CENTERED = "NativeLayerNormBackward0"
"""Autograd's node of a LayerNorm over the last dimensions."""


def keep_low(norm: Any, args: tuple[Any, ...], output: Any) -> Any:
    """A forward hook: the same output, with a backward pass that keeps less.

    Norms that it does not know for certain, and norms outside of autocast, stay as they are.
    """
    if len(args) != 1 or torch.compiler.is_compiling() or not _is_trained(args[0], output):
        return output
    x: Tensor = args[0]
    low = autocast_dtype(x)
    if low is None or low.itemsize >= output.dtype.itemsize:
        return output
    centered, origin = _is_centered(norm, output), origin_of(x)
    if centered is None or (origin is not None and origin.exact):  # nothing new is kept for that
        return output
    with torch.no_grad():
        normalized, rstd = _normalized(norm, x, centered=centered)
        normalized = normalized.to(low)
    weight, bias = norm.weight, getattr(norm, "bias", None)
    given = (x, weight, bias, output.detach(), normalized, rstd, centered)
    y: Tensor = _LowNorm.apply(*given)
    parameters = [None if p is None else p.detach() for p in (weight, bias)]
    note(y, (normalized,), partial(_scaled, weight=parameters[0], bias=parameters[1]), exact=False)
    return y


def _is_trained(x: Any, output: Any) -> bool:
    both = isinstance(x, Tensor) and isinstance(output, Tensor)
    return both and x.requires_grad and output.grad_fn is not None


def _is_centered(norm: Any, output: Tensor) -> bool | None:
    """Whether the norm centers its input, over the last dimension; None where it is not certain."""
    if tuple(getattr(norm, "normalized_shape", ())) != tuple(output.shape[-1:]):
        return None
    if isinstance(norm, nn.LayerNorm):
        node = output.grad_fn
        return True if node is not None and node.name() == CENTERED else None
    return False if masked_norm.registry.get(type(norm)) is by_root_mean_square else None


def _normalized(norm: Any, x: Tensor, *, centered: bool) -> tuple[Tensor, Tensor]:
    """The normalized rows, and by what each was multiplied: ... D and ... 1, in 32 bits."""
    wide = x.float()
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    if centered:
        y, _, rstd = torch.native_layer_norm(wide, wide.shape[-1:], None, None, eps)
        return y, rstd
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * rstd, rstd


def _scaled(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What the norm gave: in 32 bits, and then rounded by whoever asks."""
    y = normalized.float()
    if weight is not None:
        y = y.mul_(weight)
    return y if bias is None else y.add_(bias)


class _LowNorm(torch.autograd.Function):
    """Gradients for x, weight and bias."""

    @staticmethod
    def forward(  # noqa: PLR0917 - torch passes them by position
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor,
        normalized: Tensor,
        rstd: Tensor,
        centered: bool,
    ) -> Tensor:
        ctx.centered, ctx.dtype = centered, x.dtype
        ctx.save_for_backward(normalized, rstd, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normalized, rstd, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        g, z = grad.float(), normalized.float()
        if ctx.centered:
            # The kernel's own rows are normalized already: mean 0 and factor 1.
            ones, zeros = torch.ones_like(rstd), torch.zeros_like(rstd)
            wide = [None if p is None else p.float() for p in (weight, bias)]
            grads = torch.ops.aten.native_layer_norm_backward(
                g, z, z.shape[-1:], zeros, ones, *wide, list(needed)
            )
        else:
            grads = _uncentered(g, z, weight, needed)
        along, grad_weight, grad_bias = grads
        grad_x = along.mul_(rstd).to(ctx.dtype) if needed[0] else None
        if grad_weight is not None and weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _uncentered(
    g: Tensor, z: Tensor, weight: Tensor | None, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of a norm by the root mean square."""
    rows = tuple(range(g.dim() - 1))
    grad_weight = (g * z).sum(rows) if needed[1] else None
    grad_bias = g.sum(rows) if needed[2] else None
    g = g if weight is None else g * weight
    return g - z * (g * z).mean(-1, keepdim=True), grad_weight, grad_bias
