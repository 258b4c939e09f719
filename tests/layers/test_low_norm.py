"""A norm that keeps its low-precision output has the gradients of one that keeps its input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_vision.layers.low_norm import keep_low

Gradients = tuple[Tensor, ...]


def run(norm: nn.Module, *, low: bool, trained: bool) -> tuple[Tensor, Gradients]:
    """The output under autocast, and the gradients of the input and of what is trained."""
    norm.requires_grad_(trained)
    handle = norm.register_forward_hook(keep_low) if low else None
    generator = torch.Generator().manual_seed(1)
    x = (3 * torch.randn(64, 32, generator=generator) + 1).requires_grad_(True)
    cotangent = torch.randn(64, 32, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x * 1.0)
    found = torch.autograd.grad(y, [x, *(p for p in norm.parameters() if trained)], cotangent)
    if handle is not None:
        assert "_LowNorm" in type(y.grad_fn).__name__
        handle.remove()
    return y, found


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(32),
        lambda: nn.LayerNorm(32, eps=0.5),
        lambda: nn.LayerNorm(32, bias=False),
        lambda: nn.LayerNorm(32, elementwise_affine=False),
        lambda: nn.RMSNorm(32),
        lambda: nn.RMSNorm(32, eps=0.5),
    ],
    ids=["LayerNorm", "eps", "no bias", "bare", "RMSNorm", "RMSNorm eps"],
)
def test_gradients(norm: type[nn.Module], trained: bool) -> None:
    module = norm()
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.5, 0.3)
    if next(module.parameters(), None) is None and trained:
        return
    y, expected = run(module, low=False, trained=trained)
    same, found = run(module, low=True, trained=trained)
    assert torch.equal(y, same)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 2**-8 * theirs.norm()


def test_a_weight_of_zero_loses_nothing() -> None:
    """What is kept is the normalized value, from which a vanishing weight cannot hide it."""
    norm = nn.LayerNorm(32)
    nn.init.zeros_(norm.weight)
    expected, found = (run(norm, low=low, trained=True)[1][1] for low in (False, True))
    assert expected.norm() > 1
    assert (found - expected).norm() < 2**-8 * expected.norm()


def test_norms_of_other_axes_stay_as_they_are() -> None:
    from timm.layers import LayerNorm2d

    norm = LayerNorm2d(4)
    norm.register_forward_hook(keep_low)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(torch.randn(2, 4, 4, 4, requires_grad=True) * 1.0)
    assert "_LowNorm" not in type(y.grad_fn).__name__
