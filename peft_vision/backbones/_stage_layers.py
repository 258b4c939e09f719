"""The layers of attention modules and MLPs, and what each does in its branch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from peft_vision.backbones.sites import LayerSite, Role
from peft_vision.layers.attention import attention_inside
from peft_vision.layers.attention_parts import AttentionParts, pieces_of
from peft_vision.layers.bottleneck import inside, place_inside
from peft_vision.layers.mlp import MlpParts
from peft_vision.layers.named_parts import holder_of
from peft_vision.layers.split_linear import SplitLinear

ROLES: dict[str, Role] = {
    "q": "q",
    "k": "k",
    "v": "v",
    "wq": "q",
    "wk": "k",
    "wv": "v",
    "qk": "q",
    "kv": "v",
    "qkv": "qkv",
    "attn": "q",
    "query": "q",
    "key": "k",
    "value": "v",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
}
"""What a linear does by its name; one that gives two of the three goes by the one that LoRA's paper
adapts."""


@dataclass(frozen=True)
class Branch:
    """One attention module or MLP: `owner` holds it under `attribute`, and is called `path`."""

    path: str
    owner: nn.Module
    attribute: str
    parts: AttentionParts | MlpParts | str


def module_of(branch: Branch) -> nn.Module:
    """The family's own module, also where one of ours stands in its place."""
    held: nn.Module = getattr(branch.owner, branch.attribute)
    return inside(held) if isinstance(branch.parts, MlpParts) else attention_inside(held)


def key_of(branch: Branch, kind: str, taken: set[str]) -> str:
    """The block's label and the kind; a second branch of a kind goes by its own name besides."""
    short = f"{branch.path}.{kind}" if branch.path else f"{branch.attribute}.{kind}"
    key = short if short not in taken else f"{branch.path}.{branch.attribute}.{kind}"
    taken.add(key)
    return key


Labels = dict[tuple[int, str], LayerSite]


def layers_of(found: Sequence[Branch], depths: Mapping[str, int]) -> Labels:
    """The linears and convolutions whose part in a branch is known, by owner and attribute."""
    taken: set[str] = set()
    sites = [
        LayerSite(
            key_of(branch, label, taken), *place_inside(owner, name), role, depths[branch.path]
        )
        for branch in found
        for owner, name, role, label in _named(branch)
    ]
    return {(id(site.owner), site.attribute): site for site in sites}


def _named(branch: Branch) -> Iterator[tuple[nn.Module, str, Role, str]]:
    """(owner, attribute, role, label) of the layers of a branch."""
    parts, module = branch.parts, module_of(branch)
    if isinstance(parts, str):
        return
    for name, role, label in _roles(parts):
        owner, last = holder_of(module, name)
        layer = getattr(owner, last)
        if isinstance(layer, SplitLinear):
            yield from ((layer, third, ROLES[third], third) for third in ("q", "k", "v"))
        else:
            yield owner, last, role, label


def _roles(parts: AttentionParts | MlpParts) -> Iterator[tuple[str, Role, str]]:
    """(name, role, label) of the layers.

    A linear whose queries, keys and values alternate by head is called ``qkv`` and goes by "q": it
    is no three linears, one after the other, that could be adapted on their own.
    """
    if isinstance(parts, MlpParts):
        ups: Sequence[Role] = ("gate", "up") if len(parts.up) == 2 else ("up",)
        yield from ((name, role, role) for name, role in zip(parts.up, ups, strict=True))
        yield parts.down, "down", "down"
        return
    for name, pieces in zip(parts.qkv, pieces_of(parts), strict=True):
        role = _role(name)
        yield name, "q" if role == "qkv" and pieces != 3 else role, role
    yield parts.out, "out", "out"


def _role(name: str) -> Role:
    """By the first or the last part of a name that says it: ``q.ln.linear``, ``self.query``."""
    found = (ROLES[step] for step in name.split(".") if step in ROLES)
    return next(found, "qkv")


def labeled(sites: Sequence[LayerSite], labels: Labels) -> tuple[LayerSite, ...]:
    """The sites, in their order, by the labels and roles that are known."""
    return tuple(labels.get((id(s.owner), s.attribute), s) for s in sites)
