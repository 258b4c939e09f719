"""Which elements of tensors go together: sets of channels that can only be removed as one.

An *atom* is one position of one dimension of a parameter. A *coloring* says for every element of a
tensor to which atom it belongs: an integer array that broadcasts to the tensor's shape, of size 1
along dimensions that do not matter. An activation B C H W has a coloring 1 C 1 1; a weight has one
for its rows and one for its columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Coloring = NDArray[np.int64]
Shape = tuple[int, ...]


class Atoms:
    """A union-find over atoms, with what is known of each set.

    Attributes:
        reasons: why atoms were frozen, and how often.
        touched: roots that a tie or a freeze has changed since `watch` was called.
    """

    def __init__(self, count: int = 0) -> None:
        self._parent = np.arange(count)
        self._marks = {
            name: np.zeros(count, dtype=bool)
            for name in ("frozen", "normed", "produced", "consumed")
        }
        self.reasons: Counter[str] = Counter()
        self.touched: set[int] = set()

    @property
    def count(self) -> int:
        """How many atoms there are."""
        return len(self._parent)

    def fresh(self, count: int) -> Coloring:
        """New atoms, each alone."""
        start = len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(start, start + count)])
        for name, marks in self._marks.items():
            self._marks[name] = np.concatenate([marks, np.zeros(count, dtype=bool)])
        return np.arange(start, start + count)

    def roots(self, atoms: Coloring) -> Coloring:
        """The name of the set that each atom is in; same shape."""
        found = self._parent[atoms]
        while not np.array_equal(above := self._parent[found], found):
            found = above
        self._parent[atoms] = found
        return found

    def tie(self, first: Coloring, second: Coloring) -> None:
        """Make one set of the sets of each pair of atoms; the arrays broadcast."""
        one, other = np.broadcast_arrays(self.roots(first), self.roots(second))
        differ = one != other
        if not differ.any():
            return
        self.touched.update(one.ravel().tolist(), other.ravel().tolist())
        pairs = np.unique(np.stack([one[differ], other[differ]]), axis=1)
        for a, b in pairs.T.tolist():
            low, high = sorted((self._root(a), self._root(b)))
            self._parent[high] = low

    def _root(self, atom: int) -> int:
        while (above := int(self._parent[atom])) != atom:
            atom = above
        return atom

    def freeze(self, atoms: Coloring, why: str) -> None:
        """These stay: a set with one frozen atom is never removed."""
        self.reasons[why] += 1
        self._marks["frozen"][atoms] = True
        self.touched.update(self.roots(atoms).ravel().tolist())

    def mark(self, atoms: Coloring, what: str) -> None:
        """Note of atoms that they are `normed`, `produced` or `consumed`.

        Normed: a statistic over channels would change without them.
        """
        self._marks[what][atoms] = True

    def marked(self, what: str) -> NDArray[np.bool_]:
        """For every atom whether some member of its set is marked."""
        roots = self.roots(np.arange(len(self._parent)))
        of_root = np.bincount(roots, weights=self._marks[what], minlength=len(roots)) > 0
        found: NDArray[np.bool_] = of_root[roots]
        return found


def varying(coloring: Coloring) -> tuple[int, ...]:
    """The dimensions along which elements belong to different atoms."""
    return tuple(d for d, size in enumerate(coloring.shape) if size > 1)


def along(atoms: Coloring, dim: int, dims: int) -> Coloring:
    """A coloring of a tensor of `dims` dimensions that varies along one of them only."""
    return atoms.reshape([-1 if d == dim else 1 for d in range(dims)])


def aligned(coloring: Coloring, dims: int) -> Coloring:
    """The coloring with dimensions of 1 in front, as in broadcasting."""
    return coloring.reshape((1,) * (dims - coloring.ndim) + coloring.shape)


def compressed(coloring: Coloring) -> Coloring:
    """The coloring with size 1 wherever it is constant along a dimension."""
    for d in varying(coloring):
        first = coloring.take([0], axis=d)
        if (coloring == first).all():
            coloring = first
    return coloring


def reshaped(coloring: Coloring, before: Shape, after: Shape) -> Coloring:
    """The coloring of a tensor whose elements are laid out in another shape, in the same order."""
    full: list[int] = []
    laid: list[int] = []
    for old, new in _blocks(before, after):
        whole = any(coloring.shape[d] > 1 for d in old)
        full += [before[d] if whole else 1 for d in old]
        laid += [after[d] if whole else 1 for d in new]
    return compressed(np.broadcast_to(coloring, full).reshape(laid))


def _blocks(before: Shape, after: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of dimensions, before and after, that hold the same number of elements."""
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(old), j + len(new)
        while (left := _product(before, old)) != (right := _product(after, new)):
            if left < right:
                old.append(i)
                i += 1
            else:
                new.append(j)
                j += 1
        yield old, new


def _product(shape: Shape, dims: Sequence[int]) -> int:
    return math.prod(shape[d] for d in dims)
