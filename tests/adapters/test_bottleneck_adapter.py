"""Bottlenecks behind and beside the branches, for every family, with what may stand around them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision.adapted import AdaptedModel
from peft_vision.backbones import view
from peft_vision.cost import unwrap
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.bottleneck import Behind, Beside, Bottleneck
from peft_vision.layers.surgery import keep_inputs, keep_outputs, weight_of
from tests.families import DEPTH, NO_TOKENS, TRANSFORMERS, WIDTH, build, features, images

PLACES = {"after_attention": 1, "after_mlp": 1, "both": 2, "parallel_mlp": 1}
METHOD = "bottleneck_adapter"


def bottlenecks(model: nn.Module) -> list[Bottleneck]:
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("place", PLACES)
def test_parameters_and_places(place: str) -> None:
    adapted = pv.wrap(build("timm_vit"), METHOD, place=place, width=5, train_head=False)
    found = bottlenecks(adapted)
    assert len(found) == PLACES[place] * DEPTH
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert count == len(found) * (2 * WIDTH * 5 + 5 + WIDTH)


@pytest.mark.parametrize("family", [*TRANSFORMERS, *NO_TOKENS])
def test_the_view_is_the_same_as_before(family: str) -> None:
    model = build(family)
    before = view(model)
    layers, mlps = [s.layer for s in before.linears], [s.mlp for s in before.hidden]
    counts = [s.count for s in before.heads]
    pv.wrap(model, METHOD, place="both")
    pv.wrap(model, METHOD, place="parallel_mlp")
    after = view(model)
    assert after.family == before.family
    assert [s.key for s in after.linears] == [s.key for s in before.linears]
    assert [s.layer for s in after.linears] == layers
    assert [s.mlp for s in after.hidden] == mlps
    assert [s.count for s in after.heads] == counts


@pytest.mark.parametrize("family", ["timm_vit", "timm_eva02_small", "hf_vit", "hf_siglip"])
def test_every_tensor_learns_after_one_step(family: str) -> None:
    """With both layers at zero, as in a released baseline, all but one bias would be dead."""
    adapted = pv.wrap(build(family), METHOD, width=4, train_head=False).train()
    x = images(adapted)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        features(adapted(x)).square().sum().backward()
        moved = [bool(p.grad.abs().sum() > 0) for p in trained]
        optimizer.step()
    assert all(moved)


def test_both_layers_at_zero_would_be_dead() -> None:
    model = Bottleneck(8, 4, "gelu", 1.0)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model(torch.randn(3, 8)).sum().backward()
    assert [bool(p.grad.any()) for p in model.parameters()] == [False, False, False, True]
    model.draw()
    assert bool(model.down.weight.any())
    assert not bool(model.up.weight.any())


def test_the_branches_are_what_the_papers_say() -> None:
    """Behind: y + up(gelu(down(y))) with y the branch; beside: the same on the MLP's input."""
    model = build("timm_vit", dtype=torch.float64)
    plain = copy.deepcopy(model).blocks[0]
    for place in ("both", "parallel_mlp"):
        shaken(pv.wrap(model, METHOD, place=place, width=4, scale=0.5))
    block, x = model.blocks[0], torch.randn(2, 5, WIDTH, dtype=torch.float64)
    attention, mlp = block.attn.proj, block.mlp
    assert isinstance(attention, Behind)
    assert isinstance(mlp, Beside)
    y = plain.attn(plain.norm1(x))
    x1 = x + y + attention.bottleneck(y)
    normed = plain.norm2(x1)
    y = plain.mlp(normed)
    expected = x1 + y + mlp.inner.fc2.bottleneck(y) + mlp.bottleneck(normed)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    by_hand = nn.functional.gelu(mlp.bottleneck.down(normed))
    torch.testing.assert_close(mlp.bottleneck(normed), 0.5 * mlp.bottleneck.up(by_hand))


@pytest.mark.parametrize("other", ["magnitude", "token_reorganization", "lora", "vpt"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("family", "place"),
    [("timm_vit_swiglu", "both"), ("timm_eva_dinov3", "parallel_mlp"), ("hf_dinov3", "both")],
)
def test_with_other_methods(
    family: str, first: bool, other: str, place: str, tmp_path: Path
) -> None:
    model = build(family)
    base, x = copy.deepcopy(model), images(model)
    own = (METHOD, {"place": place, "width": 4})
    for name, settings in (own, (other, {})) if first else ((other, {}), own):
        model = pv.wrap(model, name, **settings)
    expected = features(shaken(model)(x))
    assert len(bottlenecks(model)) == PLACES[place] * DEPTH
    assert isinstance(model, AdaptedModel)
    model.save_pretrained(tmp_path / "out")
    alone = model.history.changed_structure and model.history.source is not None
    again = pv.load(tmp_path / "out", base=None if alone else base)
    assert torch.equal(features(again(x)), expected)
    merged = pv.merge(model)
    torch.testing.assert_close(features(merged(x)), expected, rtol=0, atol=1e-3)
    assert len(bottlenecks(merged)) == PLACES[place] * DEPTH


def test_heads_and_units_leave_through_it() -> None:
    model = build("timm_vit", dtype=torch.float64)
    x = images(model)
    shaken(pv.wrap(model, METHOD, width=4))
    shaken(pv.wrap(model, METHOD, place="parallel_mlp", width=4))
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.blocks[1].attn.proj.inner.weight[:, 8:16] = 0
        masked.blocks[2].mlp.inner.fc2.inner.weight[:, 5:] = 0
    sites = view(model)
    sites.heads[1].keep([0, 2, 3])
    sites.hidden[2].keep(range(5))
    torch.testing.assert_close(model(x), masked(x), rtol=0, atol=1e-12)


def test_surgery_on_the_layer_itself() -> None:
    layer = Behind(nn.Linear(6, 5), Bottleneck(5, 3, "relu", 2.0)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(weight_of(layer), layer.inner.weight)
    whole = copy.deepcopy(layer)
    keep_inputs(layer, [0, 2, 5])
    assert layer.in_features == 3
    with torch.no_grad():
        whole.inner.weight[:, [1, 3, 4]] = 0
    torch.testing.assert_close(layer(x[:, [0, 2, 5]]), whole(x))
    keep_outputs(layer, [1, 4])
    assert layer.out_features == 2
    assert layer(x[:, :3]).shape == (4, 2)


def test_in_half_precision_it_computes_in_single() -> None:
    adapted = pv.wrap(build("timm_vit").bfloat16(), METHOD, train_head=False)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert adapted(images().bfloat16()).dtype == torch.bfloat16


def test_refusals() -> None:
    for settings in ({"width": 0}, {"place": "before"}, {"activation": "sine"}, {"scale": 0}):
        with pytest.raises(BadSetting):
            pv.wrap(build("timm_vit"), METHOD, **settings)
    with pytest.raises(UnsupportedSite, match="TinyCnn has no hidden"):
        pv.wrap(build("generic_cnn"), METHOD)
    adapted = pv.wrap(build("timm_vit"), METHOD, place="after_mlp")
    with pytest.raises(UnsupportedSite, match=r"carries one at blocks.0.down"):
        pv.wrap(unwrap(adapted), METHOD)
