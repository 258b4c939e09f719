"""Depthwise kernels as squares, rows, columns and nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import count_flops, twin
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.branch_conv import BranchConv
from peft_vision.method import Evidence, make
from peft_vision.plan import unpack_indices

METHOD = "band"


class Large(nn.Module):
    """Two depthwise 7 x 7 with a mix of channels behind each, for 16 px images of 3 channels."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, stride=2)
        self.first = nn.Conv2d(16, 16, 7, padding=3, groups=16, bias=bias)
        self.mix = nn.Conv2d(16, 16, 1)
        self.second = nn.Conv2d(16, 16, 7, padding="same", groups=16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.mix(self.first(self.stem(x)).relu()))
        found: Tensor = self.fc(x.mean((2, 3)))
        return found


def of_kinds(model: Large) -> dict[str, list[int]]:
    """Give each of the first layer's channels a kernel that is nothing but one kind."""
    with torch.no_grad():
        weight = model.first.weight
        mask = torch.zeros_like(weight)
        mask[0:4, :, 2:5, 2:5] = 1
        mask[4:8, :, 3, :] = 1
        mask[8:12, :, :, 3] = 1
        weight.mul_(mask)
        weight[12:, :, 3, 3] = 1
        model.first.bias[12:] = 0
    members = ("square", "row", "column", "identity")
    return {kind: list(range(4 * n, 4 * n + 4)) for n, kind in enumerate(members)}


@torch.no_grad()
def test_kernels_that_are_of_a_kind_lose_nothing() -> None:
    model = Large().double().eval()
    wanted = of_kinds(model)
    model.second = nn.Conv2d(16, 16, 3, padding=1, groups=16).double()  # too small to be divided
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = model(x)
    decided: Any = make(METHOD, {"identity": 0.25}).decide(view(model), 1.0, Evidence())
    found = {kind: unpack_indices(members) for kind, members in decided["first"].items()}
    assert found == wanted
    make(METHOD).apply(view(model), {"first": decided["first"]})
    assert isinstance(model.first, BranchConv)
    assert (model(x) - before).abs().max() < 1e-12


def test_cost_never_rises_and_no_more_pass_than_may() -> None:
    model, evidence, costs = Large().eval(), Evidence(), []
    for strength in torch.linspace(0, 1, 17).tolist():
        decided: Any = make(METHOD).decide(view(model), strength, evidence)
        smaller = twin(model)
        make(METHOD).apply(view(smaller), decided)
        costs.append(count_flops(smaller, (3, 16, 16)))
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 12
    assert [len(unpack_indices(kinds["identity"])) for kinds in decided.values()] == [10, 10]


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    base = Large(bias=False).eval()
    wrapped = pv.wrap(copy.deepcopy(base), METHOD, ratio=0.6, image_size=16)
    wrapped.save_pretrained(tmp_path / "x")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(pv.load(tmp_path / "x", base=base)(x), wrapped(x))


def test_budget() -> None:
    result = pv.compress(Large().eval(), target_flops=0.6, methods=[METHOD], image_size=16)
    assert 0.98 * 0.6 < result.ratio <= 0.6


def test_a_divided_layer_is_not_divided_again() -> None:
    model = Large().eval()
    pv.wrap(model, METHOD, ratio=0.2, image_size=16)
    with pytest.raises(UnsupportedSite, match="no depthwise convolution"):
        pv.wrap(model, METHOD, ratio=0.2, image_size=16)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 7, padding=3),
        nn.Conv2d(8, 8, 7, padding=3, stride=2, groups=8),
        nn.Conv2d(8, 8, 7, groups=8),
        nn.Conv1d(8, 8, 7, padding=3, groups=8),
    ],
)
def test_other_convolutions_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedSite, match="no depthwise convolution"):
        make(METHOD).decide(view(nn.Sequential(layer)), 0.5, Evidence())


@pytest.mark.parametrize("settings", [{"square": 2}, {"identity": 1.1}, {"ratio": -0.1}])
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(BadSetting):
        make(METHOD, settings)
