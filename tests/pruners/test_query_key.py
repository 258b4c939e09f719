"""Narrower queries and keys: cut equals masked, the best directions are the best, and no softmax
notices what is the same for all keys."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.backbones.queries import QueriesSite, queries_in
from peft_vision.calibration import Walk
from peft_vision.cost import input_size, measure, unwrap
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.exporting import export
from peft_vision.layers.attention import attend
from peft_vision.layers.narrow_attention import NarrowAttention
from peft_vision.layers.routed_attention import RoutedAttention
from peft_vision.method import Evidence, make
from peft_vision.plan import unpack_indices
from peft_vision.pruners._query_spectra import QueryMoments, moments_of
from tests.families import (
    NO_TOKENS,
    ROTARY,
    TRANSFORMERS,
    WIDTH,
    build,
    eva02_small,
    images,
    moved,
    run,
    timm_vit,
)

F64 = torch.float64
NORMED = ("timm_vit_normed",)
FAMILIES = [name for name in TRANSFORMERS if name not in NORMED]
FEW = {"multiple": 2, "least": 2}
SOME = ("timm_vit", "timm_siglip", "timm_eva02_small", "hf_dinov3", "hf_vit")


def narrow(model: nn.Module, **settings: Any) -> Any:
    return pv.wrap(model, "query_key", **{**FEW, **settings})


def sites_of(model: nn.Module) -> tuple[QueriesSite, ...]:
    return queries_in(view(unwrap(model)))


def mask(model: nn.Module, decisions: dict[str, Any]) -> nn.Module:
    """The same features of queries at zero, where a cut would remove them."""
    for site in queries_in(view(model)):
        kept = set(unpack_indices(decisions[site.key]["kept"])) if site.key in decisions else None
        gone = [] if kept is None else [i for i in range(site.count * site.width) if i not in kept]
        layer = getattr(site.attention, site.parts.qkv[0])
        beside = [getattr(site.attention, name) for name in (site.parts.biases or ())[:1]]
        with torch.no_grad():
            for tensor in (layer.weight, layer.bias, *beside):
                if tensor is not None:
                    tensor[gone] = 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_equals_masked(family: str) -> None:
    model = build(family, dtype=F64)
    x = images(model)
    smaller = narrow(copy.deepcopy(model), ratio=0.5)
    decisions = smaller.history.plan.steps[-1].decisions
    assert decisions
    assert [s.width for s in sites_of(smaller)] != [s.width for s in sites_of(model)]
    assert (run(smaller, x) - run(mask(copy.deepcopy(model), decisions), x)).abs().max() < 1e-10
    assert (run(smaller, x) - run(model, x)).abs().max() > 1e-6
    assert measure(smaller).flops < measure(model).flops


def test_what_is_counted_is_the_formula() -> None:
    model = timm_vit(depth=1)
    dense, smaller = measure(model).flops, narrow(copy.deepcopy(model), ratio=0.5)
    (site,) = sites_of(smaller)
    gone = site.count * (8 - site.width)
    assert gone > 0
    assert dense - measure(smaller).flops == 2 * gone * (2 * 17 * WIDTH + 17**2)


def in_few_directions(model: nn.Module, rank: int) -> nn.Module:
    """Queries of each head within a subspace that is not along the features."""
    generator = torch.Generator().manual_seed(5)
    for site in queries_in(view(model)):
        layer: Any = getattr(site.attention, site.parts.qkv[0])
        for head in range(site.count):
            rows = slice(head * site.width, (head + 1) * site.width)
            basis = torch.linalg.qr(torch.randn(site.width, rank, generator=generator, dtype=F64)).Q
            with torch.no_grad():
                layer.weight[rows] = basis @ basis.T @ layer.weight[rows]
                if layer.bias is not None:
                    layer.bias[rows] = basis @ basis.T @ layer.bias[rows]
    return model


@pytest.mark.parametrize("family", ["timm_vit", "timm_siglip", "hf_vit", "hf_clip"])
def test_logits_that_live_in_few_directions_need_no_more(family: str) -> None:
    model = in_few_directions(build(family, dtype=F64), 4)
    x = images(model)
    smaller = narrow(copy.deepcopy(model), ratio=1.0, multiple=4, least=4, data=[images(model, 8)])
    blind = narrow(copy.deepcopy(model), ratio=1.0, multiple=4, least=4)
    assert {s.width for s in sites_of(smaller)} == {4}
    assert (run(smaller, x) - run(model, x)).abs().max() < 1e-7
    assert (run(blind, x) - run(model, x)).abs().max() > 1e-4


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("family", ["timm_vit", "hf_vit"])
def test_directions_are_found_below_an_adapter_too(family: str, split: bool) -> None:
    model = in_few_directions(build(family, dtype=F64), 4)
    x = images(model)
    adapted = pv.wrap(model, "lora", r=2, split_qkv=split, targets=["k", "v", "out"])
    adapted = moved(adapted).double()
    before = run(adapted, x)
    smaller = narrow(adapted, ratio=1.0, multiple=4, least=4, data=[images(model, 8)])
    assert {s.width for s in sites_of(smaller)} == {4}
    assert (run(smaller, x) - before).abs().max() < 1e-7


def product(a: Tensor, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Mean square of what logits lack, if queries and keys met by chance."""
    lack = torch.eye(q.shape[-1], dtype=F64) - a.mT @ b
    return (lack.mT @ q @ lack @ k).diagonal(dim1=1, dim2=2).sum(1)


def test_no_other_directions_lose_less() -> None:
    torch.manual_seed(0)
    roots = torch.randn(2, 3, 6, 6, dtype=F64)
    moments = QueryMoments(roots[0] @ roots[0].mT, roots[1] @ roots[1].mT)
    for rank in (1, 3, 6):
        a, b = moments.best(rank)
        error = product(a, b, moments.q, moments.k)
        torch.testing.assert_close(error, moments.spectrum[:, rank:].sum(1), atol=1e-8, rtol=1e-6)
        for _ in range(20):
            near = (t + 0.1 * torch.randn_like(t) for t in (a, b))
            assert (product(*near, moments.q, moments.k) >= error - 1e-9).all()
        for kept in itertools.combinations(range(6), rank):
            some = torch.eye(6, dtype=F64)[list(kept)].expand(3, -1, -1)
            assert (product(some, some, moments.q, moments.k) >= error - 1e-9).all()


def test_what_is_the_same_for_all_keys_does_not_count() -> None:
    model = build("timm_vit", dtype=F64)
    batches = [images(model, 4)]
    (first, *_) = sites_of(model)
    before = moments_of(Walk(view(model), batches), first)
    with torch.no_grad():
        first.attention.qkv.bias[WIDTH : 2 * WIDTH] += 10.0
    after = moments_of(Walk(view(model), batches), first)
    torch.testing.assert_close(after.k, before.k, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after.q, before.q)


def test_only_queries_that_are_made_count() -> None:
    model = unwrap(pv.wrap(build("timm_vit", dtype=F64), "pooled_last_block"))
    batches = [images(model, 4)]
    walk, site = Walk(view(model), batches), sites_of(model)[-1]
    while walk.index < site.block:
        walk.advance()
    q = site.attention.qkv(walk.block.norm1(walk.streams[0].x)[:, :1])[..., :WIDTH]
    heads = q.reshape(4, 4, 8)
    expected = torch.einsum("bhd,bhe->hde", heads, heads) / 4
    torch.testing.assert_close(moments_of(walk, site).q, expected)


@pytest.mark.parametrize("family", SOME)
def test_images_help(family: str) -> None:
    model = build(family, dtype=F64)
    x, errors = images(model, 16), []
    for data in (None, [x]):
        smaller = narrow(copy.deepcopy(model), ratio=0.6, data=data)
        errors.append(float((run(smaller, x) - run(model, x)).square().mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("family", ["timm_eva02_small", "timm_eva_dinov3", "hf_dinov3"])
def test_what_is_rotated_together_stays_together(family: str) -> None:
    assert family in ROTARY
    model = build(family, dtype=F64)
    mates = sites_of(model)[0].mates
    assert mates is not None
    assert [mates[m] for m in mates] == list(range(8))
    decided = make("query_key", FEW).decide(view(model), 0.6, Evidence([images(model)]))
    for decision in decided.values():
        kept = set(unpack_indices(decision["kept"]))
        assert all(i // 8 * 8 + mates[i % 8] in kept for i in kept)
    with pytest.raises(UnsupportedSite, match="stands in its place"):
        narrow(narrow(model, ratio=0.3), ratio=0.6)


def test_the_kernel_gives_what_the_formula_says() -> None:
    q, k = torch.randn(2, 3, 4, 7, 5, dtype=F64)
    v = torch.randn(3, 4, 7, 8, dtype=F64)
    site = sites_of(build("timm_vit", dtype=F64))[0]
    given = attend(site.attention.eval(), site.parts, q, k, v)
    expected = (q @ k.mT * 5**-0.5).softmax(-1) @ v
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("multiple", [1, 2, 3, 8, 64])
def test_widths_are_multiples_and_some_stay(multiple: int) -> None:
    model = timm_vit(embed_dim=64, num_heads=2)
    smaller = narrow(copy.deepcopy(model), ratio=0.7, multiple=multiple, least=4)
    widths = [site.width for site in sites_of(smaller)]
    step = min(multiple, 32 // 2)
    assert min(widths) < 32
    assert all(w == 32 or (w % step == 0 and w >= 4) for w in widths)
    least = [s.width for s in sites_of(narrow(model, ratio=1.0, multiple=multiple, least=4))]
    assert set(least) == {next(w for w in range(4, 33) if w % step == 0)}


def test_narrow_heads_lose_a_half() -> None:
    model = build("timm_vit")
    assert {s.width for s in sites_of(pv.wrap(model, "query_key", ratio=1.0))} == {4}


def test_data_free_ranking_goes_by_weights() -> None:
    model = build("timm_vit")
    site = sites_of(model)[1]
    with torch.no_grad():
        for head in range(4):
            site.attention.qkv.weight[head * 8 + head] *= 1e-3
    decided = make("query_key", {"multiple": 1, "least": 1}).decide(
        view(model), 1.01 / 28, Evidence()
    )
    assert list(decided) == ["blocks.1.queries"]
    gone = set(range(32)) - set(unpack_indices(decided["blocks.1.queries"]["kept"]))
    assert gone == {head * 8 + head for head in range(4)}


@pytest.mark.parametrize("family", ["timm_vit", "timm_eva02_small", "hf_dinov3"])
@pytest.mark.parametrize("order", [("query_key", "magnitude"), ("magnitude", "query_key")])
def test_heads_may_go_before_and_after(family: str, order: tuple[str, ...], tmp_path: Path) -> None:
    model, settings = build(family), {"query_key": FEW, "magnitude": {"ratio": 0.7}}
    x, dense = images(model), copy.deepcopy(model)
    for name in order:
        model = pv.wrap(model, name, **settings[name], data=[x])
    assert sum(site.count for site in sites_of(model)) < 16
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(run(pv.load(tmp_path / "m", base=dense), x), run(model, x))


def test_a_budget_may_be_spent_on_both_at_once() -> None:
    model = build("timm_vit")
    methods = [make("query_key", FEW), make("magnitude", {"multiple": 1})]
    result = pv.compress(
        model, target_flops=0.7, methods=methods, data=[images(model, 4)], trials=1
    )
    assert 0.98 * 0.7 < result.ratio <= 0.7
    assert [s.method for s in result.plan.steps][-2:] == ["query_key", "magnitude"]
    widths = [s.width for s in sites_of(result.model)]
    assert set(widths) != {8}
    assert ("query width", "8", f"{sum(widths) / 4:g} on average") in result.table()
    alone = pv.compress(model, target_flops=0.7, methods=make("magnitude", {"multiple": 1}))
    assert "query width" not in str(alone)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ["timm_vit", "timm_eva02_small", "hf_vit"])
def test_lora_before_and_after(family: str, order: str, split: bool, tmp_path: Path) -> None:
    model = build(family)
    x, dense = images(model), copy.deepcopy(model)
    steps: list[dict[str, Any]] = [
        {"method": "lora", "r": 2, "split_qkv": split},
        {"method": "query_key", **FEW},
    ]
    for step in steps if order == "before" else steps[::-1]:
        model = pv.wrap(model, **step)
    moved(model)
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(run(pv.load(tmp_path / "m", base=dense), x), run(model, x))
    torch.testing.assert_close(run(pv.merge(model), x), run(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        ("mixture_of_heads", {"start": 0.0, "skip": 0.6}),
        ("sparse_attention", {"start": 0.0, "keep": 0.5}),
        ("token_reorganization", {"keep_rate": 0.6}),
        ("token_merging", {"ratio": 0.1}),
        ("pooled_last_block", {}),
    ],
    ids=lambda other: other[0],
)
def test_what_else_computes_attention_takes_narrow_heads(other: tuple[str, Any]) -> None:
    model = build("timm_vit", dtype=F64)
    x, (name, settings) = images(model), other
    smaller = pv.wrap(narrow(copy.deepcopy(model), ratio=0.5), name, **settings)
    decisions = smaller.history.plan.steps[0].decisions
    same = mask(copy.deepcopy(model), decisions)
    for site in queries_in(view(same)):  # keys, too: similarity may be read off them
        kept = set(unpack_indices(decisions[site.key]["kept"])) if site.key in decisions else None
        gone = [] if kept is None else [WIDTH + i for i in range(WIDTH) if i not in kept]
        with torch.no_grad():
            site.attention.qkv.weight[gone] = 0
            site.attention.qkv.bias[gone] = 0
    same = pv.wrap(same, name, **settings)
    shared = [m for m in unwrap(smaller).modules() if isinstance(m, RoutedAttention)]
    for mine, theirs in zip(
        shared, (m for m in unwrap(same).modules() if isinstance(m, RoutedAttention)), strict=True
    ):
        mine.router.load_state_dict(theirs.router.state_dict())
    if not shared:  # which heads are shared goes by their weights, which are others by now
        assert (run(smaller, x) - run(same, x)).abs().max() < 1e-10
    for module in shared:
        y = torch.randn(2, 17, WIDTH, dtype=F64)
        fast = module.eval()(y)
        module.gathered = False
        torch.testing.assert_close(module(y), fast, rtol=0, atol=1e-12)


def test_routed_heads_are_cut_where_they_are() -> None:
    model = pv.wrap(build("timm_vit", dtype=F64), "mixture_of_heads", start=0.0, skip=0.6)
    smaller = unwrap(narrow(model, ratio=0.5))
    assert all(isinstance(block.attn, RoutedAttention) for block in smaller.blocks)
    y = torch.randn(2, 17, WIDTH, dtype=F64)
    for block in smaller.blocks:
        fast = block.attn.eval()(y)
        block.attn.gathered = False
        torch.testing.assert_close(block.attn(y), fast, rtol=0, atol=1e-12)
    masked = pv.wrap(build("timm_vit"), "sparse_attention", mode="mask", start=0.0)
    with pytest.raises(UnsupportedSite, match="before keys are chosen"):
        narrow(masked)


def test_the_width_of_the_stream_may_be_cut_behind_it() -> None:
    model = unwrap(narrow(build("timm_eva02_small"), ratio=0.5))
    site = view(model).width
    assert site is not None
    site.keep(range(0, WIDTH, 2))
    assert run(model, images(model)).isfinite().all()
    assert any(isinstance(m, NarrowAttention) for m in model.modules())


@pytest.mark.parametrize("format", ["onnx", "torch.export"])
@pytest.mark.parametrize("make_model", [timm_vit, eva02_small], ids=["plain", "rotary"])
def test_it_exports_with_any_batch_size(make_model: Any, format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = narrow(make_model(depth=1), ratio=0.5)
    path = tmp_path / ("m.onnx" if format == "onnx" else "m.pt2")
    assert export(model, path, format=format).batch_sizes_checked == (1, 2, 5)


@pytest.mark.parametrize("family", [*NO_TOKENS, *NORMED, "generic_cnn"])
def test_what_it_cannot_act_on_is_refused_by_name(family: str) -> None:
    with pytest.raises(UnsupportedSite, match=r"has no (tokens|heads|queries and keys)"):
        narrow(build(family))


def test_another_number_of_heads_is_refused_by_name() -> None:
    model = build("timm_vit")
    decided = make("query_key", FEW).decide(view(model), 0.5, Evidence())
    view(model).heads[0].keep([0, 1])
    with pytest.raises(UnsupportedSite, match="had 4 heads when"):
        make("query_key", FEW).apply(view(model), decided)


@pytest.mark.parametrize(
    "settings", [{"ratio": -0.1}, {"ratio": 1.1}, {"multiple": 0}, {"least": 0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        make("query_key", settings)


def test_cost_falls_evenly() -> None:
    model = timm_vit(embed_dim=64, num_heads=2)
    assert input_size(model)
    costs = [measure(narrow(copy.deepcopy(model), ratio=r / 8)).flops for r in range(1, 9)]
    assert costs == sorted(set(costs), reverse=True)
