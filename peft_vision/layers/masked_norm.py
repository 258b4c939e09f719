"""Norms over some of their features only, as if the others had been removed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.gates import Gate, Gated
from peft_vision.layers.surgery import keep_features


@singledispatch
def masked_norm(norm: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    """What `norm` gives with its statistics over the kept features of x (... D).

    Args:
        keep: D ones and zeros. What comes out at the others is what the norm would make of them.

    Raises:
        UnsupportedSite: there is no rule for this class of norm.
    """
    raise UnsupportedSite(f"There is no rule to mask the features of {type(norm).__name__}.")


@masked_norm.register(nn.LayerNorm)
def _(norm: nn.LayerNorm, x: Tensor, keep: Tensor) -> Tensor:
    wide, mask, count = _prepared(x, keep)
    centered = wide - (wide * mask).sum(-1, keepdim=True) / count
    return _finished(norm, x, centered, (centered.square() * mask).sum(-1, keepdim=True) / count)


@masked_norm.register(nn.RMSNorm)
def by_root_mean_square(norm: Any, x: Tensor, keep: Tensor) -> Tensor:
    """The rule for norms that divide by the root mean square and do not center."""
    wide, mask, count = _prepared(x, keep)
    return _finished(norm, x, wide, (wide.square() * mask).sum(-1, keepdim=True) / count)


def _prepared(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mask = keep.to(wide.dtype)
    return wide, mask, mask.sum().clamp_min(1.0)


def _finished(norm: Any, x: Tensor, centered: Tensor, power: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    y = centered * torch.rsqrt(power + eps)
    if norm.weight is not None:
        y = y * norm.weight.to(y.dtype)
    bias = getattr(norm, "bias", None)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)


class GatedNorm(Gated):
    """A norm with a gate on the features that leave it, and its statistics over the kept ones only.

    So nothing changes when the others are removed: what is trained is what is deployed. A mean that
    is not one is a factor of the norm's weight.

    Attributes:
        own: the gate, where it is this norm's alone; one that norms share is owned elsewhere.
        draws: multiply by the gate; else only leave out what it has closed.
    """

    def __init__(self, inner: nn.Module, gate: Gate, *, shared: bool, draws: bool = True) -> None:
        super().__init__(inner)
        self.own = None if shared else gate
        self.draws = draws
        # A tuple is not registered: a gate that is shared is saved once, by its owner.
        self._gates = (gate,)

    @property
    def gate(self) -> Gate:
        """The gate, whoever owns it."""
        return self._gates[0]

    def forward(self, x: Tensor) -> Tensor:
        """The normalized features, B ... D."""
        keep = self.gate.over(self.gate.kept(), x.shape[-1])
        y = masked_norm(self.inner, x, keep)
        return self.gate.multiply(y) if self.draws else y * keep.to(y.dtype)

    @torch.no_grad()
    def settle(self) -> nn.Module:
        """The norm with the gate's mean in its weight and bias."""
        if not self.draws:
            return self.inner
        weight, bias = (getattr(self.inner, name, None) for name in ("weight", "bias"))
        for values in (weight, bias):
            if isinstance(values, Tensor):
                values.mul_(self.gate.over(self.gate.mean(), values.shape[0]).to(values))
        return self.inner


def can_be_gated(norm: nn.Module) -> str:
    """Why a gate cannot stand behind this norm; empty when it can."""
    if masked_norm.dispatch(type(norm)) is masked_norm.dispatch(object):
        return f"there is no rule to mask the features of {type(norm).__name__}"
    if getattr(norm, "weight", None) is None:
        return f"its {type(norm).__name__} has no weight to take the mean of a gate"
    return ""


@keep_features.register(GatedNorm)
def _(layer: GatedNorm, indices: Sequence[int]) -> None:
    before = _features(layer.inner)
    if layer.own is not None or layer.gate.units == before:  # a shared gate is cut by the first
        layer.gate.keep_features(indices, before)
    keep_features(layer.inner, indices)


def _features(norm: Any) -> int:
    return int(norm.normalized_shape[-1])
