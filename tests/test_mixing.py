"""Dividing a budget among methods: the search over proportions, and what it compares."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision.errors import BadSetting
from peft_vision.mixing import Mix, best_mix, divergence


def bowl(best: float) -> tuple[list[Mix], object]:
    """A landscape of two methods that is lowest where their ratio is `best`."""
    tried: list[Mix] = []

    def attempt(mix: Mix) -> tuple[float, Mix]:
        tried.append(mix)
        return abs(math.log2(mix[1] / mix[0]) - math.log2(best)), mix

    return tried, attempt


@pytest.mark.parametrize("best", [0.25, 1.0, 2.0, 2**0.5])
def test_the_best_ratio_is_found(best: float) -> None:
    tried, attempt = bowl(best)
    mix, found = best_mix(2, attempt, 12)  # type: ignore[arg-type]
    assert found == mix
    assert mix[1] / mix[0] == pytest.approx(best)
    assert len(tried) == len(set(tried))


def test_trials_are_counted() -> None:
    tried, attempt = bowl(2.0**-20)
    best_mix(2, attempt, 5)  # type: ignore[arg-type]
    assert len(tried) == 5


def test_out_of_reach_is_never_chosen() -> None:
    mix, found = best_mix(3, lambda mix: (math.inf, None), 4)
    assert (mix, found) == ((1.0, 1.0, 1.0), None)


def test_divergence_is_that_of_the_answers() -> None:
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.randn(4, 3, 2, 2)
    own = model(images).detach()
    assert divergence(model, [own], [images]) == pytest.approx(0.0, abs=1e-7)
    other = torch.randn(4, 3)
    expected = (other.softmax(-1) * (other.log_softmax(-1) - own.log_softmax(-1))).sum(-1).mean()
    assert divergence(model, [other], [images]) == pytest.approx(float(expected), rel=1e-5)


def test_compress_says_how_the_budget_was_divided() -> None:
    torch.manual_seed(0)
    model = pv.create_model("timm/test_vit", pretrained=False, num_classes=3)
    images = [torch.randn(6, 3, 160, 160)]
    both = ["magnitude", "token_merging"]
    result = pv.compress(model, target_flops=0.6, methods=both, data=images, trials=3)
    assert 0.98 * 0.6 < result.ratio <= 0.6
    assert any("divided by trial" in note for note in result.notes)
    alone = pv.compress(model, target_flops=0.6, methods=both, data=images, trials=1)
    assert not any("divided by trial" in note for note in alone.notes)
    with pytest.raises(BadSetting, match="trials"):
        pv.compress(model, target_flops=0.6, data=images, trials=0)


def test_a_budget_above_the_exact_steps_is_divided_too() -> None:
    torch.manual_seed(0)
    model = pv.create_model("timm/test_vit", pretrained=False, num_classes=3).train()
    images = [torch.randn(6, 3, 160, 160)]
    both = ["magnitude", "token_merging"]
    exact = pv.create_model("timm/test_vit", pretrained=False, num_classes=3)
    share = pv.measure(pv.wrap(exact, "pooled_last_block")).flops / pv.measure(model).flops
    target = (1 + share) / 2
    result = pv.compress(model, target_flops=target, methods=both, data=images, trials=2)
    assert 0.98 * target < result.ratio <= target
    assert all(step.method != "pooled_last_block" for step in result.plan.steps)
    assert model.training
    assert result.model.plain_model.training, "both are left in the mode that the model was in"
