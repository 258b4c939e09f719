"""A model with heads or hidden units cut away computes what the masked model computes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.backbones.sites import HeadsSite, HiddenSite
from peft_vision.errors import UnsupportedSite
from tests.families import NO_TOKENS, TRANSFORMERS, build, features, images

KEPT_HEADS = ([1, 3], [0], [0, 1, 2, 3], [2, 3])

every_family = pytest.mark.parametrize("name", [*TRANSFORMERS, *NO_TOKENS])


class MaskedNorm(nn.Module):
    """A norm whose statistics are over the members that stay; the others come out as zero."""

    def __init__(self, norm: nn.Module, kept: Sequence[int]) -> None:
        super().__init__()
        self.norm = norm
        self.kept = list(kept)

    def forward(self, x: Tensor) -> Tensor:
        inside = x[..., self.kept]
        centered = isinstance(self.norm, nn.LayerNorm)
        middle = inside - inside.mean(-1, keepdim=True) if centered else inside
        scale = (middle.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt()
        result = torch.zeros_like(x)
        result[..., self.kept] = middle * scale * self.norm.weight[self.kept]
        if getattr(self.norm, "bias", None) is not None:
            result[..., self.kept] += self.norm.bias[self.kept]
        return result


def mask_inputs(owner: nn.Module, last: str, norm: str | None, kept: Sequence[int]) -> None:
    """Zero the columns of `last` that do not stay, behind a masked norm where there is one."""
    layer = getattr(owner, last)
    gone = [i for i in range(layer.in_features) if i not in set(kept)]
    with torch.no_grad():
        layer.weight[:, gone] = 0
    if norm is not None and any(True for _ in getattr(owner, norm).parameters()):
        setattr(owner, norm, MaskedNorm(getattr(owner, norm), kept))


def mask_heads(site: HeadsSite, heads: Sequence[int]) -> None:
    width = site.attention.head_dim
    kept = [head * width + i for head in heads for i in range(width)]
    mask_inputs(site.attention, site.parts.out, site.parts.norm, kept)


def mask_hidden(site: HiddenSite, units: Sequence[int]) -> None:
    mask_inputs(site.mlp, site.parts.down, site.parts.norm, units)


def unfuse(model: nn.Module) -> None:
    """Let the model compute its attention without the fused kernel."""
    if getattr(model, "set_attn_implementation", None) is not None:
        model.set_attn_implementation("eager")
    for module in model.modules():
        if getattr(module, "fused_attn", None) is not None:
            module.fused_attn = False


def some_units(site: HiddenSite, index: int) -> list[int]:
    return [u for u in range(site.count) if (u * 7 + index) % 5 not in (0, 3)]


@every_family
@pytest.mark.parametrize("eager", [False, True], ids=["fused", "eager"])
@pytest.mark.parametrize("kind", ["heads", "hidden"])
def test_cut_equals_masked(name: str, kind: str, eager: bool) -> None:
    model = build(name, dtype=torch.float64)
    if eager:
        unfuse(model)
    masked, x = copy.deepcopy(model), images(model)
    whole = features(model(x))
    for index, (site, other) in enumerate(
        zip(getattr(view(model), kind), getattr(view(masked), kind), strict=True)
    ):
        kept = KEPT_HEADS[index] if kind == "heads" else some_units(site, index)
        (mask_heads if kind == "heads" else mask_hidden)(other, kept)
        site.keep(kept)
        assert site.count == len(kept)
    cut, expected = features(model(x)), features(masked(x))
    torch.testing.assert_close(cut, expected, rtol=0, atol=1e-10)
    assert (cut - whole).abs().max() > 1e-3, "the cut removed nothing that matters"


@every_family
def test_keeping_everything_changes_nothing(name: str) -> None:
    model = build(name, dtype=torch.float64)
    x = images(model)
    before = features(model(x))
    backbone = view(model)
    for heads, hidden in zip(backbone.heads, backbone.hidden, strict=True):
        heads.keep(range(heads.count))
        hidden.keep(range(hidden.count))
    torch.testing.assert_close(features(model(x)), before, rtol=0, atol=1e-12)


@every_family
def test_what_is_left_trains(name: str) -> None:
    model = build(name).train()
    backbone = view(model)
    backbone.call_every_linear()
    for heads, hidden in zip(backbone.heads, backbone.hidden, strict=True):
        heads.keep([2])
        hidden.keep([0, 5, 6])
    features(model(images(model))).square().sum().backward()
    for site in backbone.linears:
        gradient = site.layer.weight.grad
        assert gradient is not None, site.key
        assert gradient.shape == site.layer.weight.shape
        assert gradient.abs().max() > 0, site.key


@every_family
def test_one_row_of_weights_per_member(name: str) -> None:
    backbone = view(build(name))
    for site in (backbone.heads[0], backbone.hidden[0]):
        weights = site.weights()
        assert {len(weight) for weight in weights} == {site.count}
        linears = [s for s in backbone.linears if s.block == 0 and s.role != "other"]
        mine = ("q", "k", "v", "qkv", "out") if isinstance(site, HeadsSite) else None
        total = sum(
            s.layer.weight.numel() for s in linears if (s.role in mine if mine else True)
        ) - (0 if mine else sum(w.numel() for w in backbone.heads[0].weights()))
        assert sum(weight.numel() for weight in weights) == total


@every_family
def test_nothing_left_is_refused(name: str) -> None:
    backbone = view(build(name))
    with pytest.raises(UnsupportedSite, match="at least one head"):
        backbone.heads[0].keep([])
    with pytest.raises(UnsupportedSite, match="at least one hidden unit"):
        backbone.hidden[0].keep([])


@pytest.mark.parametrize("name", ["timm_eva02_small", "timm_eva_inner_norm", "timm_eva_dinov3"])
def test_an_opened_attention_obeys_masks(name: str) -> None:
    model = build(name, dtype=torch.float64)
    x = images(model)
    before = features(model(x, is_causal=True))
    assert (before - features(model(x))).abs().max() > 1e-6
    for site in view(model).heads:
        site.keep(range(site.count))
    torch.testing.assert_close(features(model(x, is_causal=True)), before, rtol=0, atol=1e-12)
