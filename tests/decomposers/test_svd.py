"""Singular value decomposition of matrices, and those of the shared laws."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.compensation import Compensation, apply_compensated
from peft_vision.decomposers._layers import factored
from peft_vision.layers.factorized import Factored, FactoredLinear, fold_factors, relative_error
from peft_vision.method import Evidence, make
from tests.decomposers import laws
from tests.families import build, features, images, run

METHOD = "svd"


def test_full_rank_and_folding() -> None:
    laws.full_rank_is_the_layer(METHOD)


def test_error_falls_with_rank() -> None:
    laws.error_falls_with_rank(METHOD)


def test_fresh_values() -> None:
    laws.fresh_values_keep_the_variance(METHOD)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = build("timm_vit")
    laws.wrapped_and_loaded(METHOD, tmp_path / "x", model, images(model))


def test_budget() -> None:
    laws.budget_is_met(METHOD, build("timm_vit"), 32)
    laws.cost_falls_finely(METHOD, build("timm_vit"), 32)


def test_figures() -> None:
    laws.figures_are_those_of(METHOD, "linear", (5,), 5 * (12 + 20), 5 * (12 + 20))
    # 4 x 4 patches from 3 to 5 channels, then 1 x 1 to 16, on 3 x 3 patches.
    weights = 5 * (3 * 16 + 16)
    laws.figures_are_those_of(METHOD, "2-d, patches", (5,), weights, weights * 9)


def test_no_matrix_of_the_rank_is_nearer() -> None:
    layer, _ = laws.dense("linear")
    values = torch.linalg.svdvals(laws.weight(layer))
    made = factored(laws.job_of(METHOD), layer, (4,))
    best = float(values[4:].norm() / values.norm())
    assert abs(relative_error(laws.weight(layer), made) - best) < 1e-10


def test_the_classifier_stays_unless_it_is_named() -> None:
    head = nn.Sequential()
    head.add_module("body", nn.Linear(40, 40))
    head.add_module("head", nn.Linear(40, 40))
    pv.wrap(head, METHOD, rank=3)
    assert isinstance(head.body, FactoredLinear)
    assert type(head.head) is nn.Linear
    pv.wrap(head, METHOD, rank=3, layers=["classifier"])
    assert isinstance(head.head, FactoredLinear)
    assert (head.head.in_features, head.head.out_features) == (40, 40)


def test_a_layer_that_would_not_get_cheaper_stays() -> None:
    """At half of its ranks a square matrix costs what it did; a rank that is named is used."""
    model = build("timm_vit")
    layers = {s.key: s.layer for s in (*view(model).linears, *view(model).convs)}
    for strength in (0.05, 0.3):
        decided = make(METHOD).decide(view(model), strength, Evidence())
        for key, decision in decided.items():
            out, read = layers[key].weight.flatten(1).shape
            assert decision["rank"][0] * (out + read) < out * read
    pv.wrap(model, METHOD, rank=32)
    assert len(view(model).blocks[0].block.mlp.fc1) == 2


def test_layers_of_low_rank_go_first() -> None:
    model = build("timm_vit")
    low = model.blocks[2].mlp.fc1
    with torch.no_grad():
        left, values, right = torch.linalg.svd(low.weight, full_matrices=False)
        low.weight.copy_(left @ torch.diag(values * 0.3 ** torch.arange(32)) @ right)
    decided = make(METHOD).decide(view(model), 0.05, Evidence())
    assert list(decided) == ["blocks.2.up"]


@torch.no_grad()
def test_heads_and_units_are_cut_from_factors_as_from_the_layer() -> None:
    one = build("timm_vit").double()
    pv.wrap(one, METHOD, rank=6)
    other = build("timm_vit").double()
    pv.wrap(other, METHOD, rank=6)
    assert fold_factors(other) == 4 * 4 + 1
    for model in (one, other):
        view(model).heads[1].keep([0, 2])
        view(model).hidden[2].keep(range(0, 128, 3))
    x = images(one).double()
    assert (features(one(x)) - features(other(x))).abs().max() < 1e-10


def test_tied_layers_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    model.add_module("again", model[0])
    pv.wrap(model, METHOD, rank=4)
    assert model[0] is model.again
    assert isinstance(model.again, FactoredLinear)


def test_overlapping_kernels_are_refused() -> None:
    laws.refused(METHOD, nn.Sequential(nn.Conv2d(8, 80, 3), nn.ReLU()), "overlaps its neighbors")


def smooth(count: int, seed: int) -> Tensor:
    """Images whose pixels resemble their neighbors, as those of photographs do."""
    drawn = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(drawn.double(), 32, mode="bicubic")


def factored_model(dense: nn.Module, decided: Any, seen: list[Tensor] | None) -> nn.Module:
    model, method = copy.deepcopy(dense), make(METHOD, {"rank": 3, "minimum": 50})
    if seen is None:
        method.apply(view(model), decided)
    else:
        apply_compensated(model, [method], [decided], seen, Compensation())
    return model


def outputs(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a layer gives for images."""
    noted: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_hook(lambda _, __, given: noted.append(given))
    run(model, x)
    hook.remove()
    return noted[0]


@torch.no_grad()
@pytest.mark.parametrize("family", ["timm_vit", "hf_vit", "generic_cnn"])
def test_images_lower_the_error_on_other_images(family: str) -> None:
    """At the same ranks: of every layer alone, of the sum of their errors, and of the answers."""
    dense = build(family).double()
    seen, other = [smooth(24, 1), smooth(24, 2)], smooth(32, 3)
    decided = make(METHOD, {"rank": 3, "minimum": 50}).decide(view(dense), 1.0, Evidence())
    names = {id(module): name for name, module in dense.named_modules()}
    sites = {site.key: site for site in (*view(dense).linears, *view(dense).convs)}
    blind, fitted = (factored_model(dense, decided, data) for data in (None, seen))
    wanted = run(dense, other)
    assert (run(fitted, other) - wanted).norm() < 0.8 * (run(blind, other) - wanted).norm()
    for key in list(decided)[:3]:
        name = names[id(sites[key].layer)]
        cut = [factored_model(dense, {key: decided[key]}, data) for data in (None, seen)]
        exact, alone, with_images = (outputs(model, name, other) for model in (dense, *cut))
        assert (with_images - exact).norm() < 0.95 * (alone - exact).norm(), key


@torch.no_grad()
def test_full_rank_on_images_is_the_layer() -> None:
    dense = build("timm_vit").double()
    method = make(METHOD, {"rank": 1000})
    decided = method.decide(view(dense), 1.0, Evidence())
    model = copy.deepcopy(dense)
    apply_compensated(model, [method], [decided], [smooth(8, 1)], Compensation())
    x = images(dense).double()
    assert (run(model, x) - run(dense, x)).abs().max() < 1e-10


@pytest.mark.parametrize("family", ["timm_vit", "hf_vit", "cnn"])
@pytest.mark.parametrize("data", [False, True])
def test_a_layer_that_two_methods_decided_on_is_the_firsts(family: str, data: bool) -> None:
    """The patch embedding is a matrix to one and a convolution to the other."""
    model = Patches() if family == "cnn" else build(family)
    images = [torch.randn(4, 3, 32, 32)] if data else None
    methods = [make(METHOD), make("tucker")]
    found = pv.compress(
        model, target_flops=0.7, methods=methods, data=images, image_size=32, trials=1
    )
    assert 0.98 * 0.7 < found.ratio <= 0.7
    plain: Any = found.model.plain_model
    chains = [module for module in plain.modules() if isinstance(module, Factored)]
    assert chains
    assert not any(isinstance(part, Factored) for chain in chains for part in chain)


class Patches(nn.Sequential):
    """A patch embedding and a convolution with overlap."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 32, 8, 8), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
