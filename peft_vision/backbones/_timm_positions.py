"""Positions of timm's transformers with one table: how their sequence is made and encoded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones.positions import PositionParts, PositionsSite, run
from peft_vision.layers.positions import Grid


def prefix(model: Any) -> Tensor | None:
    """Class, distillation and register tokens with their positions: 1 P D."""
    named = (model.cls_token, getattr(model, "dist_token", None), model.reg_token)
    tokens = [token for token in named if token is not None]
    if not tokens:
        return None
    x = torch.cat(tokens, dim=1)
    if model.pos_embed is None or model.no_embed_class:
        return x
    placed: Tensor = x + model.pos_embed[:, : x.shape[1]]
    return placed


def patches(model: Any, images: Tensor) -> Tensor:
    """Embedded patches of images of any size, B N D; the module itself takes one size only."""
    embedded: Tensor = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    normed: Tensor = model.patch_embed.norm(embedded)
    return normed


def encode(model: Any, tokens: Tensor, rope: Any) -> Tensor:
    """The tokens behind the final norm, B N D."""
    x = model.norm_pre(tokens)
    return final_norm(model, run(model.blocks, x, recompute=model.grad_checkpointing))


def final_norm(model: Any, x: Tensor) -> Tensor:
    """The norm of the tokens, or that of their mean where the model keeps its norm for that."""
    normed: Tensor = model.norm(x)
    if isinstance(model.norm, nn.Identity):
        normed = model.fc_norm(normed)
    return normed


def resize(model: Any, grid: Grid) -> None:
    """Tell the model its new size; timm would resize the table itself, in another way."""
    rows, columns = model.patch_embed.patch_size
    table, model.pos_embed = model.pos_embed, None
    model.set_input_size(img_size=(grid[0] * rows, grid[1] * columns))
    model.pos_embed = table


PARTS = PositionParts(patches=patches, prefix=prefix, encode=encode, resize=resize)


def why_not(model: Any, *known: type) -> str:
    """What keeps the positions from being understood; empty when nothing does.

    Args:
        known: classes whose way of adding positions is understood.
    """
    from timm.layers import PatchEmbed

    embed = model.patch_embed
    if type(model)._pos_embed not in [cls._pos_embed for cls in known]:  # type: ignore[attr-defined]  # noqa: SLF001
        return f"{type(model).__name__} adds positions in a way of its own"
    if type(embed) is not PatchEmbed:
        return f"its patches come from {type(embed).__name__}, not from one convolution"
    if embed.grid_size is None:
        return "it does not say the size of its images"
    if not isinstance(model.patch_drop, nn.Identity | None):
        return "it drops patches at random while it is trained"
    if model.pos_embed is None and getattr(model, "rope", None) is None:
        return "it has no positions at all"
    return ""


def site(model: Any, parts: PositionParts, stays: str = "") -> PositionsSite:
    """The positions of a model that `why_not` admits."""
    embed, tokens = model.patch_embed, int(model.num_prefix_tokens)
    return PositionsSite(
        key="positions",
        model=model,
        parts=parts,
        owner=model,
        attribute="pos_drop",
        container=(model, "blocks"),
        grid=tuple(embed.grid_size),
        patch=tuple(embed.patch_size),
        prefix=tokens,
        width=int(model.embed_dim),
        table=None if model.pos_embed is None else (model, "pos_embed"),
        leading=0 if model.no_embed_class else tokens,
        bias=(embed, "proj") if isinstance(embed.norm, nn.Identity) else None,
        stays=stays,
    )
