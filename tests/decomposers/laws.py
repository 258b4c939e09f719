"""The laws that every decomposition into a chain keeps; the tests of each call them by its name."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import count_flops, twin
from peft_vision.decomposers._job import Job
from peft_vision.decomposers._layers import factored
from peft_vision.layers.factorized import Factored, fold_factors, relative_error
from peft_vision.layers.layer_shape import LayerShape, shape_of
from peft_vision.layers.surgery import weight_of
from peft_vision.method import Evidence, make

LAYERS: dict[str, nn.Module] = {
    "1-d, stride, padding, dilation": nn.Conv1d(6, 8, 5, stride=2, padding=2, dilation=2),
    "2-d": nn.Conv2d(6, 8, 3, padding=1),
    "2-d, groups, not square": nn.Conv2d(8, 12, (3, 5), (2, 1), (1, 0), (2, 1), groups=2),
    "2-d, padding same, no bias": nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False),
    "2-d, depthwise": nn.Conv2d(8, 8, 7, padding=3, groups=8),
    "2-d, patches": nn.Conv2d(3, 16, 4, stride=4),
    "2-d, one way already": nn.Conv2d(6, 8, (1, 5), padding=(0, 2)),
    "2-d, 1 x 1": nn.Conv2d(8, 16, 1, stride=2, groups=2),
    "3-d": nn.Conv3d(4, 6, 3, stride=(1, 2, 1), padding=(1, 0, 1)),
    "3-d, flat": nn.Conv3d(4, 6, (1, 3, 3), stride=(2, 1, 1), padding=(0, 1, 1)),
    "linear": nn.Linear(12, 20),
}


def job_of(method: str, **settings: Any) -> Job:
    made: Any = make(method, settings)
    job: Job = made.job()
    return job


def handled(method: str) -> list[str]:
    scheme = job_of(method).scheme
    return [name for name, layer in LAYERS.items() if not scheme.why_not(shape_of(layer))]


def dense(name: str) -> tuple[nn.Module, Tensor]:
    """A layer in float64 and something it reads."""
    torch.manual_seed(0)
    layer = copy.deepcopy(LAYERS[name]).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    shape = shape_of(layer)
    sides = [13, 12, 14][: len(shape.kernel)]
    return layer, torch.randn(2, shape.inputs, *sides, dtype=torch.float64)


def ranks(full: Sequence[int], count: int = 6) -> list[tuple[int, ...]]:
    """From 1 to full rank, every rank by the same share."""
    steps = [(place + 1) / count for place in range(count)]
    return [tuple(max(1, math.floor(share * r)) for r in full) for share in steps]


@torch.no_grad()
def full_rank_is_the_layer(method: str) -> None:
    """And folding a chain changes nothing, at any rank."""
    job = job_of(method)
    for name in handled(method):
        layer, x = dense(name)
        full = job.scheme.full(shape_of(layer))
        whole = factored(job, layer, full)
        assert (whole(x) - layer(x)).abs().max() < 1e-10, name
        some = factored(job, layer, ranks(full)[2])
        folded = some.fold()
        assert type(folded) is type(layer)
        assert shape_of(folded) == shape_of(layer)
        assert (folded(x) - some(x)).abs().max() < 1e-10, name


def error_falls_with_rank(method: str, slack: float = 1e-9) -> None:
    """Args: slack: by which the relative error may rise, for what is found by iterating."""
    job = job_of(method)
    for name in handled(method):
        layer, _ = dense(name)
        full = job.scheme.full(shape_of(layer))
        errors = [relative_error(weight(layer), factored(job, layer, r)) for r in ranks(full)]
        assert all(b <= a + slack for a, b in itertools.pairwise(errors)), (name, errors)
        assert errors[0] > errors[-1] or len(set(ranks(full))) == 1, (name, errors)


def weight(layer: nn.Module) -> Tensor:
    found: Any = layer
    return found.weight.detach()


def figures_are_those_of(
    method: str, name: str, rank: tuple[int, ...], weights: int, macs: int
) -> None:
    """Parameters without the bias, and multiply-accumulates, counted on the chain itself."""
    layer, x = dense(name)
    made = factored(job_of(method), layer, rank)
    bias = 0 if made.bias is None else made.bias.numel()
    assert sum(p.numel() for p in made.parameters()) - bias == weights
    size = tuple(x.shape[1:])
    assert count_flops(twin(made), size) == 2 * macs  # type: ignore[arg-type]


@torch.no_grad()
def fresh_values_keep_the_variance(method: str) -> None:
    job = job_of(method, init="fresh")
    for name in handled(method):
        layer, x = dense(name)
        layer.register_parameter("bias", None)
        full = job.scheme.full(shape_of(layer))
        drawn = [factored(job, layer, ranks(full)[1])(x).var() for _ in range(8)]
        share = float(torch.stack(drawn).mean() / layer(x).var())
        assert 0.5 < share < 2.0, (name, share)


class PlainCnn(nn.Module):
    """Three convolutions, a normalization and a classifier, for 16 px images of 3 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 32, 5, stride=2, padding=2)
        self.deep = nn.Conv2d(32, 32, 3, padding=1)
        self.mix = nn.Conv2d(32, 48, 1)
        self.fc = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.mix(self.deep(self.wide(x).relu()).relu()).relu()
        found: Tensor = self.fc(x.mean((2, 3)))
        return found


def wrapped_and_loaded(method: str, folder: Path, model: nn.Module, x: Tensor) -> None:
    """Bit-exact, and the sizes that models ask a layer for are those of the dense one."""
    base = copy.deepcopy(model)
    wrapped: Any = pv.wrap(model, method, image_size=int(x.shape[-1]), ratio=0.6, minimum=64)
    decided = wrapped.history.plan.steps[-1].decisions
    assert decided
    layers = {site.key: site for site in (*view(base).linears, *view(base).convs)}
    names = {id(module): name for name, module in base.named_modules()}
    for key in decided:
        was = layers[key].layer
        made: Any = wrapped.plain_model.get_submodule(names[id(was)])
        assert isinstance(made, Factored)
        assert made.weight.shape == was.weight.shape == weight_of(made).shape
        assert made.weight.dtype == was.weight.dtype
        assert (made.bias is None) == (was.bias is None)
    wrapped.save_pretrained(folder)
    again = pv.load(folder, base=base)
    with torch.no_grad():
        assert torch.equal(again(x), wrapped.eval()(x))
        before = wrapped(x)
        assert fold_factors(wrapped) == len(decided)
        assert (wrapped(x) - before).abs().max() < 1e-4
    assert sum(p.numel() for p in wrapped.parameters()) == sum(p.numel() for p in base.parameters())


def budget_is_met(method: str, model: nn.Module, size: int, target: float = 0.6) -> None:
    result = pv.compress(model, target_flops=target, methods=[method], image_size=size)
    assert 0.98 * target < result.ratio <= target
    few = pv.compress(model, target_params=target + 0.1, methods=[method], image_size=size)
    assert 0.98 * (target + 0.1) < few.ratio <= target + 0.1


def cost_falls_finely(method: str, model: nn.Module, size: int) -> None:
    """Never rises with strength, and every site's own decision only ever gets cheaper."""
    technique, evidence, backbone = make(method, {"minimum": 64}), Evidence(), view(model)
    costs, before = [], {}
    for strength in torch.linspace(0, 1, 33).tolist():
        decisions: Any = technique.decide(backbone, strength, evidence)
        smaller = twin(model)
        technique.apply(view(smaller), decisions)
        costs.append(count_flops(smaller, (3, size, size)))
        for key, ranks_before in before.items():
            assert all(
                now <= was for now, was in zip(decisions[key]["rank"], ranks_before, strict=True)
            )
        before = {key: decision["rank"] for key, decision in decisions.items()}
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 12
    assert costs[-1] < costs[0]


def shape(layer: str) -> LayerShape:
    return shape_of(LAYERS[layer])


def refused(method: str, model: nn.Module, why: str, **settings: Any) -> None:
    with pytest.raises(pv.errors.UnsupportedSite, match=why):
        pv.wrap(model, method, **settings)
