"""Tucker-2: between fewer channels, and those of the shared laws."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from peft_vision.decomposers._layers import factored
from peft_vision.layers.factorized import relative_error
from tests.decomposers import laws

METHOD = "tucker"


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
    # 1 x 1 from 6 to 2, 3 x 3 from 2 to 3, 1 x 1 from 3 to 8, on a grid of 13 x 12.
    weights = 6 * 2 + 2 * 3 * 9 + 3 * 8
    laws.figures_are_those_of(METHOD, "2-d", (2, 3), weights, weights * 13 * 12)
    # The first runs on the 13 points that arrive, the others on the 5 behind the stride.
    macs = 6 * 2 * 13 + (2 * 3 * 5 + 3 * 8) * 5
    laws.figures_are_those_of(
        METHOD, "1-d, stride, padding, dilation", (2, 3), 6 * 2 + 2 * 3 * 5 + 3 * 8, macs
    )


def test_a_side_that_stays_has_no_layer_of_its_own() -> None:
    layer, _ = laws.dense("2-d, patches")
    made = factored(laws.job_of(METHOD), layer, (3, 5))
    assert [tuple(conv.weight.shape) for conv in made] == [(5, 3, 4, 4), (16, 5, 1, 1)]


def test_orthogonal_iteration_is_at_least_as_near_as_one_projection() -> None:
    """HOOI starts from the leading vectors of both unfoldings and only improves on them."""
    layer, _ = laws.dense("2-d")
    kernel = laws.weight(layer)
    rows = torch.linalg.svd(kernel.flatten(1))[0][:, :3]
    columns = torch.linalg.svd(kernel.transpose(0, 1).flatten(1))[0][:, :2]
    projected = torch.einsum("oixy,op,iq,rp,sq->rsxy", kernel, rows, columns, rows, columns)
    once = float((projected - kernel).norm() / kernel.norm())
    assert relative_error(kernel, factored(laws.job_of(METHOD), layer, (2, 3))) <= once + 1e-12


def test_depthwise_and_linears_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 9, groups=8), nn.Conv2d(8, 80, 1))
    laws.refused(METHOD, model, "depthwise.*no kernel")


def test_the_users_backend_stays() -> None:
    import tensorly

    before = tensorly.get_backend()
    layer, _ = laws.dense("2-d")
    factored(laws.job_of(METHOD), layer, (2, 3))
    assert tensorly.get_backend() == before
