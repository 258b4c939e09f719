"""How many patches go on behind each block: shapes over depth, each found from one number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from peft_vision.backbones.sites import Backbone, TokensSite
from peft_vision.errors import UnsupportedSite
from peft_vision.layers.absent import Absent
from peft_vision.layers.reduction import Reducer
from peft_vision.plan import Decisions

SHAPE = (1.0, 0.90, 0.82, 0.72, 0.58, 0.49, 0.40, 0.30, 0.24, 0.11, 0.07, 0.015)
"""Share of the patches behind each of the 12 blocks of a DeiT-B, as DiffRate (Chen et al., ICCV
2023) learned it for half of the multiply-accumulates."""

STEEPEST = 64.0
"""The exponent at which one patch is left behind the first block that reduces."""

USUAL = 196
"""Patches of a model that does not say how many it has."""

POOLED_FLOOR = 0.1
"""Share of the patches that a curve leaves where a head reads more than the class token."""


def tokens_of(backbone: Backbone) -> TokensSite:
    """The token stream.

    Raises:
        UnsupportedSite: there is none, with the reason; no block has attention to choose by; every
            token votes in the result; or several images are in one sequence.
    """
    backbone.require("tokens")
    site = backbone.tokens
    if site is None or not blocks_with_attention(backbone):
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} has no attention left that could choose tokens."
        )
    if backbone.positions is not None and backbone.positions.joint:
        raise UnsupportedSite(
            f"The sequence of {type(backbone.model).__name__} holds the patches of several images, "
            "and where those of each stand would be lost. Methods that remove heads and hidden "
            "units work."
        )
    trunk = site.trunk_if_any()
    if trunk is not None and trunk.votes is not None and trunk.votes.rows is None:
        raise UnsupportedSite(
            f"Every token of {type(backbone.model).__name__} votes in the result, and one that "
            "leaves could not. Models that read their class token alone can have both."
        )
    return site


def blocks_with_attention(backbone: Backbone) -> list[int]:
    """Blocks whose attention was not removed."""
    name = backbone.tokens.parts.attention if backbone.tokens is not None else ""
    return [s.index for s in backbone.blocks if not isinstance(getattr(s.block, name), Absent)]


def reads_class_only(site: TokensSite) -> bool:
    """Whether no patch is read behind the last block."""
    return site.pooling == "class" and site.class_tokens > 0


def patches_of(backbone: Backbone) -> int:
    """How many patches an image is cut into, or the usual number where the model does not say."""
    grids = [site.grid for site in backbone.readouts if site.grid is not None]
    if grids:
        return grids[0][0] * grids[0][1]
    strides = [getattr(s.layer, "stride", None) for s in backbone.convs if s.role == "patch"]
    if backbone.input_size is None or len(strides) != 1 or not isinstance(strides[0], tuple):
        return USUAL
    _, height, width = backbone.input_size
    down, across = int(strides[0][0]), int(strides[0][1])
    return max(1, (height // down) * (width // across))


def curve(mean: float, depth: int, floor: float = 0.0) -> list[float]:
    """Share of the patches behind each of `depth` blocks: SHAPE, resampled, to some power.

    Args:
        mean: over the blocks behind the first, which none leaves, in [0, 1].
        floor: no share is below this.
    """
    shape = [_at(place / max(1, depth - 1)) for place in range(depth)]
    if depth == 1:
        shape = [SHAPE[-1]]
    moving = [share for share in shape if share < 1]
    low, high = 0.0, STEEPEST
    for _ in range(60):
        middle = (low + high) / 2
        if sum(share**middle for share in moving) / len(moving) > mean:
            low = middle
        else:
            high = middle
    return [max(floor, share**high) if high > 1e-9 else 1.0 for share in shape]


def _at(depth: float) -> float:
    """SHAPE at a relative depth in [0, 1], between its blocks by a straight line."""
    place = depth * (len(SHAPE) - 1)
    left = min(int(place), len(SHAPE) - 2)
    return SHAPE[left] + (place - left) * (SHAPE[left + 1] - SHAPE[left])


def counts(shares: Sequence[float], patches: int, least: int = 1, most: float = 1.0) -> list[int]:
    """Whole patches behind each block, never more than before it.

    Args:
        shares: of all patches, behind each block.
        least: so many stay.
        most: a block takes away at most this share of what arrives.
    """
    found, before = [], patches
    for share in shares:
        wanted = math.ceil(share * patches - 1e-9)
        before = min(before, max(wanted, least, before - math.floor(most * before + 1e-9)))
        found.append(before)
    return found


def put_reducers(backbone: Backbone, decisions: Decisions, kind: Callable[..., Reducer]) -> None:
    """Open the blocks' trunk and put a reducer into each block named, in place.

    Args:
        kind: makes a reducer of a decision's entries.
    """
    if not decisions:
        return
    site = tokens_of(backbone)
    trunk = site.trunk()
    trunk.restore = trunk.restore or not reads_class_only(site)
    for key, decision in decisions.items():
        if not isinstance(decision, dict):
            raise UnsupportedSite(f"{key}: not a decision on tokens: {decision!r}.")
        settings: dict[str, Any] = dict(decision)
        trunk.reduce(int(key.split(".")[1]), kind(**settings))
