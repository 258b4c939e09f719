"""Rules to cut convolutions and norms of a batch, which some families use in the place of linears.

`keep_outputs` of a convolution is where the patch embedding is cut (`layers.stream`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.surgery import (
    keep_features,
    keep_inputs,
    select_parameter,
    weight_of,
)


@weight_of.register(nn.Conv2d)
def _(layer: nn.Conv2d) -> Tensor:
    return layer.weight.detach()


@keep_inputs.register(nn.Conv2d)
def _(layer: nn.Conv2d, indices: Sequence[int]) -> None:
    if layer.groups != 1:
        raise UnsupportedSite(
            f"Inputs of a convolution in {layer.groups} groups cannot be cut one by one."
        )
    select_parameter(layer, "weight", indices, 1)
    layer.in_channels = len(indices)


@keep_features.register(nn.Conv2d)
def _(layer: nn.Conv2d, indices: Sequence[int]) -> None:
    if not layer.groups == layer.in_channels == layer.out_channels:
        raise UnsupportedSite(
            f"A convolution of {layer.in_channels} channels in {layer.groups} groups mixes its "
            "channels; only one that keeps every channel apart can be cut feature by feature."
        )
    select_parameter(layer, "weight", indices, 0)
    if layer.bias is not None:
        select_parameter(layer, "bias", indices, 0)
    layer.groups = layer.in_channels = layer.out_channels = len(indices)


@keep_features.register(nn.BatchNorm1d)
@keep_features.register(nn.BatchNorm2d)
def _(layer: nn.BatchNorm1d | nn.BatchNorm2d, indices: Sequence[int]) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(layer, name) is not None:
            select_parameter(layer, name, indices, 0)
    layer.num_features = len(indices)
