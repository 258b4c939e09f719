"""What the view finds in each family: counts, roles, prefix tokens, pooling, classifier."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_vision.backbones import families, view
from peft_vision.cost import twin
from tests.families import (
    CLASS_POOLED,
    DEPTH,
    FAMILIES,
    HEADS,
    NO_TOKENS,
    SIZE,
    TRANSFORMERS,
    build,
    features,
    images,
)

FUSED = ("qkv", "out", "up", "down")
SEPARATE = ("q", "k", "v", "out", "up", "down")
GATED = ("q", "k", "v", "out", "gate", "up", "down")

ROLES: dict[str, tuple[str, ...]] = {
    "timm_vit_normed": ("qkv", "other", "out", "gate", "up", "down"),
    "timm_vit_swiglu": ("qkv", "out", "gate", "up", "down"),
    "timm_eva02_base": GATED,
    "timm_eva_inner_norm": GATED,
    "hf_dinov2_swiglu": GATED,
    "hf_dinov3_gated": GATED,
}
PREFIX = {
    "timm_deit_distilled": (1, 1, 0),
    "timm_dinov2_registers": (1, 0, 4),
    "timm_eva_dinov3": (1, 0, 4),
    "timm_eva_dinov3_qkv_bias": (1, 0, 4),
    "hf_dinov2_registers": (1, 0, 4),
    "hf_dinov3": (1, 0, 4),
    "hf_dinov3_gated": (1, 0, 4),
    "timm_siglip": (0, 0, 0),
    "hf_siglip": (0, 0, 0),
    "hf_siglip_classifier": (0, 0, 0),
}
POOLING = {
    **dict.fromkeys(CLASS_POOLED, "class"),
    "timm_vit_average": "average",
    "timm_siglip": "attention",
    "timm_eva02_small": "average",
    "timm_eva02_base": "average",
    "timm_eva_rope": "attention",
    "hf_dinov2_classifier": "class+average",
    "hf_clip_classifier": "average",
    "hf_siglip": "attention",
    "hf_siglip_classifier": "average",
}
UNITS = {
    "timm_vit_glu": 64,
    "timm_eva02_small": 85,
    "timm_eva02_small_class": 85,
    "timm_eva02_base": 85,
    "timm_eva_inner_norm": 85,
    "timm_eva_dinov3_qkv_bias": 128,
    "hf_dinov2_swiglu": 88,
}


def roles(name: str) -> tuple[str, ...]:
    """The roles of a block's linears, in order."""
    return ROLES.get(name, SEPARATE if name.startswith("hf_") else FUSED)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_right_file_sees_the_model(name: str) -> None:
    model = build(name)
    owner = "timm_eva" if "eva" in name else "timm_vit" if name.startswith("timm") else None
    expected = owner or ("generic" if name.startswith("generic") else name[: name.find("_", 3)])
    if name.count("_") == 1 and name.startswith("hf"):
        expected = name
    assert view(model).family == expected
    assert expected in {*families(), "generic"}


@pytest.mark.parametrize("name", [*TRANSFORMERS, *NO_TOKENS])
def test_counts_and_roles(name: str) -> None:
    backbone = view(build(name))
    assert len(backbone.blocks) == len(backbone.heads) == len(backbone.hidden) == DEPTH
    assert [site.count for site in backbone.heads] == [HEADS] * DEPTH
    assert [site.count for site in backbone.hidden] == [UNITS.get(name, 128)] * DEPTH
    inside = [site for site in backbone.linears if site.role != "pool"]
    assert [site.role for site in inside] == list(roles(name)) * DEPTH
    assert [site.block for site in inside] == [i for i in range(DEPTH) for _ in roles(name)]
    assert [site.role for site in backbone.convs] == ["patch"]
    assert backbone.input_size == (3, SIZE, SIZE)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_tokens(name: str) -> None:
    tokens = view(build(name)).tokens
    assert tokens is not None
    found = (tokens.class_tokens, tokens.distillation_tokens, tokens.register_tokens)
    assert found == PREFIX.get(name, (1, 0, 0))
    assert tokens.prefix == sum(found)
    assert tokens.pooling == POOLING[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_is_a_site_of_its_own_or_the_classifier(name: str) -> None:
    model = build(name)
    backbone = view(model)
    sites = [*backbone.linears, *backbone.convs, *backbone.classifier]
    assert len({site.key for site in sites}) == len(sites)
    assert len({id(site.layer) for site in sites}) == len(sites)
    seen = {id(site.layer) for site in sites}
    left = {
        label
        for label, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and id(layer) not in seen
    }
    unread = {"head.attention.out_proj"}  # nn.MultiheadAttention reads its weight, see below
    if name == "hf_siglip_classifier":  # a pooling head that the classifier does not read
        unread = {"vision_model.head." + n for n in ("attention.out_proj", "mlp.fc1", "mlp.fc2")}
    assert left <= unread


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_is_called(name: str) -> None:
    """An adapter on a linear whose weight is read past its forward would never train."""
    model = build(name)
    backbone = view(model)
    backbone.call_every_linear()
    called: set[str] = set()
    hooks = [
        site.layer.register_forward_hook(lambda *_, key=site.key: called.add(key))
        for site in (*backbone.linears, *backbone.convs, *backbone.classifier)
    ]
    model(images(model))
    for hook in hooks:
        hook.remove()
    expected = {s.key for s in (*backbone.linears, *backbone.convs, *backbone.classifier)}
    assert called == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_calling_every_linear_changes_no_output(name: str) -> None:
    model = build(name, dtype=torch.float64)
    before = features(model(images(model)))
    view(model).call_every_linear()
    torch.testing.assert_close(features(model(images(model))), before, rtol=0, atol=1e-12)


def test_bypasses_of_eva_are_found_and_silent_without() -> None:
    model = build("timm_eva02_small")
    linear = view(model).linears[0].layer
    seen: list[int] = []
    linear.register_forward_hook(lambda *_: seen.append(1))
    model(images(model))
    assert not seen, "timm calls the layer by now: the bypass is not needed any more"
    assert len(view(model).bypasses) == DEPTH


@pytest.mark.parametrize("name", [*FAMILIES, *NO_TOKENS])
def test_the_twin_on_meta_looks_the_same(name: str) -> None:
    model = build(name)
    here, there = view(model), view(twin(model))
    for kind in ("linears", "convs", "blocks", "heads", "hidden", "classifier"):
        assert [s.key for s in getattr(here, kind)] == [s.key for s in getattr(there, kind)]
    assert here.input_size == there.input_size
    assert {p.device.type for p in there.model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", [*TRANSFORMERS, *NO_TOKENS])
def test_built_on_meta_can_be_cut(name: str) -> None:
    with torch.device("meta"):
        model = {**FAMILIES, **NO_TOKENS}[name]()
    backbone = view(model)
    for heads, hidden in zip(backbone.heads, backbone.hidden, strict=True):
        heads.keep([0, 2])
        hidden.keep(range(7))
    again = view(model)
    assert [site.count for site in again.heads] == [2] * DEPTH
    assert [site.count for site in again.hidden] == [7] * DEPTH
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks so
@pytest.mark.parametrize("name", FAMILIES)
def test_seen_the_same_under_peft(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = build(name)
    before = view(model)
    names = {id(module): label for label, module in model.named_modules()}
    targets = [f"{names[id(s.owner)]}.{s.attribute}" for s in (*before.linears, before.convs[0])]
    heads = [f"{names[id(s.owner)]}.{s.attribute}".strip(".") for s in before.classifier]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=heads or None)
    get_peft_model(model, config)
    after = view(model)
    assert after.family == before.family
    for kind in ("linears", "convs", "blocks", "heads", "hidden", "classifier"):
        assert [s.key for s in getattr(after, kind)] == [s.key for s in getattr(before, kind)]
    assert [s.count for s in after.heads] == [s.count for s in before.heads]
    assert [s.count for s in after.hidden] == [s.count for s in before.hidden]
    assert after.input_size == before.input_size
    assert type(after.linears[0].layer) is not nn.Linear


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_seen_the_same_through_a_trunk_and_opened_attention(name: str) -> None:
    model = build(name)
    before = view(model)
    assert before.tokens is not None
    before.heads[1].keep([0, 3])
    before.tokens.trunk()
    after = view(copy.deepcopy(model))
    assert [site.key for site in after.linears] == [site.key for site in before.linears]
    assert [site.count for site in after.heads] == [4, 2, 4, 4]
    assert after.tokens is not None
    assert after.tokens.trunk_if_any() is not None
