"""A linear or a convolution as a chain of smaller ones.

The factors are plain layers, so that surgery, adapters, quantizers and exporters meet nothing new.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.layer_shape import (
    LayerShape,
    Sizes,
    kernel_of,
    shape_of,
)
from peft_vision.layers.surgery import keep_inputs, keep_outputs, weight_of
from peft_vision.layers.traits import Foldable


class Factored(nn.Module, Foldable):
    """What stands for one linear or convolution and holds it as factors."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight of the layer they stand for, in its shape; gradients pass."""

    @property
    @abstractmethod
    def first(self) -> Any:
        """The factor that reads what arrives."""

    @property
    def weight(self) -> Tensor:
        """The shape, dtype and device of the weight they stand for, and no numbers: all are NaN.

        Models ask a layer for its weight's dtype on every call; the product of the factors would
        cost them more than the layer. It is `dense_weight`.
        """
        held: Tensor = self.first.weight
        return held.detach().new_full((), math.nan).expand(self._size())

    @abstractmethod
    def _size(self) -> torch.Size:
        """Of the weight they stand for."""


class Chain(nn.Sequential, Factored):
    """Layers in a row that stand for one; the last holds its bias."""

    @property
    def first(self) -> Any:
        """The factor that reads what arrives."""
        return self[0]

    @property
    def last(self) -> Any:
        """The factor that gives the output."""
        return self[len(self) - 1]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, which is the last factor's."""
        found: nn.Parameter | None = self.last.bias
        return found


class FactoredLinear(Chain):
    """Linears in a row: ... I -> ... R -> ... O."""

    @property
    def in_features(self) -> int:
        """I."""
        return int(self.first.in_features)

    @property
    def out_features(self) -> int:
        """O."""
        return int(self.last.out_features)

    def _size(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def dense_weight(self) -> Tensor:
        """O I."""
        weight: Tensor = self.first.weight
        others: list[Any] = list(self)[1:]
        for factor in others:
            weight = factor.weight @ weight
        return weight

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """One linear that computes the same."""
        dense = LayerShape(self.in_features, self.out_features).make(self.dense_weight(), self.bias)
        assert isinstance(dense, nn.Linear)
        return dense.train(self.training)


class FactoredConv(Chain):
    """Convolutions in a row: B I *grid -> B O *grid.

    Along each axis of the grid at most one factor has a kernel longer than 1, so that the kernel
    they stand for is their product. It has as many groups as the last factor.
    """

    @property
    def in_channels(self) -> int:
        """I."""
        return int(self.first.in_channels)

    @property
    def out_channels(self) -> int:
        """O."""
        return int(self.last.out_channels)

    @property
    def groups(self) -> int:
        """Of the convolution they stand for."""
        return int(self.last.groups)

    @property
    def kernel_size(self) -> Sizes:
        """Of the convolution they stand for; so are `stride`, `padding` and `dilation`."""
        return self._shape().kernel

    @property
    def stride(self) -> Sizes:
        """Step per axis."""
        return self._shape().stride

    @property
    def padding(self) -> Sizes:
        """Zeros on each side per axis."""
        return self._shape().padding

    @property
    def dilation(self) -> Sizes:
        """Spread per axis."""
        return self._shape().dilation

    def dense_weight(self) -> Tensor:
        """O, I / groups, kernel."""
        convs: list[Any] = list(self)
        whole = kernel_of([(c.weight, c.groups) for c in convs])
        return whole.flatten(0, 1)

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """One convolution that computes the same."""
        return self._shape().make(self.dense_weight(), self.bias).train(self.training)

    def _size(self) -> torch.Size:
        return torch.Size(self._shape().size)

    def _shape(self) -> LayerShape:
        shapes = [shape_of(factor) for factor in self]
        several = [(s.kernel, s.stride, s.padding, s.dilation) for s in shapes]
        kernels, strides, paddings, dilations = (
            list(zip(*rows, strict=True)) for rows in zip(*several, strict=True)
        )
        return LayerShape(
            self.in_channels,
            self.out_channels,
            tuple(max(sizes) for sizes in kernels),
            tuple(math.prod(steps) for steps in strides),
            tuple(sum(zeros) for zeros in paddings),
            tuple(max(spreads) for spreads in dilations),
            self.groups,
        )


def chain(layer: nn.Module, shapes: Sequence[LayerShape], weights: Sequence[Tensor]) -> Chain:
    """The chain that takes the place of `layer`, with its bias, dtype, device and mode.

    Args:
        shapes: of the factors, first to last.
        weights: of the factors, of any dtype; on `meta` where the layer is.
    """
    dense: Any = layer
    last = len(shapes) - 1
    factors = [
        shape.make(weight.to(dense.weight), dense.bias if place == last else None)
        for place, (shape, weight) in enumerate(zip(shapes, weights, strict=True))
    ]
    made = FactoredLinear(*factors) if isinstance(layer, nn.Linear) else FactoredConv(*factors)
    return made.requires_grad_(dense.weight.requires_grad).train(layer.training)


def last_factor(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    """(owner, attribute) of the layer that gives the output: of a chain its last factor."""
    found = getattr(owner, name)
    return (found, str(len(found) - 1)) if isinstance(found, Chain) else (owner, name)


def earlier_factors(owner: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """(owner, attribute) of the factors of a chain but the last; none of a plain layer."""
    found = getattr(owner, name)
    count = len(found) - 1 if isinstance(found, Chain) else 0
    return [(found, str(number)) for number in range(count)]


def fold_factors(model: nn.Module) -> int:
    """Put dense layers in the place of all that are factored below `model`, in place.

    Returns:
        How many there were.
    """
    found = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, Factored)
    ]
    for owner, name, child in found:
        setattr(owner, name, child.fold())
    return len(found)


def relative_error(weight: Tensor, factored: Factored) -> float:
    """Frobenius norm of what the factors lack, relative to that of the dense weight."""
    exact = weight.detach().double()
    lost = factored.dense_weight().detach().double().reshape(exact.shape) - exact
    return float(lost.norm() / exact.norm().clamp_min(1e-30))


@weight_of.register(Factored)
def _(layer: Factored) -> Tensor:
    return layer.dense_weight().detach()


@keep_outputs.register(Chain)
def _(layer: Chain, indices: Sequence[int]) -> None:
    _require_one_group(layer)
    keep_outputs(layer.last, indices)


@keep_inputs.register(Chain)
def _(layer: Chain, indices: Sequence[int]) -> None:
    _require_one_group(layer)
    keep_inputs(layer.first, indices)


def _require_one_group(layer: Chain) -> None:
    if isinstance(layer, FactoredConv) and layer.groups > 1:
        raise UnsupportedSite(
            f"A chain of grouped convolutions ({layer.groups} groups) cannot be cut. Cut first and "
            "factor what stays."
        )
