"""An MLP without its activation: two linears in a row are one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.layers.mlp import MlpParts


class LinearMlp(nn.Module):
    """Stands where an MLP was: D -> D by one linear with a bias.

    Attributes:
        linear: the linear; views and PEFT reach it there.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @classmethod
    def instead_of(cls, mlp: nn.Module, parts: MlpParts, *, zero: bool = False) -> LinearMlp:
        """The product of an MLP's two linears, as if it had no activation between them.

        Args:
            mlp: with one plain `up` linear and no norm, unless `zero`.
            zero: start from zero, for values that are fitted afterwards.
        """
        down: Any = getattr(mlp, parts.down)
        up: Any = getattr(mlp, parts.up[0])
        where = {"device": down.weight.device, "dtype": down.weight.dtype}
        made = nn.Linear(up.in_features, down.out_features, device="meta")
        with torch.no_grad():
            bias = torch.zeros(down.out_features, **where) if down.bias is None else down.bias
            weight = torch.zeros(down.out_features, up.in_features, **where)
            if not zero:
                weight = down.weight @ up.weight
                bias = bias if up.bias is None else bias + down.weight @ up.bias
        trained = bool(down.weight.requires_grad)
        made.weight = nn.Parameter(weight, requires_grad=trained)
        made.bias = nn.Parameter((0 * bias if zero else bias.clone()), requires_grad=trained)
        return cls(made).train(mlp.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The branch's output, B N D."""
        y: Tensor = self.linear(x)
        return y

    @torch.no_grad()
    def fit(self, inputs: Tensor, outputs: Tensor, *, ridge: float = 1e-3) -> None:
        """Take the values of the best linear map from what the MLP read to what it gave.

        Args:
            inputs: ... D. outputs: ... D, of the same tokens.
            ridge: penalty on the weight, relative to the mean variance of an input; >= 0. The bias
                is not penalized.
        """
        x, y = (t.flatten(0, -2).double() for t in (inputs, outputs))
        self.fit_moments(x.mean(0), y.mean(0), x.t() @ x / len(x), x.t() @ y / len(x), ridge=ridge)

    @torch.no_grad()
    def fit_moments(
        self, mean_x: Tensor, mean_y: Tensor, xx: Tensor, xy: Tensor, *, ridge: float = 1e-3
    ) -> None:
        """The same from gathered means (D) and mean outer products (D D) of inputs and outputs."""
        covariance = xx.double() - torch.outer(mean_x, mean_x).double()
        cross = xy.double() - torch.outer(mean_x, mean_y).double()
        # Even without a ridge, directions in which the inputs do not vary must not blow up.
        amount = max(ridge, 1e-12) * covariance.diagonal().mean().clamp_min(1e-30)
        eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        weight = torch.linalg.solve(covariance + amount * eye, cross).t()
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(mean_y.double() - weight @ mean_x.double())
