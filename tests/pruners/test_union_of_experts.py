"""Union of experts: the same function while all experts are on, and gathering equals masking."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.compensation import Compensation, apply_compensated
from peft_vision.cost import count_flops, input_size, measure, twin, unwrap
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.exporting import export
from peft_vision.layers.clusters import balanced_clusters
from peft_vision.layers.routed_mlp import RoutedMlp
from peft_vision.layers.router import Router, load_balance, preferences, top_gates
from peft_vision.layers.traits import penalties, teaching
from peft_vision.method import Evidence, make
from tests.families import (
    NO_TOKENS,
    TRANSFORMERS,
    build,
    features,
    images,
    moved,
    run,
    timm_vit,
)

SOME = ("timm_vit", "timm_vit_normed", "timm_vit_glu", "timm_eva02_base", "hf_dinov3_gated")
some_families = pytest.mark.parametrize("family", SOME)


def grouped(family: str = "timm_vit", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A family's backbone with its MLPs in experts, the routers moved."""
    given = {"start": 0.0, "experts": 4, **settings}
    model = pv.wrap(build(family, dtype=dtype), "union_of_experts", **given)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router):
                for p in module.parameters():
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                    p.add_(noise.to(p.dtype))
    return model


def modules_of(model: nn.Module) -> list[RoutedMlp]:
    return [m for m in model.modules() if isinstance(m, RoutedMlp)]


def gathering(model: nn.Module, on: bool) -> nn.Module:
    for module in modules_of(model):
        module.gathered = on
    return model


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_gathered_experts_equal_masked_experts(family: str) -> None:
    model = grouped(family, skip=0.6)
    x = images(unwrap(model))
    fast, slow = run(gathering(model, True), x), run(gathering(model, False), x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    assert (slow - run(build(family, dtype=torch.float64), x)).abs().max() > 1e-6
    single = model.float()
    fast, slow = run(gathering(single, True), x.float()), run(gathering(single, False), x.float())
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["timm_vit", "timm_vit_glu", "timm_vit_swiglu", "hf_clip"])
@pytest.mark.parametrize("gate", ["binary", "soft"])
def test_the_experts_of_an_image_equal_masked_ones(family: str, gate: str) -> None:
    model = grouped(family, skip=0.5, choice="sample", gate=gate)
    x = images(unwrap(model), batch=4)
    fast, slow = run(gathering(model, True), x), run(gathering(model, False), x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    alone = torch.cat([run(gathering(model, True), image[None]) for image in x])
    torch.testing.assert_close(alone, fast, rtol=0, atol=1e-10)


@pytest.mark.parametrize("choice", ["capacity", "sample"])
@pytest.mark.parametrize("gate", ["binary", "soft"])
@some_families
def test_with_all_experts_on_nothing_changes(family: str, gate: str, choice: str) -> None:
    dense = build(family, dtype=torch.float64)
    x, before = images(dense), copy.deepcopy(dense)
    experts = 5 if family == "timm_eva02_base" else 4
    settings = {"start": 0.0, "experts": experts, "gate": gate, "choice": choice}
    model = pv.wrap(dense, "union_of_experts", **settings)
    for module in modules_of(model):
        module.now.target = 1.0
    torch.testing.assert_close(run(model, x), run(before, x), rtol=0, atol=1e-10)
    outputs = []
    for one in (model, before):
        torch.manual_seed(5)  # some families shift positions in training
        outputs.append(features(one.train()(x)))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gate", ["binary", "soft"])
@pytest.mark.parametrize("choice", ["capacity", "sample"])
def test_gathering_and_masking_train_alike(gate: str, choice: str) -> None:
    grads = []
    for on in (True, False):
        model = grouped("timm_vit_average", skip=0.6, gate=gate, choice=choice)
        model = gathering(model, on).train()
        features(model(images(unwrap(model)))).square().sum().backward()
        assert all(bool(m.router.routed.grad.abs().sum() > 0) for m in modules_of(model))
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=0, atol=1e-9)


def test_clusters_are_balanced_and_the_same_every_time() -> None:
    rows = torch.randn(85, 12)
    groups = balanced_clusters(rows, 8)
    sizes = [groups.count(g) for g in range(8)]
    assert sorted(sizes) == [10, 10, 10, 11, 11, 11, 11, 11]
    assert groups == balanced_clusters(rows.clone(), 8)
    assert groups[0] == 0, "numbered as they appear"
    assert balanced_clusters(torch.empty(5, 3, device="meta"), 2) == [0, 0, 0, 1, 1]


def test_clusters_find_what_belongs_together() -> None:
    centers = torch.eye(4)
    kinds = torch.arange(4).repeat(6)
    rows = 5 * torch.rand(24, 1).add(0.2) * (centers[kinds] + 0.05 * torch.randn(24, 4))
    assert balanced_clusters(rows, 4) == kinds.tolist()


def test_the_penalty_is_the_balance_of_images() -> None:
    model = grouped(choice="sample", beta=0.5, skip=0.5).train()
    x = images(unwrap(model), batch=4)
    seen: dict[int, torch.Tensor] = {}
    for i, module in enumerate(modules_of(model)):
        module.router.register_forward_hook(lambda m, given, out, i=i: seen.update({i: out}))
    model(x)
    terms = penalties(model)
    for i, term in enumerate(terms):
        chosen, _ = top_gates(seen[i], 2)
        torch.testing.assert_close(term, 0.5 / 4 * load_balance(seen[i], chosen))
    torch.stack(terms).sum().backward()
    assert all(bool(m.router.routed.grad.abs().sum() > 0) for m in modules_of(model))
    copy.deepcopy(model)
    quiet = grouped(beta=0.5).train()
    quiet(x)
    assert float(torch.stack(penalties(quiet)).sum()) == 0.0, "capacities balance themselves"


def test_patches_may_come_in_any_order_and_first_tokens_are_whole() -> None:
    dense = build("timm_vit", dtype=torch.float64).blocks[0].mlp
    module = modules_of(grouped(skip=0.5))[0].eval()
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(16)])
    torch.testing.assert_close(module(x)[:, order], module(x[:, order]), rtol=0, atol=1e-12)
    torch.testing.assert_close(module(x)[:, 0], dense(x)[:, 0], rtol=0, atol=1e-12)
    assert (module(x) - dense(x)).abs().max() > 1e-3


@pytest.mark.parametrize("choice", ["capacity", "sample"])
@pytest.mark.parametrize("family", ["timm_vit", "timm_vit_glu", "timm_vit_normed", "hf_clip"])
def test_images_teach_the_router_and_what_reads_the_experts(family: str, choice: str) -> None:
    model = build(family, dtype=torch.float64).eval()
    method = make("union_of_experts", {"choice": choice, "start": 0.0, "experts": 4})
    x, errors = images(model, 16), {}
    for how in (Compensation("none"), Compensation("ridge")):
        smaller = copy.deepcopy(model)
        decided = method.decide(view(smaller), 0.5, Evidence())
        apply_compensated(smaller, [method], [decided], [x], how)
        errors[how.how] = float((run(smaller, x) - run(model, x)).square().mean())
    assert 0 < errors["ridge"] < 0.7 * errors["none"]


def test_a_fitted_expert_serves_the_patches_that_it_gives_most() -> None:
    model = grouped(skip=0.5)
    for module in modules_of(model):
        width = module.router.routed.shape[1]
        x = torch.randn(32, 17, width, generator=torch.Generator().manual_seed(0)).double()
        with teaching(module, 1e-3):
            module(x)
            energy = module.lessons[0].wanted.exp().unflatten(0, (32, 16))
        served = preferences(module.router(x)[:, 1:]).topk(8, dim=-1).indices
        share = energy.transpose(1, 2).gather(2, served).sum((0, 2)) / energy.sum((0, 1))
        best = energy.topk(8, dim=1).values.sum((0, 1)) / energy.sum((0, 1))
        assert (share > 0.5 + 0.2 * (best - 0.5)).all()  # by chance: 8 of 16


def test_soft_gates_are_not_fitted() -> None:
    model = build("timm_vit")
    module = modules_of(pv.wrap(model, "union_of_experts", gate="soft"))[0]
    with teaching(module, 1e-3):
        module(torch.randn(2, 17, module.router.routed.shape[1]))
    assert not module.router.routed.any()


@pytest.mark.parametrize("choice", ["capacity", "sample"])
def test_strength_is_what_is_saved(choice: str) -> None:
    model = build("timm_vit")
    backbone, costs = view(model), []
    for strength in (0.0, 0.01, 0.05, 0.3, 0.6, 1.0):
        method = make("union_of_experts", {"skip": strength, "choice": choice, "start": 0.0})
        decisions = method.decide(backbone, strength, Evidence())
        assert (decisions == {}) == (strength < 0.02)
        small = twin(model)
        method.apply(view(small), decisions)
        costs.append(count_flops(small, input_size(model)))
    assert costs == sorted(costs, reverse=True) or choice == "sample"
    assert costs[-1] < costs[0]


def test_what_is_counted_is_the_formula() -> None:
    model = build("timm_vit")
    dense = measure(model).flops
    model = pv.wrap(model, "union_of_experts", skip=0.5, experts=4, start=0.75)
    saved = (16 - 8) * 2 * 32 * 128 - 17 * 32 * 4
    assert dense - measure(model).flops == 2 * saved


@pytest.mark.parametrize("choice", ["capacity", "sample"])
def test_other_pruners_may_cut_units_before_and_after(choice: str, tmp_path: Path) -> None:
    model = build("timm_vit", dtype=torch.float64)
    x, dense = images(model), copy.deepcopy(model)
    model = pv.wrap(model, "magnitude", ratio=0.25)
    model = pv.wrap(model, "union_of_experts", choice=choice, experts=4)
    model = pv.wrap(model, "magnitude", ratio=0.4, multiple=4)
    torch.testing.assert_close(
        run(gathering(model, True), x), run(gathering(model, False), x), rtol=0, atol=1e-10
    )
    model.save_pretrained(tmp_path / "m")
    again = pv.load(tmp_path / "m", base=dense)
    assert torch.equal(run(again, x), run(gathering(model, True), x))


@pytest.mark.parametrize("choice", ["capacity", "sample"])
def test_units_cut_later_leave_a_trained_router_and_are_made_up_for(choice: str) -> None:
    model = grouped(choice=choice, skip=0.5)
    x, whole = images(model, 16), copy.deepcopy(model)
    lost = copy.deepcopy(model)
    model = pv.wrap(model, "magnitude", data=[(x, None)], ratio=0.5, heads=False)
    lost = pv.wrap(lost, "magnitude", ratio=0.5, heads=False)
    for module, trained in zip(modules_of(model), modules_of(whole), strict=True):
        rows = {tuple(row.tolist()) for row in trained.router.routed}
        assert {tuple(row.tolist()) for row in module.router.routed} <= rows
    errors = [float((run(m, x) - run(whole, x)).square().mean()) for m in (model, lost)]
    assert errors[0] < 0.7 * errors[1]


def test_an_expert_without_units_is_gone() -> None:
    module = copy.deepcopy(modules_of(grouped(skip=0.5))[0]).eval()
    assert module.routing.sizes == [32, 32, 32, 32]
    last = module.router.routed[3].clone()
    module.keep_units([0, 1, 2, 40, 41, 127, 100])
    assert module.routing.expert == (0, 0, 0, 1, 1, 2, 2)
    assert torch.equal(module.router.routed[2], last)
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    fast = module(x)
    module.gathered = False
    torch.testing.assert_close(module(x), fast, rtol=0, atol=1e-12)
    module.keep_units([3, 4])
    assert torch.equal(module(x), module.inner(x)), "one expert is the MLP itself"


@pytest.mark.parametrize("targets", [("up", "down"), ("down",)])
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_before_and_after(order: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    model = build("timm_vit")
    x, dense = images(model), copy.deepcopy(model)
    lora = {"method": "lora", "r": 2, "targets": targets}
    experts = {"method": "union_of_experts", "start": 0.0, "experts": 4}
    for step in (lora, experts) if order == "before" else (experts, lora):
        model = pv.wrap(model, **step)
    moved(model)
    fast, slow = run(gathering(model, True), x), run(gathering(model, False), x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "m")
    again = pv.load(tmp_path / "m", base=dense)
    assert torch.equal(run(again, x), run(gathering(model, True), x))
    torch.testing.assert_close(run(pv.merge(model), x), slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"choice": "sample"}, {"gate": "soft"}])
def test_every_variant_reloads_bit_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    model = grouped("timm_eva02_small", torch.float32, anneal=4, experts=5, **settings)
    x = images(unwrap(model))
    model.train()(x)
    model.save_pretrained(tmp_path / "m")
    again = pv.load(tmp_path / "m", base=build("timm_eva02_small"))
    assert torch.equal(run(again, x), run(model, x))
    assert [int(m.now.steps) for m in modules_of(again)] == [1, 1, 1, 1]


@pytest.mark.parametrize(("choice", "format"), [("capacity", "onnx"), ("sample", "torch.export")])
def test_it_exports_with_any_batch_size(choice: str, format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = pv.wrap(timm_vit(depth=1), "union_of_experts", experts=2, start=0.0, choice=choice)
    path = tmp_path / ("m.onnx" if format == "onnx" else "m.pt2")
    assert export(model, path, format=format).batch_sizes_checked == (1, 2, 5)


@pytest.mark.parametrize("family", [*NO_TOKENS, "generic_cnn"])
def test_what_it_cannot_act_on_is_refused_by_name(family: str) -> None:
    with pytest.raises(UnsupportedSite, match=r"has no (tokens|hidden)"):
        pv.wrap(build(family), "union_of_experts")


def test_uneven_images_and_second_groupings_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedSite, match="85 units, which 4 experts do not share evenly"):
        grouped("timm_eva02_small", choice="sample")
    with pytest.raises(UnsupportedSite, match="computed by RoutedMlp already"):
        pv.wrap(grouped(), "union_of_experts")
    cut = build("timm_vit")
    method = make("union_of_experts", {"experts": 4, "start": 0.0})
    decided = method.decide(view(cut), 0.5, Evidence())
    view(cut).hidden[0].keep(range(8))
    with pytest.raises(UnsupportedSite, match="had 128 units when they were grouped and has 8"):
        method.apply(view(cut), decided)


@pytest.mark.parametrize(
    "settings",
    [
        {"skip": 1.5},
        {"experts": 1},
        {"experts": 37},
        {"choice": "both"},
        {"gate": "hard"},
        {"start": 1.0},
        {"anneal": -1},
        {"beta": 2.0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        make("union_of_experts", settings)
