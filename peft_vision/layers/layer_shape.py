"""The shape of a linear or a convolution as plain numbers: what it costs, and how to make one.

A linear is a convolution without a grid: its kernel, stride, padding and dilation are empty.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.errors import UnsupportedSite

Sizes = tuple[int, ...]
"""One number per axis of the grid."""

KINDS: dict[type[nn.Module], int] = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
CONVS = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerShape:
    """Channels, and per axis of the grid the kernel's size, its step, its padding, its spread."""

    inputs: int
    outputs: int
    kernel: Sizes = ()
    stride: Sizes = ()
    padding: Sizes = ()
    dilation: Sizes = ()
    groups: int = 1

    @property
    def weights(self) -> int:
        """Parameters without the bias."""
        return self.outputs * (self.inputs // self.groups) * math.prod(self.kernel)

    @property
    def size(self) -> Sizes:
        """Of the weight: outputs, inputs of a group, kernel."""
        return (self.outputs, self.inputs // self.groups, *self.kernel)

    @property
    def wide(self) -> tuple[int, ...]:
        """The axes along which the kernel is longer than 1."""
        return tuple(axis for axis, size in enumerate(self.kernel) if size > 1)

    def after(self, grid: Sizes) -> Sizes:
        """Size of the grid behind the layer."""
        axes = zip(grid, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)

    def between(self, inputs: int, outputs: int, axes: Collection[int], groups: int) -> LayerShape:
        """A layer between other channels that does along `axes` what this one does there."""

        def kept(values: Sizes, otherwise: int) -> Sizes:
            return tuple(v if axis in axes else otherwise for axis, v in enumerate(values))

        return replace(
            self,
            inputs=inputs,
            outputs=outputs,
            kernel=kept(self.kernel, 1),
            stride=kept(self.stride, 1),
            padding=kept(self.padding, 0),
            dilation=kept(self.dilation, 1),
            groups=groups,
        )

    def make(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A plain layer that holds these; on `meta` where they are."""
        kind = CONVS[len(self.kernel)]
        with_bias = bias is not None
        made: Any = (
            nn.Linear(self.inputs, self.outputs, with_bias, device="meta")
            if kind is None
            else kind(
                self.inputs,
                self.outputs,
                self.kernel,  # type: ignore[arg-type]
                self.stride,  # type: ignore[arg-type]
                self.padding,  # type: ignore[arg-type]
                self.dilation,  # type: ignore[arg-type]
                self.groups,
                with_bias,
                device="meta",
            )
        )
        # Copied, for kernels round otherwise where a weight's strides are not those of its file.
        made.weight = nn.Parameter(weight.new_empty(self.size).copy_(weight.reshape(self.size)))
        made.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        result: nn.Module = made
        return result


def cost_of(shapes: Sequence[LayerShape], grid: Sizes, rows: int = 1) -> int:
    """Multiply-accumulates of layers in a row.

    Args:
        grid: size of the grid that arrives; empty for linears.
        rows: how many grids, or rows of a linear, arrive.
    """
    total = 0
    for shape in shapes:
        grid = shape.after(grid)
        total += shape.weights * math.prod(grid)
    return total * rows


def why_not_plain(layer: nn.Module) -> str:
    """What keeps a layer from being described by a `LayerShape`; empty when nothing does."""
    if type(layer) not in KINDS:
        return (
            f"it is a {type(layer).__name__}, and only plain linears and convolutions have a rule"
        )
    if not layer.weight.is_floating_point():  # type: ignore[operator]
        return "its weight is packed; factor the full weights and quantize afterwards"
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if layer.padding_mode != "zeros":
            return (
                f"it pads with {layer.padding_mode!r}, and only zeros can be divided over factors"
            )
        if layer.padding == "same" and any(total % 2 for total in _same(layer)):
            return "its padding 'same' is larger on one side"
    return ""


def shape_of(layer: nn.Module) -> LayerShape:
    """The shape of a plain linear or convolution.

    Raises:
        UnsupportedSite: it is another class of layer, or pads otherwise than with zeros.
    """
    if reason := why_not_plain(layer):
        raise UnsupportedSite(f"{type(layer).__name__} has no plain shape: {reason}.")
    if isinstance(layer, nn.Linear):
        return LayerShape(layer.in_features, layer.out_features)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    padding: Sizes
    if isinstance(layer.padding, str):
        same = layer.padding == "same"
        padding = tuple(total // 2 if same else 0 for total in _same(layer))
    else:
        padding = tuple(layer.padding)
    return LayerShape(
        layer.in_channels,
        layer.out_channels,
        tuple(layer.kernel_size),
        tuple(layer.stride),
        padding,
        tuple(layer.dilation),
        layer.groups,
    )


def _same(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Sizes:
    """How many rows of zeros keep the grid's size, both sides together."""
    return tuple(d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))


def per_group(weight: Tensor, groups: int) -> Tensor:
    """A weight (outputs, inputs of a group, kernel) as (groups, outputs, inputs, kernel)."""
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])


def spread_groups(weight: Tensor, groups: int, among: int) -> Tensor:
    """The weight of a layer of `groups` as one of fewer groups, zeros between: G, O, I, kernel.

    Args:
        among: the number of groups that are left, a divisor of `groups`.
    """
    inner = groups // among
    parts = weight.reshape(among, inner, weight.shape[0] // groups, *weight.shape[1:])
    eye = torch.eye(inner, dtype=weight.dtype, device=weight.device)
    spread = torch.einsum("gmoi...,mn->gmoni...", parts, eye)
    outputs, inputs = inner * parts.shape[2], inner * parts.shape[3]
    return spread.reshape(among, outputs, inputs, *weight.shape[2:])


def kernel_of(factors: Sequence[tuple[Tensor, int]]) -> Tensor:
    """The kernel that factors stand for: groups of the last, outputs, inputs, kernel.

    Args:
        factors: (weight, groups) of each, first to last.
    """
    groups = factors[-1][1]
    whole = spread_groups(*factors[0], groups)
    for weight, own in factors[1:]:
        part = spread_groups(weight, own, groups)
        whole = torch.einsum("gom...,gmi...->goi...", part, whole)
    return whole
