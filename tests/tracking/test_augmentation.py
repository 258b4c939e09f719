"""Changes of pairs keep images and boxes together."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from peft_vision.tracking.augmentation import (
    changed,
    flipped,
    jittered,
    one_of_three,
)
from peft_vision.tracking.boxes import covered
from peft_vision.tracking.settings import PairAugmentation

BOX = torch.tensor([0.125, 0.25, 0.5, 0.75], dtype=torch.float64)


def painted(box: torch.Tensor) -> torch.Tensor:
    """White where the box is."""
    return covered(box[None], (32, 32)).float().expand(3, 32, 32)


def test_a_mirror_image_has_its_target_in_the_mirrored_box():
    image, box = flipped(painted(BOX), BOX)
    assert box.tolist() == [0.5, 0.25, 0.875, 0.75]
    assert torch.equal(image, painted(box))
    back, again = flipped(image, box)
    assert torch.equal(again, BOX)
    assert torch.equal(back, painted(BOX))


def test_template_and_search_image_are_mirrored_each_for_itself():
    settings = PairAugmentation(color=0.0, three_augment=False)
    seen = []
    for _ in range(200):
        pair = changed((painted(BOX), BOX), (painted(BOX), BOX), settings)
        for image, box in pair:
            assert torch.equal(image, painted(box))
        seen.append(tuple(not torch.equal(box, BOX) for _, box in pair))
    counts = [seen.count((one, two)) for one in (False, True) for two in (False, True)]
    assert min(counts) > 30
    never = PairAugmentation(flip=0.0, color=0.0, three_augment=False)
    assert torch.equal(changed((painted(BOX), BOX), (painted(BOX), BOX), never)[0][1], BOX)


def test_one_of_three_is_the_same_for_both():
    image = torch.rand(3, 32, 32)
    kinds = set()
    for _ in range(40):
        settings = PairAugmentation(flip=0.0, color=0.0)
        (one, _), (two, _) = changed((image, BOX), (image, BOX), settings)
        assert torch.equal(one, two), "also of the same blur"
        gray = bool((one[0] - one[1]).abs().max() < 1e-6)
        solarized = torch.equal(one, one_of_three(image, 1, 1.0))
        kinds.add("gray" if gray else "solarized" if solarized else "blurred")
        assert not torch.equal(one, image), "one is always applied"
    assert kinds == {"gray", "solarized", "blurred"}


def test_the_three():
    image = torch.rand(3, 24, 24)
    solarized = one_of_three(image, 1, 1.0)
    bright = image >= 128 / 255
    torch.testing.assert_close(solarized, torch.where(bright, 1 - image, image))
    point = torch.zeros(3, 25, 25)
    point[:, 12, 12] = 1
    blurred = one_of_three(point, 2, 1.5)
    assert blurred.sum().item() == pytest.approx(3, abs=1e-4)
    places = torch.arange(25.0) - 12
    spread = (blurred[0].sum(0) * places**2).sum().sqrt().item()
    assert spread == pytest.approx(1.5, abs=0.06), "the radius is the standard deviation"


def test_colors_change_within_their_range_and_not_alike():
    flat = torch.full((3, 8, 8), 0.5)
    values = torch.tensor([jittered(flat, 0.4).mean().item() for _ in range(200)])
    assert values.min() >= 0.3 - 1e-6
    assert values.max() <= 0.7 + 1e-6
    assert values.std() > 0.08
    image = torch.rand(3, 8, 8)
    assert torch.equal(jittered(image, 0.0), image)
    still = PairAugmentation(flip=0.0, three_augment=False)
    (one, _), (two, _) = changed((image, BOX), (image, BOX), still)
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    "wrong", [{"scale_jitter": 2.0}, {"shift_jitter": -1}, {"flip": 1.5}, {"color": 1.0}]
)
def test_settings_have_ranges(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        PairAugmentation(**wrong)
