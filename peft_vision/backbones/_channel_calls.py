"""An operation and the colorings of what goes into it (see `_channel_labels`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peft_vision.backbones._channel_labels import (
    Atoms,
    Coloring,
    Shape,
    aligned,
    varying,
)

Colorings = list[Coloring]


@dataclass
class Call:
    """One operation: its name, its arguments by name, what came out, and what is known.

    Attributes:
        known: colorings of a tensor. `is_data`: whether a tensor depends on the image.
    """

    name: str
    given: dict[str, Any]
    out: Any
    tensors: list[Tensor]
    atoms: Atoms
    known: Callable[[Any], Colorings]
    is_data: Callable[[Tensor], bool]
    by_group: Callable[[Tensor, int], bool]

    @property
    def shape(self) -> Shape:
        """Of the (first) result."""
        return tuple((self.out[0] if isinstance(self.out, tuple | list) else self.out).shape)

    def first(self) -> tuple[Tensor, Colorings]:
        """The first argument and its colorings."""
        x = next(iter(self.given.values()))
        return x, self.known(x)

    def freeze(self, *colorings: Coloring, why: str) -> None:
        for coloring in colorings:
            self.atoms.freeze(coloring, why)


Rule = Callable[[Call], Any]
"""Colorings of the result, or a list of them per result where there are several."""


class Rules(dict[str, Rule]):
    """Rules by the name of the operation."""

    def on(self, *names: str) -> Callable[[Rule], Rule]:
        """Enter a function for these operations."""

        def enter(function: Rule) -> Rule:
            self.update(dict.fromkeys(names, function))
            return function

        return enter


def unknown(call: Call) -> Colorings:
    """Freeze whatever comes in."""
    for tensor in call.tensors:
        call.freeze(*call.known(tensor), why=f"{call.name} mixes channels")
    return []


def joined(atoms: Atoms, operands: Sequence[tuple[Shape, Colorings]]) -> Colorings:
    """Tie what meets where tensors broadcast against each other, element by element."""
    dims = max(len(shape) for shape, _ in operands)
    extent = [1] * dims
    result: Colorings = []
    for shape, colorings in operands:
        now = (1,) * (dims - len(shape)) + shape
        fresh = [aligned(coloring, dims) for coloring in colorings]
        met: set[int] = set()
        kept: Colorings = []
        for mine in result:
            hits = [n for n, c in enumerate(fresh) if set(varying(c)) & set(varying(mine))]
            for n in hits:
                atoms.tie(mine, fresh[n])
            met.update(hits)
            if hits or all(now[d] == 1 for d in varying(mine)):
                kept.append(mine)
            else:
                atoms.freeze(mine, "channels meet something of a fixed size")
        for n, c in enumerate(fresh):
            if n in met:
                continue
            if all(extent[d] == 1 for d in varying(c)):
                kept.append(c)
            else:
                atoms.freeze(c, "channels meet something of a fixed size")
        result = kept
        extent = [max(a, b) for a, b in zip(extent, now, strict=True)]
    return result


def pointwise(call: Call) -> Colorings:
    """Elementwise with broadcasting."""
    return joined(call.atoms, [(tuple(t.shape), call.known(t)) for t in call.tensors])
