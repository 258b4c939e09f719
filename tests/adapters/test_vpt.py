"""Prompts: where they stand, that they are gone when features are pooled, and what they learn."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone, TokensSite
from peft_vision.cost import unwrap
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.trunk import kept_positions
from peft_vision.method import Evidence, make
from tests.families import (
    CLASS_POOLED,
    DEPTH,
    NO_TOKENS,
    PATCH,
    PATCHES,
    ROTARY,
    TRANSFORMERS,
    WIDTH,
    build,
    features,
    images,
)

COUNT = 3


def tokens_of(backbone: Backbone) -> TokensSite:
    assert backbone.tokens is not None
    return backbone.tokens


def streams(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """What enters the trunk, what every block sees, and what leaves the trunk."""
    trunk = tokens_of(view(unwrap(model))).trunk()
    inside: list[Tensor] = []
    ends: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, a: inside.append(a[0])) for b in trunk.blocks]
    hooks.append(trunk.register_forward_hook(lambda _, a, out: ends.extend((a[0], out))))
    model(x)
    for hook in hooks:
        hook.remove()
    return ends[0], inside, ends[1]


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_where_prompts_stand(family: str, deep: bool) -> None:
    model = build(family)
    site = tokens_of(view(model))
    adapted = pv.wrap(model, "vpt", tokens=COUNT, deep=deep).eval()
    entering, inside, leaving = streams(adapted, images(model))
    trunk = site.trunk()
    assert leaving.shape == entering.shape, "what is pooled is what was pooled before"
    assert all(x.shape[1] == entering.shape[1] + COUNT for x in inside)
    first, last = site.prefix, site.prefix + COUNT
    assert torch.equal(inside[0][:, :first], entering[:, :first])
    assert torch.equal(inside[0][:, last:], entering[:, first:])
    assert len(trunk.prompts) == (DEPTH if deep else 1)
    for index, prompts in trunk.prompts.items():
        assert torch.equal(inside[int(index)][0, first:last], prompts.tokens)


@pytest.mark.parametrize("family", ["timm_vit", "timm_deit_distilled", "timm_eva_dinov3"])
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_a_class_token_sees_what_it_would_see_if_they_stayed(family: str, deep: bool) -> None:
    """The paper keeps them to the end; here a slow loop does."""
    model = build(family, dtype=torch.float64)
    x = images(model)
    blocks, prefix = list(model.blocks), model.num_prefix_tokens
    adapted = pv.wrap(model, "vpt", tokens=COUNT, deep=deep).eval()
    prompts = dict(tokens_of(view(model)).trunk().prompts.items())
    y, rope = model._pos_embed(model.patch_embed(x)), {}
    if family in ROTARY:
        y, rope = y[0], {"rope": y[1]}
    y = model.norm_pre(y)
    y = torch.cat([y[:, :prefix], prompts["0"].tokens.expand(2, -1, -1), y[:, prefix:]], 1)
    for index, block in enumerate(blocks):
        if deep and index:
            y[:, prefix : prefix + COUNT] = prompts[str(index)].tokens
        y = block(y.clone(), **rope)
    expected = model.forward_head(model.norm(y))
    torch.testing.assert_close(adapted(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", [n for n in ROTARY if n.startswith("timm")])
def test_prompts_are_not_rotated(family: str) -> None:
    model = build(family, dtype=torch.float64)
    before = model.num_prefix_tokens
    pv.wrap(model, "vpt", tokens=COUNT)
    trunk = tokens_of(view(model)).trunk()
    assert all(block.attn.num_prefix_tokens == before + COUNT for block in trunk.blocks)
    assert model.num_prefix_tokens == before


@pytest.mark.parametrize("family", CLASS_POOLED)
def test_the_order_of_prompts_does_not_matter(family: str) -> None:
    """They have no positions; were they rotated, exchanging two would change the output."""
    model = build(family, dtype=torch.float64)
    adapted = pv.wrap(model, "vpt", tokens=COUNT, deep=False).eval()
    x = images(model)
    before = features(adapted(x))
    tokens = tokens_of(view(model)).trunk().prompts["0"].tokens
    with torch.no_grad():
        tokens.copy_(tokens[[2, 0, 1]].clone())
    torch.testing.assert_close(features(adapted(x)), before, rtol=0, atol=1e-12)
    with torch.no_grad():
        tokens.normal_()
    assert (features(adapted(x)) - before).abs().max() > 1e-6


def test_parameters_and_first_values() -> None:
    for deep, blocks in ((True, DEPTH), (False, 1)):
        adapted = pv.wrap(build("timm_vit"), "vpt", tokens=50, deep=deep, train_head=False)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == blocks * 50 * WIDTH
        bound = math.sqrt(6 / (3 * PATCH**2 + WIDTH))
        assert all(0.9 * bound < float(p.detach().abs().max()) <= bound for p in trained)


@pytest.mark.parametrize("family", ["timm_vit_average", "timm_siglip", "timm_eva_rope", "hf_clip"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_all_prompts_learn(family: str, checkpointing: bool) -> None:
    adapted = pv.wrap(build(family), "vpt", tokens=COUNT).train()
    view(unwrap(adapted)).set_checkpointing(checkpointing)
    features(adapted(images(adapted))).square().sum().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(bool(p.grad.abs().sum() > 0) for p in trained)


def test_checkpointing_changes_no_gradient() -> None:
    adapted = pv.wrap(build("timm_eva_dinov3", dtype=torch.float64), "vpt", tokens=COUNT).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    gradients = []
    for on in (False, True):
        view(unwrap(adapted)).set_checkpointing(on)
        adapted(images(adapted)).square().sum().backward()
        gradients.append([p.grad.clone() for p in trained])
        adapted.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "family", ["timm_vit", "timm_dinov2_registers", "timm_eva_dinov3", "hf_dinov3"]
)
@pytest.mark.parametrize("first", [True, False], ids=["prompts first", "tokens first"])
def test_where_tokens_leave_prompts_stay(family: str, first: bool) -> None:
    model = build(family, dtype=torch.float64)
    reduce = make("token_reorganization", {"keep_rate": 0.5})
    decisions = reduce.decide(view(model), 0.5, Evidence())
    x = images(model)
    kept = {key: {"keep_rate": 1.0, "fuse": True} for key in decisions}
    if not first:
        reduce.apply(view(model), kept)
    adapted = pv.wrap(model, "vpt", tokens=COUNT).eval()
    expected = features(adapted(x)) if first else None
    if first:
        reduce.apply(view(model), kept)
        torch.testing.assert_close(features(adapted(x)), expected, rtol=0, atol=1e-10)
    reduce.apply(view(model), decisions)
    places = kept_positions(model, x)
    assert max(int(p.max()) for p in places.values()) < PATCHES
    site, seen = tokens_of(view(model)), []
    for reducer in site.trunk().reducers.values():
        reducer.register_forward_pre_hook(lambda _, args: seen.append((args[0].shape[1], args[2])))
    adapted(x)
    before = site.prefix + COUNT
    left = [PATCHES, *(int(places[i].shape[1]) for i in sorted(places))]
    assert seen == [(before + patches, before) for patches in left[:-1]]


def test_a_merged_model_keeps_them(tmp_path: Path) -> None:
    model = build("timm_eva_dinov3")
    base, x = copy.deepcopy(model), images(model)
    adapted = pv.wrap(model, "lora", r=2)
    adapted = pv.wrap(adapted, "vpt", tokens=COUNT).eval()
    merged = pv.merge(adapted)
    assert [step.method for step in merged.history.plan.steps] == ["vpt"]
    torch.testing.assert_close(merged(x), adapted(x), rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "out")
    assert torch.equal(pv.load(tmp_path / "out", base=base)(x), merged(x))


def test_refusals() -> None:
    for settings in ({"tokens": 0}, {"tokens": 1.5}, {"dropout": 1.0}, {"prompts": 3}):
        with pytest.raises(BadSetting):
            pv.wrap(build("timm_vit"), "vpt", **settings)
    for family in (*NO_TOKENS, "generic_cnn"):
        with pytest.raises(UnsupportedSite, match="has no tokens"):
            pv.wrap(build(family), "vpt")
    with pytest.raises(UnsupportedSite, match="carries prompts already"):
        pv.wrap(pv.wrap(build("timm_vit"), "vpt"), "vpt")
