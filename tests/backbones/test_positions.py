"""Where positions are, what resizing them means, and what has none that could be shared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.backbones.positions import PositionsSite, relative
from peft_vision.cost import twin
from peft_vision.errors import UnsupportedSite
from peft_vision.layers.positions import resized, top_left
from tests.families import (
    DEPTH,
    HEADS,
    PATCH,
    SIZE,
    TRANSFORMERS,
    WIDTH,
    build,
    features,
    timm_eva,
    timm_vit,
)

GRID = (SIZE // PATCH, SIZE // PATCH)
LARGER = (6, 6)
ROTARY_ONLY = ("timm_eva_dinov3", "timm_eva_dinov3_qkv_bias", "hf_dinov3", "hf_dinov3_gated")
TABLE_ONLY_OF_PATCHES = ("timm_deit3", "timm_dinov2_registers", "timm_siglip")


def site_of(model: nn.Module) -> PositionsSite:
    site = view(model).positions
    assert site is not None
    return site


def tiny(model: Any, **changes: Any) -> nn.Module:
    """A tiny model of one of timm's other families."""
    return model(
        **{
            "img_size": 2 * SIZE,
            "patch_size": 4,
            "embed_dim": WIDTH,
            "num_classes": 3,
            **changes,
        }
    ).eval()


def timm_beit() -> nn.Module:
    from timm.models.beit import Beit

    return tiny(Beit, depth=2, num_heads=HEADS, patch_size=16, use_rel_pos_bias=True)


def timm_swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return tiny(SwinTransformer, depths=(1, 1), num_heads=(2, 2), window_size=4)


def timm_swin2() -> nn.Module:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return tiny(SwinTransformerV2, depths=(1, 1), num_heads=(2, 2), window_size=4)


def timm_relpos() -> nn.Module:
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    return tiny(VisionTransformerRelPos, depth=2, num_heads=HEADS, patch_size=16)


def hf_beit() -> nn.Module:
    from transformers import BeitConfig, BeitModel

    config = BeitConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=WIDTH,
        use_relative_position_bias=True,
    )
    return BeitModel(config).eval()


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_family_says_where_its_positions_are(name: str) -> None:
    model = build(name)
    backbone = view(model)
    backbone.require("positions")
    site, tokens = site_of(model), backbone.tokens
    assert tokens is not None
    assert (site.grid, site.patch, site.width) == (GRID, (PATCH, PATCH), WIDTH)
    assert site.prefix == tokens.prefix
    assert site.types is None
    table = site.rows()
    assert (table is None) == (name in ROTARY_ONLY)
    assert (site.parts.rope is not None) == (name in ROTARY_ONLY or name.startswith("timm_eva"))
    if table is not None:
        assert table.shape == (GRID[0] * GRID[1], WIDTH)
        assert site.leading == (0 if name in TABLE_ONLY_OF_PATCHES else table_prefix(name, site))


def table_prefix(name: str, site: PositionsSite) -> int:
    """transformers' tables hold a row for the class token alone, not for registers."""
    return 1 if name.startswith("hf_dino") else site.prefix


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_parts_make_the_sequence_that_the_model_makes(name: str) -> None:
    """What the last norm gives of them is what the model computes on its own way."""
    model = build(name, dtype=torch.float64)
    site, x = site_of(model), square(SIZE)
    tokens = site.parts.patches(site.model, x)
    table, front = site.rows(), site.parts.prefix(site.model)
    tokens = tokens if table is None else tokens + table
    if front is not None:
        tokens = torch.cat([front.expand(len(x), -1, -1), tokens], dim=1)
    rope = site.parts.rope(site.model, x) if site.parts.rope else None
    found = site.parts.encode(site.model, tokens, rope)
    torch.testing.assert_close(found, last_tokens(model, x), rtol=0, atol=1e-10)


def square(side: int, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64)


def last_tokens(model: Any, x: Tensor) -> Tensor:
    """What a model's own forward gives behind its final norm, all tokens."""
    if view(model).family.startswith("timm"):
        tokens = model.forward_features(x)
        return model.fc_norm(tokens) if isinstance(model.norm, nn.Identity) else tokens
    base = next(m for m in model.modules() if getattr(m, "embeddings", None) is not None)
    tokens = base(x).last_hidden_state
    # CLIP's tower norms the class token alone.
    return base.post_layernorm(tokens) if view(model).family == "hf_clip" else tokens


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_resized_model_takes_the_new_size_and_says_so(name: str) -> None:
    model = build(name)
    before, front = site_of(model).rows(), site_of(model).leading
    leading = None if before is None else table_of(model)[:front].clone()
    site_of(model).resize(LARGER)
    side = LARGER[0] * PATCH
    assert view(model).input_size == (3, side, side)
    assert site_of(model).grid == LARGER
    assert features(model(square(side).float())).shape[0] == 2
    after = site_of(model).rows()
    if before is not None:
        assert after is not None
        maps = before.reshape(1, *GRID, -1).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, LARGER, mode="bicubic", align_corners=False, antialias=False)
        assert torch.equal(after, maps.permute(0, 2, 3, 1).reshape(-1, WIDTH))
        assert torch.equal(table_of(model)[:front], leading)


def table_of(model: nn.Module) -> Tensor:
    table = site_of(model).table
    assert table is not None
    return getattr(*table).detach().flatten(0, -2)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_resizing_works_without_numbers(name: str) -> None:
    real, meta = build(name), twin(build(name))
    site_of(real).resize(LARGER)
    site_of(meta).resize(LARGER)
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}
    shapes = [
        {n: t.shape for n, t in (*m.named_parameters(), *m.named_buffers())} for m in (real, meta)
    ]
    assert shapes[0] == shapes[1]
    assert view(meta).input_size == view(real).input_size


@pytest.mark.parametrize("name", ["hf_vit", "hf_clip_classifier", "hf_siglip", "hf_dinov3"])
def test_a_configuration_that_two_models_share_is_left_alone(name: str) -> None:
    model = build(name)
    sister = type(model)(model.config)
    assert sister.config is model.config
    site_of(model).resize(LARGER)
    assert view(sister).input_size == (3, SIZE, SIZE)
    configs = {id(vars(m)["config"]) for m in model.modules() if "config" in vars(m)}
    assert not configs & {id(vars(m)["config"]) for m in sister.modules() if "config" in vars(m)}
    assert len(configs) <= 2, "its modules go on sharing one configuration, and that of the vision"


def test_resizing_is_in_float32_where_the_table_is_narrower() -> None:
    rows = torch.randn(16, 8)
    found = resized(rows.bfloat16(), (4, 4), (3, 5))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, resized(rows.bfloat16().float(), (4, 4), (3, 5)).bfloat16())
    assert resized(rows.double(), (4, 4), (3, 5)).dtype == torch.float64
    assert resized(rows, (4, 4), (4, 4)) is rows


def test_timms_own_resize_is_another_one() -> None:
    """It is antialiased; the one that trackers were trained with is not."""
    model, other = timm_vit(), timm_vit()
    other.load_state_dict(model.state_dict())
    site_of(model).resize((2, 2))
    other.set_input_size(img_size=(2 * PATCH, 2 * PATCH))
    assert not torch.allclose(model.pos_embed, other.pos_embed, atol=1e-3)


def test_top_left() -> None:
    rows = torch.arange(12.0).reshape(12, 1)  # a grid of 3 x 4
    assert top_left(rows, (3, 4), (2, 2)).flatten().tolist() == [0, 1, 4, 5]


def test_a_table_may_be_a_buffer_or_frozen() -> None:
    """Fixed tables of sines and cosines are kept as either."""
    model = timm_vit()
    table = model.pos_embed.detach()
    del model.pos_embed
    model.register_buffer("pos_embed", table)
    site_of(model).resize(LARGER)
    assert "pos_embed" in dict(model.named_buffers())
    assert model.pos_embed.shape[1] == 37
    frozen = timm_vit()
    frozen.pos_embed.requires_grad_(False)
    site_of(frozen).resize(LARGER)
    assert not frozen.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (timm_beit, "relative_position_bias_table of Attention"),
        (timm_swin, "relative_position_bias_table of WindowAttention"),
        (timm_swin2, "cpb_mlp of WindowAttention"),
        (timm_relpos, "rel_pos of RelPosAttention"),
        (hf_beit, "relative_position_bias"),
    ],
)
def test_relative_positions_are_named(make: Callable[[], nn.Module], named: str) -> None:
    model = make()
    assert view(model).positions is None
    assert named in relative(model)


@pytest.mark.parametrize("name", ["timm_vit", "hf_dinov2", "generic_cnn"])
def test_others_have_none(name: str) -> None:
    assert relative(build(name)) == ""


class OwnPositions(nn.Module):
    """What a subclass may do with positions, which nobody can know."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (partial(timm_vit, pos_embed="none"), "no positions at all"),
        (partial(timm_vit, patch_drop_rate=0.5), "drops patches at random"),
        (partial(timm_eva, patch_drop_rate=0.5), "drops patches at random"),
        (partial(timm_eva, use_abs_pos_emb=False), "no positions at all"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_reason(
    make: Callable[[], nn.Module], reason: str
) -> None:
    backbone = view(make())
    assert backbone.positions is None
    assert backbone.tokens is not None, "the rest of the model is understood"
    with pytest.raises(UnsupportedSite, match=reason):
        backbone.require("positions")


def test_a_subclass_with_positions_of_its_own_is_refused() -> None:
    from timm.models.vision_transformer import VisionTransformer

    odd = type("Odd", (VisionTransformer,), {"_pos_embed": OwnPositions._pos_embed})
    settings = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH}
    with pytest.raises(UnsupportedSite, match="Odd adds positions in a way of its own"):
        view(odd(**settings, num_heads=HEADS)).require("positions")


def test_hybrid_patches_are_refused() -> None:
    from timm.layers import HybridEmbed

    stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4))
    embed = partial(HybridEmbed, backbone=stem, feature_ratio=4)
    with pytest.raises(UnsupportedSite, match="HybridEmbed"):
        view(timm_vit(embed_layer=embed, patch_size=2)).require("positions")


def test_the_site_of_a_copy_is_the_copys() -> None:
    model = build("timm_vit")
    again = copy.deepcopy(model)
    site_of(again).resize(LARGER)
    assert site_of(model).grid == GRID
