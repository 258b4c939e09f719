"""The joint forward pass: one stream is the model's own pass, several see each other."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.backbones.joint import embedded
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.prompts import Prompts
from peft_vision.streams import Streams
from tests.adapters.test_decoupled_position import METHOD, decoupled, shaken, site_of, types_of
from tests.backbones.test_positions import last_tokens, square
from tests.backbones.test_trunk import reduce_tokens
from tests.families import (
    HEADS,
    PATCH,
    SIZE,
    TRANSFORMERS,
    WIDTH,
    build,
    eva_dinov3,
    timm_eva,
    timm_vit,
)

SMALL = 16
TRACKER = {"streams": (SMALL, SIZE), "kinds": (2, 1)}
A_FEW = ("timm_vit", "timm_siglip", "timm_eva02_small", "timm_eva_dinov3", "hf_vit", "hf_dinov3")
A_FEW += ("hf_dinov2_registers", "hf_clip", "hf_siglip")
MIXED = {"rope_type": "mixed", "use_rot_pos_emb": True, "attn_type": "rope", "num_reg_tokens": 2}
GROUPED = {"attn_type": "rope", "use_rot_pos_emb": True, "qkv_fused": False, "num_kv_heads": 2}


def tracker(name: str, **settings: Any) -> Streams:
    """Two streams with random rows, in float64."""
    return Streams(shaken(decoupled(build(name, dtype=torch.float64), **TRACKER, **settings)))


def pair(batch: int = 2) -> list[Tensor]:
    return [square(SMALL, batch, seed=2), square(SIZE, batch, seed=3)]


def kinds(batch: int = 2) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(4)
    side = SMALL // PATCH
    return [torch.randint(0, 2, (batch, side, side), generator=generator), None]


@torch.no_grad()
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_one_stream_is_what_the_model_computes(name: str) -> None:
    model = shaken(decoupled(build(name, dtype=torch.float64)))
    x = square(SIZE)
    front, patches = Streams(model)([x], prefix=True)
    assert patches.shape == (2, (SIZE // PATCH) ** 2, WIDTH)
    assert front.shape == (2, site_of(model).prefix, WIDTH)
    found = torch.cat([front, patches], dim=1)
    torch.testing.assert_close(found, last_tokens(model, x), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("make", [timm_vit, timm_eva, eva_dinov3])
def test_models_that_take_images_of_any_size(make: Any) -> None:
    model = shaken(decoupled(make(dynamic_img_size=True).double(), streams=(SMALL, SIZE)))
    streams = Streams(model)
    assert [t.shape[1] for t in streams(pair())] == [4, 16]
    alone = Streams(shaken(decoupled(make(dynamic_img_size=True).double())))
    found = torch.cat(alone([square(SIZE)], prefix=True), dim=1)
    expected = last_tokens(alone.model, square(SIZE))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_through_a_librarys_wrapper_around_another_librarys_model() -> None:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    inner = {"img_size": SIZE, "depth": 2}
    config = TimmWrapperConfig(architecture="test_vit", num_labels=5, model_args=inner)
    model = TimmWrapperForImageClassification(config).double().eval()
    single = shaken(decoupled(copy.deepcopy(model)))
    found = torch.cat(Streams(single)([square(SIZE)], prefix=True), dim=1)
    expected = single.timm_model.forward_features(square(SIZE))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    streams = Streams(decoupled(model, streams=(SIZE, 48)))
    assert [t.shape[1] for t in streams([square(SIZE), square(48)])] == [4, 9]
    assert model(square(48)).logits.shape == (2, 5)


@torch.no_grad()
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_an_image_twice_is_the_image_once(name: str) -> None:
    """Attention over every token twice is attention over every token once."""
    model = build(name, dtype=torch.float64)
    once = Streams(decoupled(copy.deepcopy(model)))([square(SIZE)])
    twice = Streams(decoupled(model, streams=(SIZE, SIZE)))([square(SIZE)] * 2)
    for tokens in twice:
        torch.testing.assert_close(tokens, once[0], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", A_FEW)
def test_streams_see_each_other_and_images_do_not(name: str) -> None:
    streams, maps = tracker(name), kinds()
    template, search = pair()
    before = streams([template, search], maps)
    other = template.clone()
    other[0] += 1.0
    after = streams([other, search], maps)
    for tokens, moved in zip(before, after, strict=True):
        assert (tokens[0] - moved[0]).abs().max() > 1e-4
        torch.testing.assert_close(tokens[1], moved[1], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", A_FEW)
def test_the_order_of_the_batch_is_the_order_of_the_outputs(name: str) -> None:
    streams, maps = tracker(name), kinds(3)
    expected = streams(pair(3), maps)
    order = [2, 0, 1]
    found = streams([x[order] for x in pair(3)], [maps[0][order], None])  # type: ignore[index]
    for tokens, turned in zip(expected, found, strict=True):
        torch.testing.assert_close(tokens[order], turned, rtol=0, atol=1e-12)


def entering(streams: Streams, images: list[Tensor], *args: Any) -> Tensor:
    """What the first block is given."""
    seen: list[Tensor] = []
    block = view(streams.model).blocks[0].block
    hook = block.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        streams(images, *args)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("fit", ["slice", "resize"])
@pytest.mark.parametrize("name", ["timm_vit", "timm_deit3", "hf_vit", "hf_siglip"])
def test_a_token_is_patch_and_place_and_kind(name: str, fit: str) -> None:
    streams, maps = tracker(name, fit=fit), kinds()
    site, types = site_of(streams.model), types_of(streams.model)
    found = entering(streams, pair(), maps)
    with torch.no_grad():
        patches = [site.parts.patches(site.model, x) for x in pair()]
    table = site.rows()
    assert table is not None
    assert maps[0] is not None
    place = table.reshape(4, 4, -1)[:2, :2].reshape(4, -1)
    if fit == "resize":
        maps_of_table = table.reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(maps_of_table, (2, 2), mode="bicubic")
        place = resized.permute(0, 2, 3, 1).reshape(4, -1)
    kind = types.type_embed[maps[0].flatten(1)]
    expected = torch.cat([patches[0] + place + kind, patches[1] + table + types.type_embed[2]], 1)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)


def test_the_map_of_kinds_chooses_the_row_within_the_stream() -> None:
    streams = tracker("timm_vit")
    rows, (where, _) = types_of(streams.model).type_embed, kinds()
    assert where is not None
    without = entering(streams, pair())
    with_kinds = entering(streams, pair(), [where, torch.zeros(2, 4, 4, dtype=torch.uint8)])
    moved = (with_kinds - without)[:, :4]
    expected = where.flatten(1).unsqueeze(-1) * (rows[1] - rows[0]).detach()
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
    assert torch.equal(with_kinds[:, 4:], without[:, 4:])
    booleans = entering(streams, pair(), [where.bool(), None])
    assert torch.equal(booleans, with_kinds)


@pytest.mark.parametrize("name", A_FEW)
def test_gradient_reaches_every_row_that_is_used(name: str) -> None:
    streams = tracker(name)
    rows = types_of(streams.model).type_embed
    _, search = streams(pair(), kinds())
    search.square().sum().backward()
    assert rows.grad is not None
    assert (rows.grad.abs().sum(dim=1) > 0).all()
    rows.grad = None
    streams(pair())[1].square().sum().backward()
    assert rows.grad is not None
    assert (rows.grad.abs().sum(dim=1) > 0).tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["timm_vit", "timm_eva02_small", "hf_dinov3", "hf_clip"])
def test_adapters_on_top_train_through_both_streams(name: str) -> None:
    model = pv.wrap(build(name), METHOD, **TRACKER)
    model = shaken(pv.wrap(model, "lora", r=2, train_head=False)).train()
    images = [x.float() for x in pair()]
    images[0].requires_grad_(True)
    streams = Streams(model)
    streams(images, kinds())[1].square().sum().backward()
    silent = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any()) and "pool" not in n
    ]
    assert not [n for n in silent if "head" not in n]
    assert images[0].grad is not None
    assert images[0].grad.any()
    with torch.no_grad():
        expected = Streams(model.eval())(images, kinds())
        found = Streams(pv.merge(model))(images, kinds())
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def gradients(streams: Streams) -> tuple[dict[str, Tensor], int]:
    """Of one training step, and how often the first block's MLP runs in it."""
    torch.manual_seed(3)  # rotary positions are moved at random while training
    streams.train().zero_grad(set_to_none=True)
    calls: list[int] = []
    mlp = view(streams.model).hidden[0].mlp
    hook = mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    sum(tokens.square().sum() for tokens in streams(pair(), kinds())).backward()  # type: ignore[union-attr]
    hook.remove()
    return {n: p.grad for n, p in streams.named_parameters() if p.grad is not None}, len(calls)


@pytest.mark.parametrize("trunk", [False, True], ids=["blocks", "trunk"])
@pytest.mark.parametrize("name", ["timm_vit", "timm_eva02_small", "hf_vit", "hf_dinov3"])
def test_recomputing_activations_changes_no_gradient(name: str, trunk: bool) -> None:
    streams = tracker(name)
    backbone = view(streams.model)
    if trunk:
        assert backbone.tokens is not None
        backbone.tokens.trunk()
    streams.requires_grad_(True)
    expected, once = gradients(streams)
    assert once == 1
    view(streams.model).set_checkpointing(True)
    found, twice = gradients(streams)
    assert twice == 2
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-10, msg=key)


@torch.no_grad()
@pytest.mark.parametrize("name", A_FEW)
def test_in_bfloat16(name: str) -> None:
    model = shaken(decoupled(build(name), **TRACKER))
    images = [x.float() for x in pair()]
    expected = Streams(model)(images, kinds())[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = Streams(model)(images, kinds())[1]
    assert found.isfinite().all()
    assert (found - expected).abs().mean() < 0.1 * expected.abs().mean()
    half = copy.deepcopy(model).bfloat16()
    assert Streams(half)([x.bfloat16() for x in images], kinds())[1].dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm_vit", "timm_eva02_small", "hf_dinov3", "hf_siglip"])
def test_after_heads_and_units_have_gone(name: str) -> None:
    """Cut heads are heads whose output is not read: the same numbers either way."""
    streams = tracker(name)
    cut = copy.deepcopy(streams)
    for site in view(cut.model).heads:
        site.keep([0, 2])
    for heads in view(streams.model).heads:
        silence(heads.attention, heads.parts.out)
    for one, other in zip(cut(pair(), kinds()), streams(pair(), kinds()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def silence(attention: nn.Module, out: str) -> None:
    weight = getattr(attention, out).weight
    width = weight.shape[1] // HEADS
    weight[:, width : 2 * width] = 0
    weight[:, 3 * width :] = 0


@torch.no_grad()
def test_pruned_before_the_positions_were_decoupled() -> None:
    model = pv.wrap(pv.wrap(build("timm_eva02_small"), "magnitude", ratio=0.5), METHOD, **TRACKER)
    tokens = Streams(model.eval())([x.float() for x in pair()], kinds())
    assert [t.shape for t in tokens] == [(2, 4, WIDTH), (2, 16, WIDTH)]


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        partial(build, "timm_eva02_small"),
        partial(build, "timm_eva02_base"),
        partial(build, "timm_eva_dinov3"),
        partial(build, "timm_eva_rope"),
        partial(timm_eva, **MIXED),
    ],
    ids=["eva02", "eva02_base", "dinov3", "rope", "mixed"],
)
def test_rotary_blocks_without_the_first_tokens(make: Any) -> None:
    """As if those tokens were there and nobody could see them."""
    model = make().double()
    streams = Streams(shaken(decoupled(model, **TRACKER)))
    site, hidden = site_of(model), model.num_prefix_tokens
    expected = streams(pair(), kinds())
    tokens = [torch.randn(2, hidden, WIDTH).double()]
    assert site.types is not None
    tokens += [embedded(site, site.types, i, x, kinds()[i]) for i, x in enumerate(pair())]
    count = sum(t.shape[1] for t in tokens)
    mask = torch.zeros(count, count, dtype=torch.float64)
    mask[:, :hidden] = -torch.inf
    assert site.parts.rope is not None
    rope = torch.cat([site.parts.rope(model, x) for x in pair()], dim=-2)
    x = torch.cat(tokens, dim=1)
    for depth, block in enumerate(model.blocks):
        x = block(x, rope=rope[depth] if model.rope_mixed else rope, attn_mask=mask)
    x = model.fc_norm(x) if isinstance(model.norm, nn.Identity) else model.norm(x)
    torch.testing.assert_close(x[:, hidden:], torch.cat(expected, dim=1), rtol=0, atol=1e-10)


@torch.no_grad()
def test_rotary_frequencies_of_each_block() -> None:
    model = shaken(decoupled(timm_eva(**MIXED).double()))
    found = torch.cat(Streams(model)([square(SIZE)], prefix=True), dim=1)
    torch.testing.assert_close(found, last_tokens(model, square(SIZE)), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (GROUPED, "share keys and values"),
        ({"use_post_norm": True, "use_fc_norm": False, "use_rot_pos_emb": True}, "after the br"),
    ],
    ids=["grouped", "post_norm"],
)
def test_first_tokens_that_have_to_stay(changes: dict[str, Any], said: str) -> None:
    model = timm_eva(**changes).double()
    single = Streams(decoupled(copy.deepcopy(model)))([square(SIZE)], prefix=True)
    found, expected = torch.cat(single, dim=1), last_tokens(model, square(SIZE))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    streams = Streams(decoupled(model, **TRACKER))
    assert len(streams(pair(), kinds(), prefix=True)) == 3
    with pytest.raises(UnsupportedSite, match=f"{said}.*prefix=True"):
        streams(pair(), kinds())


@torch.no_grad()
def test_training_time_changes_of_rotary_positions_are_drawn() -> None:
    model = eva_dinov3(rope_rescale_coords=2.0)
    streams = Streams(decoupled(model, **TRACKER))
    images = [x.float() for x in pair()]
    still = [streams.eval()(images)[1] for _ in range(2)]
    assert torch.equal(*still)
    moving = [streams.train()(images)[1] for _ in range(2)]
    assert not torch.equal(*moving)


@torch.no_grad()
def test_prompts_go_with_it_but_not_without_the_first_tokens_of_rotary_blocks() -> None:
    for name in ("timm_vit", "hf_dinov3"):
        streams = tracker(name)
        tokens = view(streams.model).tokens
        assert tokens is not None
        before = streams(pair(), kinds(), prefix=True)
        prompts = Prompts(3, WIDTH).double()
        prompts.draw(1.0)
        tokens.trunk().insert({0: prompts})
        after = streams(pair(), kinds(), prefix=True)
        assert [t.shape for t in after] == [t.shape for t in before]
        assert (after[2] - before[2]).abs().max() > 1e-3
        if name == "timm_vit":
            assert len(streams(pair(), kinds())) == 2
        else:
            with pytest.raises(UnsupportedSite, match=r"prompts.*prefix=True"):
                streams(pair(), kinds())


def test_refusals() -> None:
    with pytest.raises(UnsupportedSite, match="positions are not decoupled"):
        Streams(timm_vit())
    with pytest.raises(UnsupportedSite, match="TinyCnn has no positions"):
        Streams(build("generic_cnn"))
    with pytest.raises(UnsupportedSite, match="holds the patches of several images"):
        reduce_tokens(tracker("timm_vit").model, 0.5)
    reduced = timm_vit()
    reduce_tokens(reduced, 0.5)
    with pytest.raises(UnsupportedSite, match="drops tokens on the way"):
        Streams(decoupled(reduced, **TRACKER))(pair())
    folded = pv.wrap(timm_vit(), METHOD)
    with pytest.raises(UnsupportedSite, match="not decoupled"):
        Streams(pv.merge(folded))


@pytest.mark.parametrize(
    ("images", "maps", "said"),
    [
        ([square(SIZE), square(SIZE)], None, r"takes 2 of height and width \[\(16, 16\), \(32, 32"),
        ([square(SMALL)], None, "takes 2 of"),
        ([square(SMALL, 1), square(SIZE, 2)], None, "one batch size"),
        (pair(), [None], "1 maps for 2 streams"),
        (pair(), [torch.zeros(2, 4, 4).long(), None], r"of \(2, 2, 2\)"),
        (pair(), [torch.zeros(2, 2, 2), None], "whole numbers below 2"),
        (pair(), [torch.full((2, 2, 2), 2), None], "from 2 to 2; the stream has 2 kinds"),
        (pair(), [None, torch.ones(2, 4, 4).long()], "the stream has 1 kinds"),
    ],
)
def test_what_does_not_fit_the_streams(images: Any, maps: Any, said: str) -> None:
    with pytest.raises(BadSetting, match=said):
        tracker("timm_vit")(images, maps)


def test_what_a_caller_may_ask() -> None:
    streams = tracker("timm_vit")
    assert streams.grids == ((2, 2), (4, 4))
    assert streams.patch == (PATCH, PATCH)
    again = copy.deepcopy(streams)
    with torch.no_grad():
        types_of(again.model).type_embed.zero_()
        one, other = (s(pair())[1] for s in (streams, again))
    assert not torch.allclose(one, other), "a copy has rows of its own"


def test_it_can_be_exported() -> None:
    for name in ("timm_vit", "timm_eva02_small", "hf_dinov3"):
        streams = tracker(name).eval()
        with torch.no_grad():
            program = torch.export.export(streams, (pair(), kinds()))
            found, expected = program.module()(pair(), kinds()), streams(pair(), kinds())
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-10)


def test_the_sizes_of_the_paper() -> None:
    """LoRAT B-224: 64 template and 256 search tokens, three rows, from a table of 37 x 37."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch14_dinov2", img_size=518, depth=1)
    assert model.pos_embed.shape == (1, 37 * 37 + 1, 768)
    streams = Streams(decoupled(model, streams=(112, 224), kinds=(2, 1)))
    assert model.pos_embed.shape == (1, 16 * 16 + 1, 768)
    assert sum(p.numel() for p in streams.parameters() if p.requires_grad) == 3 * 768
    images = [torch.empty(2, 3, side, side, device="meta") for side in (112, 224)]
    where = torch.zeros(2, 8, 8, dtype=torch.long, device="meta")
    assert entering(streams, images, [where, None]).shape == (2, 64 + 256, 768)
    assert [t.shape[1] for t in streams(images, [where, None])] == [64, 256]
