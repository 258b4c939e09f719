"""CP: a convolution as a sum of products of vectors (Lebedev et al., ICLR 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_vision.decomposers._factoring import Factoring
from peft_vision.decomposers._job import Job, check
from peft_vision.decomposers._low_rank import along, balanced, leading
from peft_vision.decomposers._scheme import Rank, Scheme
from peft_vision.layers.layer_shape import LayerShape
from peft_vision.method import check_range


@dataclass(frozen=True)
class Cp(Factoring):
    """Replace a convolution by 1 x 1, a depthwise filter per direction, and 1 x 1, over R channels.

    The factors are found by alternating least squares; every layer loses the same share.
    """

    ratio: float = 0.5
    """Share that `wrap` takes of the multiply-accumulates that can be saved, in [0, 1]."""

    rank: int | None = None
    """Channels between the factors (in each group), the same in every layer, at least 1; then
    every layer is factored, also where that saves nothing. None: as `ratio` or a budget says."""

    init: str = "dense"
    """First values: "dense", near to the layer's weight; "fresh", random values of its size."""

    iterations: int = 20
    """Rounds of alternating least squares at most, 1 to 10000."""

    minimum: int = 512
    """Layers with fewer weights than this stay as they are."""

    def __post_init__(self) -> None:
        check(self.ratio, self.rank, self.init, self.minimum)
        check_range("iterations", self.iterations, 1, 10_000)

    def job(self) -> Job:
        """See `Factoring`."""
        scheme = _Sum(int(self.iterations))
        return Job(scheme, ("convs",), self.rank, self.init, self.minimum)


RIDGE = 1e-6
"""Added to the diagonal of each least-squares problem, relative to its mean."""

ENOUGH = 1e-5
"""Rounds end when the squared error falls by less than this share of the squared norm."""

LARGE = 2**16
"""Kernels with more weights than this are iterated on in float32, in half of the time."""


@dataclass(frozen=True)
class _Sum(Scheme):
    """Outputs x inputs x each direction as a sum of R products of vectors.

    tensorly's CP builds the Khatri-Rao product of inputs and outputs: 1 GB for a convolution of
    512 x 512 x 3 x 3. Here the short axes are contracted last, and nothing larger than the kernel
    times R / k is held.
    """

    iterations: int

    def why_not(self, shape: LayerShape) -> str:
        """Without a kernel this is a matrix, for which there are direct ways."""
        return "" if shape.wide else "it has no kernel"

    def full(self, shape: LayerShape) -> Rank:
        """The rank that suffices for any kernel: all axes but the longest."""
        directions = [shape.kernel[axis] for axis in shape.wide]
        sizes = [shape.outputs // shape.groups, shape.inputs // shape.groups, *directions]
        return (math.prod(sizes) // max(sizes),)

    def shapes(self, shape: LayerShape, rank: Rank) -> list[LayerShape]:
        """Axes with a kernel of 1 belong to the first direction."""
        between = shape.groups * rank[0]
        first, *others = shape.wide
        short = [axis for axis in range(len(shape.kernel)) if axis not in shape.wide]
        return [
            shape.between(shape.inputs, between, (), shape.groups),
            shape.between(between, between, [first, *short], between),
            *(shape.between(between, between, [axis], between) for axis in others),
            shape.between(between, shape.outputs, (), shape.groups),
        ]

    def weights(self, kernel: Tensor, rank: Rank) -> list[Tensor]:
        """Axes of size 1 are left out; what is a matrix then is solved at once."""
        outputs, inputs, *sizes = kernel.shape
        wide = [axis for axis, size in enumerate(sizes) if size > 1]
        modes = [outputs, inputs, *(sizes[axis] for axis in wide)]
        places = [place for place, size in enumerate(modes) if size > 1]
        tensor = kernel.reshape([modes[place] for place in places])
        found = dict(zip(places, self._vectors(tensor, rank[0]), strict=True))
        one = kernel.new_ones(1, rank[0])
        vectors = [found.get(place, one) for place in range(len(modes))]  # each of size x R
        filters = [
            along(vectors[2 + place].t()[:, None], sizes, [axis]) for place, axis in enumerate(wide)
        ]
        narrow = along(vectors[1].t(), sizes, ())
        return balanced([narrow, *filters, along(vectors[0], sizes, ())])

    def _vectors(self, tensor: Tensor, rank: int) -> list[Tensor]:
        if rank >= math.prod(tensor.shape) // max(tensor.shape):
            return _exact(tensor, rank)
        if tensor.dim() == 2:
            left = leading(tensor, rank)
            return [left, tensor.t() @ left]
        large = tensor.numel() > LARGE
        found = _alternating(tensor.float() if large else tensor, rank, self.iterations)
        return [vectors.to(tensor) for vectors in found]


def _exact(tensor: Tensor, rank: int) -> list[Tensor]:
    """One term per place of all axes but the longest, and terms of zero for the rest."""
    longest = max(range(tensor.dim()), key=lambda axis: tensor.shape[axis])
    others = [axis for axis in range(tensor.dim()) if axis != longest]
    rows = tensor.movedim(longest, -1).flatten(0, -2)
    grid = torch.cartesian_prod(*(torch.arange(tensor.shape[axis]) for axis in others))
    vectors = [tensor.new_zeros(size, rank) for size in tensor.shape]
    vectors[longest][:, : len(rows)] = rows.t()
    places = grid.reshape(len(rows), len(others))
    for column, axis in enumerate(others):
        vectors[axis][places[:, column], torch.arange(len(rows))] = 1.0
    return vectors


def _alternating(tensor: Tensor, rank: int, iterations: int) -> list[Tensor]:
    """Each axis in turn by least squares, starting from leading vectors."""
    vectors = [_start(tensor, axis, rank) for axis in range(tensor.dim())]
    whole = float(tensor.square().sum())
    before = math.inf
    for _ in range(iterations):
        for axis in range(tensor.dim()):
            others = [place for place in range(tensor.dim()) if place != axis]
            gram = torch.ones(rank, rank, dtype=tensor.dtype, device=tensor.device)
            for place in others:
                gram = gram * (vectors[place].t() @ vectors[place])
            gram.diagonal().add_(RIDGE * gram.diagonal().mean())
            right = _contracted(tensor, vectors, axis)
            vectors[axis] = torch.linalg.solve(gram, right.t()).t()
        # Of the last axis the projection is known: |T|^2 - 2 <T, S> + |S|^2.
        last = vectors[-1]
        error = whole - 2 * float((right * last).sum()) + float(((last.t() @ last) * gram).sum())
        if before - error < ENOUGH * whole:
            break
        before = error
    return vectors


def _contracted(tensor: Tensor, vectors: Sequence[Tensor], axis: int) -> Tensor:
    """The tensor times the vectors of every axis but one: size x R."""
    order = sorted(
        (place for place in range(tensor.dim()) if place != axis), key=lambda p: -tensor.shape[p]
    )
    first, *rest = order
    moved = tensor.movedim(first, -1)
    left = [place for place in range(tensor.dim()) if place != first]
    found = moved @ vectors[first]  # the axes of `left`, then R
    for place in rest:
        at = left.index(place)
        left.remove(place)
        shape = [1] * found.dim()
        shape[at], shape[-1] = vectors[place].shape
        found = (found * vectors[place].reshape(shape)).sum(at)
    return found


def _start(tensor: Tensor, axis: int, rank: int) -> Tensor:
    """Leading vectors of one axis; where there are too few, random ones, always the same."""
    size = tensor.shape[axis]
    basis = leading(tensor.movedim(axis, 0).flatten(1), min(rank, size))
    drawn = torch.Generator().manual_seed(axis)
    more = torch.randn(size, rank - basis.shape[1], dtype=tensor.dtype, generator=drawn)
    return torch.cat([basis, more.to(tensor.device) / size**0.5], dim=1)
