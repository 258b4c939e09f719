"""Tensor trains, and those of the shared laws."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.decomposers._layers import factored
from peft_vision.layers.factorized import relative_error
from peft_vision.layers.layer_shape import shape_of
from peft_vision.layers.surgery import keep_inputs, keep_outputs
from peft_vision.method import Evidence, make
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


def test_figures_of_a_linear() -> None:
    # 12 = 3 x 4 inputs and 20 = 4 x 5 outputs: 4 to 4 r, three times, and 3 r to 5, four times.
    for r in (1, 5):
        weights, macs = r * (4 * 4 + 3 * 5), 3 * (4 * 4 * r) + 4 * (3 * r * 5)
        laws.figures_are_those_of(METHOD, "linear", (r,), weights, macs)
        shape = laws.shape("linear")
        assert laws.job_of(METHOD).scheme.macs(shape, (r,), (), 7) == 7 * macs
    assert laws.job_of(METHOD).scheme.full(laws.shape("linear")) == (15,)


@pytest.mark.parametrize("sizes", [(12, 20), (7, 12), (16, 5), (7, 5), (1, 1)])
@torch.no_grad()
def test_full_rank_of_any_sizes(sizes: tuple[int, int]) -> None:
    """Primes too, which are 1 x themselves; any number of axes before the features."""
    torch.manual_seed(0)
    layer, job = nn.Linear(*sizes).double(), laws.job_of(METHOD)
    made = factored(job, layer, job.scheme.full(shape_of(layer)))
    for rows in ((), (3,), (2, 3), (2, 0), (2, 3, 4)):
        x = torch.randn(*rows, sizes[0], dtype=torch.float64)
        assert made(x).shape == layer(x).shape
        assert torch.allclose(made(x), layer(x), rtol=0, atol=1e-10)


def test_no_train_of_the_rank_is_nearer() -> None:
    layer, _ = laws.dense("linear")
    kernel = laws.weight(layer)
    regrouped = kernel.reshape(4, 5, 3, 4).permute(1, 2, 0, 3).reshape(15, 16)
    values = torch.linalg.svdvals(regrouped)
    for rank in (1, 4, 14):
        made = factored(laws.job_of(METHOD), layer, (rank,))
        best = float(values[rank:].norm() / values.norm())
        assert abs(relative_error(kernel, made) - best) < 1e-10


def wide_vit() -> nn.Module:
    """Wide enough that ranks differ by little: two blocks of 96 features."""
    torch.manual_seed(0)
    model: nn.Module = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=96, depth=2, num_heads=3, num_classes=5
    )
    return model.eval()


def test_linears_of_a_transformer(tmp_path: Path) -> None:
    laws.wrapped_and_loaded(METHOD, tmp_path / "x", wide_vit(), torch.randn(2, 3, 16, 16))
    laws.budget_is_met(METHOD, wide_vit(), 16)
    laws.cost_falls_finely(METHOD, wide_vit(), 16)


def test_no_layer_gets_dearer() -> None:
    """Two square linears of 32 features: 256 multiply-accumulates a rank, 1024 dense."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    for strength in (0.2, 0.5, 1.0):
        for decision in make(METHOD).decide(view(model), strength, Evidence()).values():
            assert decision["rank"][0] <= 3  # type: ignore[index, call-overload]


def test_a_train_is_not_cut_adapted_or_packed() -> None:
    """By name; and what is an adapter's or packed already is not factored."""
    for method in ("magnitude", "lora", "nf4"):
        wrapped = pv.wrap(wide_vit(), METHOD, rank=2)
        with pytest.raises(pv.errors.UnsupportedSite, match=r"train of cores|plain nn.Linear"):
            pv.wrap(wrapped, method)
    layer = factored(laws.job_of(METHOD), laws.dense("linear")[0], (2,))
    for cut in (keep_outputs, keep_inputs):
        with pytest.raises(pv.errors.UnsupportedSite, match="Cut first"):
            cut(layer, [0, 1])


def test_a_refusal_leaves_the_model_whole() -> None:
    """One train in the second block; the first could be cut."""
    for method in ("magnitude", "vib"):
        model = wide_vit()
        make(METHOD).apply(view(model), {"blocks.1.up": {"rank": [2]}})
        before = {name: value.shape for name, value in model.state_dict().items()}
        with pytest.raises(pv.errors.UnsupportedSite, match="train of cores"):
            pv.wrap(model, method)
        assert {name: value.shape for name, value in model.state_dict().items()} == before


def test_what_has_no_axes_to_divide_is_refused() -> None:
    laws.refused(METHOD, nn.Sequential(nn.Conv2d(8, 80, 1), nn.ReLU()), "no kernel")
    only = nn.Sequential(nn.Conv2d(8, 80, 1), nn.Linear(80, 8))
    laws.refused(METHOD, only, "no kernel", layers=("convs",))
