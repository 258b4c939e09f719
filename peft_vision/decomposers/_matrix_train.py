"""The train of two cores that a linear becomes (Novikov et al., 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from peft_vision.decomposers._low_rank import balanced, energy, leading
from peft_vision.decomposers._scheme import Rank, Scheme
from peft_vision.layers.factorized import Factored
from peft_vision.layers.layer_shape import LayerShape, Sizes
from peft_vision.layers.train_linear import halves, train_linear, train_product


@dataclass(frozen=True)
class MatrixTrain(Scheme):
    """Inputs a x b, outputs c x d, a and c the smaller ones: cores of b to c r and of a r to d.

    a c (b + d) multiply-accumulates for each rank and row; with the larger ones in the place of
    the smaller, and so in the other order of the two products, it would be b d (a + c).
    """

    def why_not(self, shape: LayerShape) -> str:
        """Matrices only."""
        return "it is a convolution" if shape.kernel else ""

    def full(self, shape: LayerShape) -> Rank:
        """The smaller side of the regrouped matrix."""
        (a, b), (c, d) = halves(shape.inputs), halves(shape.outputs)
        return (min(a * d, b * c),)

    def shapes(self, shape: LayerShape, rank: Rank) -> list[LayerShape]:
        """The core that reads, and the one that gives."""
        (a, b), (c, d) = halves(shape.inputs), halves(shape.outputs)
        return [LayerShape(b, c * rank[0]), LayerShape(a * rank[0], d)]

    def macs(self, shape: LayerShape, rank: Rank, grid: Sizes, rows: int) -> int:
        """The first core is called once for each of a, the last for each of c."""
        (a, _), (c, _) = halves(shape.inputs), halves(shape.outputs)
        first, last = self.shapes(shape, rank)
        return rows * (a * first.weights + c * last.weights)

    def weights(self, kernel: Tensor, rank: Rank) -> list[Tensor]:
        """The nearest of this rank: singular vectors of the regrouped matrix, split in halves."""
        (a, b), (c, d) = halves(kernel.shape[1]), halves(kernel.shape[0])
        size = rank[0]
        matrix = _regrouped(kernel[None])[0]
        left = leading(matrix, size)
        left, right = balanced([left.t(), (left.t() @ matrix).t()])
        last = left.t().reshape(d, a * size)
        first = right.t().reshape(size, c, b).transpose(0, 1)
        return [first.reshape(c * size, b), last]

    def energies(self, kernels: Tensor) -> list[Tensor]:
        """Squared singular values of the regrouped matrix."""
        return [energy(_regrouped(kernels))]

    def product(
        self, shape: LayerShape, shapes: Sequence[LayerShape], weights: Sequence[Tensor]
    ) -> Tensor:
        """The dense matrix."""
        first, last = weights
        return train_product(first, last, shape.inputs, shape.outputs)

    def put(
        self, layer: nn.Module, shapes: Sequence[LayerShape], weights: Sequence[Tensor]
    ) -> Factored:
        """Two linears with a transposition between."""
        return train_linear(layer, shapes, weights)


def _regrouped(kernels: Tensor) -> Tensor:
    """G x (c d) x (a b) as G x (d a) x (c b)."""
    groups, outputs, inputs = kernels.shape
    (a, b), (c, d) = halves(inputs), halves(outputs)
    apart = kernels.reshape(groups, c, d, a, b).permute(0, 2, 3, 1, 4)
    return apart.reshape(groups, d * a, c * b)
