"""The laws that every method, every ordered pair of methods and every backbone family keeps.

The lists come from the file tree and from `tests.families`: a newcomer inherits all of it.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import count_flops, input_size, measure, twin, unwrap
from peft_vision.errors import BudgetUnreachable, UnsupportedSite
from peft_vision.method import Adapter, Evidence, Trained, filed, find, make
from peft_vision.plan import Plan
from tests.families import FAMILIES, SIZE, images

METHODS = filed()
# What is trained before it decides cuts nothing until then; its own tests keep these laws.
CUTTING = [n for n in METHODS if find(n).reduces and not issubclass(find(n), Trained)]
ADAPTERS = [name for name in METHODS if issubclass(find(name), Adapter)]
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def in_turn(names: list[str], share: int = 6) -> pytest.MarkDecorator:
    """Each method on one of `share` families, in turn: every family meets a part of the methods.

    What a method does on all families is in its own tests; these laws are about what is shared.
    """
    families = sorted(FAMILIES)
    cases = [
        pytest.param(family, name, id=f"{family}-{name}")
        for index, name in enumerate(names)
        for family in families[index % share :: share]
    ]
    return pytest.mark.parametrize(("family", "method"), cases)


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def main_output(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "pooler_output", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output[0]


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    return main_output(model.eval()(x))


def wrapped(model: nn.Module, method: str) -> Any:
    try:
        return pv.wrap(model, method)
    except UnsupportedSite as error:
        pytest.skip(f"refused by name: {error}")


def test_the_lists_are_not_empty() -> None:
    assert len(METHODS) >= 3
    assert len(CUTTING) >= 2
    assert len(ADAPTERS) >= 1
    assert len(FAMILIES) >= 12


@in_turn(CUTTING)
def test_strength_zero_changes_nothing(family: str, method: str) -> None:
    model, technique = model_of(family), make(method)
    try:
        decisions = technique.decide(view(model), 0.0, Evidence())
    except UnsupportedSite as error:
        pytest.skip(f"refused by name: {error}")
    assert decisions == {}


@in_turn(CUTTING)
def test_cost_never_rises_with_strength(family: str, method: str) -> None:
    model, technique, evidence = model_of(family), make(method), Evidence()
    backbone, costs = view(model), []
    for strength in STRENGTHS:
        try:
            decisions = technique.decide(backbone, strength, evidence)
        except UnsupportedSite as error:
            pytest.skip(f"refused by name: {error}")
        smaller = twin(model)
        technique.apply(view(smaller), decisions)
        costs.append(count_flops(smaller, input_size(model)))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]


@in_turn(ADAPTERS, 4)
def test_an_adapter_starts_as_the_identity_and_trains(family: str, method: str) -> None:
    model = model_of(family).double()
    x = images(model).double()
    before = run(model, x)
    adapted = wrapped(model, method)
    changed = (run(adapted, x) - before).abs().max()
    assert (changed < 1e-12) == find(method).keeps_function
    main_output(adapted.train()(x)).square().sum().backward()
    trained = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    silent = [n for n, p in trained if p.grad is None]
    assert trained
    assert not silent
    moved = [n for n, p in trained if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    assert len(moved) * 2 >= len(trained), "half of the tensors start behind a zero, no more"


@in_turn(ADAPTERS, 4)
def test_merging_keeps_the_function_and_the_live_model(family: str, method: str) -> None:
    adapted = shaken(wrapped(model_of(family).double(), method))
    x = images(unwrap(adapted)).double()
    expected = run(adapted, x)
    merged = pv.merge(adapted)
    assert (run(merged, x) - expected).abs().max() < 1e-10
    assert torch.equal(run(adapted, x), expected)
    assert not any("lora" in name for name, _ in merged.named_modules())


def shaken(model: nn.Module) -> nn.Module:
    """Trainable parameters moved, so that an adapter does something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def saved_and_loaded(model: Any, folder: Path, base: nn.Module) -> Any:
    model.save_pretrained(folder)
    source = model.history.source
    needs_base = source is None or not model.history.changed_structure
    return pv.load(folder, base=base if needs_base else None)


@in_turn(METHODS)
def test_a_wrapped_model_is_called_like_before_and_reloads_bit_exactly(
    family: str, method: str, tmp_path: Path
) -> None:
    model = model_of(family)
    dense = copy.deepcopy(model)
    x = images(model)
    before = dense(x)
    changed = shaken(wrapped(model, method))
    after = changed.eval()(x)
    assert type(after) is type(before)
    assert not isinstance(before, Tensor) or after.shape == before.shape
    again = saved_and_loaded(changed, tmp_path / "out", dense)
    assert torch.equal(run(again, x), run(changed, x))
    assert again.history.plan == changed.history.plan


FAMILY_LIST = sorted(FAMILIES)
PAIRS = [
    pytest.param(FAMILY_LIST[index % len(FAMILY_LIST)], pair, id="-then-".join(pair))
    for index, pair in enumerate(itertools.product(METHODS, repeat=2))
]
"""Each pair on one family, in turn."""


@pytest.mark.parametrize(("family", "pair"), PAIRS)
def test_every_ordered_pair_composes_and_reloads(
    family: str, pair: tuple[str, str], tmp_path: Path
) -> None:
    model = model_of(family)
    dense = copy.deepcopy(model)
    x = images(model)
    if pair[0] == pair[1] and pair[0] in ADAPTERS:
        pytest.skip("an adapter twice is a second adapter of one model")
    changed = shaken(wrapped(wrapped(model, pair[0]), pair[1]))
    assert [step.method for step in changed.history.plan.steps] == list(pair)
    again = saved_and_loaded(changed, tmp_path / "out", dense)
    assert torch.equal(run(again, x), run(changed, x))


@in_turn(CUTTING)
def test_a_saved_plan_gives_a_fresh_twin_the_same_shapes(family: str, method: str) -> None:
    model = model_of(family)
    fresh = twin(model)
    changed = wrapped(model, method)
    plan = Plan.from_json(changed.history.plan.to_json())
    for step in plan.steps:
        make(step.method, dict(step.settings)).apply(view(fresh), step.decisions)
    shapes = {name: t.shape for name, t in unwrap(changed).state_dict().items()}
    assert {name: t.shape for name, t in fresh.state_dict().items()} == shapes
    assert measure(changed).flops == count_flops(fresh, input_size(changed.plain_model))


@pytest.mark.parametrize("family", sorted(FAMILIES)[::5])
def test_compress_lands_in_the_band(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    if family == "generic_cnn":  # a few channels are all there is to choose from there
        with pytest.raises(BudgetUnreachable, match="too coarse"):
            pv.compress(model, target_flops=0.6, image_size=SIZE)
        return
    result = pv.compress(model, target_flops=0.6, image_size=SIZE)
    assert 0.98 * 0.6 < result.ratio <= 0.6
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert measure(result.model, SIZE).flops == result.cost.flops
    result.save_pretrained(tmp_path / "out")
