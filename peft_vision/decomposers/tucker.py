"""Tucker-2: a convolution between fewer channels (Kim et al., ICLR 2016)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_vision.decomposers._factoring import Factoring
from peft_vision.decomposers._job import Job, check
from peft_vision.decomposers._low_rank import balanced, bonds, energy, whole, with_tensorly
from peft_vision.decomposers._scheme import Rank, Scheme
from peft_vision.layers.layer_shape import LayerShape


@dataclass(frozen=True)
class Tucker(Factoring):
    """Replace a convolution by one between fewer channels, with a 1 x 1 before and behind it.

    A 1 x 1 that would not narrow anything is left out.
    """

    ratio: float = 0.5
    """Share that `wrap` takes of the multiply-accumulates that can be saved, in [0, 1]."""

    rank: int | None = None
    """Channels before and behind the kernel (in each group), the same in every layer, at least 1;
    then every layer is factored, also where that saves nothing. None: as `ratio` or a budget
    says."""

    init: str = "dense"
    """First values: "dense", nearest to the layer's weight; "fresh", random values of its size."""

    minimum: int = 512
    """Layers with fewer weights than this stay as they are."""

    def __post_init__(self) -> None:
        check(self.ratio, self.rank, self.init, self.minimum)

    def job(self) -> Job:
        """See `Factoring`."""
        return Job(_Core(), ("convs",), self.rank, self.init, self.minimum)


@dataclass(frozen=True)
class _Core(Scheme):
    """Ranks: channels before the kernel, channels behind it."""

    def why_not(self, shape: LayerShape) -> str:
        """Without a kernel there is nothing between the channels."""
        if shape.groups == shape.inputs == shape.outputs:
            return "it is depthwise, and has no channels to narrow"
        return "" if shape.wide else "it has no kernel"

    def full(self, shape: LayerShape) -> Rank:
        """All channels of one group."""
        return whole(_sizes(shape))

    def shapes(self, shape: LayerShape, rank: Rank) -> list[LayerShape]:
        """Narrow, convolve, widen; stride, padding and dilation belong to the middle."""
        groups = shape.groups
        before, behind = (groups * r for r in bonds(rank, _sizes(shape)))
        found = [shape.between(before, behind, range(len(shape.kernel)), groups)]
        if before < shape.inputs:
            found.insert(0, shape.between(shape.inputs, before, (), groups))
        if behind < shape.outputs:
            found.append(shape.between(behind, shape.outputs, (), groups))
        return found

    def weights(self, kernel: Tensor, rank: Rank) -> list[Tensor]:
        """By orthogonal iteration, from the leading vectors of both unfoldings."""
        outputs, inputs, *sizes = kernel.shape
        before, behind = bonds(rank, [inputs, math.prod(sizes), outputs])
        core, (widen, narrow) = with_tensorly(lambda tl: _partial(tl, kernel, behind, before))
        ones = [1] * (kernel.dim() - 2)
        found = []
        if before < inputs:
            found.append(narrow.t().reshape(before, -1, *ones))
        else:
            core = torch.einsum("oi...,ni->on...", core, narrow)
        if behind < outputs:
            return balanced([*found, core, widen.reshape(-1, behind, *ones)])
        return balanced([*found, torch.einsum("oi...,no->ni...", core, widen)])

    def energies(self, kernels: Tensor) -> list[Tensor]:
        """Of the unfoldings along inputs and along outputs."""
        by_input = kernels.transpose(1, 2).flatten(2)
        return [energy(by_input), energy(kernels.flatten(2))]


def _sizes(shape: LayerShape) -> list[int]:
    """Inputs of a group, kernel, outputs of a group."""
    groups = shape.groups
    return [shape.inputs // groups, math.prod(shape.kernel), shape.outputs // groups]


def _partial(tl: Any, kernel: Tensor, behind: int, before: int) -> Any:
    found, _ = tl.decomposition.partial_tucker(kernel, rank=[behind, before], modes=[0, 1])
    return found
