"""Backbones of several stages: blocks found by the classes of their attention modules and MLPs.

Families of this kind differ in what they call things and in where the blocks are; each says the
first (`Words`), and the second is looked for. A block is what holds an attention module or an MLP
that is known; its label is where it stands, e.g. ``stages.2.blocks.5``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

import peft_vision.layers.conv_surgery  # noqa: F401  (its rules)
from peft_vision.backbones import generic
from peft_vision.backbones._stage_layers import (
    Branch,
    key_of,
    labeled,
    layers_of,
    module_of,
)
from peft_vision.backbones.positions import RELATIVE, relative
from peft_vision.backbones.sites import Backbone, BlockSite, HeadsSite, HiddenSite
from peft_vision.backbones.timm_vit import mlp_parts, register_rules
from peft_vision.layers.attention import attention_inside
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.bottleneck import inside
from peft_vision.layers.mlp import MlpParts
from peft_vision.layers.named_parts import part_of

WIDTHS = "its stages have streams of different widths"
SCORES = "its heads attend in modules of several kinds, often within windows, and are not compared"
POSITIONS = "its positions are made by convolutions or belong to one grid"


def timm_mlp(mlp: nn.Module) -> MlpParts | None:
    """The parts of an MLP of timm's layers, of linears or of 1 x 1 convolutions; None of others."""
    from timm.layers import ConvMlp

    register_rules()
    if type(mlp) is ConvMlp:
        return MlpParts(up=("fc1",), down="fc2", between=("norm",))
    return mlp_parts(mlp)


def _none(_: nn.Module) -> None:
    """No block holds parts of a branch itself."""


@dataclass(frozen=True)
class Words:
    """What a family calls things.

    Attributes:
        attention: the parts of a module that is one of the family's attention modules; why its
            heads stay, where they cannot be told apart; None for any other module.
        mlp: the parts of a module that is one of its MLPs, else None.
        own_mlp: the parts of the MLP whose halves a block holds itself, else None; own_attention:
            of the attention whose biases it holds.
        tokens: why tokens cannot leave on the way.
        width: why the stream cannot become narrower; positions: why they stay as they are.
        heads: why there are none, where there is no attention.
    """

    attention: Callable[[nn.Module], AttentionParts | str | None]
    tokens: str
    mlp: Callable[[nn.Module], MlpParts | None] = timm_mlp
    own_mlp: Callable[[nn.Module], MlpParts | None] = _none
    own_attention: Callable[[nn.Module], AttentionParts | str | None] = _none
    width: str = WIDTHS
    positions: str = POSITIONS
    heads: str = "it has no attention"


def branches(owner: nn.Module, words: Words, path: str = "") -> Iterator[Branch]:
    """Every attention module and MLP below `owner`, in the order in which they were made."""
    for name, child in owner.named_children():
        if RELATIVE.search(name):  # an MLP may make a table of biases, beside all blocks
            continue
        parts = words.attention(attention_inside(child)) or words.mlp(inside(child))
        if parts is not None:
            yield Branch(path, owner, name, parts)
            continue
        below = f"{path}.{name}" if path else name
        yield from branches(child, words, below)
        own = (words.own_attention(child), words.own_mlp(child))
        yield from (Branch(below, owner, name, kind) for kind in own if kind is not None)


def why_not(model: nn.Module, words: Words) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    try:
        found = list(branches(model, words))
    except ImportError as error:
        return f"the installed library calls its parts something else ({error})"
    if not found:
        return "none of its attention modules and MLPs is of a class that is known"
    for branch in found:
        absent = _absent(branch)
        if absent:
            return absent
    return ""


def _absent(branch: Branch) -> str:
    """What a module lacks of the parts named: names change between versions of a library."""
    parts = branch.parts
    if isinstance(parts, str):
        return ""
    module = module_of(branch)
    names = (
        (*parts.qkv, parts.out, *parts.heads, *parts.width, *parts.caches)
        if isinstance(parts, AttentionParts)
        else (*parts.up, parts.down)
    )
    missing = [name for name in names if part_of(module, name) is None]
    return f"{type(module).__name__} has no {', '.join(missing)}" if missing else ""


def see(model: nn.Module, family: str, words: Words) -> Backbone:
    """The model as linears and convolutions, and its heads and hidden units by block."""
    seen = generic.view(model)
    found = _distinct(branches(model, words))
    depths = {path: i for i, path in enumerate(dict.fromkeys(b.path for b in found))}
    heads = _heads(found, depths)
    hidden = _hidden(found, depths)
    labels = layers_of(found, depths)
    stay = next((b.parts for b in found if isinstance(b.parts, str)), words.heads)
    return replace(
        seen,
        family=family,
        blocks=tuple(_block(model, path, i) for path, i in depths.items() if path),
        heads=heads,
        hidden=hidden,
        linears=labeled(seen.linears, labels),
        convs=labeled(seen.convs, labels),
        missing={
            **{kind: why for kind, why in seen.missing.items() if kind not in KINDS},
            "heads": stay,
            "hidden": "none of its MLPs is of a class that is known",
            "tokens": words.tokens,
            "width": words.width,
            "positions": relative(model) or words.positions,
            "scores": SCORES,
        },
    )


KINDS = ("blocks", "heads", "hidden", "tokens", "width", "positions")


def _distinct(found: Iterator[Branch]) -> list[Branch]:
    """Modules that several blocks share are one branch, of the first of them."""
    once: dict[tuple[int, type], Branch] = {}
    for branch in found:
        held = getattr(branch.owner, branch.attribute)
        once.setdefault((id(held), type(branch.parts)), branch)
    return list(once.values())


def _block(model: nn.Module, path: str, index: int) -> BlockSite:
    owner, _, name = path.rpartition(".")
    return BlockSite(path, model.get_submodule(owner), name, index)


def _heads(found: Sequence[Branch], depths: dict[str, int]) -> tuple[HeadsSite, ...]:
    taken: set[str] = set()
    return tuple(
        HeadsSite(
            key_of(branch, "heads", taken),
            branch.owner,
            branch.attribute,
            branch.parts,
            depths[branch.path],
            opens=branch.parts.forward is not None,
        )
        for branch in found
        if isinstance(branch.parts, AttentionParts)
    )


def _hidden(found: Sequence[Branch], depths: dict[str, int]) -> tuple[HiddenSite, ...]:
    taken: set[str] = set()
    return tuple(
        HiddenSite(
            key_of(branch, "hidden", taken),
            branch.owner,
            branch.attribute,
            branch.parts,
            depths[branch.path],
        )
        for branch in found
        if isinstance(branch.parts, MlpParts)
    )
