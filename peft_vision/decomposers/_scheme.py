"""What one decomposition has to say for itself; everything else is shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from peft_vision.layers.factorized import Factored, chain
from peft_vision.layers.layer_shape import LayerShape, Sizes, cost_of, kernel_of

Rank = tuple[int, ...]
"""How many channels stand between each factor and the next that a rank is chosen for."""


class Scheme(ABC):
    """How a weight becomes the weights of a chain. It holds no state but settings."""

    @abstractmethod
    def why_not(self, shape: LayerShape) -> str:
        """Why layers of this shape are not factored, after "because"; empty if they are."""

    @abstractmethod
    def full(self, shape: LayerShape) -> Rank:
        """The ranks at which the chain computes what the layer does."""

    @abstractmethod
    def shapes(self, shape: LayerShape, rank: Rank) -> list[LayerShape]:
        """The factors, first to last."""

    @abstractmethod
    def weights(self, kernel: Tensor, rank: Rank) -> list[Tensor]:
        """The weights of the factors that come nearest to one group's kernel.

        Args:
            kernel: outputs, inputs, kernel; the same tensor gives the same factors.

        Returns:
            Per factor its outputs, inputs of a group, kernel: for one group.
        """

    def energies(self, kernels: Tensor) -> list[Tensor] | None:
        """Per rank, how much each of its components holds of the squared norm, falling.

        Args:
            kernels: groups, outputs, inputs, kernel.

        Returns:
            None where that cannot be told without factoring; then layers lose equal shares.
        """
        return None

    def macs(self, shape: LayerShape, rank: Rank, grid: Sizes, rows: int) -> int:
        """Multiply-accumulates of the factors.

        Args:
            grid: size of the grid that arrives; empty for linears.
            rows: how many grids, or rows of a linear, arrive.
        """
        return cost_of(self.shapes(shape, rank), grid, rows)

    def product(
        self, shape: LayerShape, shapes: Sequence[LayerShape], weights: Sequence[Tensor]
    ) -> Tensor:
        """The weight that factors of these shapes stand for, its axes in any order."""
        return kernel_of([(w, one.groups) for w, one in zip(weights, shapes, strict=True)])

    def put(
        self, layer: nn.Module, shapes: Sequence[LayerShape], weights: Sequence[Tensor]
    ) -> Factored:
        """The factors as what takes the place of `layer`."""
        return chain(layer, shapes, weights)


def clipped(rank: int, full: Sequence[int]) -> Rank:
    """One number for every rank, as far as each goes."""
    return tuple(min(rank, most) for most in full)
