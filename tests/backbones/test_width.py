"""The width of the residual stream: all that stands on it is cut together, or it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.backbones.width import WidthSite
from peft_vision.cost import count_flops, twin, unwrap
from peft_vision.errors import UnsupportedSite
from peft_vision.layers.absent import Absent
from peft_vision.layers.gates import Gate
from peft_vision.layers.masked_norm import GatedNorm
from tests.families import FAMILIES, SIZE, WIDTH, build, features, images, run

KEPT = [0, 1, 3, 4, 8, 9, 10, 13, 17, 20, 21, 22, 30, 31]
REFUSED = {
    "generic_cnn": "finds none",
    "hf_clip_classifier": "without a norm",
    "timm_eva_post_norm": "after the branches",
    "timm_vit_post_norm": "after the branches",
}
OFFERED = (
    *("timm_vit", "timm_vit_average", "timm_vit_normed", "timm_vit_glu", "timm_deit_distilled"),
    *("timm_dinov2_registers", "timm_clip", "timm_siglip", "timm_eva02_small"),
    *("timm_eva_inner_norm", "timm_eva_dinov3", "timm_eva_rope", "hf_vit", "hf_dinov2_swiglu"),
    *("hf_dinov2_classifier", "hf_dinov2_registers", "hf_dinov3_gated", "hf_clip", "hf_siglip"),
    "hf_siglip_classifier",
)
SOME = (
    "timm_vit",
    "timm_deit_distilled",
    "timm_siglip",
    "timm_eva02_small",
    "hf_dinov3",
    "hf_clip",
)


def site_of(model: nn.Module) -> WidthSite:
    site = view(unwrap(model)).width
    assert site is not None
    return site


def masked(model: nn.Module, kept: list[int]) -> None:
    """Norms take their statistics over some features only, and give nothing at the others."""
    site = site_of(model)
    gate = Gate(site.count, 1.0, dtype=torch.float64).eval()
    with torch.no_grad():
        gate.logvar_offset.fill_(10.0)
        gate.logvar_offset[kept] = 0.0
    for owner, name in (*site.norms, *site.other_norms, *site.held_norms):
        norm = getattr(owner, name)
        if not isinstance(norm, nn.Identity):
            setattr(owner, name, GatedNorm(norm, gate, shared=True).eval())


def compared(masked_output: Tensor, cut_output: Tensor) -> float:
    """Features that leave a model without a classifier have lost what was cut."""
    if masked_output.shape != cut_output.shape:
        masked_output = masked_output[..., KEPT]
    return float((masked_output - cut_output).abs().max())


@pytest.mark.parametrize("family", OFFERED)
def test_a_cut_stream_is_a_masked_one(family: str) -> None:
    model = build(family, dtype=torch.float64)
    x, cut = images(model), copy.deepcopy(model)
    masked(model, KEPT)
    site_of(cut).keep(KEPT)
    assert site_of(cut).count == len(KEPT)
    assert compared(run(model, x), run(cut, x)) < 1e-10
    output = cut.train()(x)
    features(output[0] if isinstance(output, tuple) else output).square().sum().backward()
    site = site_of(cut)
    assert all(p.grad is not None for place in site.outputs for p in getattr(*place).parameters())


def test_every_family_offers_its_width_or_is_refused() -> None:
    offering = {name for name in FAMILIES if view(build(name)).width is not None}
    assert offering == set(FAMILIES) - set(REFUSED)


@pytest.mark.parametrize("family", SOME)
def test_a_twin_is_cut_to_the_same_shapes(family: str) -> None:
    model = build(family)
    empty, before = twin(model), count_flops(twin(model), (3, SIZE, SIZE))
    for one in (model, empty):
        site_of(one).keep(KEPT)
        site_of(one).keep([0, 2, 5, 7])  # and again
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    assert {name: t.shape for name, t in empty.state_dict().items()} == shapes
    assert count_flops(empty, (3, SIZE, SIZE)) < 0.3 * before


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_stream_that_cannot_be_cut_is_refused_by_name(family: str) -> None:
    backbone = view(build(family))
    assert backbone.width is None
    with pytest.raises(UnsupportedSite, match=REFUSED[family]):
        backbone.require("width")


def test_one_feature_stays() -> None:
    with pytest.raises(UnsupportedSite, match="at least one"):
        site_of(build("timm_vit")).keep([])


def test_what_a_model_says_of_its_width_follows() -> None:
    model = build("timm_vit")
    site_of(model).keep(KEPT)
    assert model.embed_dim == model.num_features == model.head_hidden_size == len(KEPT)
    assert view(model).readouts[0].width == len(KEPT)
    first, second = build("hf_vit"), build("hf_vit")
    second.config = first.config
    site_of(first).keep(KEPT)
    assert first.config.hidden_size == len(KEPT)
    assert second.config.hidden_size == WIDTH, "a configuration that models share stays"


def test_pooling_by_attention_reads_the_whole_width_still() -> None:
    model = build("timm_siglip")
    site_of(model).keep(KEPT)
    assert model.num_features == WIDTH
    assert model.attn_pool.places.tolist() == KEPT
    site_of(model).keep([1, 2])
    assert model.attn_pool.places.tolist() == [KEPT[1], KEPT[2]]


@pytest.mark.parametrize("family", ["timm_deit_distilled", "hf_dinov3", "hf_clip"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"targets": ("qkv", "q", "out", "up", "down"), "train_head": True}),
        ("vpt", {}),
        ("decoupled_position", {}),
    ],
)
def test_what_methods_put_on_the_stream_is_cut_too(
    family: str, method: str, settings: dict[str, object]
) -> None:
    try:
        model = pv.wrap(build(family), method, **settings).double()
    except (UnsupportedSite, pv.errors.BadSetting) as error:
        pytest.skip(f"refused by name: {error}")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    cut, x = copy.deepcopy(model), images(model)
    masked(model, KEPT)
    site_of(cut).keep(KEPT)
    assert compared(run(model, x), run(cut, x)) < 1e-10


@pytest.mark.parametrize("place", ["both", "parallel_mlp"])
def test_bottlenecks_are_cut_too(place: str) -> None:
    model = pv.wrap(build("timm_vit"), "bottleneck_adapter", place=place)
    before = sum(p.numel() for p in model.parameters())
    site_of(model).keep(KEPT)
    assert run(model, images(model)).shape == (2, 5)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before


@pytest.mark.parametrize("head", ["linear_head", "mlp_head"])
def test_heads_of_ours_are_cut_too(head: str) -> None:
    model = pv.wrap(build("timm_vit"), head, outputs=7).double()
    cut, x = copy.deepcopy(model), images(model)
    masked(model, KEPT)
    site_of(cut).keep(KEPT)
    assert compared(run(model, x), run(cut, x)) < 1e-10
    assert view(unwrap(cut)).readouts[0].width == len(KEPT)


def test_what_is_left_of_a_branch_is_cut_too() -> None:
    model = build("timm_vit", dtype=torch.float64)
    tokens = view(model).tokens
    assert tokens is not None
    block = tokens.trunk().blocks[1]
    block.attn = Absent(WIDTH).double()
    nn.init.normal_(block.attn.offset)
    cut, x = copy.deepcopy(model), images(model)
    masked(model, KEPT)
    site_of(cut).keep(KEPT)
    assert compared(run(model, x), run(cut, x)) < 1e-10
