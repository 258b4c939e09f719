"""A small MLP through a narrow layer, beside or behind somebody's module (Houlsby et al., 2019).

The module that it stands at is kept under `inner`: views, surgery and PEFT reach it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peft_vision.layers.gates import Gated
from peft_vision.layers.mlp import OwnMlp
from peft_vision.layers.ownership import matched
from peft_vision.layers.readout import activation_of
from peft_vision.layers.surgery import keep_inputs, keep_outputs, weight_of


class Bottleneck(nn.Module):
    """scale * up(activation(down(x))): ... D -> ... D, through `width` units."""

    def __init__(self, features: int, width: int, activation: str, scale: float) -> None:
        super().__init__()
        self.down = nn.Linear(features, width)
        self.activation = activation_of(activation)
        self.up = nn.Linear(width, features)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """The update, in the dtype of `x`."""
        hidden = self.activation(self.down(matched(x, self.down.weight)))
        update: Tensor = self.scale * self.up(hidden)
        return update.to(x.dtype)

    def draw(self) -> None:
        """First values: `down` random and `up` zero, so that nothing changes and all is learned.

        With both at zero every gradient but that of `up`'s bias would stay zero for good.
        """
        self.down.reset_parameters()
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)


class Behind(nn.Module):
    """A linear layer, and a bottleneck on its output: y + bottleneck(y)."""

    def __init__(self, inner: nn.Module, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.inner = inner
        self.bottleneck = bottleneck

    @property
    def in_features(self) -> int:
        """Of the linear layer."""
        return int(self.inner.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Of the linear layer."""
        return int(self.inner.out_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output and the update that is computed from it."""
        y: Tensor = self.inner(x)
        update: Tensor = self.bottleneck(y)
        return y + update


class Beside(nn.Module):
    """A branch's MLP, and a bottleneck on the same input: mlp(x) + bottleneck(x)."""

    def __init__(self, inner: nn.Module, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.inner = inner
        self.bottleneck = bottleneck

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The MLP's output and the update beside it."""
        y: Tensor = self.inner(x, *args, **kwargs)
        update: Tensor = self.bottleneck(x)
        return y + update


def inside(module: nn.Module) -> nn.Module:
    """The module that bottlenecks, gates, or an MLP of ours, stand at; any other module itself."""
    while isinstance(module, Behind | Beside | OwnMlp | Gated):
        module = module.inner
    return module


def around(module: nn.Module) -> nn.Module:
    """The module without bottlenecks: a family's MLP, or one of ours in its place."""
    while isinstance(module, Behind | Beside):
        module = module.inner
    return module


def place_inside(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    """(owner, attribute) of the module that `inside` gives, reached from (owner, name)."""
    found = getattr(owner, name)
    while isinstance(found, Behind | Beside | OwnMlp | Gated):
        owner, name, found = found, "inner", found.inner
    return owner, name


@keep_inputs.register(Behind)
def _(layer: Behind, indices: Sequence[int]) -> None:
    keep_inputs(layer.inner, indices)


@keep_outputs.register(Behind)
def _(layer: Behind, indices: Sequence[int]) -> None:
    keep_outputs(layer.inner, indices)
    keep_inputs(layer.bottleneck.down, indices)
    keep_outputs(layer.bottleneck.up, indices)


@weight_of.register(Behind)
def _(layer: Behind) -> Tensor:
    return weight_of(layer.inner)
