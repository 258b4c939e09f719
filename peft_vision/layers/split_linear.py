"""A fused linear as several, so that each part can be adapted on its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

import torch
from torch import Tensor, nn

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.named_parts import outputs_of
from peft_vision.layers.surgery import keep_inputs, keep_outputs, weight_of

NAMES = ("q", "k", "v")


class SplitLinear(nn.Module):
    """Queries, keys and values by a linear each; called like the fused one.

    Maps B N C to the outputs of the three, one after the other.
    """

    q: nn.Module
    k: nn.Module
    v: nn.Module

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.q, self.k, self.v = parts

    @property
    def out_features(self) -> int:
        """How many features the three give."""
        return sum(outputs_of(part) for part in (self.q, self.k, self.v))

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of the three, joined."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


@singledispatch
def split_outputs(layer: nn.Module, sizes: Sequence[int]) -> list[nn.Module]:
    """Layers of so many outputs each, which one after the other are those of `layer`.

    Raises:
        UnsupportedSite: there is no rule for this class of layer.
    """
    raise UnsupportedSite(f"There is no rule to split the outputs of {type(layer).__name__}.")


@split_outputs.register(nn.Linear)
def _(layer: nn.Linear, sizes: Sequence[int]) -> list[nn.Module]:
    if type(layer) is not nn.Linear:
        raise UnsupportedSite(f"There is no rule to split the outputs of {type(layer).__name__}.")
    weights = torch.split(layer.weight.detach(), list(sizes))
    biases: Sequence[Tensor | None] = [None] * len(weights)
    if layer.bias is not None:
        biases = torch.split(layer.bias.detach(), list(sizes))
    return [_linear(w, b) for w, b in zip(weights, biases, strict=True)]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    made = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return made


def fuse(split: SplitLinear) -> nn.Linear:
    """The fused linear again, from three plain ones.

    Raises:
        UnsupportedSite: a part is not a plain linear.
    """
    parts: list[nn.Linear] = []
    for part in (split.q, split.k, split.v):
        if type(part) is not nn.Linear:
            kind = type(part).__name__
            raise UnsupportedSite(f"Only plain linears can be fused again, and this is a {kind}.")
        parts.append(part)
    biased = parts[0].bias is not None
    bias = torch.cat([part.bias.detach() for part in parts]) if biased else None
    return _linear(torch.cat([part.weight.detach() for part in parts]), bias)


@keep_outputs.register(SplitLinear)
def _(layer: SplitLinear, indices: Sequence[int]) -> None:
    start = 0
    for name in NAMES:
        part = getattr(layer, name)
        size = outputs_of(part)
        keep_outputs(part, [i - start for i in indices if start <= i < start + size])
        start += size


@keep_inputs.register(SplitLinear)
def _(layer: SplitLinear, indices: Sequence[int]) -> None:
    for name in NAMES:
        keep_inputs(getattr(layer, name), indices)


@weight_of.register(SplitLinear)
def _(layer: SplitLinear) -> Tensor:
    return torch.cat([weight_of(getattr(layer, name)) for name in NAMES])
