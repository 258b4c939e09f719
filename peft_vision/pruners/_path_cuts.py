"""What cutting a path does to a block: modules go, and small ones stand in their place."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from peft_vision.backbones.sites import Backbone, device_of
from peft_vision.errors import UnsupportedSite
from peft_vision.layers.absent import Absent
from peft_vision.layers.attention import attention_inside
from peft_vision.layers.block import BlockParts
from peft_vision.layers.bottleneck import inside
from peft_vision.layers.linear_mlp import LinearMlp
from peft_vision.layers.mlp import MlpParts, unit_count
from peft_vision.layers.ownership import trained_dtype
from peft_vision.layers.trunk import Trunk
from peft_vision.layers.votes import Half, Votes, path_of
from peft_vision.pruners._path_probe import Branch


def remove(trunk: Trunk, branch: Branch, *, offset: bool) -> None:
    """Take a branch out of the stream, with its norm and its scale, in place.

    Args:
        offset: a constant (zero until it is set) is added in its place.
    """
    parts, (index, half) = trunk.parts, branch
    block, own = trunk.blocks[index], half == "attention"
    name, norm = (parts.attention, parts.norm1) if own else (parts.mlp, parts.norm2)
    behind, others = (parts.after1, parts.after2) if own else (parts.after2, parts.after1)
    like = next(p for p in block.parameters() if p.is_floating_point())
    normal = next(getattr(block, norm).parameters(), like)
    made = (
        Absent(_width_of(getattr(block, name), parts, half), trunk.prefix) if offset else Absent()
    )
    made = made.to(normal.device, normal.dtype).requires_grad_(normal.requires_grad)
    setattr(block, name, made.train(block.training))
    setattr(block, norm, nn.Identity())
    for part in behind:
        if part not in others:  # some families have one for both branches
            own_part = getattr(block, part)
            setattr(block, part, nn.Identity() if isinstance(own_part, nn.Module) else None)
    if trunk.votes is not None and not offset:
        trunk.votes.silence([path_of(index, half)])


def _width_of(module: nn.Module, parts: BlockParts, half: Half) -> int:
    """Width of what a branch gives: its last linear's."""
    if half == "attention":
        last = getattr(attention_inside(module), parts.attention_parts.out)
    else:
        own = inside(module)
        linear = isinstance(own, LinearMlp)
        last = own.linear if linear else getattr(own, parts.mlp_parts.down)
    return int(last.out_features)


def new_votes(backbone: Backbone, trunk: Trunk, rows: int | None) -> Votes:
    """Votes that give the stream back, on the model's device; `rows` first tokens vote."""
    ends = [site.layer for site in backbone.linears if site.role in ("out", "down")]
    width = getattr(ends[0], "out_features", None) if ends else None
    if not isinstance(width, int):
        raise UnsupportedSite(f"{type(backbone.model).__name__}: the stream's width is not known.")
    made = Votes(len(trunk.blocks), width, rows)
    gone = [
        path_of(index, half)
        for index, block in enumerate(trunk.blocks)
        for half, name in halves(trunk.parts)
        if isinstance(branch := getattr(block, name), Absent) and branch.offset is None
    ]
    made.silence(gone)
    made.to(device_of(backbone.model), trained_dtype(backbone.model))
    return made.train(backbone.model.training)


def halves(parts: BlockParts) -> tuple[tuple[Half, str], ...]:
    """Each half of a block, and what the family calls its module."""
    return (("attention", parts.attention), ("mlp", parts.mlp))


def trim(trunk: Trunk, votes: Votes, silent: Collection[int]) -> None:
    """Take votes, and then the branches at the end that nobody reads any more, in place."""
    votes.silence(silent)
    for index in reversed(range(len(trunk.blocks))):
        for half, name in reversed(halves(trunk.parts)):
            if path_of(index, half) in votes.kept:
                return
            branch = getattr(trunk.blocks[index], name)
            if isinstance(branch, Absent):
                branch.drop()
            else:
                remove(trunk, (index, half), offset=False)


def why_not_linear(backbone: Backbone, index: int, *, data: bool) -> str:
    """Why the MLP of block `index` cannot become one linear, in words; empty when it can."""
    mlp, parts = _mlp(backbone, index)
    name = type(mlp).__name__
    if inside(mlp) is not mlp:
        return f"{name} stands at the MLP, and what it adds would be lost"
    kinds = [type(getattr(mlp, layer)) for layer in (*parts.up, parts.down)]
    strange = [kind.__name__ for kind in kinds if kind is not nn.Linear]
    if strange:
        return f"{name} holds {strange[0]}; merge adapters and do this before quantization"
    width = int(getattr(mlp, parts.down).out_features)
    if 2 * unit_count(mlp, parts) <= width:
        return f"{name} has {unit_count(mlp, parts)} units for a width of {width}: nothing is saved"
    if not data and not _plain(mlp, parts):
        return (
            f"{name} is gated, or has a norm on its units, so that no product of weights stands "
            "for it; pass data, by which one is fitted"
        )
    return ""


def linearize(backbone: Backbone, index: int, *, fitted: bool) -> None:
    """Put one linear in the place of the MLP of block `index`.

    Args:
        fitted: data say the values afterwards (`LinearMlp.fit`). Until then they are the product
            of the two linears where there is such a thing, and zero elsewhere.
    """
    mlp, parts = _mlp(backbone, index)
    if reason := why_not_linear(backbone, index, data=fitted):
        raise UnsupportedSite(f"blocks.{index}.mlp: {reason}.")
    block = backbone.blocks[index].block
    made = LinearMlp.instead_of(mlp, parts, zero=not _plain(mlp, parts))
    if backbone.tokens is not None:
        setattr(block, backbone.tokens.parts.mlp, made)


def _mlp(backbone: Backbone, index: int) -> tuple[Any, MlpParts]:
    if backbone.tokens is None:
        raise AssertionError("the caller requires tokens")
    parts = backbone.tokens.parts
    return getattr(backbone.blocks[index].block, parts.mlp), parts.mlp_parts


def _plain(mlp: nn.Module, parts: MlpParts) -> bool:
    norm = None if parts.norm is None else getattr(mlp, parts.norm)
    return len(parts.up) == 1 and parts.packed == 1 and isinstance(norm, nn.Identity | None)
