"""Biases alone: which they are, that nothing else moves, and that nothing is left behind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.errors import BadSetting, UnsupportedSite
from tests.families import DEPTH, FAMILIES, SIZE, WIDTH, build, features, images


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("base_model.model."): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def wrapped(family: str, **settings: object) -> nn.Module:
    return pv.wrap(build(family), "bitfit", image_size=SIZE, **settings)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_biases_and_nothing_else(family: str) -> None:
    model = build(family)
    every = {n for n, p in model.named_parameters() if n.endswith("bias")}
    heads = {id(p) for site in view(model).classifier for p in site.layer.parameters()}
    adapted = pv.wrap(model, "bitfit", image_size=SIZE)
    found = trained(adapted)
    backbone = {n for n, p in found.items() if id(p) not in heads}
    assert backbone
    assert backbone <= every
    assert heads <= {id(p) for p in found.values()}
    features(adapted(images(model))).square().sum().backward()
    silent = {n for n, p in found.items() if p.grad is None}
    left_out = every - found.keys()
    if left_out or silent:  # a part of the tower that this output does not read
        assert family in ("hf_clip_classifier", "hf_siglip_classifier", "hf_dinov2", "hf_vit")
    assert not silent


def test_every_bias_of_a_plain_vit_is_counted() -> None:
    adapted = wrapped("timm_vit", train_head=False)
    count = sum(p.numel() for p in trained(adapted).values())
    assert count == WIDTH * (11 * DEPTH + 2), "3 + 1 + 4 + 1 + 1 + 1 a block, norm and patches"


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("attention", {"attn.qkv.bias", "attn.proj.bias"}),
        ("mlp", {"mlp.fc1.bias", "mlp.fc2.bias"}),
        ("norms", {"norm1.bias", "norm2.bias"}),
    ],
)
def test_kinds(which: str, names: set[str]) -> None:
    found = trained(wrapped("timm_vit", which=which, train_head=False))
    inside = {n.split(".", 2)[2] for n in found if n.startswith("blocks.")}
    outside = {n for n in found if not n.startswith("blocks.")}
    assert inside == names
    assert outside == ({"norm.bias"} if which == "norms" else set())


def test_biases_beside_a_fused_layer() -> None:
    found = trained(wrapped("timm_eva02_small", which="attention", train_head=False))
    names = {n.split(".", 2)[2] for n in found}
    assert names == {"attn.q_bias", "attn.v_bias", "attn.proj.bias"}


def test_a_pooling_head_that_is_not_read_is_left_alone() -> None:
    found = trained(wrapped("hf_siglip_classifier"))
    assert not any(".head." in name for name in found)


@pytest.mark.parametrize("family", ["timm_vit", "timm_eva02_small", "hf_dinov2_classifier"])
def test_a_merged_model_is_a_plain_one(family: str, tmp_path: Path) -> None:
    model = build(family)
    base, x = copy.deepcopy(model), images(model)
    adapted = pv.wrap(model, "bitfit")
    with torch.no_grad():
        for parameter in trained(adapted).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = features(adapted.eval()(x))
    adapted.save_pretrained(tmp_path / "out")
    assert torch.equal(features(pv.load(tmp_path / "out", base=base)(x)), expected)
    merged = pv.merge(adapted)
    assert type(merged) is type(base)
    assert torch.equal(features(merged(x)), expected)
    own = base.state_dict()
    changed = {n for n, t in merged.state_dict().items() if not torch.equal(t, own[n])}
    heads = {site.key for site in view(base).classifier}
    assert all(n.endswith("bias") or n.rpartition(".")[0] in heads for n in changed)


@pytest.mark.parametrize("other", ["lora", "token_reorganization", "magnitude", "vpt"])
@pytest.mark.parametrize("first", [True, False])
def test_labels_survive_other_housings(other: str, first: bool) -> None:
    """PEFT's wrappers and our trunk change the names of parameters, not which are trained."""
    alone = trained(wrapped("timm_vit", train_head=False))
    model = build("timm_vit")
    for name in ("bitfit", other) if first else (other, "bitfit"):
        settings = {} if name in ("token_reorganization", "magnitude") else {"train_head": False}
        model = pv.wrap(model, name, **settings)
    found = [n for n in trained(model) if n.endswith("bias")]
    assert len(found) == len(alone)


def test_refusals() -> None:
    with pytest.raises(BadSetting, match="all, attention, mlp, norms"):
        pv.wrap(build("timm_vit"), "bitfit", which="gates")
    with pytest.raises(UnsupportedSite, match="TinyCnn has no heads"):
        pv.wrap(build("generic_cnn"), "bitfit", which="attention", image_size=SIZE)
    bare = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.LazyLinear(2, bias=False))
    bare(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UnsupportedSite, match="Sequential has no biases of the kind 'all'"):
        pv.wrap(bare, "bitfit", image_size=8)
