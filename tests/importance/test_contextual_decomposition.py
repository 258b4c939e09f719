"""Decomposition: every rule keeps the sum, and says what the paper says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import unwrap
from peft_vision.importance import _decomposition as rules
from peft_vision.importance._ahead import Ahead, opened, read
from peft_vision.importance._decomposed_blocks import block_through, heads_through, read_through
from peft_vision.importance._decomposition import Pair
from peft_vision.importance._probing import means_of
from peft_vision.importance.contextual_decomposition import (
    beyond_mean,
    decomposed,
    outputs,
    score,
)
from tests.families import TRANSFORMERS, build, images, moved
from tests.importance.laws import made

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def pair(*shape: int) -> Pair:
    return Pair(drawn(*shape), drawn(*shape))


def test_linear() -> None:
    layer, x = nn.Linear(5, 3).double(), pair(2, 4, 5)
    found = rules.through(layer, x)
    b, c = x.relevant @ layer.weight.t(), x.rest @ layer.weight.t()
    torch.testing.assert_close(
        found.relevant, b + layer.bias * b.abs() / (b.abs() + c.abs()), **TIGHT
    )
    torch.testing.assert_close(found.rest, c + layer.bias * c.abs() / (b.abs() + c.abs()), **TIGHT)


def test_nothing_relevant_stays_nothing() -> None:
    layer, x = nn.Linear(5, 3).double(), drawn(2, 4, 5)
    found = rules.through(layer, Pair(torch.zeros_like(x), x))
    assert not found.relevant.any()
    empty = rules.through(layer, Pair(torch.zeros_like(x), torch.zeros_like(x)))
    torch.testing.assert_close(empty.total, layer(torch.zeros_like(x)), **TIGHT)


def test_attention() -> None:
    q, k, v = (pair(2, 3, 6, 4) for _ in range(3))
    found = rules.attended(q, k, v)
    likely = (q.relevant @ k.relevant.transpose(-2, -1) / 2).softmax(-1)
    torch.testing.assert_close(found.relevant, likely @ v.relevant, **TIGHT)
    whole = nn.functional.scaled_dot_product_attention(q.total, k.total, v.total)
    torch.testing.assert_close(found.total, whole, **TIGHT)


def test_norms() -> None:
    x, layer = pair(2, 4, 6), nn.LayerNorm(6).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    found, bare = rules.through(layer, x), nn.LayerNorm(6, elementwise_affine=False).double()
    torch.testing.assert_close(found.total, layer(x.total), **TIGHT)
    std = (x.total.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
    centered = x.relevant - x.relevant.mean(-1, keepdim=True)
    torch.testing.assert_close(rules.through(bare, x).relevant, centered / std, **TIGHT)
    root = nn.RMSNorm(6, eps=1e-6).double()
    torch.testing.assert_close(rules.through(root, x).total, root(x.total), **TIGHT)


def test_activation() -> None:
    x, act = pair(2, 4, 6), nn.GELU()
    found = rules.through(act, x)
    torch.testing.assert_close(found.rest, act(x.rest), **TIGHT)
    torch.testing.assert_close(found.relevant, act(x.total) - act(x.rest), **TIGHT)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_the_parts_add_up_at_every_block_and_in_the_answer(family: str) -> None:
    model = made(family)
    backbone, x = view(model), [images(model, 2)]
    means = means_of(backbone, x)
    with torch.no_grad(), opened(backbone) as trunk:
        ahead = Ahead(backbone, x, trunk)
        whole = next(ahead.answers())
        ahead.go(1)
        assert ahead.walk is not None
        stream, (args, kwargs) = ahead.walk.streams[0], ahead.walk.given[0]
        parts = Pair(0.3 * torch.randn_like(stream.x), stream.x)
        parts = Pair(parts.relevant, stream.x - parts.relevant)
        for index in range(1, len(trunk.blocks)):
            stream = trunk.step(index, stream, args, kwargs)
            parts = block_through(trunk.blocks[index], trunk.parts, parts, stream.rope)
            torch.testing.assert_close(parts.total, stream.x, **TIGHT)
        answer = read_through(backbone, trunk, parts, x[0][:1])
        torch.testing.assert_close(answer.total, read(backbone, trunk, stream.x, x[0][:1]), **TIGHT)
        torch.testing.assert_close(answer.total, whole, **TIGHT)
        site = backbone.heads[1]
        source = beyond_mean(outputs(ahead, site)[0], means[1], 2, site.count)
        torch.testing.assert_close(decomposed(ahead, site, 0, source).total, whole, **TIGHT)


def test_heads_are_what_the_model_has() -> None:
    model = made("timm_vit_normed")
    backbone, x = view(model), [images(model, 2)]
    with torch.no_grad(), opened(backbone) as trunk:
        ahead = Ahead(backbone, x, trunk)
        assert ahead.walk is not None
        block, site = ahead.walk.block, backbone.heads[0]
        normed = block.norm1(ahead.walk.streams[0].x)
        parts = Pair(0.5 * normed, 0.5 * normed)
        found = heads_through(site.attention, site.parts, parts, None)
        torch.testing.assert_close(found.total, outputs(ahead, site)[0], **TIGHT)


def test_few_images_are_decomposed() -> None:
    model = made("timm_vit")
    backbone, x = view(model), images(model, 4)
    few = score(backbone, [x[:2], x[2:]], images=1)
    assert not torch.equal(few, score(backbone, [x]))
    torch.testing.assert_close(few, score(backbone, [x], images=1))


@pytest.mark.parametrize("method", ["vib", "union_of_experts", "bottleneck_adapter"])
def test_what_has_no_rule_of_its_own_is_taken_to_bend(method: str) -> None:
    model = pv.wrap(build("timm_vit"), method)
    moved(model).double()
    found = score(view(unwrap(model)), [images(dtype=torch.float64)])
    assert bool(found.isfinite().all())
    assert bool((found > 0).any(1).all())


def test_half_precision() -> None:
    model = build("timm_vit", dtype=torch.bfloat16)
    assert bool(score(view(model), [images(model)]).isfinite().all())
