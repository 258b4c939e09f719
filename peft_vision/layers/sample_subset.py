"""Stochastic depth on samples, each branch computed for those that are kept only.

Huang et al., "Deep Networks with Stochastic Depth" (ECCV 2016), in the way of DINOv2 (Oquab et al.,
2023) and LoRAT (Lin et al., ECCV 2024): a branch of a residual block runs on a random subset of the
batch and is added back onto those samples, scaled so that its expectation stays. What is left out
is neither computed nor kept. torch's own `index_add` keeps what it adds; here nothing but the
indices is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def kept_count(batch: int, share: float) -> int:
    """How many of `batch` samples a branch is computed for when `share` of them is left out.

    Rounded down as in DINOv2, and at least 1: 9 of 16 for 0.4.
    """
    return max(1, int(batch * (1.0 - share)))


class SampleSubset:
    """Hooks on a branch, from its norm to its last module, for as long as `remove` is not called.

    Args:
        norm: the branch's first module, given B N C.
        last: the module whose output is the branch; what it passes through after that (scales) is
            applied to zeros for the samples that were left out.
        share: of the samples to leave out, in [0, 1).
    """

    def __init__(self, norm: nn.Module, last: nn.Module, share: float) -> None:
        self._share = share
        self._chosen: tuple[Tensor, int] | None = None
        self._handles: list[RemovableHandle] = [
            norm.register_forward_pre_hook(self._choose),
            last.register_forward_hook(self._put_back),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _choose(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x: Tensor = args[0]
        batch = x.shape[0]
        count = kept_count(batch, self._share)
        if not module.training or count == batch:
            self._chosen = None
            return None
        chosen = torch.randperm(batch, device=x.device)[:count]
        self._chosen = (chosen, batch)
        return (x.index_select(0, chosen), *args[1:])

    def _put_back(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._chosen is None:
            return output
        (chosen, batch), self._chosen = self._chosen, None
        if isinstance(output, tuple):
            return (_PutBack.apply(output[0], chosen, batch), *output[1:])
        return _PutBack.apply(output, chosen, batch)


class _PutBack(torch.autograd.Function):
    """Rows in their places among zeros, scaled by the number of places for each row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, chosen: Tensor, batch: int) -> Tensor:
        ctx.scale = batch / rows.shape[0]
        ctx.save_for_backward(chosen)
        whole = rows.new_zeros(batch, *rows.shape[1:])
        return whole.index_copy_(0, chosen, rows * ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (chosen,) = ctx.saved_tensors
        return grad.index_select(0, chosen) * ctx.scale, None, None
