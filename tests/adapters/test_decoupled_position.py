"""Decoupled positions: the same function at the start, what is trained, folded, saved, refused."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.backbones.positions import PositionsSite
from peft_vision.cost import unwrap
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.positions import TypeRows
from peft_vision.method import Adapter, Evidence, make
from tests.backbones.test_positions import timm_beit, timm_relpos, timm_swin
from tests.families import (
    SIZE,
    TRANSFORMERS,
    WIDTH,
    build,
    features,
    images,
    timm_eva,
    timm_vit,
)

METHOD = "decoupled_position"
PAIR = {"streams": (16, SIZE), "kinds": (2, 1)}
A_FEW = ("timm_vit", "timm_deit3", "timm_eva02_small", "timm_eva_dinov3", "hf_vit")
A_FEW += ("hf_dinov2_registers", "hf_dinov3", "hf_clip", "hf_siglip_classifier")


def frozen(model: nn.Module) -> nn.Module:
    """Frozen weights are multiplied by other kernels than trained ones: compare like with like."""
    return model.requires_grad_(False)


def decoupled(model: nn.Module, **settings: Any) -> nn.Module:
    """The method put in as `wrap` does, without what `wrap` measures and proves beside it."""
    method = make(METHOD, settings)
    assert isinstance(method, Adapter)
    decisions = method.decide(view(model), 1.0, Evidence())
    method.apply(view(model), decisions)
    method.start(view(model), decisions)
    model.requires_grad_(False)
    for owner, attribute in method.trained(view(model), decisions):
        getattr(owner, attribute).requires_grad_(True)
    return model


def site_of(model: nn.Module) -> PositionsSite:
    site = view(unwrap(model)).positions
    assert site is not None
    return site


def types_of(model: nn.Module) -> TypeRows:
    types = site_of(model).types
    assert types is not None
    return types


def shaken(model: nn.Module) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    return features(model.eval()(x))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_one_stream_is_the_same_function_bit_for_bit(name: str) -> None:
    model = frozen(build(name))
    before = run(model, images())
    assert torch.equal(run(decoupled(model, **PAIR), images()), before)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_row_of_the_last_kind_is_added_to_the_patches_alone(name: str) -> None:
    """As if the table, or the embedding's bias, held it."""
    model = build(name, dtype=torch.float64)
    other, x = copy.deepcopy(model), images(model)
    adapted = shaken(decoupled(model, **PAIR))
    assert site_of(other).add(types_of(adapted).type_embed[-1].detach())
    torch.testing.assert_close(run(adapted, x), run(other, x), rtol=0, atol=1e-12)
    with torch.no_grad():
        types_of(adapted).type_embed[:-1].normal_()
    torch.testing.assert_close(run(adapted, x), run(other, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["timm_vit", "timm_eva_dinov3", "hf_dinov3", "hf_clip"])
def test_only_the_rows_are_trained(name: str) -> None:
    adapted = pv.wrap(build(name), METHOD, **PAIR)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert [p.shape for p in trained.values()] == [(3, WIDTH)]
    assert next(iter(trained)).endswith("type_embed")
    assert adapted.injected is None
    features(adapted.train()(images())).square().sum().backward()
    (rows,) = trained.values()
    assert rows.grad is not None
    assert rows.grad[-1].abs().sum() > 0
    assert rows.grad[:-1].abs().sum() == 0, "one image passes as the last kind"


def test_first_values() -> None:
    assert not types_of(decoupled(timm_vit(), **PAIR)).type_embed.any()
    model = decoupled(timm_vit(embed_dim=256), std=0.02, **PAIR)
    drawn = types_of(model).type_embed.detach()
    assert 0.018 < float(drawn.std()) < 0.022
    assert float(drawn.mean()) < 0.004


@pytest.mark.parametrize("name", A_FEW)
def test_a_larger_stream_resizes_the_table_once(name: str) -> None:
    model = build(name)
    before = site_of(model).rows()
    adapted = decoupled(model, streams=(16, 48), kinds=(2, 1))
    assert view(model).input_size == (3, 48, 48)
    assert features(adapted(torch.randn(2, 3, 48, 48))).shape[0] == 2
    after = site_of(adapted).rows()
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        maps = before.detach().reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, (6, 6), mode="bicubic", align_corners=False)
        assert torch.equal(after, maps.permute(0, 2, 3, 1).reshape(36, -1))
        assert not after.requires_grad


def test_slice_and_resize() -> None:
    model = timm_vit()
    pretrained = site_of(model).rows()
    assert pretrained is not None
    grid = pretrained.detach().reshape(4, 4, WIDTH)
    sliced = decoupled(copy.deepcopy(model), streams=(16, SIZE))
    table = site_of(sliced).rows()
    assert table is not None
    assert torch.equal(types_of(sliced).spatial(0, table), grid[:2, :2].reshape(4, -1))
    assert torch.equal(types_of(sliced).spatial(1, table), table)

    fitted = decoupled(model, streams=(16, 48), fit="resize")
    maps = grid.permute(2, 0, 1).unsqueeze(0)
    maps = F.interpolate(maps, (2, 2), mode="bicubic", align_corners=False)
    table = site_of(fitted).rows()
    assert table is not None
    expected = maps.permute(0, 2, 3, 1).reshape(4, -1)
    assert torch.equal(types_of(fitted).spatial(0, table), expected), "from the pretrained table"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_one_row_folds_into_the_table_or_a_bias(name: str) -> None:
    model = shaken(decoupled(build(name, dtype=torch.float64)))
    x, method = images(model), make(METHOD)
    before = run(model, x)
    assert isinstance(method, Adapter)
    assert method.fold(view(model), method.decide(view(build(name)), 1.0, Evidence()))
    assert site_of(model).types is None
    assert model.state_dict().keys() == build(name).state_dict().keys()
    torch.testing.assert_close(run(model, x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["timm_vit", "hf_dinov3"])
def test_merging_folds_and_leaves_the_live_model_alone(name: str) -> None:
    adapted = shaken(pv.wrap(build(name, dtype=torch.float64), METHOD))
    x = images(unwrap(adapted))
    before = run(adapted, x)
    merged = pv.merge(adapted)
    assert type(merged) is type(unwrap(adapted))
    torch.testing.assert_close(run(merged, x), before, rtol=0, atol=1e-12)
    assert torch.equal(run(adapted, x), before)


def test_without_a_place_for_the_row_it_stays() -> None:
    """A convolution before a norm has no bias, and rotary positions have no table."""
    rotary = partial(timm_eva, rope_type="dinov3", use_rot_pos_emb=True, use_abs_pos_emb=False)
    model = rotary(use_pre_transformer_norm=True, rope_rotate_half=True).double()
    assert model.patch_embed.proj.bias is None
    adapted = shaken(pv.wrap(model, METHOD))
    merged = pv.merge(adapted)
    assert site_of(merged).types is not None
    assert torch.equal(run(merged, images(model)), run(adapted, images(model)))


@pytest.mark.parametrize("settings", [PAIR, {"streams": (48,)}], ids=["rows", "size"])
def test_what_cannot_be_folded_stays_and_is_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    model = build("timm_vit")
    dense = copy.deepcopy(model)
    adapted = shaken(pv.wrap(model, METHOD, **settings))
    x = torch.randn(2, 3, *view(model).input_size[1:])  # type: ignore[index]
    merged = pv.merge(adapted)
    assert torch.equal(run(merged, x), run(adapted, x))
    merged.save_pretrained(tmp_path / "merged")
    again = pv.load(tmp_path / "merged", base=dense)
    assert torch.equal(run(again, x), run(adapted, x))
    assert torch.equal(types_of(again).type_embed, types_of(adapted).type_embed)


@pytest.mark.parametrize("name", ["timm_vit", "timm_eva02_small", "hf_dinov3", "hf_clip"])
def test_saved_and_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = build(name)
    dense = copy.deepcopy(model)
    settings = {"streams": (16, 48), "kinds": (2, 1), "fit": "resize"}
    adapted = shaken(pv.wrap(model, METHOD, **settings))
    adapted.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=dense)
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(run(again, x), run(adapted, x))
    assert all(
        torch.equal(tensor, again.plain_model.state_dict()[key])
        for key, tensor in adapted.plain_model.state_dict().items()
    )
    assert view(unwrap(again)).input_size == (3, 48, 48)
    assert pv.measure(again).image_size == (48, 48)
    assert not (tmp_path / "out" / "model.safetensors").exists(), "the base need not be saved"


def test_plain_peft_says_why_it_cannot(tmp_path: Path) -> None:
    import peft

    pv.wrap(timm_vit(), METHOD, **PAIR).save_pretrained(tmp_path / "out")
    with pytest.raises(Exception, match="position table"):
        peft.PeftModel.from_pretrained(timm_vit(), str(tmp_path / "out"))


@pytest.mark.parametrize("order", ["lora first", "positions first"])
@pytest.mark.parametrize("name", ["timm_vit", "hf_dinov3"])
def test_with_lora_in_both_orders(name: str, order: str, tmp_path: Path) -> None:
    model = build(name)
    dense = copy.deepcopy(model)
    steps = [("lora", {"r": 2, "targets": ["linears", "convs"]}), (METHOD, PAIR)]
    adapted: Any = model
    for method, settings in steps if order == "lora first" else reversed(steps):
        adapted = pv.wrap(adapted, method, **settings)  # type: ignore[arg-type]
    adapted = shaken(adapted)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert sum("type_embed" in n for n in trained) == 1
    assert sum("lora_" in n for n in trained) > 16
    x = images(model)
    adapted.save_pretrained(tmp_path / "out")
    assert torch.equal(run(pv.load(tmp_path / "out", base=dense), x), run(adapted, x))
    merged = pv.merge(adapted)
    assert not any("lora" in n for n, _ in merged.named_modules())
    torch.testing.assert_close(run(merged, x), run(adapted, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [("magnitude", METHOD), (METHOD, "magnitude")], ids="-".join)
@pytest.mark.parametrize("name", ["timm_eva02_small", "hf_dinov3"])
def test_with_pruning_before_and_after(name: str, order: tuple[str, str], tmp_path: Path) -> None:
    model = build(name)
    dense = copy.deepcopy(model)
    changed: Any = model
    for method in order:
        settings = PAIR if method == METHOD else {"ratio": 0.5}
        changed = pv.wrap(changed, method, **settings)  # type: ignore[arg-type]
    changed = shaken(changed)
    changed.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=dense)
    assert torch.equal(run(again, images(model)), run(changed, images(model)))
    assert types_of(again).type_embed.requires_grad


@pytest.mark.parametrize("backbone", [timm_beit, timm_swin, timm_relpos])
def test_relative_positions_are_refused_by_name(backbone: Any) -> None:
    with pytest.raises(UnsupportedSite, match=r"has no positions: .* biases between pairs"):
        pv.wrap(backbone(), METHOD)


def test_other_refusals() -> None:
    with pytest.raises(UnsupportedSite, match="TinyCnn has no positions"):
        pv.wrap(build("generic_cnn"), METHOD)
    with pytest.raises(UnsupportedSite, match="no positions at all"):
        pv.wrap(timm_vit(pos_embed="none"), METHOD)
    with pytest.raises(UnsupportedSite, match="decoupled already"):
        pv.wrap(pv.wrap(timm_vit(), METHOD), METHOD)
    adapted = pv.wrap(timm_vit(), METHOD)
    with pytest.raises(UnsupportedSite, match="cannot be switched off"), adapted.disable_adapter():
        pass


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"streams": (0,)}, "whole numbers"),
        ({"streams": (32.0,)}, "whole numbers"),
        ({"kinds": (True,)}, "whole numbers"),
        ({"streams": (32, 16)}, "the largest"),
        ({"streams": (16, 32), "kinds": (2,)}, "each stream needs one"),
        ({"kinds": (2, 1)}, "each stream needs one"),
        ({"fit": "crop"}, "slice, resize"),
        ({"std": -1.0}, "std"),
        ({"streams": (20, 32)}, "Nearest: 16 and 24"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSetting, match=said):
        pv.wrap(timm_vit(), METHOD, **settings)


@pytest.mark.parametrize("name", ["hf_clip", "hf_siglip"])
def test_interpolating_on_the_fly_keeps_the_row(name: str) -> None:
    """transformers resizes the table itself when asked to; the row has to come with it."""
    model = build(name, dtype=torch.float64)
    other = copy.deepcopy(model)
    adapted = shaken(decoupled(model))
    site_of(other).add(types_of(adapted).type_embed[-1].detach())
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        found, expected = (m(x, interpolate_pos_encoding=True) for m in (adapted, other))
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)


def test_half_precision_models_keep_their_dtype() -> None:
    model = timm_vit().bfloat16()
    adapted = pv.wrap(model, METHOD, std=0.5, **PAIR)
    assert types_of(adapted).type_embed.dtype == torch.float32
    out = adapted(torch.randn(1, 3, SIZE, SIZE, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
