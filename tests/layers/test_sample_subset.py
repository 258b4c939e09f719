"""How many samples a branch is computed for, and what is kept of the way back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_vision.layers.sample_subset import SampleSubset, kept_count


def test_the_count_is_that_of_the_papers_recipe() -> None:
    assert kept_count(16, 0.4) == 9
    assert [kept_count(b, 0.4) for b in (1, 2, 3, 128)] == [1, 1, 1, 76]
    assert kept_count(10, 0.0) == 10


def test_only_indices_are_kept_on_the_way_back() -> None:
    norm, last = nn.Identity(), nn.Identity()
    SampleSubset(norm, last, 0.5)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        last(norm(torch.randn(8, 3, 4, requires_grad=True)))
    assert saved
    assert {(t.dtype, tuple(t.shape)) for t in saved} == {(torch.int64, (4,))}


def test_the_expectation_stays() -> None:
    norm, last = nn.Identity(), nn.Identity()
    SampleSubset(norm, last, 0.3)
    x = torch.ones(7, 2)
    mean = torch.stack([last(norm(x)) for _ in range(2000)]).mean(0)
    assert (mean - 1).abs().max() < 0.1
