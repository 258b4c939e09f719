"""Budgets of every kind, and what `compress` does around the search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.cost import Timing, count_flops, example_input, time_on, twin
from peft_vision.errors import BadSetting, BudgetUnreachable, UnknownName, UnsupportedSite
from peft_vision.method import make

Tiny = Callable[..., nn.Module]


def test_a_params_budget(tiny_timm: Tiny) -> None:
    model = tiny_timm()
    result = pv.compress(model, target_params=0.6)
    assert 0.98 * 0.6 < result.cost.params / result.before.params <= 0.6
    assert any("does not reduce params" in note for note in result.notes)


@pytest.mark.parametrize("unit", ["FLOPs", "MACs"])
def test_an_absolute_flops_budget(tiny_timm: Tiny, unit: str) -> None:
    model = tiny_timm()
    half = pv.measure(model).flops / 2
    asked = f"{half / (2 if unit == 'MACs' else 1) / 1e3:.3f}k{unit}"
    result = pv.compress(model, target_flops=asked)
    assert 0.98 * half < result.cost.flops <= half * 1.0001


def test_the_whole_model_is_a_budget_that_changes_nothing(tiny_timm: Tiny) -> None:
    model, x = tiny_timm(), torch.randn(2, 3, 32, 32)
    result = pv.compress(model, target_flops=1.0)
    assert result.plan.steps == ()
    assert torch.equal(result.model(x), model(x))


def test_out_of_reach_names_the_smallest(tiny_timm: Tiny) -> None:
    model = tiny_timm()
    with pytest.raises(BudgetUnreachable, match=r"smallest .* is ([0-9.]+) GMACs") as caught:
        pv.compress(model, target_flops=0.01, methods=["magnitude"])
    strongest = make("magnitude")
    cut = twin(model)
    from peft_vision.backbones import view
    from peft_vision.method import Evidence

    strongest.apply(view(cut), strongest.decide(view(model), 1.0, Evidence()))
    pv.wrap(cut, "pooled_last_block")
    share = count_flops(cut, (3, 32, 32)) / pv.measure(model).flops
    assert f"({share:.4f} of the model)" in str(caught.value)


def test_a_method_named_must_work_a_default_one_is_left_out(tiny_timm: Tiny) -> None:
    from timm.models.vision_transformer import ResPostBlock

    model = tiny_timm(block_fn=ResPostBlock)
    with pytest.raises(UnsupportedSite, match="normalize after"):
        pv.compress(model, target_flops=0.6, methods=["token_reorganization"])
    result = pv.compress(model, target_flops=0.6)
    assert [step.method for step in result.plan.steps] == ["magnitude"]
    assert any("normalize after" in note for note in result.notes)


def test_methods_by_name_by_preset_and_as_objects(tiny_timm: Tiny) -> None:
    model = tiny_timm()
    for methods in ("magnitude", ["magnitude"], [make("magnitude", {"heads": False})], "evit"):
        result = pv.compress(model, target_flops=0.85, methods=methods)
        assert result.ratio <= 0.85
    with pytest.raises(UnknownName, match="Nearest: magnitude"):
        pv.compress(model, target_flops=0.5, methods="magnitud")
    with pytest.raises(BadSetting, match="empty"):
        pv.compress(model, target_flops=0.5, methods=[])


def test_width_is_cut_before_tokens_whatever_the_order(tiny_timm: Tiny) -> None:
    result = pv.compress(
        tiny_timm(), target_flops=0.6, methods=["token_reorganization", "magnitude"]
    )
    steps = [step.method for step in result.plan.steps]
    assert steps == ["pooled_last_block", "magnitude", "token_reorganization"]


def test_adapters_are_merged_first_and_the_model_is_untouched(tiny_timm: Tiny) -> None:
    adapted = pv.wrap(tiny_timm(), "lora", r=2)
    x = torch.randn(2, 3, 32, 32)
    before = adapted.eval()(x)
    result = pv.compress(adapted, target_flops=0.6)
    assert all(step.method != "lora" for step in result.plan.steps)
    assert not any("lora" in name for name, _ in result.model.named_parameters())
    assert torch.equal(adapted(x), before)


def test_figures_measured_before_are_not_carried_along(tiny_timm: Tiny) -> None:
    adapted = pv.wrap(tiny_timm(), "lora", r=2)
    adapted.history.metrics = {"top1": {"value": 0.9, "n": 100}}
    adapted.history.labels = ["a", "b", "c", "d", "e"]
    result = pv.compress(adapted, target_flops=0.6)
    assert result.model.history.metrics == {}
    assert result.model.history.labels == ["a", "b", "c", "d", "e"]


def test_compressing_twice(tiny_timm: Tiny) -> None:
    once = pv.compress(tiny_timm(), target_flops=0.8, methods=["magnitude"])
    twice = pv.compress(once.model, target_flops=0.8, methods=["magnitude"])
    assert 0.98 * 0.8 < twice.cost.flops / once.cost.flops <= 0.8
    names = [step.method for step in twice.plan.steps]
    assert names == ["pooled_last_block", "magnitude", "magnitude"]


def timed_by_count(ms_per_flop: float) -> Any:
    """A clock for which time is work: what the counter says."""

    def clock(
        models: Mapping[str, nn.Module], images: Tensor, *, rounds: int = 9, **_: Any
    ) -> dict[str, Timing]:
        size = tuple(images.shape[1:])
        return {
            name: Timing((ms_per_flop * count_flops(twin(model), size),) * rounds, images.shape[0])
            for name, model in models.items()
        }

    return clock


def test_a_latency_budget(tiny_timm: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_timm()
    flops = pv.measure(model).flops
    monkeypatch.setattr("peft_vision.pricing.time_on", timed_by_count(10.0 / flops))
    result = pv.compress(model, target_latency_ms=6.0)
    assert 0.98 * 6.0 < result.got <= 6.0
    assert 0.55 < result.ratio <= 0.6


def test_a_latency_budget_out_of_reach(tiny_timm: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_timm()
    flops = pv.measure(model).flops
    monkeypatch.setattr("peft_vision.pricing.time_on", timed_by_count(10.0 / flops))
    with pytest.raises(BudgetUnreachable, match="ms"):
        pv.compress(model, target_latency_ms=0.1)


def test_models_are_timed_in_turns(tiny_timm: Tiny) -> None:
    calls: list[str] = []
    one, two = tiny_timm(), tiny_timm()
    one.register_forward_hook(lambda *_: calls.append("one"))
    two.register_forward_hook(lambda *_: calls.append("two"))
    one.train()
    found = time_on({"one": one, "two": two}, example_input(one, batch=2), rounds=3, warm_up=0)
    assert calls == ["one", "two"] * 3
    assert one.training
    assert not two.training
    assert len(found["one"].milliseconds) == 3
    assert found["one"].images_per_second > 0


def test_a_budget_between_the_exact_steps_and_the_whole_is_met_without_them(
    tiny_timm: Tiny,
) -> None:
    model = tiny_timm()
    exact = pv.measure(pv.wrap(tiny_timm(), "pooled_last_block")).flops / pv.measure(model).flops
    target = (1 + exact) / 2
    assert exact < 0.98 * target
    result = pv.compress(model, target_flops=target, methods="magnitude")
    assert [step.method for step in result.plan.steps] == ["magnitude"]
    assert 0.98 * target < result.ratio <= target


@pytest.mark.parametrize("data", [None, [torch.randn(8, 3, 32, 32)]])
def test_a_branch_that_is_gone_is_not_cut(tiny_timm: Tiny, data: Any, tmp_path: Path) -> None:
    """Decisions are made on the whole model; those on what an earlier method took are dropped."""
    result = pv.compress(
        tiny_timm(), target_flops=0.45, methods=["path_pruning", "magnitude"], data=data, trials=1
    )
    taken = {
        key.replace("attention", "heads").replace("mlp", "hidden")
        for step in result.plan.steps
        if step.method == "path_pruning"
        for key in step.decisions
    }
    cut = {k for step in result.plan.steps if step.method == "magnitude" for k in step.decisions}
    assert taken
    assert not taken & cut
    x = torch.randn(2, 3, 32, 32)
    result.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=tiny_timm())
    assert torch.equal(again(x), result.model.eval()(x))


def test_a_removed_branch_leaves_its_mean(tiny_timm: Tiny) -> None:
    from peft_vision.layers.absent import Absent

    data = [torch.randn(8, 3, 32, 32)]
    methods = ["path_pruning", "magnitude"]
    result = pv.compress(tiny_timm(), target_flops=0.45, methods=methods, data=data, trials=1)
    left = [m for m in result.model.modules() if isinstance(m, Absent) and m.first is not None]
    assert left
    # The class token's, which is all that the last block computes where nothing else is read.
    assert all(bool(m.first.abs().sum() > 0) for m in left if m.first is not None)


class Narrow(nn.Module):
    """Three convolutions that a sum couples with the images: no channel can be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(48, 48, 3, padding=1) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            images = images + layer(images)
        return images


def test_by_default_layers_are_factored_where_nothing_can_be_removed() -> None:
    torch.manual_seed(0)
    result = pv.compress(Narrow().eval(), target_flops=0.5, image_size=8)
    assert 0.49 < result.ratio <= 0.5
    assert [step.method for step in result.plan.steps] == ["tucker"]
    assert "factors were used, too" in result.notes[0]
    with pytest.raises(UnsupportedSite):
        pv.compress(Narrow().eval(), target_flops=0.5, image_size=8, methods="magnitude")
