"""The trunk: the same function as before, and tokens that leave as a slow reference says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone
from peft_vision.errors import UnsupportedSite
from peft_vision.layers.trunk import Trunk, kept_positions
from peft_vision.method import Evidence, make
from tests.backbones.reference import Reference
from tests.families import (
    CLASS_POOLED,
    NO_TOKENS,
    PATCHES,
    ROTARY,
    TRANSFORMERS,
    build,
    features,
    images,
)

AT = (0.25, 0.5, 0.75)
"""Blocks 1, 2 and 3 of 4."""


def reduce_tokens(model: nn.Module, keep_rate: float, fuse: bool = True) -> Backbone:
    method = make("token_reorganization", {"keep_rate": keep_rate, "fuse": fuse, "at": AT})
    backbone = view(model)
    method.apply(backbone, method.decide(backbone, method.strength, Evidence()))
    return backbone


def whole_output(output: Any) -> list[Tensor]:
    """Every tensor that a model returns."""
    return [output] if isinstance(output, Tensor) else [t for t in output.values() if t is not None]


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_empty_trunk_changes_nothing(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype=dtype)
    x = images(model)
    before = whole_output(model(x))
    tokens = view(model).tokens
    assert tokens is not None
    trunk = tokens.trunk()
    assert tokens.trunk() is trunk, "a second call has to find the first one's trunk"
    for then, now in zip(before, whole_output(model(x)), strict=True):
        assert torch.equal(then, now)


@pytest.mark.parametrize("name", CLASS_POOLED)
def test_keeping_every_patch_changes_nothing(name: str) -> None:
    model = build(name, dtype=torch.float64)
    x = images(model)
    before = whole_output(model(x))
    backbone = view(model)
    method = make("token_reorganization", {"keep_rate": 0.5, "at": AT})
    decisions = method.decide(backbone, 0.5, Evidence())
    method.apply(backbone, {key: {"keep_rate": 1.0, "fuse": True} for key in decisions})
    assert backbone.tokens is not None
    assert len(backbone.tokens.trunk().reducers) == len(AT)
    for then, now in zip(before, whole_output(model(x)), strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-12)


def with_reference(model: nn.Module, keep_rate: float, fuse: bool) -> Reference:
    """Put the slow reference in place of the model's blocks."""
    tokens = view(model).tokens
    assert tokens is not None
    container = getattr(tokens.owner, tokens.attribute)
    rates = dict.fromkeys((1, 2, 3), keep_rate)
    rows = tokens.class_tokens + tokens.distillation_tokens
    reference = Reference(list(container.children()), tokens.prefix, rates, fuse, rows)
    inside = (reference,) if isinstance(container, nn.Sequential) else ([reference],)
    setattr(tokens.owner, tokens.attribute, type(container)(*inside))
    return reference


@pytest.mark.parametrize("name", CLASS_POOLED)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "dropped"])
@pytest.mark.parametrize("cut", [False, True], ids=["all heads", "fewer heads"])
def test_tokens_leave_as_the_reference_says(name: str, fuse: bool, cut: bool) -> None:
    model = build(name, dtype=torch.float64)
    if cut:
        for site in view(model).heads[::2]:
            site.keep([0, 2])
    slow, x = copy.deepcopy(model), images(model, batch=3)
    before = features(model(x))
    reduce_tokens(model, 0.6, fuse)
    for site in view(slow).heads:  # the reference reads the family's own attention modules
        setattr(site.owner, site.attribute, site.attention)
    reference = with_reference(slow, 0.6, fuse)
    fast, expected = model(x), slow(x)
    for now, then in zip(whole_output(fast), whole_output(expected), strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-10)
    assert (features(fast) - before).abs().max() > 1e-6, "no patch that matters has left"
    last = kept_positions(model, x)[3]
    assert last.shape == (3, len(reference.places[0]))
    for image, places in zip(last.tolist(), reference.places[:3], strict=True):
        assert [p for p in image if p >= 0] == [
            p for p, q in zip(places, image, strict=True) if q >= 0
        ]


@pytest.mark.parametrize("name", [n for n in TRANSFORMERS if n not in CLASS_POOLED])
def test_what_is_read_of_every_patch_is_there_again(name: str) -> None:
    model = build(name)
    x = images(model)
    before = [t.shape for t in whole_output(model(x))]
    backbone = reduce_tokens(model, 0.5)
    assert backbone.tokens is not None
    assert backbone.tokens.trunk().restore
    assert [t.shape for t in whole_output(model(x))] == before


@pytest.mark.parametrize("name", [*NO_TOKENS, "generic_cnn"])
def test_a_model_without_a_token_stream_is_refused_by_name(name: str) -> None:
    model = build(name)
    with pytest.raises(UnsupportedSite, match=rf"{type(model).__name__} has no tokens: its "):
        reduce_tokens(model, 0.5)


def captured(model: nn.Module) -> tuple[Trunk, tuple[Any, ...], dict[str, Any]]:
    """The trunk and what it is called with."""
    tokens = view(model).tokens
    assert tokens is not None
    trunk, seen = tokens.trunk(), []
    hook = trunk.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    model(images(model))
    hook.remove()
    return trunk, *seen[0]


def permuted(rope: Any, order: Tensor) -> Any:
    return tuple(t[order] for t in rope) if isinstance(rope, tuple) else rope[order]


@pytest.mark.parametrize("name", CLASS_POOLED)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "dropped"])
def test_the_order_of_patches_does_not_matter(name: str, fuse: bool) -> None:
    """Patches that come in another order, each with its position, leave the class token alone."""
    model = build(name, dtype=torch.float64)
    reduce_tokens(model, 0.6, fuse)
    trunk, (x, *masks), kwargs = captured(model)
    prefix, order = trunk.prefix, torch.randperm(PATCHES)
    shuffled = torch.cat([x[:, :prefix], x[:, prefix:][:, order]], dim=1)
    moved = {k: permuted(v, order) if k == trunk.parts.rope else v for k, v in kwargs.items()}
    assert (trunk.parts.rope in kwargs) == (name in ROTARY)
    expected, found = trunk(x, *masks, **kwargs), trunk(shuffled, *masks, **moved)
    torch.testing.assert_close(found[:, :prefix], expected[:, :prefix], rtol=0, atol=1e-10)
    if name in ROTARY:
        stuck = trunk(shuffled, *masks, **kwargs)
        assert (stuck[:, :prefix] - expected[:, :prefix]).abs().max() > 1e-6


@pytest.mark.parametrize("name", CLASS_POOLED)
def test_images_of_a_batch_do_not_meet(name: str) -> None:
    model = build(name, dtype=torch.float64)
    reduce_tokens(model, 0.5)
    x = images(model, batch=3)
    alone = torch.cat([features(model(x[i : i + 1])) for i in range(3)])
    torch.testing.assert_close(features(model(x)), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_copy_is_independent(name: str) -> None:
    model = build(name, dtype=torch.float64)
    x = images(model)
    view(model).heads[0].keep([1, 2])
    tokens = view(model).tokens
    assert tokens is not None
    tokens.trunk()
    before = features(model(x))
    other = copy.deepcopy(model)
    for site in view(other).heads[1:]:
        site.keep([0])
    view(other).hidden[2].keep([3])
    if name in CLASS_POOLED:
        reduce_tokens(other, 0.3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert torch.equal(features(model(x)), before)
    assert [site.count for site in view(model).heads] == [2, 4, 4, 4]
    again = view(model).tokens
    assert again is not None
    assert not again.trunk().reducers


@pytest.mark.parametrize("name", ["timm_vit", "hf_vit"])
def test_a_mask_is_refused_where_tokens_leave(name: str) -> None:
    model = build(name)
    reduce_tokens(model, 0.5)
    mask = torch.ones(1, 1, PATCHES + 1, PATCHES + 1, dtype=torch.bool).tril()
    given = {"attn_mask": mask} if name.startswith("timm") else {"attention_mask": mask}
    with pytest.raises(UnsupportedSite, match="mask"):
        model(images(model), **given)
    if name.startswith("timm"):
        with pytest.raises(UnsupportedSite, match="mask"):
            model(images(model), is_causal=True)
