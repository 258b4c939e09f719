"""A linear as two cores with the axes of its inputs and outputs regrouped between them.

Inputs are counted as a x b and outputs as c x d, so that

    W[(c d), (a b)] = sum over r of last[d, (a r)] * first[(c r), b]

which is a tensor train of two cores over the pairs (d, a) and (c, b) (Novikov et al., 2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.factorized import Factored
from peft_vision.layers.layer_shape import LayerShape
from peft_vision.layers.surgery import keep_inputs, keep_outputs


def halves(size: int) -> tuple[int, int]:
    """The two whole factors of a number that are nearest to each other, the smaller one first."""
    small = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return small, size // small


def train_product(first: Tensor, last: Tensor, inputs: int, outputs: int) -> Tensor:
    """O I: the weight that two cores stand for.

    Args:
        first: c r x b.
        last: d x a r.
        inputs: a b.
        outputs: c d.
    """
    a, c = inputs // first.shape[1], outputs // last.shape[0]
    left, right = last.unflatten(1, (a, -1)), first.unflatten(0, (c, -1))  # type: ignore[no-untyped-call]
    return torch.einsum("dar,crb->cdab", left, right).reshape(outputs, inputs)


class TrainLinear(Factored):
    """Two linears with a transposition between: ... I -> ... O.

    Each reads its rows from an axis of their own: the first once for each of a, the last once for
    each of c. No unit of the output is a row of either, so that none can be cut on its own.
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, cores: Sequence[nn.Module], bias: Tensor | None
    ) -> None:
        """Cores: a linear from b to c r, and one from a r to d, neither with a bias."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.narrow, self.widen = cores
        self.bias = None if bias is None else nn.Parameter(bias)

    @property
    def first(self) -> Any:
        """The core that reads what arrives."""
        return self.narrow

    @property
    def last(self) -> Any:
        """The core that gives the output."""
        return self.widen

    def forward(self, x: Tensor) -> Tensor:
        """Map ... I to ... O."""
        c, b = self.out_features // self.last.out_features, self.first.in_features
        rows = x.shape[:-1]
        between: Tensor = self.first(x.reshape(*rows, self.in_features // b, b))
        regrouped = between.unflatten(-1, (c, -1)).transpose(-3, -2).flatten(-2)  # type: ignore[no-untyped-call]
        given: Tensor = self.last(regrouped).flatten(-2)
        return given if self.bias is None else given + self.bias

    def dense_weight(self) -> Tensor:
        """O I."""
        return train_product(
            self.first.weight, self.last.weight, self.in_features, self.out_features
        )

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """One linear that computes the same."""
        dense = LayerShape(self.in_features, self.out_features).make(self.dense_weight(), self.bias)
        assert isinstance(dense, nn.Linear)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, as a linear says them."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _size(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))


def train_linear(
    layer: nn.Module, shapes: Sequence[LayerShape], weights: Sequence[Tensor]
) -> TrainLinear:
    """The train that takes the place of a linear, with its bias, dtype, device and mode.

    Args:
        shapes: of the two cores, first to last.
        weights: of the cores, of any dtype; on `meta` where the layer is.
    """
    dense: Any = layer
    cores = [s.make(w.to(dense.weight), None) for s, w in zip(shapes, weights, strict=True)]
    bias = None if dense.bias is None else dense.bias.detach().clone()
    made = TrainLinear(dense.in_features, dense.out_features, cores, bias)
    return made.requires_grad_(dense.weight.requires_grad).train(layer.training)


def require_cuttable(*layers: object) -> None:
    """Refuse trains before anything is cut.

    Raises:
        UnsupportedSite: one of these layers is a train.
    """
    for layer in layers:
        if isinstance(layer, TrainLinear):
            raise UnsupportedSite(
                f"A train of cores ({layer.in_features} to {layer.out_features} features) cannot "
                "be cut: a feature is no row or column of a core. Cut first and factor what stays, "
                "or fold it (layers.factorized.fold_factors) and cut the dense layer."
            )


@keep_outputs.register(TrainLinear)
@keep_inputs.register(TrainLinear)
def _(layer: TrainLinear, indices: Sequence[int]) -> None:
    require_cuttable(layer)
