"""A gated product is replaced only where the graph shows that it is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peft_vision.layers.gate_product import GateWatch
from peft_vision.layers.mlp import MlpParts
from peft_vision.layers.recomputed import origin_of

Combine = Callable[[Tensor, Tensor], Tensor]
silu, gelu = nn.functional.silu, nn.functional.gelu


class Gated(nn.Module):
    """Gate and value by one linear or by two, put together as the test says."""

    def __init__(self, combine: Combine, packed: bool) -> None:
        super().__init__()
        self.up = nn.Linear(6, 16 if packed else 8)
        self.value = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.combine, self.packed = combine, packed
        self.seen = False

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1) if self.packed else (self.up(x), self.value(x))
        product = self.combine(gate, value)
        self.down.register_forward_pre_hook(self._look)
        y: Tensor = self.down(product)
        return y

    def _look(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen = origin_of(args[0]) is not None


def taken(combine: Combine, packed: bool) -> bool:
    """Whether the product was replaced; gradients are checked in any case."""
    torch.manual_seed(0)
    mlp = Gated(combine, packed).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    torch.manual_seed(1)
    expected = torch.autograd.grad(mlp(x).square().sum(), list(mlp.up.parameters()))
    parts = MlpParts(("up",), "down", 2) if packed else MlpParts(("up", "value"), "down")
    watch = GateWatch(mlp, parts)
    torch.manual_seed(1)
    found = torch.autograd.grad(mlp(x).square().sum(), list(mlp.up.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    watch.remove()
    seen = mlp.seen
    mlp(x)
    assert not mlp.seen
    return seen


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize(
    "combine",
    [
        lambda a, b: silu(a) * b,
        lambda a, b: a * silu(b),
        lambda a, b: b * gelu(a),
        lambda a, b: gelu(b, approximate="tanh") * a,
    ],
    ids=["silu first", "silu last", "gelu", "tanh"],
)
def test_certain(combine: Combine, packed: bool) -> None:
    assert taken(combine, packed)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize(
    "combine",
    [
        lambda a, b: silu(a) * b * 2,
        lambda a, b: silu(a) + b,
        lambda a, b: silu(a) * a,
        lambda a, b: silu(a) * silu(b),
        lambda a, b: torch.relu(a) * b,
        lambda a, b: silu(a) * (b + 1),
        lambda a, b: silu(a * 2) * b,
        lambda a, b: nn.functional.dropout(silu(a) * b, 0.5),
    ],
    ids=["scaled", "sum", "itself", "both", "relu", "shifted", "scaled gate", "dropout"],
)
def test_something_else(combine: Combine, packed: bool) -> None:
    assert not taken(combine, packed)


def test_a_pass_that_fails_leaves_no_graph_behind() -> None:
    mlp = Gated(lambda a, b: silu(a[..., :7]) * b, packed=False)
    watch = GateWatch(mlp, MlpParts(("up", "value"), "down"))
    with pytest.raises(RuntimeError):
        mlp(torch.randn(2, 6))
    assert not watch._outputs
