"""Sparse attention: all keys are the dense function, and gathered keys equal masked ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import count_flops, input_size, measure, twin, unwrap
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.exporting import export
from peft_vision.layers.mask_predictor import MaskPredictor
from peft_vision.layers.sparse_keys import SparseKeys, SparseMask
from peft_vision.layers.traits import penalties
from peft_vision.method import Evidence, make
from tests.families import (
    NO_TOKENS,
    TRANSFORMERS,
    build,
    features,
    images,
    moved,
    run,
    timm_vit,
)

SOME = ("timm_vit", "timm_vit_normed", "timm_siglip", "timm_eva02_small", "hf_vit")


def sparse(family: str = "timm_vit", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A family's backbone with sparse attention in every block."""
    return pv.wrap(build(family, dtype=dtype), "sparse_attention", **{"start": 0.0, **settings})


def modules_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, SparseKeys | SparseMask)]


def gathering(model: nn.Module, on: bool) -> nn.Module:
    for module in modules_of(model):
        module.gathered = on
    return model


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_gathered_keys_equal_masked_keys(family: str) -> None:
    model = sparse(family, keep=0.4)
    x = images(unwrap(model))
    fast, slow = run(gathering(model, True), x), run(gathering(model, False), x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    assert (slow - run(build(family, dtype=torch.float64), x)).abs().max() > 1e-6
    single = model.float()
    fast, slow = run(gathering(single, True), x.float()), run(gathering(single, False), x.float())
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["keys", "mask"])
@pytest.mark.parametrize("family", SOME)
def test_all_keys_change_nothing(family: str, mode: str) -> None:
    dense = build(family, dtype=torch.float64)
    x = images(dense)
    model = sparse(family, mode=mode, keep=0.5, warm_up=0)
    for module in modules_of(model):
        module.keep = 1.0
    torch.testing.assert_close(run(model, x), run(dense, x), rtol=0, atol=1e-10)


def test_the_keys_kept_are_those_that_matter() -> None:
    module = modules_of(sparse(keep=0.25, by="attention"))[0].eval()
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    q, k, _ = module.branch(x)[1:]
    paid = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
    ranked = module._ranked(q, k, None)
    torch.testing.assert_close(ranked, paid[:, :, [i * 17 // 16 for i in range(16)]].mean(2))
    by_query = modules_of(sparse(keep=0.25))[0]._ranked(q, k, None)
    mean = (q.mean(2, keepdim=True) @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
    torch.testing.assert_close(by_query, mean.squeeze(2))


def test_patches_may_come_in_any_order() -> None:
    module = modules_of(sparse(keep=0.4))[0].eval()
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(16)])
    torch.testing.assert_close(module(x)[:, order], module(x[:, order]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("by", ["query", "attention"])
def test_strength_is_what_is_saved(by: str) -> None:
    model = build("timm_vit")
    backbone, costs = view(model), []
    for strength in (0.0, 0.01, 0.1, 0.3, 0.6, 0.99):
        method = make("sparse_attention", {"keep": 1 - strength, "by": by, "start": 0.0})
        decisions = method.decide(backbone, strength, Evidence())
        assert (decisions == {}) == (strength == 0.0)
        small = twin(model)
        method.apply(view(small), decisions)
        costs.append(count_flops(small, input_size(model)))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]


def test_what_is_counted_is_the_formula_and_a_mask_counts_as_dense() -> None:
    dense = measure(build("timm_vit")).flops
    by_keys = pv.wrap(build("timm_vit"), "sparse_attention", keep=0.5, start=0.75)
    assert dense - measure(by_keys).flops == 2 * (2 * 17 * 8 * 32 - 17 * 32)
    masked = pv.wrap(build("timm_vit"), "sparse_attention", mode="mask", start=0.75)
    assert measure(masked).flops > dense
    assert make("sparse_attention", {"mode": "mask"}).reduces == frozenset()
    assert make("sparse_attention").reduces == {"flops", "latency_ms"}


def test_a_mask_hides_what_the_predictor_leaves_out() -> None:
    module: SparseMask = modules_of(sparse(mode="mask", keep=0.25, warm_up=0))[0].eval()
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    done = module.branch(x)
    likely = module.predictor(done.q[:, :, 1:], done.k[:, :, 1:])
    seen = torch.ones(2, 4, 17, 17, dtype=torch.bool)
    best = likely.topk(4, dim=-1).indices
    seen[:, :, 1:, 1:] = torch.zeros(2, 4, 16, 16, dtype=torch.bool).scatter(-1, best, True)
    heads = F.scaled_dot_product_attention(done.q, done.k, done.v, attn_mask=seen)
    expected = module.attention.proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(done.branch, expected, rtol=0, atol=1e-12)


def test_a_predictor_is_as_wide_as_the_keys_where_few_tokens_are_read() -> None:
    model = pv.wrap(build("timm_vit"), "pooled_last_block")
    model = pv.wrap(model, "sparse_attention", mode="mask", start=0.0, warm_up=0)
    assert [m.predictor.patches for m in modules_of(model)] == [16] * 4
    assert run(model, images(model)).shape == (2, 5)


def test_the_predictor_learns_the_dense_map_first() -> None:
    dense = build("timm_vit", dtype=torch.float64)
    model = sparse(mode="mask", keep=0.3, warm_up=2, beta=0.5)
    x = images(unwrap(model))
    for step in range(3):
        model.zero_grad()
        output = features(model.train()(x))
        terms = torch.stack(penalties(model)).sum()
        changed = (output - features(dense(x))).abs().max()
        assert (changed < 1e-10) == (step < 2), "dense while it warms up"
        assert (terms > 0) == (step < 2)
        if step < 2:
            terms.backward()
            assert all(bool(m.predictor.basis.grad.abs().sum() > 0) for m in modules_of(model))
            assert model.plain_model.blocks[0].attn.attention.qkv.weight.grad is None
    model(x)
    copy.deepcopy(model)


def test_a_predictor_can_be_taught() -> None:
    predictor = MaskPredictor(8, 16, 4, torch.zeros(1), 1)
    q, k = torch.randn(4, 2, 16, 8), torch.randn(4, 2, 16, 8)
    target = (q @ k.transpose(-2, -1)).softmax(-1).mean(0, keepdim=True).expand(4, -1, -1, -1)
    optimizer, errors = torch.optim.Adam(predictor.parameters(), 0.01), []
    for _ in range(120):
        optimizer.zero_grad()
        error = F.mse_loss(predictor(q, k), target)
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("mode", ["keys", "mask"])
def test_it_goes_with_fewer_tokens_and_rows_and_sizes_and_masks(mode: str) -> None:
    model = build("timm_vit", dtype=torch.float64)
    x = images(model)
    model = pv.wrap(model, "token_reorganization", keep_rate=0.6)
    model = pv.wrap(model, "sparse_attention", start=0.0, keep=0.5, mode=mode, warm_up=0)
    assert run(model, x).shape == (2, 5)
    module = modules_of(sparse(mode=mode, keep=0.5, warm_up=0))[0].eval()
    y, sizes = torch.randn(2, 17, 32, dtype=torch.float64), torch.rand(2, 17, dtype=torch.float64)
    whole = module.branch(y, key_bias=sizes).branch
    torch.testing.assert_close(
        module.branch(y, rows=3, key_bias=sizes).branch, whole[:, :3], rtol=0, atol=1e-12
    )
    mask = (torch.rand(2, 1, 17, 17) > 0.3).index_fill(-1, torch.tensor([0]), True)
    seen = module.branch(y, attn_mask=mask).branch
    rows = module.branch(y, rows=3, attn_mask=mask).branch
    torch.testing.assert_close(rows, seen[:, :3], rtol=0, atol=1e-12)
    if mode == "keys":
        module.gathered = False
        torch.testing.assert_close(module.branch(y, key_bias=sizes).branch, whole)
        torch.testing.assert_close(module.branch(y, attn_mask=mask).branch, seen)


@pytest.mark.parametrize("mode", ["keys", "mask"])
def test_other_pruners_may_cut_heads_before_and_after(mode: str, tmp_path: Path) -> None:
    model = build("timm_vit")
    x, dense = images(model), copy.deepcopy(model)
    for name in ("magnitude", "sparse_attention", "magnitude"):
        model = pv.wrap(model, name, **({"mode": mode} if name == "sparse_attention" else {}))
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(run(pv.load(tmp_path / "m", base=dense), x), run(model, x))


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_before_and_after(order: str, tmp_path: Path) -> None:
    model = build("timm_vit")
    x, dense = images(model), copy.deepcopy(model)
    steps = [{"method": "lora", "r": 2}, {"method": "sparse_attention"}]
    for step in steps if order == "before" else steps[::-1]:
        model = pv.wrap(model, **step)
    moved(model)
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(run(pv.load(tmp_path / "m", base=dense), x), run(model, x))
    torch.testing.assert_close(run(pv.merge(model), x), run(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mode", "format"), [("keys", "onnx"), ("mask", "torch.export")])
def test_it_exports_with_any_batch_size(mode: str, format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = pv.wrap(timm_vit(depth=1), "sparse_attention", start=0.0, mode=mode)
    path = tmp_path / ("m.onnx" if format == "onnx" else "m.pt2")
    assert export(model, path, format=format).batch_sizes_checked == (1, 2, 5)


@pytest.mark.parametrize("family", [*NO_TOKENS, "generic_cnn"])
def test_what_it_cannot_act_on_is_refused_by_name(family: str) -> None:
    with pytest.raises(UnsupportedSite, match=r"has no (tokens|heads)"):
        pv.wrap(build(family), "sparse_attention")


def test_a_second_choice_of_keys_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedSite, match="computed by SparseKeys already"):
        pv.wrap(sparse(), "sparse_attention")


@pytest.mark.parametrize(
    "settings", [{"keep": 0.0}, {"keep": 1.1}, {"mode": "blocks"}, {"by": "luck"}, {"start": 1.0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        make("sparse_attention", settings)
