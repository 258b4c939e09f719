"""Norms of weights: relative to the block's, whatever the scale of its linears."""

from __future__ import annotations

import pytest
import torch

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.importance.weight_norm import score
from tests.families import build
from tests.importance.laws import FEW, made, reorder, site_of


@pytest.mark.parametrize("family", FEW)
def test_blocks_count_the_same(family: str) -> None:
    model = made(family)
    found = score(view(model))
    torch.testing.assert_close(found.square().mean(1), torch.ones(4, dtype=torch.float64))
    site = site_of(model, 0)
    with torch.no_grad():
        getattr(site.attention, site.parts.out).weight.mul_(7.0)
    torch.testing.assert_close(score(view(model)), found)
    reorder(model, 0, [3, 2, 1, 0])
    torch.testing.assert_close(score(view(model))[0], found[0].flip(0))


def test_packed_weights_are_what_they_stand_for() -> None:
    plain = build("hf_vit")
    wanted = score(view(plain))
    packed = pv.wrap(plain, "int8")
    torch.testing.assert_close(score(view(packed.plain_model)), wanted, rtol=0.02, atol=0)
