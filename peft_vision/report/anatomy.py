"""What is left of a compressed model, read off the model that went in and the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_vision.backbones import view
from peft_vision.backbones.sites import HeadsSite, HiddenSite
from peft_vision.cost import unwrap
from peft_vision.history import History
from peft_vision.layers.trunk import GONE, kept_positions
from peft_vision.plan import Json, unpack_indices
from peft_vision.report.content import Block, Kept, Overlay, Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

STAGES = 4
"""Pictures of one image, where patches leave in many blocks."""


def blocks_left(dense: nn.Module, compressed: nn.Module, images: Tensor) -> tuple[Block, ...]:
    """Heads, hidden units and tokens of each block that are left.

    Args:
        dense: the model before the plan of `compressed`, for the numbers of what there was.
        compressed: a model with a plan.
        images: `B 3 H W`, preprocessed, to count tokens with.
    """
    backbone = view(unwrap(dense))
    sites: list[HeadsSite | HiddenSite] = [*backbone.heads, *backbone.hidden]
    kept = {site.key: list(range(site.count)) for site in sites}
    before = {key: len(members) for key, members in kept.items()}
    done = len(History.of(dense).without_adapters().plan.steps)
    for step in History.of(compressed).plan.steps[done:]:
        for key, decision in step.decisions.items():
            if key in kept and _is_packed(decision):
                kept[key] = [kept[key][index] for index in unpack_indices(decision)]
    heads = {site.block: Kept(before[site.key], tuple(kept[site.key])) for site in backbone.heads}
    hidden = {site.block: Kept(before[site.key], tuple(kept[site.key])) for site in backbone.hidden}
    tokens = _tokens_left(unwrap(compressed), images, len(backbone.blocks))
    return tuple(
        Block(heads.get(number), hidden.get(number), tokens.get(number))
        for number in range(len(backbone.blocks))
    )


def patches_of(model: nn.Module) -> int | None:
    """How many patches an image is cut into, where the model says."""
    grid = _grid(model)
    return grid[0] * grid[1] if grid else None


def overlays_of(
    model: nn.Module,
    images: Tensor,
    titles: Sequence[str],
    preprocessing: Mapping[str, Any],
) -> tuple[Overlay, ...]:
    """The patches that `model` keeps of each image; empty where it drops none.

    Args:
        model: the compressed model.
        images: `B 3 H W`, preprocessed.
        titles: what each image shows.
        preprocessing: whose `mean` and `std` are undone for the picture.
    """
    positions, grid = kept_positions(unwrap(model), images), _grid(model)
    if not positions or grid is None:
        return ()
    found = []
    for number, title in enumerate(titles):
        stages = tuple(
            Stage(f"after block {block + 1}", _places(positions[block][number]))
            for block in _some(sorted(positions))
        )
        found.append(Overlay(title, _picture(images[number], preprocessing), grid, stages))
    return tuple(found)


def _is_packed(decision: Json) -> bool:
    return isinstance(decision, dict) and {"of", "bits"} <= set(decision)


def _tokens_left(model: nn.Module, images: Tensor, depth: int) -> dict[int, int]:
    """Patch tokens that leave each block; a token that stands for several patches counts once."""
    positions, patches = kept_positions(model, images), patches_of(model)
    if patches is None:
        return {}
    left, counts = patches, {}
    for number in range(depth):
        left = positions[number].shape[1] if number in positions else left
        counts[number] = left
    return counts


def _grid(model: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of patches, from the convolution that cuts them."""
    backbone = view(unwrap(model))
    size = backbone.input_size
    strides = [
        getattr(site.layer, "stride", None) for site in backbone.convs if site.role == "patch"
    ]
    if size is None or len(strides) != 1 or not isinstance(strides[0], tuple):
        return None
    rows, columns = strides[0]
    return size[1] // rows, size[2] // columns


def _some(blocks: list[int]) -> list[int]:
    """At most STAGES of the blocks, evenly spread, the last among them."""
    shown = min(len(blocks), STAGES)
    return [blocks[len(blocks) * (i + 1) // shown - 1] for i in range(shown)]


def _places(kept: Tensor) -> tuple[int, ...]:
    return tuple(int(place) for place in kept.tolist() if place != GONE)


def _picture(
    image: Tensor, preprocessing: Mapping[str, Any]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Undo the normalization: `3 H W` -> `H W 3`, uint8."""
    mean, std = np.asarray(preprocessing["mean"]), np.asarray(preprocessing["std"])
    pixels = image.detach().cpu().numpy().transpose(1, 2, 0) * std + mean
    return np.asarray((pixels.clip(0, 1) * 255).round(), dtype=np.uint8)
