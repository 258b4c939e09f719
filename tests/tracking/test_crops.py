"""What is cut out of a frame, and that the way back is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_vision.tracking.boxes import corners
from peft_vision.tracking.crops import Crop, Frame, cut, mean_color

FILL = (10.0, 20.0, 30.0)


@pytest.fixture
def frame() -> Frame:
    return np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def test_the_published_size_of_a_crop() -> None:
    """Area factor 4 around 20 x 10: 65 x 55 pixels, by one scale (LoRAT's formula by hand)."""
    crop = Crop.around((100, 50, 20, 10), 4.0, 128, least=1)
    scale = 128 / np.sqrt(65 * 55)
    assert crop.scale == pytest.approx((scale, scale))
    middle = crop.into(np.array([110.0, 55.0, 110.0, 55.0]))
    assert middle == pytest.approx([64, 64, 64, 64])


def test_small_boxes_count_as_larger_ones_in_the_same_place() -> None:
    small, large = (Crop.around(b, 4.0, 64, 10) for b in ((20, 20, 2, 2), (16, 16, 10, 10)))
    assert small == large


def test_there_and_back(frame: Frame) -> None:
    crop = Crop((1.7, 0.6), (-3.2, 8.5), 32)
    box = corners(np.array([3.5, 7.25, 20.0, 11.0]))
    assert crop.back(crop.into(box)) == pytest.approx(box, abs=1e-12)


def test_at_scale_one_it_is_the_frame_itself(frame: Frame) -> None:
    found = cut(frame, Crop((1.0, 1.0), (-7.0, -5.0), 24), FILL)
    expected = torch.from_numpy(frame[5:29, 7:31].copy()).permute(2, 0, 1).float()
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_half_a_pixel_is_the_mean_of_two(frame: Frame) -> None:
    found = cut(frame, Crop((1.0, 1.0), (-7.5, -5.0), 24), FILL)
    pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1).float()
    expected = (pixels[:, 5:29, 7:31] + pixels[:, 5:29, 8:32]) / 2
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_what_is_outside_has_the_color(frame: Frame) -> None:
    found = cut(frame, Crop((1.0, 1.0), (8.0, 4.0), 24), FILL)
    color = torch.tensor(FILL)[:, None, None]
    torch.testing.assert_close(found[:, :3], color.expand(3, 3, 24))
    torch.testing.assert_close(found[:, :, :7], color.expand(3, 24, 7))
    inside = torch.from_numpy(frame[:20, :16].copy()).permute(2, 0, 1).float()
    torch.testing.assert_close(found[:, 4:, 8:], inside, atol=2e-3, rtol=0)
    away = cut(frame, Crop((1.0, 1.0), (500.0, 4.0), 24), FILL)
    torch.testing.assert_close(away, color.expand(3, 24, 24))


@pytest.mark.parametrize("scale", [0.4, 2.5])
def test_a_drawn_square_lies_where_its_box_says(scale: float) -> None:
    frame: Frame = np.zeros((120, 160, 3), dtype=np.uint8)
    frame[30:60, 70:110] = 255
    crop = Crop.centered((90.0, 45.0), (scale, scale), 64)
    found = cut(frame, crop, (0, 0, 0))[0] > 127
    rows, columns = torch.nonzero(found.any(1)).flatten(), torch.nonzero(found.any(0)).flatten()
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    expected = np.clip(crop.into(np.array([70.0, 30.0, 110.0, 60.0])), 0, 64)
    assert np.array([int(s) for s in seen]) == pytest.approx(expected, abs=0.51)


def test_mean_color() -> None:
    frame: Frame = np.zeros((2, 2, 3), dtype=np.uint8)
    frame[0, :, 0] = 100
    assert mean_color(frame) == (50.0, 0.0, 0.0)
