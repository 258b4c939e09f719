"""What the tests of all scores share: a sample of families, and heads changed by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.backbones.sites import HeadsSite
from peft_vision.layers.head_surgery import keep_heads
from peft_vision.layers.surgery import weight_of
from tests.families import HEADS, build, images

SAMPLE = (
    "timm_vit_normed",  # norms on queries, keys, heads and units, gates on both branches
    "timm_deit_distilled",
    "timm_dinov2_registers",
    "timm_siglip",  # pooled by attention
    "timm_eva02_base",  # separate projections, rotary, gated
    "timm_eva_dinov3_qkv_bias",
    "hf_vit",
    "hf_dinov2_swiglu",  # features and no classes
    "hf_siglip_classifier",
)

FEW = ("timm_vit", "timm_eva02_base", "hf_dinov3")


def made(family: str) -> nn.Module:
    """A family in float64."""
    return build(family, dtype=torch.float64)


def batches(model: nn.Module, count: int = 3) -> list[Tensor]:
    """Two batches of random images."""
    return list(images(model, count).split((count + 1) // 2))


def site_of(model: nn.Module, block: int) -> HeadsSite:
    return next(site for site in view(model).heads if site.block == block)


def silence(model: nn.Module, block: int, head: int) -> None:
    """Let nobody read one head."""
    site = site_of(model, block)
    weight = weight_of(getattr(site.attention, site.parts.out))
    width = weight.shape[1] // site.count
    weight[:, head * width : (head + 1) * width] = 0.0


def reorder(model: nn.Module, block: int, order: list[int]) -> None:
    """The same function, with the heads of one block in another order."""
    site = site_of(model, block)
    keep_heads(site.attention, site.parts, order)


def away(model: nn.Module, block: int) -> None:
    """Take the first head of a block out."""
    site_of(model, block).keep(range(1, HEADS))
