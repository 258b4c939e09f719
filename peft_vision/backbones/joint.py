"""Several images through one backbone in one sequence: the pass itself, and how it is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones.positions import PositionsSite
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.positions import TypeRows, joined
from peft_vision.layers.readout import DenseReadout


def together(
    site: PositionsSite,
    types: TypeRows,
    images: Sequence[Tensor],
    kinds: Sequence[Tensor | None],
    *,
    prefix: bool = False,
) -> list[Tensor]:
    """The tokens of each stream behind the final norm: B N D each; with `prefix` B P D first."""
    pairs = zip(images, kinds, strict=True)
    parts = [embedded(site, types, i, image, map_) for i, (image, map_) in enumerate(pairs)]
    if prefix:
        parts.insert(0, _front(site, types, parts[0]))
    rope = site.parts.rope and joined([site.parts.rope(site.model, x) for x in images])
    tokens = site.parts.encode(site.model, torch.cat(parts, dim=1), rope)
    return list(torch.split(tokens, [part.shape[1] for part in parts], dim=1))


def with_streams(backbone: Backbone) -> Backbone:
    """A model of several streams that reads the last one's tokens is counted and run with all.

    Of one image, every smaller stream is shown the top left part. A model that has a classifier of
    pooled features still is one of single images, whatever else is done with its blocks.
    """
    site = backbone.positions
    reading = [s.layer for s in backbone.readouts if isinstance(s.layer, DenseReadout)]
    if site is None or not site.joint or not reading or backbone.run is not None:
        return backbone
    return replace(backbone, run=partial(_one_image, site, reading[0]))


def _one_image(site: PositionsSite, readout: DenseReadout, model: nn.Module, images: Tensor) -> Any:
    types = site.types
    if types is None:
        return model(images)
    sides = [(rows * site.patch[0], columns * site.patch[1]) for rows, columns in types.grids]
    shown = [images[..., :height, :width] for height, width in sides]
    whole = site.prefix > 0 and bool(site.kept)
    *_, tokens = together(site, types, shown, [None] * len(shown), prefix=whole)
    return readout(tokens, types.grids[-1])


def embedded(
    site: PositionsSite, types: TypeRows, stream: int, image: Tensor, kinds: Tensor | None
) -> Tensor:
    """The patches of one stream with their positions and kinds, before the blocks: B N D."""
    x = site.parts.patches(site.model, image)
    table = site.rows()
    if table is not None:
        x = x + types.spatial(stream, table)
    return _dropped(types, x) + types.rows(stream, kinds).to(x.dtype)


def _front(site: PositionsSite, types: TypeRows, like: Tensor) -> Tensor:
    tokens = site.parts.prefix(site.model)
    if tokens is None:
        return like[:, :0]
    return _dropped(types, tokens.expand(like.shape[0], -1, -1))


def _dropped(types: TypeRows, x: Tensor) -> Tensor:
    dropped: Tensor = types.inner(x) if isinstance(types.inner, nn.Dropout) else x
    return dropped
