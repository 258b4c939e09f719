"""Activations in two parts, x = relevant + rest, and the rules that carry both through layers.

Contextual decomposition for transformers (CD-T; Hsu et al., 2024). Every rule keeps the sum: the
two parts of what a layer gives add up to what it gives for the sum of the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_vision.backbones.assembly import is_linear
from peft_vision.layers.gates import GatedLinear
from peft_vision.layers.linear_mlp import LinearMlp
from peft_vision.layers.masked_norm import by_root_mean_square, masked_norm
from peft_vision.layers.split_linear import SplitLinear

Function = Callable[[Tensor], Tensor]

AFFINE = (SplitLinear, GatedLinear, LinearMlp, nn.Identity, nn.Dropout)
"""Layers that are a linear map and a constant in evaluation mode, besides linears."""


class Pair(NamedTuple):
    """Two parts of one activation, of the same shape."""

    relevant: Tensor
    rest: Tensor

    @property
    def total(self) -> Tensor:
        """The activation."""
        return self.relevant + self.rest

    def each(self, function: Function) -> Pair:
        """A linear map without a constant, of both parts."""
        return Pair(function(self.relevant), function(self.rest))

    def plus(self, other: Pair) -> Pair:
        """A sum of activations."""
        return Pair(self.relevant + other.relevant, self.rest + other.rest)


def with_constant(pair: Pair, constant: Tensor) -> Pair:
    """A constant is divided between the parts by their absolute values; the rest takes it at 0."""
    size = pair.relevant.abs()
    mine = constant * (size / (size + pair.rest.abs()).clamp_min(torch.finfo(size.dtype).tiny))
    return Pair(pair.relevant + mine, pair.rest + (constant - mine))


def affine(layer: Function, pair: Pair) -> Pair:
    """Through W x + b, whoever computes it."""
    constant = layer(torch.zeros_like(pair.rest[:1]))
    return with_constant(pair.each(lambda x: layer(x) - constant), constant)


def attended(q: Pair, k: Pair, v: Pair) -> Pair:
    """Through scores, probabilities and output of attention: B H N D each.

    The relevant part of a product is that of the relevant parts; all else is the rest.
    """
    scale = q.rest.shape[-1] ** -0.5

    def scores(a: Tensor, b: Tensor) -> Tensor:
        product: Tensor = a @ b.transpose(-2, -1) * scale
        return product

    likely, whole = scores(q.relevant, k.relevant).softmax(-1), scores(q.total, k.total).softmax(-1)
    relevant = likely @ v.relevant
    return Pair(relevant, whole @ v.total - relevant)


def normed(norm: Any, pair: Pair, *, centers: bool) -> Pair:
    """Through a norm over the last dimension: the statistics are those of the sum."""
    parts = pair.each(lambda x: x - x.mean(-1, keepdim=True)) if centers else pair
    power = parts.total.square().mean(-1, keepdim=True)
    eps = torch.finfo(power.dtype).eps if norm.eps is None else norm.eps
    scale = torch.rsqrt(power + eps)
    scale = scale if norm.weight is None else scale * norm.weight.to(power.dtype)
    done = parts.each(lambda x: x * scale)
    bias: Tensor | None = getattr(norm, "bias", None)
    return done if bias is None else with_constant(done, bias)


def rest_first(function: Function, pair: Pair) -> Pair:
    """Through what bends: the rest goes first, and what it does not explain is relevant."""
    rest = function(pair.rest)
    return Pair(function(pair.total) - rest, rest)


def through(module: nn.Module, pair: Pair) -> Pair:
    """Through a layer by the rule of its kind; what is of no kind known is taken to bend."""
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return normed(module, pair, centers=True)
    if masked_norm.dispatch(type(module)) is by_root_mean_square:
        return normed(module, pair, centers=False)
    if is_linear(module) or isinstance(module, AFFINE):
        return affine(module, pair)
    return rest_first(module, pair)
