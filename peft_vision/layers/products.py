"""Matrix products by the fastest kernel that torch has for them, without autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""What torch's compiler calls for a linear on CPUs. In eager mode torch leaves 32-bit products to
its BLAS, which on some CPUs, and for thin matrices on most, is the slower of the two."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` as a tensor of its own, not a view, so that it may be changed in place.

    Args:
        x: ... x in. `weight`: out x in. `bias`: out.

    Returns:
        ... x out, in the dtype of `x`.
    """
    if _is_for_onednn(x, weight, *(() if bias is None else (bias,))):
        rows = ONEDNN(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
        own: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], weight.shape[0]])  # noqa: SLF001
        return own
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), rows, weight.t(), out=out)
    return y


def _is_for_onednn(*tensors: Tensor) -> bool:
    x, *_ = tensors
    here: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    on = ONEDNN is not None and here
    single = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return on and bool(torch.backends.mkldnn.enabled) and single and x.dim() > 1 and x.numel() > 0
