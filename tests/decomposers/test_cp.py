"""CP by alternating least squares, and those of the shared laws."""

from __future__ import annotations

from pathlib import Path

import tensorly
import torch
from tensorly.decomposition import parafac
from torch import nn

from peft_vision.decomposers._layers import factored
from peft_vision.layers.factorized import relative_error
from tests.decomposers import laws

METHOD = "cp"


def test_full_rank_and_folding() -> None:
    laws.full_rank_is_the_layer(METHOD)


def test_error_falls_with_rank() -> None:
    laws.error_falls_with_rank(METHOD, slack=0.01)


def test_fresh_values() -> None:
    laws.fresh_values_keep_the_variance(METHOD)


def test_saved_and_loaded(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    laws.wrapped_and_loaded(METHOD, tmp_path / "x", laws.PlainCnn().eval(), x)


def test_budget() -> None:
    laws.budget_is_met(METHOD, laws.PlainCnn().eval(), 16)
    laws.cost_falls_finely(METHOD, laws.PlainCnn().eval(), 16)


def test_figures() -> None:
    # 1 x 1 from 6 to 5, depthwise 3 x 1 and 1 x 3, 1 x 1 from 5 to 8.
    weights = 5 * (6 + 3 + 3 + 8)
    laws.figures_are_those_of(METHOD, "2-d", (5,), weights, weights * 13 * 12)


def test_it_is_as_near_as_tensorlys() -> None:
    layer, _ = laws.dense("2-d")
    kernel = laws.weight(layer)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        theirs = tensorly.cp_to_tensor(
            parafac(kernel, 8, n_iter_max=100, init="random", random_state=0)
        )
    error = float((theirs - kernel).norm() / kernel.norm())
    ours = relative_error(kernel, factored(laws.job_of(METHOD, iterations=100), layer, (8,)))
    assert ours < 1.05 * error


def test_a_sum_of_few_products_is_found_again() -> None:
    torch.manual_seed(0)
    vectors = [torch.randn(size, 3, dtype=torch.float64) for size in (8, 6, 3, 3)]
    layer, _ = laws.dense("2-d")
    with torch.no_grad():
        laws.weight(layer).copy_(torch.einsum("or,ir,xr,yr->oixy", *vectors))
    made = factored(laws.job_of(METHOD, iterations=500), layer, (3,))
    assert relative_error(laws.weight(layer), made) < 0.02


def test_depthwise_kernels_are_solved_at_once() -> None:
    """An axis of one channel is no axis: what is left is a matrix."""
    layer, _ = laws.dense("2-d, depthwise")
    kernels = laws.weight(layer)[:, 0]
    best = torch.linalg.svdvals(kernels)[:, 2:].norm() / kernels.norm()
    made = factored(laws.job_of(METHOD), layer, (2,))
    assert abs(relative_error(laws.weight(layer), made) - float(best)) < 1e-10


def test_linears_are_refused() -> None:
    laws.refused(METHOD, nn.Sequential(nn.Conv2d(8, 80, 1), nn.Linear(80, 8)), "no kernel")
