"""A fused linear as three: the same function, cut and fused again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.split_linear import SplitLinear, fuse, split_outputs
from peft_vision.layers.surgery import keep_inputs, keep_outputs, weight_of


def pair(*, bias: bool = True) -> tuple[nn.Linear, SplitLinear]:
    torch.manual_seed(0)
    fused = nn.Linear(6, 12, bias=bias, dtype=torch.float64)
    return fused, SplitLinear(split_outputs(fused, [fused.out_features // 3] * 3))


@pytest.mark.parametrize("bias", [True, False])
def test_split_equals_fused_and_fuses_back_exactly(bias: bool) -> None:
    fused, split = pair(bias=bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert (split(x) - fused(x)).abs().max() < 1e-14
    again = fuse(split)
    assert torch.equal(again.weight, fused.weight)
    assert (again.bias is None) == (not bias)
    assert bias is False or torch.equal(again.bias, fused.bias)
    assert torch.equal(weight_of(split), fused.weight)


def test_rows_and_columns_are_kept_as_of_the_fused_one() -> None:
    fused, split = pair()
    rows, columns = [0, 3, 4, 7, 8, 11], [1, 2, 5]
    for layer in (fused, split):
        keep_outputs(layer, rows)
        keep_inputs(layer, columns)
    x = torch.randn(2, 3, dtype=torch.float64)
    assert (split(x) - fused(x)).abs().max() < 1e-14
    assert [part.out_features for part in (split.q, split.k, split.v)] == [2, 2, 2]


def test_it_is_empty_on_meta() -> None:
    with torch.device("meta"):
        split = SplitLinear(split_outputs(nn.Linear(4, 6), [2, 2, 2]))
    assert all(parameter.is_meta for parameter in split.parameters())


def test_other_layers_are_refused() -> None:
    with pytest.raises(UnsupportedSite, match="Conv2d"):
        split_outputs(nn.Conv2d(3, 6, 1), [2, 2, 2])
    _, split = pair()
    split.q = nn.Sequential(split.q)
    with pytest.raises(UnsupportedSite, match="Sequential"):
        fuse(split)
