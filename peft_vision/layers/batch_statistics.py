"""Running means and variances of batch norms, taken again on images.

After channels were cut, or layers replaced, what arrives at a batch norm is another distribution
than the one that its running statistics describe; taking them again costs one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Sums:
    """Over all values of a channel: how many, their sum and the sum of their squares, C each."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.square = torch.zeros(width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        values = x.detach().transpose(0, 1).flatten(1).float()  # C, everything else
        self.count += values.shape[1]
        self.total += values.sum(1, dtype=torch.float64).cpu()
        self.square += (values**2).sum(1, dtype=torch.float64).cpu()

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        return (self.square / self.count - self.mean**2).clamp_min(0.0)


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Those that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001
        and module.running_mean is not None
    ]


@torch.no_grad()
def estimate_again(model: nn.Module, run: Callable[[], None]) -> int:
    """Set the running statistics of all batch norms by what arrives while `run` calls the model.

    Each batch is normalized by its own statistics on its way, as in training, so that one pass is
    enough; in the end there are those of all values together. A norm that sees one value per
    channel, or none, keeps what it has.

    Returns:
        How many norms have new statistics.
    """
    norms = batch_norms(model)
    sums = {norm: _Sums(norm.num_features) for norm in norms}
    before = {norm: _statistics(norm) for norm in norms}

    def arrive(norm: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001
        now = _Sums(norm.num_features)
        now.add(args[0])
        if now.count > 1:
            sums[norm].add(args[0])
            _set(norm, now.mean, now.variance)

    handles = [norm.register_forward_pre_hook(arrive) for norm in norms]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            _set(norm, *before[norm])
    seen = [norm for norm in norms if sums[norm].count > 1]
    for norm in seen:
        _set(norm, sums[norm].mean, sums[norm].variance)
    return len(seen)


def _statistics(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.clone(), norm.running_var.clone()


def _set(norm: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
