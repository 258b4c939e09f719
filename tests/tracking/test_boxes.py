"""Boxes against pixels that are counted one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import generalized_box_iou

from peft_vision.tracking import boxes


def test_conversions_are_inverse_and_clipping_keeps_what_is_inside() -> None:
    given = np.array([[1.5, 2.0, 3.0, 4.5], [-2.0, 0.0, 5.0, 30.0]])
    assert boxes.corners(given).tolist() == [[1.5, 2.0, 4.5, 6.5], [-2.0, 0.0, 3.0, 30.0]]
    assert np.array_equal(boxes.sizes(boxes.corners(given)), given)
    assert boxes.clipped(boxes.corners(given), 4, 6).tolist() == [[1.5, 2, 4, 6], [0, 0, 3, 6]]


def test_overlap_by_hand() -> None:
    one, other = torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 1, 3, 3])
    assert boxes.iou(one, other).item() == pytest.approx(1 / 7)
    assert boxes.giou(one, other).item() == pytest.approx(1 / 7 - 2 / 9)
    apart = torch.tensor([4.0, 0, 6, 2])
    assert boxes.iou(one, apart).item() == 0
    assert boxes.giou(one, apart).item() == pytest.approx(-4 / 12)
    inside_out = torch.tensor([2.0, 2, 0, 0])
    assert boxes.iou(one, inside_out).item() == 0


def test_giou_is_torchvisions() -> None:
    drawn = torch.rand(2, 50, 2, 2, dtype=torch.float64).sort(dim=2).values.flatten(2)
    one, other = drawn
    torch.testing.assert_close(boxes.giou(one, other), generalized_box_iou(one, other).diagonal())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-6, 30), min_size=4, max_size=4))
def test_covered_cells_are_those_that_hold_a_part_of_the_box(given: list[int]) -> None:
    """On a grid of 3 x 4 cells of 6 x 6 pixels, by whole pixels."""
    x1, x2 = sorted(given[:2])
    y1, y2 = sorted(given[2:])
    pixels = torch.zeros(18, 24, dtype=torch.bool)
    pixels[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)] = True
    expected = pixels.reshape(3, 6, 4, 6).any(3).any(1)
    share = torch.tensor([[x1 / 24, y1 / 18, x2 / 24, y2 / 18]])
    assert torch.equal(boxes.covered(share, (3, 4))[0], expected)


def test_a_sliver_of_a_cell_does_not_count() -> None:
    box = torch.tensor([[0.25 - 1e-6, 0.0, 0.5 + 1e-6, 1.0]])
    assert boxes.covered(box, (1, 4)).tolist() == [[[False, True, False, False]]]
