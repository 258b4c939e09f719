"""Gates with noise: what a variational information bottleneck puts on the units of a network.

Each unit i is multiplied by z_i = mu_i + sigma_i e with e ~ N(0, 1). With the prior N(0, xi_i) at
its best xi_i, what the gate lets through costs KL_i = 1/2 log(1 + mu_i^2 / sigma_i^2); a unit is
worth nothing where sigma_i^2 >= mu_i^2 (VIBNet; Dai et al., ICML 2018). Evaluation uses the mean.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.surgery import (
    keep_inputs,
    keep_outputs,
    select_parameter,
    weight_of,
)
from peft_vision.layers.traits import Temporary

MEAN, LOG_VARIANCE = 1.0, -9.0
"""Where a gate starts: exactly open, with hardly any noise."""

BOUNDS = (-14.0, 4.0)
"""Of the log variance."""

UNBOUNDED = (-math.inf, math.inf)

STEEPNESS = 10.0
"""Of the soft probability that a unit stays, sigmoid(-10 log alpha)."""


class Hastened(torch.autograd.Function):
    """start + speed * offset, within bounds; the gradient arrives at the offset as it is.

    Gates need steps of about 0.05, a hundred times those of weights, and no weight decay. As
    offsets that count `speed` times they get the one; and decay pulls them, at the slow rate of the
    weights, towards where they started instead of towards zero. So one plain optimizer with one
    learning rate trains both. What would only push further out of the bounds is held back. With
    `up` the gradient is reversed: the optimizer, which descends, then ascends.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        offset: Tensor,
        start: float,
        speed: float,
        bounds: tuple[float, float],
        up: bool,
    ) -> Tensor:
        low, high = bounds
        wide = offset.to(torch.promote_types(offset.dtype, torch.float32))
        value = start + speed * wide
        ctx.save_for_backward(value <= low, value >= high)
        ctx.up, ctx.dtype = up, offset.dtype
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        below, above = ctx.saved_tensors
        held = (below & (grad > 0)) | (above & (grad < 0))
        grad = torch.where(held, torch.zeros_like(grad), grad)
        return (-grad if ctx.up else grad).to(ctx.dtype), None, None, None, None


class Gate(nn.Module):
    """Noisy factors of some units.

    Attributes:
        mean_offset, logvar_offset: what is trained; see `Hastened`. One number per unit.
        of: how many units there were when the gate was made.
        speed: how many times faster than a weight they move.
    """

    def __init__(self, units: int, speed: float, **like: Any) -> None:
        super().__init__()
        self.mean_offset = nn.Parameter(torch.zeros(units, **like))
        self.logvar_offset = nn.Parameter(torch.zeros(units, **like))
        self.of = units
        self.speed = speed

    @property
    def units(self) -> int:
        """How many there are now."""
        return int(self.mean_offset.shape[0])

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.units}"

    def mean(self) -> Tensor:
        """mu, one per unit, float32 or wider."""
        value: Tensor = Hastened.apply(self.mean_offset, MEAN, self.speed, UNBOUNDED, False)
        return value

    def log_variance(self) -> Tensor:
        """Log sigma^2, one per unit, float32 or wider."""
        value: Tensor = Hastened.apply(self.logvar_offset, LOG_VARIANCE, self.speed, BOUNDS, False)
        return value

    def log_alpha(self) -> Tensor:
        """Log alpha = log(sigma^2 / mu^2): a unit is worth nothing where this is 0 or more."""
        return self.log_variance() - (self.mean().square() + 1e-8).log()

    def kept(self) -> Tensor:
        """1 for each unit that is worth something, else 0; without gradient."""
        log_alpha = self.log_alpha().detach()
        return (log_alpha < 0).to(log_alpha.dtype)

    def share(self) -> Tensor:
        """The share of the units there were that is expected to stay, with gradient.

        The value is that of the steep probability, whose gradient is nothing but for a unit at the
        border; the gradient is that of sigmoid(-log alpha). Far below the border it shrinks just as
        that of the noise in the loss does, so that what a unit is worth and what it costs are
        weighed against each other from the first step on.
        """
        log_alpha = self.log_alpha()
        gentle = torch.sigmoid(-log_alpha)
        steep = torch.sigmoid(-STEEPNESS * log_alpha)
        return (gentle + (steep - gentle).detach()).sum() / self.of

    def kl(self) -> Tensor:
        """The sum over units of 1/2 log(1 + mu^2 / sigma^2)."""
        # log(1 + e^-a), which is exact for large and small a alike.
        return 0.5 * nn.functional.softplus(-self.log_alpha()).sum()

    def factors(self, batch: int, features: int) -> Tensor:
        """What to multiply `features` by: batch x features while training, else 1 x features.

        One draw for each example and unit. A unit that is worth nothing is closed; its gradient is
        that of an open one, so that it may come back.
        """
        z = self.mean()
        if self.training:
            noise = torch.randn(batch, self.units, device=z.device, dtype=z.dtype)
            z = z + (0.5 * self.log_variance()).exp() * noise
        else:
            z = z.unsqueeze(0)
        z = z + (self.kept() * z - z).detach()
        return self.over(z, features)

    def over(self, values: Tensor, features: int) -> Tensor:
        """Values of units (... units) as values of features, which units have in equal parts."""
        return values.repeat_interleave(features // self.units, dim=-1)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply x (B ... features) by the factors, the same for all tokens of an example."""
        z = self.factors(x.shape[0], x.shape[-1])
        return x * z.reshape(z.shape[0], *[1] * (x.dim() - 2), z.shape[1]).to(x.dtype)

    def keep(self, units: Sequence[int]) -> None:
        """Keep the gates of some units, in place."""
        select_parameter(self, "mean_offset", units)
        select_parameter(self, "logvar_offset", units)

    def keep_features(self, indices: Sequence[int], features: int) -> None:
        """Keep the gates of the units that some of the features belong to, in place."""
        each = features // self.units
        self.keep(sorted({index // each for index in indices}))


class Gated(nn.Module, Temporary, ABC):
    """A module with gates on it, which it is kept in as `inner`: views and PEFT see that one.

    Attributes:
        host: a module that belongs to all gates together, in one of them only.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.host: nn.Module | None = None
        self.train(inner.training)


class GatedLinear(Gated):
    """A linear with a gate on the units that it reads, and one on all that it gives.

    Attributes:
        units: of its inputs, each of one or more features; None: no gate.
        branch: one factor of the whole output; None: no gate.
    """

    def __init__(self, inner: nn.Module, units: Gate | None, branch: Gate | None) -> None:
        super().__init__(inner)
        self.units = units
        self.branch = branch

    @property
    def in_features(self) -> int:
        """Of the linear."""
        return int(self.inner.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Of the linear."""
        return int(self.inner.out_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The linear's output, B ... O."""
        y: Tensor = self.inner(x if self.units is None else self.units.multiply(x))
        return y if self.branch is None else self.branch.multiply(y)

    def require_foldable(self) -> None:
        """Refuse a layer whose weight is not all in one tensor.

        Raises:
            UnsupportedSite: it is not a plain linear.
        """
        own = [name for name, _ in self.inner.named_parameters()]
        plain = isinstance(self.inner, nn.Linear) and not set(own) - {"weight", "bias"}
        if not plain or not self.inner.weight.dtype.is_floating_point:
            raise UnsupportedSite(
                "The mean of a gate can be folded into a plain linear, and this is a "
                f"{type(self.inner).__name__}. Merge adapters first; quantize afterwards."
            )

    @torch.no_grad()
    def settle(self) -> nn.Module:
        """The linear with the gates' means in its columns and rows, in place.

        Raises:
            UnsupportedSite: it is not a plain linear.
        """
        self.require_foldable()
        weight: Tensor = self.inner.weight  # type: ignore[assignment]
        bias: Tensor | None = self.inner.bias  # type: ignore[assignment]
        if self.units is not None:
            weight.mul_(self.units.over(self.units.mean(), weight.shape[1]).to(weight))
        if self.branch is not None:
            for values in (weight, bias):
                if values is not None:
                    values.mul_(self.branch.mean().to(values))
        return self.inner


@keep_inputs.register(GatedLinear)
def _(layer: GatedLinear, indices: Sequence[int]) -> None:
    if layer.units is not None:
        layer.units.keep_features(indices, layer.in_features)
    keep_inputs(layer.inner, indices)


@keep_outputs.register(GatedLinear)
def _(layer: GatedLinear, indices: Sequence[int]) -> None:
    keep_outputs(layer.inner, indices)


@weight_of.register(GatedLinear)
def _(layer: GatedLinear) -> Tensor:
    return weight_of(layer.inner)
