"""Closed-form compensation: exact where it can be, never worse than doing less."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.calibration import Moments, Walk
from peft_vision.compensation import Compensation, apply_compensated
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.method import Evidence, make
from tests.families import FAMILIES, images

SAMPLE = [
    "timm_vit",
    "timm_vit_normed",
    "timm_vit_glu",
    "timm_eva02_base",
    "timm_deit_distilled",
    "timm_siglip",
    "hf_vit",
    "hf_dinov3_gated",
    "hf_clip",
]


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]().double().eval()


def calibration(model: nn.Module, count: int = 64) -> list[Tensor]:
    torch.manual_seed(1)
    channels, *size = images(model).shape[1:]
    return list(torch.randn(count, channels, *size, dtype=torch.float64).split(16))


def features(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise AssertionError(type(output))


@torch.no_grad()
def error(model: nn.Module, dense: nn.Module, batches: list[Tensor]) -> float:
    lost = [features(model(x)) - features(dense(x)) for x in batches]
    return float(torch.cat(lost).square().mean())


def cut(model: nn.Module, how: Compensation, batches: list[Tensor], **settings: Any) -> nn.Module:
    method = make("magnitude", {"ratio": 0.5, "multiple": 1, **settings})
    decisions = method.decide(view(model), method.strength, Evidence())
    smaller = copy.deepcopy(model)
    apply_compensated(smaller, [method], [decisions], batches, how)
    return smaller


@pytest.mark.parametrize("family", SAMPLE)
def test_ridge_beats_mean_beats_nothing_at_the_first_cut(family: str) -> None:
    """Of one block, on the images that it was fitted on, as least squares promise."""
    model = model_of(family)
    batches, method = calibration(model), make("magnitude", {"heads": False, "multiple": 1})
    decisions = method.decide(view(model), 0.5, Evidence())
    key = next(iter(decisions))
    lost = {}
    for how in ("none", "mean", "ridge"):
        smaller = copy.deepcopy(model)
        one = {key: decisions[key]}
        apply_compensated(smaller, [method], [one], batches, Compensation(how, 1e-9))  # type: ignore[arg-type]
        walk, dense = Walk(view(smaller), batches), Walk(view(model), batches)
        while walk.index <= view(model).hidden[0].block:
            walk.advance()
            dense.advance()
        pairs = zip(walk.streams, dense.streams, strict=True)
        lost[how] = sum(float((a.x - b.x).square().mean()) for a, b in pairs)
    biased = getattr(view(model).hidden[0].mlp, view(model).hidden[0].parts.down).bias is not None
    assert lost["ridge"] < lost["none"]
    assert lost["mean"] < lost["none"] if biased else lost["mean"] == lost["none"]
    assert lost["ridge"] < lost["mean"]


@pytest.mark.parametrize("family", ["timm_vit", "hf_vit"])
def test_what_is_a_sum_of_others_is_not_missed(family: str) -> None:
    """Units that repeat others leave without a trace."""
    model = model_of(family)
    for site in view(model).hidden:
        up, half = getattr(site.mlp, site.parts.up[0]), site.count // 2
        with torch.no_grad():
            up.weight[half:] = up.weight[:half]
            up.bias[half:] = up.bias[:half]
            getattr(site.mlp, site.parts.down).weight[:, half:] *= 1e-3  # the ones that go
    batches = calibration(model)
    smaller = cut(model, Compensation("ridge", 1e-12), batches, heads=False)
    assert sum(site.count for site in view(smaller).hidden) < 0.6 * 4 * 128
    left = error(smaller, model, batches)
    without = error(cut(model, Compensation("none"), batches, heads=False), model, batches)
    assert left < 1e-3 * without


def test_the_last_block_is_fitted_on_the_tokens_that_are_read() -> None:
    """Its linear sees one vector per image there, not one per token."""
    model = model_of("timm_vit")
    pv.wrap(model, "pooled_last_block")
    batches = calibration(model, 32)
    walk, last = Walk(view(model), batches), view(model).hidden[-1]
    counts = []
    for site in view(model).hidden:
        seen = walk.moments(getattr(site.mlp, site.parts.down))[0]
        counts.append(0 if seen is None else seen.count)
        walk.advance()
    assert last.block == 3
    assert counts == [32 * 17, 32 * 17, 32 * 17, 32]


def test_moments_are_those_of_all_batches_together() -> None:
    values = torch.randn(50, 7, dtype=torch.float64)
    seen = Moments.of_width(7)
    for part in values.split(11):
        seen.add(part.reshape(1, -1, 7))
    assert seen.count == 50
    assert (seen.mean - values.mean(0)).abs().max() < 1e-12
    assert (seen.covariance - values.t().cov(correction=0)).abs().max() < 1e-12


@pytest.mark.parametrize("family", SAMPLE)
def test_a_walk_arrives_where_the_model_does(family: str) -> None:
    model, batches = model_of(family), None
    batches = calibration(model, 8)
    walk, ends = Walk(view(model), batches), []
    last = view(model).blocks[-1].block
    handle = last.register_forward_hook(lambda _, __, out: ends.append(out))
    for x in batches:
        model(x)
    handle.remove()
    for _ in view(model).blocks:
        walk.advance()
    for stream, end in zip(walk.streams, ends, strict=True):
        assert torch.equal(stream.x, end if isinstance(end, Tensor) else end[0])


def test_compensated_models_reload_bit_exactly(tmp_path: Path) -> None:
    model = pv.create_model("timm/test_vit", pretrained=False, num_classes=3)
    data = [(torch.randn(8, 3, 160, 160), torch.zeros(8))]
    result = pv.compress(model, target_flops=0.6, methods="magnitude", data=data)
    plain = pv.compress(model, target_flops=0.6, methods="magnitude", data=data, compensate="none")
    assert result.plan == plain.plan, "values are not in the plan"
    x = data[0][0]
    assert not torch.equal(result.model.eval()(x), plain.model.eval()(x))
    result.save_pretrained(tmp_path / "out")
    assert torch.equal(pv.load(tmp_path / "out")(x), result.model(x))


def test_bad_input_is_refused() -> None:
    model = model_of("timm_vit")
    with pytest.raises(BadSetting, match="none, mean or ridge"):
        Compensation("best")  # type: ignore[arg-type]
    with pytest.raises(BadSetting, match="above 0"):
        Compensation(ridge=0.0)
    with pytest.raises(BadSetting, match="no batch"):
        Walk(view(model), [])
    with pytest.raises(BadSetting, match="batch of str"):
        Walk(view(model), ["picture.png"])
    with pytest.raises(UnsupportedSite, match="tokens"):
        Walk(view(FAMILIES["generic_cnn"]()), [torch.randn(1, 3, 32, 32)])
