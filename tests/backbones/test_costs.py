"""Costs of the families, counted on meta."""

from __future__ import annotations

import copy

import pytest
import torch

from peft_vision import cost
from peft_vision.backbones import view
from tests.backbones.test_cuts import unfuse
from tests.backbones.test_trunk import reduce_tokens
from tests.families import (
    CLASS_POOLED,
    CLASSES,
    DEPTH,
    FAMILIES,
    PATCH,
    PATCHES,
    SIZE,
    TRANSFORMERS,
    WIDTH,
    build,
    images,
    timm_vit,
)


def closed_form(tokens: list[tuple[int, int]], a: int, f: int) -> int:
    """Multiply-accumulates of a plain ViT; per block, the tokens of attention and of the MLP."""
    d = WIDTH
    blocks = sum(4 * n * d * a + 2 * n * n * a + 2 * m * d * f for n, m in tokens)
    return PATCHES * d * 3 * PATCH**2 + blocks + d * CLASSES


def test_a_plain_vit_costs_what_the_closed_form_says() -> None:
    model = build("timm_vit")
    n = PATCHES + 1
    assert cost.measure(model).flops == 2 * closed_form([(n, n)] * DEPTH, WIDTH, 4 * WIDTH)


def test_a_cut_vit_costs_what_the_closed_form_says() -> None:
    model = build("timm_vit")
    for heads, hidden in zip(view(model).heads, view(model).hidden, strict=True):
        heads.keep([1])
        hidden.keep(range(50))
    n = PATCHES + 1
    assert cost.measure(model).flops == 2 * closed_form([(n, n)] * DEPTH, 8, 50)


@pytest.mark.parametrize(("fuse", "left"), [(True, (9, 6, 4)), (False, (8, 4, 2))])
def test_fewer_tokens_cost_what_the_closed_form_says(fuse: bool, left: tuple[int, ...]) -> None:
    model = build("timm_vit")
    reduce_tokens(model, 0.5, fuse)
    after = [PATCHES, *left]
    before = [PATCHES, PATCHES, *left[:-1]]
    schedule = [(b + 1, a + 1) for b, a in zip(before, after, strict=True)]
    base = closed_form(schedule, WIDTH, 4 * WIDTH)
    # The class token's row of attention is computed once more, beside the fused kernel.
    rows = sum((b + 1) * WIDTH for b in before[1:])
    fused = sum(b * WIDTH for b in before[1:]) if fuse else 0
    assert cost.measure(model).flops == 2 * (base + rows + fused)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_counted_alike_fused_and_not(name: str) -> None:
    model = build(name)
    fused = cost.measure(model)
    other = copy.deepcopy(model)
    unfuse(other)
    assert cost.measure(other) == fused
    assert fused.params == sum(p.numel() for p in model.parameters())
    assert fused.image_size == (SIZE, SIZE)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_counted_alike_without_gradients(name: str, mode: type) -> None:
    model = build(name)
    expected = cost.measure(model)
    with mode():
        assert cost.measure(model) == expected


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_cuts_lower_the_cost(name: str) -> None:
    model = build(name)
    costs = [cost.measure(model)]
    view(model).heads[0].keep([0])
    costs.append(cost.measure(model))
    view(model).hidden[0].keep([0])
    costs.append(cost.measure(model))
    if name in CLASS_POOLED:
        reduce_tokens(model, 0.5)
        costs.append(cost.measure(model))
    assert [c.flops for c in costs] == sorted((c.flops for c in costs), reverse=True)
    assert len({c.flops for c in costs}) == len(costs)
    assert costs[0].params > costs[1].params > costs[2].params


@pytest.mark.parametrize("name", FAMILIES)
def test_measuring_leaves_the_model_alone(name: str) -> None:
    model = build(name)
    x = images(model)
    before = model(x)
    cost.measure(model, image_size=SIZE)
    after = model(x)
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_pooling_by_attention_is_counted() -> None:
    """torch's counter crashes on nn.MultiheadAttention's fast path, which meta does not take."""
    pooled, plain = cost.measure(build("hf_siglip")), cost.measure(build("hf_siglip_classifier"))
    d, n = WIDTH, PATCHES
    assert pooled.flops + 2 * d * CLASSES == plain.flops, "the tower's pooling head runs in both"
    blocks = DEPTH * (12 * n * d * d + 2 * n * n * d) + n * d * 3 * PATCH**2
    pool = 2 * d * d + 2 * n * d * d + 2 * n * d + 8 * d * d
    assert pooled.flops == 2 * (blocks + pool)


def test_a_model_built_on_meta_is_measured() -> None:
    with torch.device("meta"):
        model = timm_vit()
    assert cost.measure(model) == cost.measure(build("timm_vit"))
