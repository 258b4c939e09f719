"""Readouts on their own: shapes, boxes by hand, the projection, dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.readout import (
    BoxReadout,
    MaskReadout,
    PooledReadout,
    around_centers,
    perceptron,
)


def test_a_perceptron_counts_its_layers() -> None:
    layers = perceptron(8, 3, layers=3, hidden=16, activation="gelu")
    shapes = [tuple(part.weight.shape) for part in layers if isinstance(part, nn.Linear)]
    assert shapes == [(16, 8), (16, 16), (3, 16)]
    assert isinstance(perceptron(8, 3, layers=1, activation="gelu")[0], nn.Linear)
    with pytest.raises(BadSetting, match="gelu, relu"):
        perceptron(8, 3, activation="sine")


@pytest.mark.parametrize(("width", "millions"), [(768, 2.4), (1024, 4.2), (1536, 9.5)])
def test_the_tracker_head_has_as_many_parameters_as_published(width: int, millions: float) -> None:
    with torch.device("meta"):
        head = BoxReadout(width)
    count = sum(p.numel() for p in head.parameters())
    assert count == 4 * width**2 + 9 * width + 5
    assert abs(count / 1e6 - millions) < 0.1


def test_boxes_by_hand() -> None:
    """Two rows of three patches; the middle of row 1, column 2 is (5/6, 3/4)."""
    sides = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    sides[0, 1, 2] = torch.tensor([0.5, 0.25, 0.1, 0.2])
    boxes = around_centers(sides)
    expected = torch.tensor([5 / 6 - 0.5, 0.75 - 0.25, 5 / 6 + 0.1, 0.75 + 0.2])
    torch.testing.assert_close(boxes[0, 1, 2], expected.double(), rtol=0, atol=1e-7)
    middle = torch.tensor([1 / 6, 0.25, 1 / 6, 0.25], dtype=torch.float64)
    torch.testing.assert_close(boxes[0, 0, 0], middle, rtol=0, atol=1e-12)


def test_a_box_readout_is_its_two_mlps() -> None:
    head = BoxReadout(8, grid=(2, 3)).double()
    tokens = torch.randn(2, 6, 8, dtype=torch.float64)
    scores, boxes = head(tokens)
    assert scores.shape == (2, 2, 3)
    assert boxes.shape == (2, 2, 3, 4)
    one = tokens[1, 4]  # row 1, column 1
    assert torch.allclose(scores[1, 1, 1], head.score(one).squeeze())
    left, top, right, bottom = head.box(one).sigmoid()
    expected = torch.stack([0.5 - left, 0.75 - top, 0.5 + right, 0.75 + bottom])
    torch.testing.assert_close(boxes[1, 1, 1], expected, rtol=0, atol=1e-12)


def test_tokens_before_the_patches_are_not_read() -> None:
    head = BoxReadout(8, grid=(2, 2), prefix=3)
    patches = torch.randn(1, 4, 8)
    inside = head(torch.cat([torch.randn(1, 3, 8), patches], dim=1))
    assert torch.equal(inside.boxes, head(patches).boxes)
    assert torch.equal(inside.scores, head(patches).scores)


def test_the_grid_is_what_the_caller_says() -> None:
    head = MaskReadout(8, 2, grid=(2, 2), prefix=1)
    assert head(torch.randn(1, 15, 8), (3, 5)).shape == (1, 2, 3, 5)
    assert MaskReadout(8, 2)(torch.randn(1, 9, 8)).shape == (1, 2, 3, 3)
    with pytest.raises(UnsupportedSite, match="7 tokens do not form a grid of 2 x 2"):
        head(torch.randn(1, 7, 8))


def test_masks_keep_rows_and_columns_apart() -> None:
    head = MaskReadout(4, 3, layers=1, grid=(2, 5)).double()
    tokens = torch.randn(2, 10, 4, dtype=torch.float64)
    maps = head(tokens)
    torch.testing.assert_close(maps[1, :, 1, 3], head.layers(tokens[1, 8]), rtol=0, atol=1e-12)
    larger = MaskReadout(4, 3, layers=1, grid=(2, 5), size=(16, 40)).double()
    larger.load_state_dict(head.state_dict())
    assert larger(tokens).shape == (2, 3, 16, 40)
    middle = larger(tokens).mean((2, 3))
    torch.testing.assert_close(middle, maps.mean((2, 3)), rtol=0, atol=1e-12)


def test_the_projection_is_for_training() -> None:
    head = PooledReadout(8, 6, layers=2, projection=3)
    x = torch.randn(4, 8)
    assert head.train()(x).shape == (4, 3)
    assert torch.equal(head.eval()(x), head.layers(x))
    settled = copy.deepcopy(head)
    settled.settle()
    assert settled.train()(x).shape == (4, 6)
    assert head.projection is not None
    again = PooledReadout(8, 6, layers=2, projection=3)
    again.load_state_dict(settled.state_dict())
    assert again.projection is None, "weights stored without it make a head without it"
    whole = PooledReadout(8, 6, layers=2, projection=3)
    whole.load_state_dict(head.state_dict())
    assert torch.equal(whole.train()(x), head.train()(x))


def test_outputs_are_at_least_single_precision() -> None:
    tokens = torch.randn(1, 4, 8).bfloat16()
    scores, boxes = BoxReadout(8)(tokens)
    assert scores.dtype == boxes.dtype == torch.float32
    assert BoxReadout(8).bfloat16()(tokens).boxes.dtype == torch.float32
    assert MaskReadout(8, 2).bfloat16()(tokens).dtype == torch.float32
    assert PooledReadout(8, 2)(tokens[:, 0]).dtype == torch.float32
