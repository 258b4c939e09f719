"""Signal to noise: of what heads add, or of the gates that a model carries."""

from __future__ import annotations

import pytest
import torch

from peft_vision.backbones import view
from peft_vision.errors import BadSetting
from peft_vision.importance._probing import reader
from peft_vision.importance.signal_to_noise import score
from peft_vision.layers.gates import Gate, GatedLinear
from tests.families import HEADS, images
from tests.importance.laws import made, site_of


def test_a_head_that_says_the_same_of_all_images_has_no_signal() -> None:
    model = made("hf_vit")
    site = site_of(model, 1)
    with torch.no_grad():
        getattr(site.attention, site.parts.qkv[2]).weight[:8] = 0.0  # its bias is all it says
    backbone, x = view(model), [images(model, 4)]
    found = score(backbone, x)
    assert float(found[1, 0]) == pytest.approx(0.0, abs=1e-20)
    assert float(found[1, 1]) > 1e-6
    assert float(score(backbone, x, measure="mean")[1, 0]) > 1e6


def test_trained_gates_are_their_own_score() -> None:
    model = made("timm_vit")
    site = site_of(model, 2)
    gate = Gate(HEADS, 1.0, dtype=torch.float64)
    with torch.no_grad():
        gate.mean_offset.copy_(torch.tensor([0.0, -0.5, 1.0, -0.9]))
        gate.logvar_offset.copy_(torch.tensor([8.0, 8.0, 8.0, 12.0]))
    setattr(site.attention, site.parts.out, GatedLinear(reader(site), gate, None).eval())
    found = score(view(model), [images(model, 2)])
    wanted = gate.mean().square() / gate.log_variance().exp()
    torch.testing.assert_close(found[2], wanted.detach(), rtol=1e-6, atol=0)
    assert found[2].argsort().tolist() == [3, 1, 0, 2]


def test_one_image_has_no_variance() -> None:
    model = made("timm_vit")
    with pytest.raises(BadSetting, match="two of them"):
        score(view(model), [images(model, 1)])
