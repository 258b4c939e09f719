"""What an earlier run gave, operation by operation, to compare a model that was cut since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_vision.backbones._channel_calls import Colorings
from peft_vision.backbones._channel_labels import Atoms, Shape, varying

Gone = NDArray[np.bool_]
"""For every atom whether the set of which it is the root was removed."""

LOOK_AHEAD = 4
"""Operations among which one is looked for that has a counterpart in the run before."""


class Result(NamedTuple):
    """What an operation gave, without the numbers."""

    shape: Shape
    dtype: torch.dtype
    colorings: Colorings


@dataclass
class Record:
    """An operation of an earlier run.

    Attributes:
        numbers: the fractions among its arguments, such as a scale that follows from a width.
        several: it gives a list, of however many results.
    """

    name: str
    numbers: tuple[float, ...]
    results: list[Result]
    several: bool


class Earlier:
    """The operations of an earlier run, in order, without what is gone since."""

    def __init__(self, records: Sequence[Record], atoms: Atoms, gone: Gone) -> None:
        self.records, self.atoms, self.gone = records, atoms, gone
        self.place = 0

    def following(self, name: str) -> Record | None:
        """What the operation gave that comes next under this name; None where none does."""
        # A slice that takes everything is no operation at all: others may have to be skipped.
        ahead = self.records[self.place : self.place + LOOK_AHEAD]
        skipped = next((n for n, record in enumerate(ahead) if record.name == name), None)
        if skipped is None:
            return None
        record = ahead[skipped]
        self.place += skipped + 1
        return replace(record, results=[self._less(result) for result in record.results])

    def _less(self, result: Result) -> Result:
        size, found = list(result.shape), []
        for c in result.colorings:
            gone = self.gone[self.atoms.roots(c)]
            for d in varying(c):
                stays = ~gone.all(axis=tuple(o for o in range(c.ndim) if o != d), keepdims=True)
                size[d] = int(stays.sum())
                c = c.compress(stays.ravel(), axis=d)  # noqa: PLW2901
                gone = gone.compress(stays.ravel(), axis=d)
            found.append(self.atoms.roots(c))
        return result._replace(shape=tuple(size), colorings=found)


def alike(numbers: tuple[float, ...], out: Any, expected: Record) -> bool:
    """Whether the results have the sizes that were expected, where channels are in them."""
    if out is None or numbers != expected.numbers:
        return False
    results = [out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)]
    return len(results) == len(expected.results) and all(
        tuple(t.shape) == r.shape or not r.colorings
        for t, r in zip(results, expected.results, strict=True)
    )
