"""Filters of one direction each, one after the other, in the place of a square or cubic kernel.

A priori compression (before training, with `init="fresh"`) as in "A priori compression of
convolutional neural networks"; of a trained layer, the nearest such chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from peft_vision.decomposers._factoring import Factoring
from peft_vision.decomposers._job import Job, check
from peft_vision.decomposers._low_rank import along, balanced, bonds, energy, train, whole
from peft_vision.decomposers._scheme import Rank, Scheme
from peft_vision.layers.layer_shape import LayerShape


@dataclass(frozen=True)
class OneWay(Factoring):
    """Replace a k x k (x k) convolution by filters of one direction each, with R channels between.

    Each filter carries the stride, padding and dilation of its own direction; groups stay.
    """

    ratio: float = 0.5
    """Share that `wrap` takes of the multiply-accumulates that can be saved, in [0, 1]."""

    rank: int | None = None
    """Channels between two filters (in each group), the same in every layer, at least 1; then
    every layer is factored, also where that saves nothing. None: as `ratio` or a budget says."""

    init: str = "dense"
    """First values: "dense", nearest to the layer's weight; "fresh", random values of its size."""

    minimum: int = 512
    """Layers with fewer weights than this stay as they are."""

    def __post_init__(self) -> None:
        check(self.ratio, self.rank, self.init, self.minimum)

    def job(self) -> Job:
        """See `Factoring`."""
        return Job(_Filters(), ("convs",), self.rank, self.init, self.minimum)


@dataclass(frozen=True)
class _Filters(Scheme):
    """Inputs and the first direction | the second | ... | the last direction and outputs."""

    def why_not(self, shape: LayerShape) -> str:
        """Kernels of one direction cannot be divided."""
        return "" if len(shape.wide) > 1 else "its kernel is longer than 1 along one axis at most"

    def full(self, shape: LayerShape) -> Rank:
        """The most that a bond between two directions can carry."""
        return whole(_sizes(shape))

    def shapes(self, shape: LayerShape, rank: Rank) -> list[LayerShape]:
        """A filter per direction; axes with a kernel of 1 belong to the first."""
        groups = shape.groups
        ranks = bonds(rank, _sizes(shape))
        channels = [shape.inputs, *(groups * r for r in ranks), shape.outputs]
        return [
            shape.between(channels[place], channels[place + 1], axes, groups)
            for place, axes in enumerate(_axes(shape))
        ]

    def weights(self, kernel: Tensor, rank: Rank) -> list[Tensor]:
        """Split off one direction after the other; two directions are split optimally."""
        sizes = kernel.shape[2:]
        wide = [axis for axis, size in enumerate(sizes) if size > 1]
        outputs, inputs = kernel.shape[:2]
        ordered = kernel.reshape(outputs, inputs, *(sizes[axis] for axis in wide)).movedim(0, -1)
        tensor = _grouped(ordered)
        cores = train(tensor, bonds(rank, tensor.shape))
        first = cores[0].reshape(inputs, sizes[wide[0]], -1).permute(2, 0, 1)
        middle = [core.permute(2, 0, 1) for core in cores[1:-1]]
        last = cores[-1].reshape(-1, sizes[wide[-1]], outputs).permute(2, 0, 1)
        parts = [first, *middle, last]
        return balanced([along(p, sizes, [axis]) for p, axis in zip(parts, wide, strict=True)])

    def energies(self, kernels: Tensor) -> list[Tensor]:
        """Of the unfoldings at every bond."""
        sizes = kernels.shape[3:]
        wide = [size for size in sizes if size > 1]
        groups, outputs, inputs = kernels.shape[:3]
        ordered = kernels.reshape(groups, outputs, inputs, *wide).movedim(1, -1)
        rows, found = inputs, []
        for size in wide[:-1]:
            rows *= size
            found.append(energy(ordered.reshape(groups, rows, -1)))
        return found


def _sizes(shape: LayerShape) -> list[int]:
    """Inputs and first direction, further directions, last direction and outputs: of one group."""
    sizes = [shape.kernel[axis] for axis in shape.wide]
    sizes[0] *= shape.inputs // shape.groups
    sizes[-1] *= shape.outputs // shape.groups
    return sizes


def _axes(shape: LayerShape) -> list[Sequence[int]]:
    short = [axis for axis in range(len(shape.kernel)) if axis not in shape.wide]
    first, *rest = shape.wide
    return [[first, *short], *([axis] for axis in rest)]


def _grouped(ordered: Tensor) -> Tensor:
    """Inputs x k1 x ... x kn x outputs, with both ends as one axis with the direction beside."""
    inner = ordered.flatten(0, 1)
    return inner.flatten(-2, -1)
