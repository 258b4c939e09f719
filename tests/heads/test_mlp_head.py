"""An MLP in the place of the classifier: what is trained, what is returned, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.compressed import CompressedModel
from peft_vision.cost import unwrap
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.readout import Boxes, PooledReadout, Readout
from tests.families import CLASSES, FAMILIES, PATCH, SIZE, WIDTH, build, features, images

Tiny = Callable[..., nn.Module]
GRID = SIZE // PATCH
HEADED = [name for name in FAMILIES if view(build(name)).readouts]
DENSE = [name for name in HEADED if view(build(name)).readouts[0].dense is not None]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_families_with_a_place_for_a_head() -> None:
    assert len(HEADED) == 23
    assert set(DENSE) == {n for n in HEADED if n.startswith("timm")} - {"timm_deit_distilled"}


@pytest.mark.parametrize("family", HEADED)
def test_it_stands_where_the_classifier_was_and_alone_is_trained(family: str) -> None:
    model = build(family)
    sites, x = view(model).readouts, images(model)
    before = features(model(x)).detach()
    adapted = pv.wrap(model, "mlp_head", outputs=7, hidden=16)
    heads = [site.layer for site in view(unwrap(adapted)).readouts]
    assert all(isinstance(head, PooledReadout) for head in heads)
    assert [head.inputs for head in heads] == [site.width for site in sites]
    inside = {id(p) for head in heads for p in head.parameters()}
    assert {id(p) for p in trained(adapted).values()} == inside
    output = features(adapted.train()(x))
    assert output.shape == (2, 7)
    output.square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in trained(adapted).values())
    assert before.shape == (2, CLASSES)


@pytest.mark.parametrize("family", HEADED)
def test_the_features_that_arrive_are_those_of_before(family: str) -> None:
    model = build(family, dtype=torch.float64)
    x, seen = images(model), []
    for wrapped in (False, True):
        if wrapped:
            pv.wrap(model, "mlp_head", image_size=SIZE)
        layer = view(model).readouts[0].layer
        hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model.eval()(x)
        hook.remove()
    assert torch.equal(*seen)


@pytest.mark.parametrize("family", HEADED)
def test_the_view_sees_one_classifier_and_nothing_inside(family: str) -> None:
    model = build(family)
    before = [site.key for site in (*view(model).linears, *view(model).convs)]
    keys = [site.key for site in view(model).classifier]
    pv.wrap(model, "mlp_head")
    after = view(model)
    assert [site.key for site in (*after.linears, *after.convs)] == before
    assert [site.key for site in after.classifier] == keys
    assert all(isinstance(site.layer, Readout) for site in after.classifier)


@pytest.mark.parametrize("family", ["timm_vit", "hf_vit", "hf_clip_classifier"])
def test_what_the_model_says_of_its_outputs_follows(family: str) -> None:
    model = build(family)
    pv.wrap(model, "mlp_head", outputs=3)
    if family.startswith("timm"):
        assert model.num_classes == 3
    else:
        assert model.config.num_labels == model.num_labels == 3
        assert len(model.config.id2label) == 3


def test_a_model_without_a_classifier_has_a_place_for_one(tiny_timm: Tiny, tmp_path: Path) -> None:
    model = tiny_timm(num_classes=0)
    base, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    with pytest.raises(BadSetting, match="Pass outputs"):
        pv.wrap(model, "mlp_head")
    adapted = pv.wrap(model, "mlp_head", outputs=4).eval()
    assert model.num_classes == 4
    assert adapted(x).shape == (2, 4)
    adapted.save_pretrained(tmp_path / "out")
    assert torch.equal(pv.load(tmp_path / "out", base=base)(x), adapted(x))


def test_a_place_is_wanted() -> None:
    with pytest.raises(UnsupportedSite, match=r"Dinov2Model has no readouts: .*ForImageClass"):
        pv.wrap(build("hf_dinov2"), "mlp_head", outputs=3)


@pytest.mark.parametrize("family", DENSE)
def test_dense_readouts_read_every_patch(family: str) -> None:
    model = build(family, dtype=torch.float64)
    x, seen = images(model), []
    hook = model.norm.register_forward_hook(lambda _, __, out: seen.append(out))
    adapted = pv.wrap(model, "mlp_head", readout="boxes").eval()
    seen.clear()
    found = adapted(x)
    hook.remove()
    assert isinstance(found, Boxes)
    assert found.boxes.shape == (2, GRID, GRID, 4)
    assert found.scores.shape == (2, GRID, GRID)
    tokens = model.fc_norm(seen[0][:, model.num_prefix_tokens :])
    alone = model.head(tokens, (GRID, GRID))
    torch.testing.assert_close(found.boxes, alone.boxes, rtol=0, atol=1e-12)


def test_masks_come_on_the_grid_or_as_large_as_the_image() -> None:
    for upsample, side in ((False, GRID), (True, SIZE)):
        model = build("timm_dinov2_registers")
        masks = pv.wrap(model, "mlp_head", readout="masks", outputs=2, upsample=upsample)
        assert masks.eval()(images(model)).shape == (2, 2, side, side)


@pytest.mark.parametrize("family", ["hf_vit", "timm_deit_distilled", "generic_cnn"])
def test_models_that_pool_inside_have_no_dense_readout(family: str) -> None:
    with pytest.raises(UnsupportedSite, match="pools its tokens before"):
        pv.wrap(build(family), "mlp_head", readout="masks")


def test_dropped_tokens_leave_no_grid() -> None:
    model = pv.wrap(build("timm_vit"), "token_reorganization")
    with pytest.raises(UnsupportedSite, match="drops tokens"):
        pv.wrap(model, "mlp_head", readout="boxes")


def test_dropped_tokens_are_back_for_a_head_that_was_there() -> None:
    dense = pv.wrap(build("timm_vit"), "mlp_head", readout="masks", outputs=2)
    x = images(unwrap(dense))
    before = dense.eval()(x)
    reduced = pv.wrap(dense, "token_reorganization").eval()(x)
    assert reduced.shape == before.shape
    assert not torch.equal(reduced, before)


def test_the_projection_is_trained_saved_and_dropped_by_merging(tmp_path: Path) -> None:
    model = build("timm_vit")
    base, x = copy.deepcopy(model), images(model)
    adapted = pv.wrap(model, "mlp_head", readout="embedding", outputs=8, projection=3)
    assert adapted.train()(x).shape == (2, 3)
    assert adapted.eval()(x).shape == (2, 8)
    adapted.save_pretrained(tmp_path / "adapter")
    again = pv.load(tmp_path / "adapter", base=base)
    assert torch.equal(again.train()(x), adapted.train()(x))
    merged = pv.merge(adapted)
    assert isinstance(merged, CompressedModel)
    assert torch.equal(merged.train()(x), adapted.eval()(x))
    merged.eval().save_pretrained(tmp_path / "merged")
    loaded = pv.load(tmp_path / "merged", base=base)
    assert torch.equal(loaded(x), adapted.eval()(x))
    assert not any("projection" in name for name in loaded.state_dict())
    assert adapted.train()(x).shape == (2, 3), "the live model keeps it"


def test_an_embedding_is_as_wide_as_the_features() -> None:
    model = build("timm_vit")
    assert pv.wrap(model, "mlp_head", readout="embedding").eval()(images(model)).shape[1] == WIDTH


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("family", ["timm_vit", "timm_deit_distilled", "hf_vit", "generic_cnn"])
def test_with_low_rank_updates(family: str, train_head: bool, order: str, tmp_path: Path) -> None:
    model = build(family)
    base, x = copy.deepcopy(model), images(model)
    steps = [("mlp_head", {"outputs": 3}), ("lora", {"r": 2, "train_head": train_head})]
    for name, settings in steps if order == "before" else steps[::-1]:
        model = pv.wrap(model, name, image_size=SIZE, **settings)
    names = trained(model)
    heads = [n for n in names if "lora_" not in n]
    count = 6 * len(view(unwrap(model)).readouts)
    assert len(heads) == count, "one head is trained, once"
    with torch.no_grad():
        for p in names.values():
            p.add_(0.05 * torch.randn_like(p))
    expected = features(model.eval()(x))
    assert expected.shape == (2, 3)
    model.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=base)
    assert torch.equal(features(again(x)), expected)
    assert trained(again).keys() == names.keys()
    merged = pv.merge(model)
    torch.testing.assert_close(features(merged(x)), expected, rtol=0, atol=1e-4)
    assert [step.method for step in merged.history.plan.steps] == ["mlp_head"]


@pytest.mark.parametrize(
    "settings",
    [
        {"readout": "points"},
        {"outputs": 0},
        {"layers": 0},
        {"layers": True},
        {"hidden": 0.5},
        {"activation": "sine"},
        {"std": 0},
        {"readout": "boxes", "outputs": 4},
        {"projection": 8},
        {"upsample": True},
        {"classes": 3},
    ],
)
def test_bad_settings(settings: dict[str, object]) -> None:
    with pytest.raises(BadSetting):
        pv.wrap(build("timm_vit"), "mlp_head", **settings)


def test_first_values() -> None:
    model = build("timm_vit")
    pv.wrap(model, "mlp_head", hidden=256, std=0.1)
    weights = [m.weight.detach() for m in model.head.modules() if isinstance(m, nn.Linear)]
    assert float(weights[1].std()) == pytest.approx(0.1, rel=0.02)
    assert not any(bool(m.bias.any()) for m in model.head.layers if isinstance(m, nn.Linear))
