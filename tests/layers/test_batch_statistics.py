"""Running statistics taken again are those of the images, and mend a model that was cut."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.compensation import Compensation, apply_compensated
from peft_vision.layers.batch_statistics import estimate_again
from peft_vision.layers.showing import show
from peft_vision.method import Evidence, make
from peft_vision.mixing import divergence


def convolutional() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 24), (24, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval()


def test_statistics_are_those_of_all_images() -> None:
    model = convolutional().double()
    batches = [torch.randn(n, 3, 8, 8, dtype=torch.float64) + n for n in (4, 1, 7)]
    assert estimate_again(model, partial(show, model, batches)) == 3
    with torch.no_grad():
        arrived = model[0](torch.cat(batches))
    assert torch.allclose(model[1].running_mean, arrived.mean((0, 2, 3)))
    assert torch.allclose(model[1].running_var, arrived.var((0, 2, 3), unbiased=False), rtol=1e-4)
    assert not model.training


def test_a_norm_that_sees_nothing_keeps_its_own() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    unused = copy.deepcopy(model[3])
    model[3] = nn.Identity()
    model.add_module("unused", nn.ModuleList([unused]))
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    assert estimate_again(model, lambda: model.eval()(torch.randn(1, 3, 2, 2))) == 0
    assert torch.equal(model[2].running_mean, torch.zeros(4))
    assert torch.equal(unused.running_var, torch.ones(4))


def drawn(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Five patterns under noise, and which one it is."""
    patterns = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(count) % 5
    return patterns[labels] + torch.randn(count, 3, 16, 16, generator=draw), labels


def test_a_trained_model_that_was_cut_answers_as_before() -> None:
    model, draw = convolutional().train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        images, labels = drawn(40, draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    batches = [drawn(64, draw)[0] for _ in range(3)]
    images, labels = drawn(200, draw)
    with torch.no_grad():
        wanted = model.eval()(images)
    method, right, away = make("magnitude", {"multiple": 1}), {}, {}
    decisions = [method.decide(view(model), 0.3, Evidence())]
    for how in ("none", "ridge"):
        smaller = copy.deepcopy(model)
        apply_compensated(smaller, [method], decisions, batches, Compensation(how))
        away[how] = divergence(smaller, [wanted], [images])
        with torch.no_grad():
            right[how] = float((smaller(images).argmax(1) == labels).float().mean())
    assert away["ridge"] < 0.7 * away["none"]
    assert right["ridge"] > right["none"] + 0.2
