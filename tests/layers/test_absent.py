"""What is left of a removed branch: nothing, or a constant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.layers.absent import Absent
from peft_vision.layers.block import attention_half, mlp_half
from tests.families import build


def stream() -> Tensor:
    return torch.randn(3, 17, 32, dtype=torch.float64)


def test_without_an_offset_the_stream_goes_on_as_it_is() -> None:
    x = stream()
    gone = Absent()
    assert gone(x) is x
    assert gone.added(x) is None
    assert not list(gone.parameters())


def test_an_offset_starts_at_zero_and_is_what_is_added() -> None:
    x = stream()
    left = Absent(32).double()
    assert torch.equal(left(x), x)
    with torch.no_grad():
        left.offset.normal_()
    assert torch.equal(left(x), x + left.added(x))
    assert left.added(x).shape == x.shape
    assert left(x.float()).dtype == torch.float32


def test_the_mean_is_the_best_constant() -> None:
    branch = stream() + torch.randn(32, dtype=torch.float64)
    left = Absent(32).double()
    left.fit(branch)
    best = (branch - left.added(branch)).square().sum()
    assert best < branch.square().sum()
    for _ in range(5):
        other = left.offset.detach() + 0.1 * torch.randn(32, dtype=torch.float64)
        assert (branch - other).square().sum() > best


def test_the_first_tokens_have_means_of_their_own() -> None:
    branch = stream()
    branch[:, 0] += 10.0
    one, two = Absent(32).double(), Absent(32, prefix=2).double()
    for left in (one, two):
        left.fit(branch)
    assert (two.first - branch[:, :2].mean(0)).abs().max() < 1e-12
    assert (two.offset - branch[:, 2:].flatten(0, 1).mean(0)).abs().max() < 1e-12
    errors = [(branch - left.added(branch)).square().sum() for left in (one, two)]
    assert errors[1] < 0.9 * errors[0]
    x = stream()
    assert torch.equal(two(x[:, :1]), two(x)[:, :1]), "where only the first tokens go on"
    fewer = Absent(32, prefix=3).double()
    fewer.fit(branch[:, :2])
    assert torch.equal(fewer.first[:2], two.first)
    assert not fewer.offset.any()
    two.drop()
    assert two(x) is x
    assert not list(two.parameters())


def test_fitting_without_room_changes_nothing() -> None:
    gone = Absent()
    gone.fit(stream())
    assert gone.offset is None


@pytest.mark.parametrize("half", ["attention", "mlp"])
@pytest.mark.parametrize("offset", [False, True], ids=["nothing", "an offset"])
def test_a_block_says_what_was_added(half: str, offset: bool) -> None:
    tokens = view(build("timm_dinov2", dtype=torch.float64)).tokens
    block, x = tokens.owner.blocks[1], stream()
    left = Absent(32 if offset else None).double()
    if offset:
        nn.init.normal_(left.offset)
    setattr(block, tokens.parts.attention if half == "attention" else tokens.parts.mlp, left)
    if half == "attention":
        after, added, attended = attention_half(block, tokens.parts, x)
        assert attended is None
        fewer = attention_half(block, tokens.parts, x, rows=2)
        assert torch.equal(fewer.x, after[:, :2])
    else:
        after, added = mlp_half(block, tokens.parts, x)
    assert torch.equal(after, x if added is None else x + added)
    assert (added is None) != offset
