"""Chains of one-way filters: error-optimal in two directions, and those of the shared laws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from peft_vision.decomposers._layers import factored
from peft_vision.errors import BadSetting
from peft_vision.layers.factorized import relative_error
from peft_vision.method import make
from tests.decomposers import laws

METHOD = "one_way"


def test_full_rank_and_folding() -> None:
    laws.full_rank_is_the_layer(METHOD)


def test_error_falls_with_rank() -> None:
    laws.error_falls_with_rank(METHOD)


def test_figures() -> None:
    # 3 x 1 from 6 to R, 1 x 3 from R to 8, both on a grid of 13 x 12.
    laws.figures_are_those_of(METHOD, "2-d", (5,), 5 * 3 * (6 + 8), 5 * 3 * (6 + 8) * 13 * 12)
    # 4 x 1 with stride (4, 1) leaves 3 x 12; 1 x 4 with stride (1, 4) leaves 3 x 3.
    macs = 2 * 4 * 3 * 36 + 2 * 4 * 16 * 9
    laws.figures_are_those_of(METHOD, "2-d, patches", (2,), 2 * 4 * (3 + 16), macs)


def test_fresh_values() -> None:
    laws.fresh_values_keep_the_variance(METHOD)


def test_saved_and_loaded(tmp_path: Path) -> None:
    laws.wrapped_and_loaded(
        METHOD, tmp_path / "x", laws.PlainCnn().eval(), torch.randn(2, 3, 16, 16)
    )


def test_budget() -> None:
    laws.budget_is_met(METHOD, laws.PlainCnn().eval(), 16)
    laws.cost_falls_finely(METHOD, laws.PlainCnn().eval(), 16)


def test_no_chain_of_two_directions_is_nearer() -> None:
    """Against the singular values of the unfolding (inputs, rows) x (columns, outputs)."""
    layer, _ = laws.dense("2-d")
    kernel = laws.weight(layer)
    unfolded = kernel.permute(1, 2, 3, 0).reshape(6 * 3, 3 * 8)
    values = torch.linalg.svdvals(unfolded)
    for rank in (1, 4, 9):
        best = values[rank:].norm() / values.norm()
        made = factored(laws.job_of(METHOD), layer, (rank,))
        assert abs(relative_error(kernel, made) - float(best)) < 1e-10


def test_a_priori_is_drawn_by_the_seed() -> None:
    layer, _ = laws.dense("2-d")
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(factored(laws.job_of(METHOD, init="fresh"), layer, (4,)).dense_weight())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_one_direction_is_refused() -> None:
    model = nn.Sequential(nn.Conv1d(8, 16, 5), nn.ReLU(), nn.Conv1d(16, 8, 5))
    laws.refused(METHOD, model, "longer than 1 along one axis at most")


@pytest.mark.parametrize(
    "settings", [{"ratio": 1.5}, {"rank": 0}, {"rank": 2.5}, {"init": "zero"}, {"minimum": -1}]
)
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(BadSetting):
        make(METHOD, settings)
