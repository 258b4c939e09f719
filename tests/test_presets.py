"""Presets are compositions: what they are made of, and what their settings reach."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch

import peft_vision as pv
from peft_vision import presets
from peft_vision.errors import BadSetting
from tests.families import build, features, images

# Width, depth, what the low-rank updates and all trained parameters are in the paper, in millions.
PUBLISHED = {
    "vit_base_patch14_dinov2": (12, 10.6, 13.0),
    "vit_large_patch14_dinov2": (24, 28.3, 32.5),
    "vit_giant_patch14_dinov2": (40, 70.8, 80.2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tracker_s_parameters_are_the_published_ones(name: str) -> None:

    depth, updates, everything = PUBLISHED[name]
    with torch.device("meta"):
        model = timm.create_model(name, img_size=518, num_classes=0, depth=1)
        adapted = pv.wrap(model, "lorat", streams=(112, 224), kinds=(2, 1), readout="boxes")
    found: Counter[bool] = Counter()
    for path, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            found["lora_" in path] += parameter.numel()
    assert round(found[True] * depth / 1e6, 1) == updates
    assert round((found[True] * depth + found[False]) / 1e6, 1) == everything


def test_settings_reach_every_method_that_has_them() -> None:
    adapted = pv.wrap(build("timm_vit"), "lorat", r=2, std=0.1, outputs=7)
    steps = {step.method: step.settings for step in adapted.history.plan.steps}
    assert steps["lora"]["r"] == 2
    assert steps["decoupled_position"]["std"] == 0.1
    assert steps["mlp_head"]["std"] == 0.1
    assert features(adapted(images())).shape == (2, 7)


def test_a_setting_that_no_part_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadSetting, match=r"lorat is made of .*alpha"):
        pv.wrap(build("timm_vit"), "lorat", rank=2)


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_says_what_it_is_and_wraps_and_reloads(name: str, tmp_path: Path) -> None:
    assert presets.read(name)["about"]
    torch.manual_seed(0)
    # One part of "factors" is for convolutions wider than their stride, which a ViT has none of.
    convolutional = name == "factors"
    dense = timm.create_model("test_resnet").eval() if convolutional else build("timm_vit")
    x = torch.randn(2, 3, 64, 64) if convolutional else images(dense)
    model = pv.wrap(copy.deepcopy(dense), name).eval()
    model.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=dense)
    with torch.no_grad():
        assert torch.equal(features(again(x)), features(model(x)))
