"""Tensor trains, and those of the shared laws."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from peft_vision.decomposers._layers import factored
from peft_vision.layers.factorized import relative_error
from tests.decomposers import laws

METHOD = "tensor_train"


def test_full_rank_and_folding() -> None:
    laws.full_rank_is_the_layer(METHOD)


def test_error_falls_with_rank() -> None:
    laws.error_falls_with_rank(METHOD)


def test_fresh_values() -> None:
    laws.fresh_values_keep_the_variance(METHOD)


def test_saved_and_loaded(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    laws.wrapped_and_loaded(METHOD, tmp_path / "x", laws.PlainCnn().eval(), x)


def test_budget() -> None:
    laws.budget_is_met(METHOD, laws.PlainCnn().eval(), 16)
    laws.cost_falls_finely(METHOD, laws.PlainCnn().eval(), 16)


def test_figures() -> None:
    # 1 x 1 from 6 to 2, 3 x 1 from 2 to 3, 1 x 3 from 3 to 4, 1 x 1 from 4 to 8.
    weights = 6 * 2 + 2 * 3 * 3 + 3 * 3 * 4 + 4 * 8
    laws.figures_are_those_of(METHOD, "2-d", (2, 3, 4), weights, weights * 13 * 12)
    layer, _ = laws.dense("3-d")
    made = factored(laws.job_of(METHOD), layer, (2, 3, 4, 5))
    kernels = [(1, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 3), (1, 1, 1)]
    assert [tuple(conv.weight.shape[2:]) for conv in made] == kernels


def test_the_error_is_within_the_tails() -> None:
    """At most the root of the sum of what every unfolding loses (Oseledets, 2011)."""
    layer, _ = laws.dense("2-d")
    kernel = laws.weight(layer)
    ordered = kernel.permute(1, 2, 3, 0)
    tails = [
        torch.linalg.svdvals(ordered.reshape(rows, -1))[rank:].square().sum()
        for rows, rank in ((6, 3), (18, 6), (54, 5))
    ]
    bound = float(sum(tails)) ** 0.5 / float(kernel.norm())
    error = relative_error(kernel, factored(laws.job_of(METHOD), layer, (3, 6, 5)))
    assert float(max(tails)) ** 0.5 / float(kernel.norm()) - 1e-12 <= error <= bound + 1e-12


def test_linears_are_refused() -> None:
    laws.refused(METHOD, nn.Sequential(nn.Conv2d(8, 80, 1), nn.Linear(80, 8)), "no kernel")
