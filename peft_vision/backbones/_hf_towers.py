"""Positions of transformers' vision towers whose table is an embedding: CLIP and SigLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones.positions import PositionParts, PositionsSite, run, set_config_size
from peft_vision.layers.positions import Grid, without_rows


def tower_in(model: nn.Module) -> Any:
    """The vision tower, which a projection or a classifier may stand around."""
    return next(m for m in model.modules() if getattr(m, "post_layernorm", None) is not None)


def patches(model: Any, images: Tensor) -> Tensor:
    """Embedded patches of images of any size, B N D."""
    convolution: Any = tower_in(model).embeddings.patch_embedding
    embedded: Tensor = convolution(images.to(convolution.weight.dtype))
    return embedded.flatten(2).transpose(1, 2)


def prefix(model: Any) -> Tensor | None:
    """CLIP's class token with its position, 1 1 D; SigLIP has none."""
    embeddings = tower_in(model).embeddings
    token: Tensor | None = getattr(embeddings, "class_embedding", None)
    if token is None:
        return None
    table: Any = without_rows(embeddings.position_embedding)
    placed: Tensor = token + table.weight[:1]
    return placed.unsqueeze(0)


def encode(model: Any, tokens: Tensor, rope: Any) -> Tensor:
    """The tokens behind the final norm, which CLIP itself applies to the class token alone."""
    tower = tower_in(model)
    before = getattr(tower, "pre_layrnorm", None)  # spelled so
    x = tokens if before is None else before(tokens)
    normed: Tensor = tower.post_layernorm(run(tower.encoder.layers, x, attention_mask=None))
    return normed


def resize(model: Any, grid: Grid) -> None:
    """Tell the tower its new size; its table is resized already."""
    embeddings = tower_in(model).embeddings
    table: Any = without_rows(embeddings.position_embedding)
    embeddings.image_size = grid[0] * embeddings.patch_size
    embeddings.num_patches = grid[0] * grid[1]
    embeddings.num_positions = table.num_embeddings = len(table.weight)
    places = torch.arange(table.num_embeddings, device=embeddings.position_ids.device)
    embeddings.register_buffer("position_ids", places.expand(1, -1), persistent=False)
    set_config_size(model, embeddings.image_size)


PARTS = PositionParts(patches=patches, prefix=prefix, encode=encode, resize=resize)


def site(model: nn.Module, blocks: tuple[nn.Module, str], tokens: int) -> PositionsSite:
    """The positions of a tower.

    Args:
        blocks: (owner, attribute) of the list of blocks.
        tokens: how many come before the patches; the table has a row for each.
    """
    embeddings = tower_in(model).embeddings
    side, patch = int(embeddings.image_size), int(embeddings.patch_size)
    return PositionsSite(
        key="positions",
        model=model,
        parts=PARTS,
        owner=embeddings,
        attribute="position_embedding",  # no module takes the sequence and gives it on
        container=blocks,
        grid=(side // patch, side // patch),
        patch=(patch, patch),
        prefix=tokens,
        width=int(embeddings.embed_dim),
        table=(without_rows(embeddings.position_embedding), "weight"),
        leading=tokens,
        bias=(embeddings, "patch_embedding"),
    )
