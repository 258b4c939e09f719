"""Shapes of plain layers: what they cost is counted, what they are is rebuilt, others are named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_vision.cost import count_flops, twin
from peft_vision.errors import UnsupportedSite
from peft_vision.layers.layer_shape import cost_of, shape_of, spread_groups
from tests.decomposers.laws import LAYERS


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_layer_of_the_shape_is_the_layer(name: str) -> None:
    layer = copy.deepcopy(LAYERS[name])
    shape = shape_of(layer)
    grid = (15, 14, 13)[: len(shape.kernel)]
    made = shape.make(layer.weight, layer.bias)
    x = torch.randn(1, shape.inputs, *grid)
    assert torch.equal(made(x), layer(x))
    assert shape.after(grid) == tuple(layer(x).shape[2:])
    assert shape.weights == layer.weight.numel()
    assert 2 * cost_of([shape], grid) == count_flops(twin(nn.Sequential(layer)), tuple(x.shape[1:]))


def test_fewer_groups_with_zeros_between() -> None:
    layer = nn.Conv2d(8, 16, 3, groups=4)
    whole = nn.Conv2d(8, 16, 3, groups=2)
    whole.weight = nn.Parameter(spread_groups(layer.weight, 4, 2).flatten(0, 1))
    whole.bias = layer.bias
    x = torch.randn(1, 8, 5, 5)
    assert torch.allclose(whole(x), layer(x), atol=1e-6)


class Standardized(nn.Conv2d):
    """As timm's: the weight that computes is not the one that is held."""


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Standardized(4, 4, 3), "it is a Standardized"),
        (nn.ConvTranspose2d(4, 4, 3), "it is a ConvTranspose2d"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "it pads with 'reflect'"),
        (nn.Conv2d(4, 4, 2, padding="same"), "its padding 'same' is larger on one side"),
    ],
)
def test_other_layers_are_named(layer: nn.Module, why: str) -> None:
    with pytest.raises(UnsupportedSite, match=why):
        shape_of(layer)
