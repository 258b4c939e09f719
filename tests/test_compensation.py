"""Closed-form compensation: exact where it can be, never worse than doing less."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.calibration import Moments, Walk
from peft_vision.compensation import Compensation, apply_compensated
from peft_vision.cost import measure, twin
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.surgery import keep_inputs
from peft_vision.method import Evidence, make
from peft_vision.plan import Plan
from tests.families import FAMILIES, images, moved, run, timm_vit

BIASLESS = {"timm_vit_biasless": partial(timm_vit, proj_bias=False)}
"""As in AIMv2: no bias where heads and hidden units are read."""

SAMPLE = [
    *BIASLESS,
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
    return {**FAMILIES, **BIASLESS}[family]().double().eval()


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
    decisions = method.decide(view(model), 0.5, Evidence(batches))
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
    assert lost["ridge"] < lost["mean"] < lost["none"]


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


def test_what_varies_little_far_from_zero_keeps_its_covariance() -> None:
    """A mean a thousand times the deviation, in float32."""
    torch.manual_seed(0)
    values = 100 + 0.1 * torch.randn(4096, 8)
    exact = values.double().t().cov(correction=0)
    seen = Moments.of_width(8)
    for part in values.split(512):
        seen.add(part)
    assert (seen.covariance - exact).abs().max() < 1e-4 * exact.diagonal().mean()
    assert (seen.mean - values.double().mean(0)).abs().max() < 1e-6
    second = values.double().t() @ values.double() / len(values)
    assert (seen.second / second - 1).abs().max() < 1e-8


def test_a_linear_that_reads_what_lies_far_from_zero_is_fitted_in_single_precision() -> None:
    """Half of the units repeat the other half; all of them vary by a thousandth of their mean."""
    model = model_of("timm_vit").float()
    for site in view(model).hidden:
        half = site.count // 2
        with torch.no_grad():
            site.mlp.fc1.weight.mul_(0.02)
            site.mlp.fc1.bias.fill_(30.0)
            site.mlp.fc1.weight[half:] = site.mlp.fc1.weight[:half]
            site.mlp.fc2.weight[:, half:] *= 0.5
            site.mlp.fc2.bias -= 30 * site.mlp.fc2.weight.sum(1)
    batches = [x.float() for x in calibration(model)]
    lost = {
        how: error(cut(model, Compensation(how, 1e-6), batches, heads=False), model, batches)  # type: ignore[arg-type]
        for how in ("mean", "ridge")
    }
    assert lost["ridge"] < 1e-2 * lost["mean"]


@pytest.mark.parametrize("adapter", ["lora", "bottleneck_adapter"])
def test_the_base_below_an_adapter_is_fitted(adapter: str, tmp_path: Path) -> None:
    """As well as a plain model; what the adapter says is not changed, and all of it is saved."""
    settings: dict[str, Any] = {"heads": False, "score": "weights"}
    model = model_of("timm_vit").float()
    batches = [x.float() for x in calibration(model)]
    dense = moved(pv.wrap(copy.deepcopy(model), adapter))
    lost = {}
    for data in (None, batches):
        smaller = pv.wrap(copy.deepcopy(dense), "magnitude", data=data, **settings)
        lost[data is None] = error(smaller.eval(), dense, batches)
    assert lost[False] < 1e-2 * lost[True]
    smaller.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=model)
    assert torch.equal(run(again, batches[0]), run(smaller, batches[0]))


class Twice(nn.Module):
    """Stands around a linear as PEFT does, and gives what is no sum with what the linear gives."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return -3 * y


@keep_inputs.register(Twice)
def _(layer: Twice, indices: Sequence[int]) -> None:
    keep_inputs(layer.base_layer, indices)


class Doubled(nn.Linear):
    """A linear for which there is a rule to cut it, but none to fit it."""


@pytest.mark.parametrize("strange", [Twice, Doubled])
def test_what_cannot_be_fitted_is_left_as_it_is_and_said(
    strange: type[nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("timm_vit")
    batches, method = calibration(model), make("magnitude", {"heads": False})
    decisions = method.decide(view(model), 0.5, Evidence())
    for site in view(model).hidden:
        linear = site.mlp.fc2
        if strange is Twice:
            site.mlp.fc2 = Twice(linear)
        else:
            site.mlp.fc2 = Doubled(linear.in_features, linear.out_features).double()
            site.mlp.fc2.load_state_dict(linear.state_dict())
    found = {}
    with caplog.at_level(logging.WARNING, "peft_vision"):
        for how in ("none", "ridge"):
            smaller = copy.deepcopy(model)
            apply_compensated(smaller, [method], [decisions], batches, Compensation(how))  # type: ignore[arg-type]
            found[how] = [p for site in view(smaller).hidden for p in site.mlp.fc2.parameters()]
    pairs = zip(found["none"], found["ridge"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(caplog.messages) == 1
    assert "blocks.0.hidden" in caplog.text
    assert strange.__name__ in caplog.text


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


def test_a_bias_that_was_not_there_is_structure(tmp_path: Path) -> None:
    """Decided where layers are fitted, counted, replayed without values, and saved."""
    model = model_of("timm_vit_biasless").float()
    batches = [x.float() for x in calibration(model)]
    method = make("magnitude", {"ratio": 0.5, "head_exponent": 1.0})
    plain = method.decide(view(model), 0.5, Evidence())
    assert all(set(decision) == {"of", "bits"} for decision in plain.values())  # type: ignore[arg-type]
    smaller = pv.wrap(copy.deepcopy(model), method, data=batches)
    plan = Plan.from_json(smaller.history.plan.to_json())
    decided = plan.steps[0].decisions
    assert all(decision["bias"] is True for decision in decided.values())  # type: ignore[index, call-overload]
    fresh = twin(model)
    method.apply(view(fresh), decided)
    shapes = {name: t.shape for name, t in smaller.plain_model.state_dict().items()}
    assert {name: t.shape for name, t in fresh.state_dict().items()} == shapes
    assert measure(smaller).params == sum(p.numel() for p in fresh.parameters())
    cut_in = {key.rpartition(".")[0] for key in decided if key.endswith(".hidden")}
    assert cut_in
    for name in cut_in:
        bias = smaller.plain_model.get_submodule(name).mlp.fc2.bias
        assert bias.abs().max() > 0
    smaller.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=model)
    assert torch.equal(run(again, batches[0]), run(smaller, batches[0]))


def test_images_are_shown_to_the_model_as_it_will_run() -> None:
    torch.manual_seed(0)
    model = timm_vit(drop_path_rate=0.5, proj_drop_rate=0.5).double()
    batches, results = calibration(model), []
    for training in (False, True):
        one = copy.deepcopy(model).train(training)
        smaller = pv.wrap(one, "magnitude", ratio=0.5, data=batches)
        assert smaller.plain_model.training == training
        results.append(run(smaller, batches[0]))
    assert torch.equal(*results)


def test_no_bias_is_decided_where_nothing_is_fitted() -> None:
    model = model_of("timm_vit_biasless").float()
    batches = [x.float() for x in calibration(model)]
    result = pv.compress(
        model, target_flops=0.7, methods="magnitude", data=batches, compensate="none"
    )
    assert "bias" not in str(result.plan.steps[-1].decisions)


def test_a_mean_that_nothing_can_take_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("timm_vit_biasless")
    batches, method = calibration(model), make("magnitude", {"heads": False})
    decisions = method.decide(view(model), 0.5, Evidence())  # no images: no bias is decided
    with caplog.at_level(logging.WARNING, "peft_vision"):
        apply_compensated(model, [method], [decisions], batches, Compensation("mean"))
    assert "no bias that could take a mean" in caplog.text
