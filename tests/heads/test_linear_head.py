"""The linear probe: the classifier that is there, or a new one, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.compressed import CompressedModel
from peft_vision.cost import unwrap
from peft_vision.errors import BadSetting, UnsupportedSite
from tests.families import CLASSES, FAMILIES, WIDTH, build, features, images

HEADED = [name for name in FAMILIES if view(build(name)).classifier]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", HEADED)
def test_by_default_the_classifier_that_is_there_is_trained(family: str) -> None:
    model = build(family)
    x = images(model)
    before = features(model(x)).detach()
    classifier = {id(p) for site in view(model).classifier for p in site.layer.parameters()}
    adapted = pv.wrap(model, "linear_head")
    assert {id(p) for p in trained(adapted).values()} == classifier
    assert torch.equal(features(adapted.eval()(x)), before)
    merged = pv.merge(adapted)
    assert type(merged) is type(build(family)), "nothing is left of the method"


@pytest.mark.parametrize("family", HEADED)
def test_a_new_one(family: str) -> None:
    model = build(family)
    adapted = pv.wrap(model, "linear_head", outputs=3)
    layers = [site.layer for site in view(unwrap(adapted)).readouts]
    assert all(type(layer) is nn.Linear for layer in layers)
    features(adapted.train()(images(model))).square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in trained(adapted).values())
    assert len(trained(adapted)) == 2 * len(layers)


def test_what_is_left_after_merging(tmp_path: Path) -> None:
    for settings, left in (
        ({"outputs": CLASSES}, False),
        ({"outputs": CLASSES, "bias": False}, True),
        ({"outputs": 3}, True),
        ({"outputs": CLASSES, "norm": True}, True),
    ):
        model = build("timm_vit")
        base, x = copy.deepcopy(model), images(model)
        adapted = pv.wrap(model, "linear_head", **settings).eval()
        merged = pv.merge(adapted)
        assert torch.equal(merged(x), adapted(x))
        assert isinstance(merged, CompressedModel) == left
        if isinstance(merged, CompressedModel):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            merged.save_pretrained(folder)
            assert torch.equal(pv.load(folder, base=base)(x), adapted(x))


def test_a_norm_before_it() -> None:
    model = build("timm_vit", dtype=torch.float64)
    adapted = pv.wrap(model, "linear_head", outputs=3, norm=True)
    assert sum(p.numel() for p in trained(adapted).values()) == 2 * WIDTH + 3 * WIDTH + 3
    one, other = torch.randn(2, WIDTH, dtype=torch.float64), 0.0
    other = 5 * one + 3
    assert torch.allclose(model.head(one), model.head(other), atol=1e-4)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("outputs", [None, 3])
def test_with_low_rank_updates(outputs: int | None, order: str, tmp_path: Path) -> None:
    model = build("timm_vit")
    base, x = copy.deepcopy(model), images(model)
    steps = [("linear_head", {"outputs": outputs}), ("lora", {"r": 2})]
    for name, settings in steps if order == "before" else steps[::-1]:
        model = pv.wrap(model, name, **settings)
    assert len([n for n in trained(model) if "lora_" not in n]) == 2
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(0.05 * torch.randn_like(p))
    expected = model.eval()(x)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(pv.load(tmp_path / "out", base=base)(x), expected)
    torch.testing.assert_close(pv.merge(model)(x), expected, rtol=0, atol=1e-4)


def test_refusals() -> None:
    with pytest.raises(UnsupportedSite, match="Dinov2Model has no classifier to train"):
        pv.wrap(build("hf_dinov2"), "linear_head")
    for settings in ({"outputs": 0}, {"norm": True}, {"bias": False}, {"std": 1}):
        with pytest.raises(BadSetting):
            pv.wrap(build("timm_vit"), "linear_head", **settings)
