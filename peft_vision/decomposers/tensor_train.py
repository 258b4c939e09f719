"""Tensor trains (Oseledets, 2011): of convolutions one core per axis, of linears two cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.decomposers._factoring import Factoring
from peft_vision.decomposers._job import Job, check, check_kinds
from peft_vision.decomposers._low_rank import along, balanced, bonds, energy, whole, with_tensorly
from peft_vision.decomposers._matrix_train import MatrixTrain
from peft_vision.decomposers._scheme import Rank, Scheme
from peft_vision.layers.factorized import Factored
from peft_vision.layers.layer_shape import LayerShape, Sizes


@dataclass(frozen=True)
class TensorTrain(Factoring):
    """Replace a convolution by 1 x 1, a filter per direction, 1 x 1, with few channels between.

    A 1 x 1 that would not narrow anything is left out. A linear is replaced by two small ones,
    with its inputs and outputs counted as a table of rows and columns each.
    """

    ratio: float = 0.5
    """Share that `wrap` takes of the multiply-accumulates that can be saved, in [0, 1]."""

    rank: int | None = None
    """Channels between two factors (in each group), the same in every layer, at least 1; then
    every layer is factored, also where that saves nothing. None: as `ratio` or a budget says."""

    init: str = "dense"
    """First values: "dense", nearest to the layer's weight; "fresh", random values of its size."""

    layers: tuple[str, ...] = ("linears", "convs")
    """Which: "linears", "convs", "classifier"."""

    minimum: int = 512
    """Layers with fewer weights than this stay as they are."""

    def __post_init__(self) -> None:
        check(self.ratio, self.rank, self.init, self.minimum)
        check_kinds(self.layers)

    def job(self) -> Job:
        """See `Factoring`."""
        return Job(_Trains(), self.layers, self.rank, self.init, self.minimum)


@dataclass(frozen=True)
class _Train(Scheme):
    """Inputs | the first direction | ... | the last direction | outputs."""

    def why_not(self, shape: LayerShape) -> str:
        """Without a kernel there is nothing between the channels."""
        return "" if shape.wide else "it has no kernel"

    def full(self, shape: LayerShape) -> Rank:
        """The most that each bond can carry."""
        return whole(_sizes(shape))

    def shapes(self, shape: LayerShape, rank: Rank) -> list[LayerShape]:
        """Axes with a kernel of 1 belong to the first direction."""
        groups = shape.groups
        ranks = [groups * r for r in bonds(rank, _sizes(shape))]
        first, *others = shape.wide
        short = [axis for axis in range(len(shape.kernel)) if axis not in shape.wide]
        found = [
            shape.between(ranks[place], ranks[place + 1], axes, groups)
            for place, axes in enumerate([[first, *short], *([axis] for axis in others)])
        ]
        if ranks[0] < shape.inputs:
            found.insert(0, shape.between(shape.inputs, ranks[0], (), groups))
        if ranks[-1] < shape.outputs:
            found.append(shape.between(ranks[-1], shape.outputs, (), groups))
        return found

    def weights(self, kernel: Tensor, rank: Rank) -> list[Tensor]:
        """Singular vectors, one unfolding after the other."""
        outputs, inputs, *sizes = kernel.shape
        wide = [axis for axis, size in enumerate(sizes) if size > 1]
        modes = [inputs, *(sizes[axis] for axis in wide), outputs]
        tensor = kernel.reshape(outputs, *modes[:-1]).movedim(0, -1)
        ranks = bonds(rank, modes)
        first, *cores, last = with_tensorly(lambda tl: _cores(tl, tensor, ranks))
        found = [core.permute(2, 0, 1) for core in cores]  # r x k x r' to outputs, inputs, k
        narrow, widen = first[0].t(), last[..., 0].t()
        if ranks[0] == inputs:
            found[0] = torch.einsum("onk,ni->oik", found[0], narrow)
        if ranks[-1] == outputs:
            found[-1] = torch.einsum("no,oik->nik", widen, found[-1])
        parts = [along(part, sizes, [axis]) for part, axis in zip(found, wide, strict=True)]
        if ranks[0] < inputs:
            parts.insert(0, along(narrow, sizes, ()))
        if ranks[-1] < outputs:
            parts.append(along(widen, sizes, ()))
        return balanced(parts)

    def energies(self, kernels: Tensor) -> list[Tensor]:
        """Of the unfoldings at every bond."""
        groups, outputs, inputs, *sizes = kernels.shape
        wide = [size for size in sizes if size > 1]
        ordered = kernels.reshape(groups, outputs, inputs, *wide).movedim(1, -1)
        rows, found = 1, []
        for size in (inputs, *wide):
            rows *= size
            found.append(energy(ordered.reshape(groups, rows, -1)))
        return found


@dataclass(frozen=True)
class _Trains(Scheme):
    """One rule for matrices, another for kernels."""

    matrix: Scheme = field(default_factory=MatrixTrain)
    kernel: Scheme = field(default_factory=_Train)

    def _of(self, shape: LayerShape) -> Scheme:
        return self.kernel if shape.kernel else self.matrix

    def why_not(self, shape: LayerShape) -> str:
        """As the rule for this kind of layer says, and so on below."""
        return self._of(shape).why_not(shape)

    def full(self, shape: LayerShape) -> Rank:
        """See `why_not`."""
        return self._of(shape).full(shape)

    def shapes(self, shape: LayerShape, rank: Rank) -> list[LayerShape]:
        """See `why_not`."""
        return self._of(shape).shapes(shape, rank)

    def macs(self, shape: LayerShape, rank: Rank, grid: Sizes, rows: int) -> int:
        """See `why_not`."""
        return self._of(shape).macs(shape, rank, grid, rows)

    def weights(self, kernel: Tensor, rank: Rank) -> list[Tensor]:
        """See `why_not`."""
        return (self.kernel if kernel.dim() > 2 else self.matrix).weights(kernel, rank)

    def energies(self, kernels: Tensor) -> list[Tensor] | None:
        """See `why_not`."""
        return (self.kernel if kernels.dim() > 3 else self.matrix).energies(kernels)

    def product(
        self, shape: LayerShape, shapes: Sequence[LayerShape], weights: Sequence[Tensor]
    ) -> Tensor:
        """See `why_not`."""
        return self._of(shape).product(shape, shapes, weights)

    def put(
        self, layer: nn.Module, shapes: Sequence[LayerShape], weights: Sequence[Tensor]
    ) -> Factored:
        """See `why_not`."""
        return self._of(shapes[0]).put(layer, shapes, weights)


def _sizes(shape: LayerShape) -> list[int]:
    """Inputs of a group, each direction, outputs of a group."""
    directions = [shape.kernel[axis] for axis in shape.wide]
    return [shape.inputs // shape.groups, *directions, shape.outputs // shape.groups]


def _cores(tl: Any, tensor: Tensor, ranks: tuple[int, ...]) -> Any:
    return list(tl.decomposition.tensor_train(tensor.contiguous(), rank=[1, *ranks, 1]))
