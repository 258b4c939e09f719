"""Tensor train: a convolution as a chain of narrow ones, one per axis (Oseledets, 2011)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft_vision.backbones.sites import Backbone
from peft_vision.decomposers._job import Job, check
from peft_vision.decomposers._layers import decide, put_in_place
from peft_vision.decomposers._low_rank import along, balanced, bonds, energy, whole, with_tensorly
from peft_vision.decomposers._scheme import Rank, Scheme
from peft_vision.layers.layer_shape import LayerShape
from peft_vision.method import Evidence, Method, Stage
from peft_vision.plan import Decisions


@dataclass(frozen=True)
class TensorTrain(Method):
    """Replace a convolution by 1 x 1, a filter per direction, 1 x 1, with few channels between.

    A 1 x 1 that would not narrow anything is left out.
    """

    ratio: float = 0.5
    """Share that `wrap` takes of the multiply-accumulates that can be saved, in [0, 1]."""

    rank: int | None = None
    """Channels between two factors (in each group), the same in every layer, at least 1; then
    every layer is factored, also where that saves nothing. None: as `ratio` or a budget says."""

    init: str = "dense"
    """First values: "dense", nearest to the layer's weight; "fresh", random values of its size."""

    minimum: int = 512
    """Layers with fewer weights than this stay as they are."""

    stage: ClassVar[Stage] = Stage.FACTOR
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "params", "latency_ms"})

    def __post_init__(self) -> None:
        check(self.ratio, self.rank, self.init, self.minimum)

    @property
    def strength(self) -> float:
        """The ratio; 1 where ranks are given."""
        return self.ratio if self.rank is None else 1.0

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per convolution, the ranks of the train."""
        return decide(self._job(), backbone, strength, evidence)

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Put the trains in place."""
        put_in_place(self._job(), backbone, decisions)

    def _job(self) -> Job:
        return Job(_Train(), ("convs",), self.rank, self.init, self.minimum)


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


def _sizes(shape: LayerShape) -> list[int]:
    """Inputs of a group, each direction, outputs of a group."""
    directions = [shape.kernel[axis] for axis in shape.wide]
    return [shape.inputs // shape.groups, *directions, shape.outputs // shape.groups]


def _cores(tl: Any, tensor: Tensor, ranks: tuple[int, ...]) -> Any:
    return list(tl.decomposition.tensor_train(tensor.contiguous(), rank=[1, *ranks, 1]))
