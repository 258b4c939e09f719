"""Two linears in a row are one; a linear map that is fitted is the best there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_vision.layers.linear_mlp import LinearMlp
from peft_vision.layers.mlp import MlpParts

PARTS = MlpParts(up=("fc1",), down="fc2")


class Two(nn.Module):
    """An MLP with any activation."""

    def __init__(self, activation: nn.Module, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 24, bias=bias), nn.Linear(24, 6, bias=bias)
        self.act = activation
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@pytest.mark.parametrize("bias", [True, False])
def test_without_an_activation_it_is_the_same(bias: bool) -> None:
    mlp, x = Two(nn.Identity(), bias=bias), torch.randn(2, 5, 6, dtype=torch.float64)
    one = LinearMlp.instead_of(mlp, PARTS)
    assert (one(x) - mlp(x)).abs().max() < 1e-12
    assert sum(p.numel() for p in one.parameters()) == 6 * 6 + 6


def test_on_meta_it_has_the_same_shapes_and_no_numbers() -> None:
    one = LinearMlp.instead_of(Two(nn.GELU()).to("meta"), PARTS)
    assert {p.is_meta for p in one.parameters()} == {True}
    assert one.linear.weight.shape == (6, 6)


@pytest.mark.parametrize("frozen", [True, False])
def test_it_is_trained_where_the_mlp_was(frozen: bool) -> None:
    mlp = Two(nn.GELU()).requires_grad_(not frozen)
    assert LinearMlp.instead_of(mlp, PARTS).linear.weight.requires_grad is not frozen


def test_a_fit_finds_a_linear_map() -> None:
    mlp, x = Two(nn.Identity()), torch.randn(200, 6, dtype=torch.float64)
    one = LinearMlp.instead_of(mlp, PARTS, zero=True)
    assert not one(x).any()
    one.fit(x, mlp(x).detach(), ridge=0.0)
    assert (one(x) - mlp(x)).abs().max() < 1e-8


def test_a_fit_is_better_than_the_product() -> None:
    mlp = Two(nn.GELU())
    x = 2 * torch.randn(8, 50, 6, dtype=torch.float64) + 0.5
    wanted = mlp(x).detach()
    one = LinearMlp.instead_of(mlp, PARTS)
    product = (one(x) - wanted).square().mean()
    one.fit(x, wanted)
    fit = (one(x) - wanted).square().mean()
    assert fit < 0.5 * product
    mean = (wanted - wanted.flatten(0, 1).mean(0)).square().mean()
    assert fit < mean, "a constant is a linear map too"


def test_inputs_that_do_not_vary_do_no_harm() -> None:
    mlp, x = Two(nn.GELU()), torch.randn(40, 6, dtype=torch.float64)
    x[:, 3] = 1.0
    one = LinearMlp.instead_of(mlp, PARTS)
    one.fit(x, mlp(x).detach(), ridge=0.0)
    assert one.linear.weight.isfinite().all()
    assert one.linear.weight.abs().max() < 1e3
