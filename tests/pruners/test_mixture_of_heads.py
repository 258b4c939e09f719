"""Mixture of heads: the same function while every head is on, and gathering equals masking."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.compensation import Compensation, apply_compensated
from peft_vision.cost import count_flops, input_size, measure, twin, unwrap
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.exporting import export
from peft_vision.layers.routed_attention import RoutedAttention
from peft_vision.layers.router import (
    Anneal,
    Router,
    load_balance,
    preferences,
    straight_through,
    top_gates,
)
from peft_vision.layers.traits import penalties, teaching
from peft_vision.method import Evidence, make
from tests.families import (
    NO_TOKENS,
    TRANSFORMERS,
    build,
    eva02_small,
    features,
    hf_vit,
    images,
    moved,
    run,
    timm_vit,
)

SOME = ("timm_vit", "timm_vit_normed", "timm_siglip", "timm_eva02_small", "hf_dinov3", "hf_vit")
some_families = pytest.mark.parametrize("family", SOME)


def routed(family: str = "timm_vit", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A family's backbone with routed heads, its routers moved."""
    torch.manual_seed(0)
    model = pv.wrap(build(family, dtype=dtype), "mixture_of_heads", **{"start": 0.0, **settings})
    shake(model)
    return model


def shake(model: nn.Module) -> None:
    """Routers with opinions."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router):
                for p in module.parameters():
                    p.add_(
                        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
                    )


def modules_of(model: nn.Module) -> list[RoutedAttention]:
    return [m for m in model.modules() if isinstance(m, RoutedAttention)]


def gathering(model: nn.Module, on: bool) -> nn.Module:
    for module in modules_of(model):
        module.gathered = on
    return model


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_gathered_heads_equal_masked_heads(family: str) -> None:
    model = routed(family, skip=0.6)
    x = images(unwrap(model))
    fast, slow = run(gathering(model, True), x), run(gathering(model, False), x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    assert (slow - run(build(family, dtype=torch.float64), x)).abs().max() > 1e-6
    single = model.float()
    fast, slow = run(gathering(single, True), x.float()), run(gathering(single, False), x.float())
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choice", ["head", "token"])
@pytest.mark.parametrize("gate", ["binary", "soft"])
@some_families
def test_with_all_heads_on_nothing_changes(family: str, gate: str, choice: str) -> None:
    dense = build(family, dtype=torch.float64)
    x, before = images(dense), copy.deepcopy(dense)
    model = pv.wrap(dense, "mixture_of_heads", start=0.0, gate=gate, choice=choice, skip=0.5)
    for module in modules_of(model):
        module.now.target = 1.0
    torch.testing.assert_close(run(model, x), run(before, x), rtol=0, atol=1e-10)
    outputs = []
    for one in (model, before):
        torch.manual_seed(5)  # some families shift positions in training
        outputs.append(features(one.train()(x)))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gate", ["binary", "soft"])
def test_gathering_and_masking_train_alike(gate: str) -> None:
    grads = []
    for on in (True, False):
        model = gathering(routed("timm_vit_average", skip=0.6, gate=gate), on).train()
        features(model(images(unwrap(model)))).square().sum().backward()
        found = modules_of(model)
        assert all(bool(m.router.routed.grad.abs().sum() > 0) for m in found), "router in the dark"
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=0, atol=1e-9)


def test_token_choice_gates_are_the_published_ones() -> None:
    logits = torch.randn(2, 5, 4, dtype=torch.float64)
    chosen, gates = top_gates(logits, 2)
    assert torch.equal(chosen.sum(-1), torch.full((2, 5), 2.0, dtype=torch.float64))
    probability = logits.softmax(-1)
    kept = probability * chosen
    torch.testing.assert_close(gates, 2 * kept / kept.sum(-1, keepdim=True))
    assert set(probability[chosen.bool()].tolist()) == set(
        probability.topk(2, -1).values.flatten().tolist()
    )
    zero = top_gates(torch.zeros(1, 3, 4), 3)
    assert torch.equal(zero[1], zero[0]), "a router of zeros has gates of exactly one"


def test_load_balance_is_its_formula() -> None:
    logits = torch.randn(2, 6, 4, dtype=torch.float64)
    chosen, _ = top_gates(logits, 2)
    p, f = logits.softmax(-1).mean((0, 1)), chosen.mean((0, 1))
    assert f.sum() == pytest.approx(2.0)
    torch.testing.assert_close(load_balance(logits, chosen), 16 * (p * f).sum() / 4)
    even = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    balanced = load_balance(torch.zeros(12, 4, dtype=torch.float64), even)
    assert balanced == pytest.approx(1.0), "K when balanced"


def test_the_penalty_reaches_the_routers_and_is_spent_once() -> None:
    model = routed(choice="token", beta=0.5).train()
    model(images(unwrap(model)))
    terms = penalties(model)
    assert len(terms) == 4
    total = torch.stack(terms).sum()
    total.backward()
    assert all(bool(m.router.routed.grad.abs().sum() > 0) for m in modules_of(model))
    assert float(torch.stack(penalties(model)).sum()) == 0.0
    model(images(unwrap(model)))
    copy.deepcopy(model)  # what is remembered from training does not stand in the way
    quiet = routed(choice="head", beta=0.5).train()
    quiet(images(unwrap(quiet)))
    assert float(torch.stack(penalties(quiet)).sum()) == 0.0, "balanced as they are"


def test_straight_through_is_exactly_one() -> None:
    soft = torch.rand(100, requires_grad=True)
    gate = straight_through(soft)
    assert torch.equal(gate, torch.ones(100))
    gate.sum().backward()
    assert torch.equal(soft.grad, torch.ones(100))


def test_patches_may_come_in_any_order() -> None:
    module = modules_of(routed(skip=0.5))[0].eval()
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(16)])
    torch.testing.assert_close(module(x)[:, order], module(x[:, order]), rtol=0, atol=1e-12)


def test_protected_tokens_are_served_by_every_head() -> None:
    dense = build("timm_vit", dtype=torch.float64)
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    before = dense.blocks[0].attn(x)
    after = modules_of(routed(skip=1.0))[0].eval()(x)
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=1e-12)
    assert (after[:, 1:] - before[:, 1:]).abs().max() > 1e-3
    bare = modules_of(routed(skip=1.0, protect=False))[0].eval()(x)
    assert (bare[:, 0] - before[:, 0]).abs().max() > 1e-6 or bare.shape == before.shape


def test_strength_is_what_is_saved() -> None:
    model = build("timm_vit")
    backbone, costs = view(model), []
    for strength in (0.0, 0.01, 0.05, 0.3, 0.6, 1.0):
        method = make("mixture_of_heads", {"skip": strength})
        decisions = method.decide(backbone, strength, Evidence())
        assert (decisions == {}) == (strength < 0.02)
        small = twin(model)
        method.apply(view(small), decisions)
        costs.append(count_flops(small, input_size(model)))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]
    masked = make("mixture_of_heads", {"choice": "token"})
    assert masked.reduces == frozenset(), "masking saves nothing and says so"
    assert make("mixture_of_heads").reduces == {"flops", "latency_ms"}


def test_what_is_counted_is_the_formula() -> None:
    model = build("timm_vit")
    dense = measure(model).flops
    skip, heads, width, n, c = 0.5, 4, 8, 16, 8
    model = pv.wrap(model, "mixture_of_heads", skip=skip, start=0.75)
    routed_heads = heads - 1
    per_token = 2 * 32 * width + 2 * 17 * width  # query and output rows, and scores twice
    saved = routed_heads * (n - c) * per_token - 17 * 32 * routed_heads
    assert dense - measure(model).flops == 2 * saved


@pytest.mark.parametrize("choice", ["head", "token"])
def test_other_pruners_may_cut_heads_before_and_after(choice: str, tmp_path: Path) -> None:
    model = build("timm_vit", dtype=torch.float64)
    x, dense = images(model), copy.deepcopy(model)
    for name in ("magnitude", "mixture_of_heads", "magnitude"):
        extra = {"choice": choice} if name == "mixture_of_heads" else {"ratio": 0.7}
        model = pv.wrap(model, name, **extra)
    shake(model)
    torch.testing.assert_close(
        run(gathering(model, True), x), run(gathering(model, False), x), rtol=0, atol=1e-10
    )
    model.save_pretrained(tmp_path / "m")
    again = pv.load(tmp_path / "m", base=dense)
    assert torch.equal(run(again, x), run(gathering(model, True), x))


def test_heads_keep_their_kind_when_others_go() -> None:
    module = copy.deepcopy(modules_of(routed(shared=0.5, skip=0.5))[0])
    assert (module.routing.routed, module.routing.shared) == ((0, 1), (2, 3))
    first = module.router.routed[1].clone()
    module.keep_heads([1, 3])
    assert (module.routing.routed, module.routing.shared) == ((0,), (1,))
    assert torch.equal(module.router.routed[0], first)
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    fast = module.eval()(x)
    module.gathered = False
    torch.testing.assert_close(module(x), fast, rtol=0, atol=1e-12)
    module.keep_heads([1])
    assert module(x).shape == x.shape, "shared heads alone are a plain attention"


@pytest.mark.parametrize("family", ["timm_vit", "timm_eva02_small", "hf_vit"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_before_and_after(family: str, order: str, tmp_path: Path) -> None:
    model = build(family)
    x, dense = images(model), copy.deepcopy(model)
    lora = {"method": "lora", "r": 2, "targets": ("qkv", "q", "k", "v", "out")}
    heads = {"method": "mixture_of_heads", "start": 0.0}
    for step in (lora, heads) if order == "before" else (heads, lora):
        model = pv.wrap(model, **step)
    moved(model)
    shake(model)
    fast, slow = run(gathering(model, True), x), run(gathering(model, False), x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "m")
    again = pv.load(tmp_path / "m", base=dense)
    assert torch.equal(run(again, x), run(gathering(model, True), x))
    merged = pv.merge(model)
    torch.testing.assert_close(run(merged, x), slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"choice": "token"}, {"gate": "soft"}, {"router": "norm"}])
def test_every_variant_reloads_bit_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    model = routed("timm_dinov2_registers", torch.float32, anneal=4, **settings)
    x = images(unwrap(model))
    model.train()(x)
    model.save_pretrained(tmp_path / "m")
    again = pv.load(tmp_path / "m", base=build("timm_dinov2_registers"))
    assert torch.equal(run(again, x), run(model, x))
    assert [int(m.now.steps) for m in modules_of(again)] == [1, 1, 1, 1]


def test_the_share_anneals_in_training_and_is_the_target_in_evaluation() -> None:
    now = Anneal(0.25, 10, torch.device("cpu"))
    shares = [now() for _ in range(12)]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert shares[5] == pytest.approx(0.625)
    assert shares[10] == shares[11] == 0.25
    assert now.eval()() == 0.25
    assert int(now.steps) == 12


def test_checkpointing_sees_the_share_of_the_forward_pass() -> None:
    model = routed(anneal=3, skip=0.9)
    x, plain = images(unwrap(model)), copy.deepcopy(model)
    view(unwrap(model)).set_checkpointing(True)
    for _ in range(3):
        for one in (model, plain):
            one.zero_grad()
            features(one.train()(x)).square().sum().backward()
        assert [int(m.now.steps) for m in modules_of(model)] == [
            int(m.now.steps) for m in modules_of(plain)
        ]
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None and b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10)


def test_it_goes_with_fewer_tokens_and_rows_and_sizes() -> None:
    model = build("timm_vit", dtype=torch.float64)
    x = images(model)
    model = pv.wrap(model, "token_reorganization", keep_rate=0.6)
    model = pv.wrap(model, "mixture_of_heads", start=0.0, skip=0.6)
    shake(model)
    fast, slow = run(gathering(model, True), x), run(gathering(model, False), x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    module, y = modules_of(model)[1], torch.randn(2, 17, 32, dtype=torch.float64)
    sizes = torch.rand(2, 17, dtype=torch.float64)
    for rows in (None, 1, 5):
        outputs = []
        for on in (True, False):
            gathering(model, on)
            outputs.append(module.branch(y, rows=rows, key_bias=sizes).branch)
        assert outputs[0].shape[1] == (rows or 17)
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    gathering(model, True)
    whole = module.branch(y, whole=True)
    assert whole.q.shape == whole.k.shape, "a reducer may ask for every query"
    assert module.branch(y).q.shape[2] == 1
    torch.testing.assert_close(module.branch(y).q, whole.q[:, :, :1], rtol=0, atol=1e-12)


TOKENS = ("token_merging", "token_reorganization")


@pytest.mark.parametrize("order", [TOKENS, TOKENS[::-1], TOKENS[1:]], ids="-".join)
@pytest.mark.parametrize("family", ["timm_vit", "timm_vit_average", "timm_siglip"])
def test_reducers_that_come_later_see_every_query(family: str, order: tuple[str, ...]) -> None:
    settings = {
        "token_merging": {"ratio": 0.1},
        "token_reorganization": {"keep_rate": 0.7, "score": "received"},
    }
    model = routed(family, skip=0.4)
    x = images(unwrap(model))
    for name in order:
        model = pv.wrap(model, name, **settings[name])
    fast, slow = run(gathering(model, True), x), run(gathering(model, False), x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)


def test_routers_compute_in_full_under_autocast() -> None:
    router = Router(32, 3, 1, torch.zeros(1), 1)
    x = torch.randn(2, 5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, router(x))


@pytest.mark.parametrize("method", ["mixture_of_heads", "union_of_experts"])
def test_a_router_that_nothing_asks_gets_a_gradient_of_zero(method: str) -> None:
    model = pv.wrap(build("timm_vit"), "pooled_last_block")
    model = unwrap(pv.wrap(model, method, start=0.0)).train().requires_grad_(True)
    features(model(images(model))).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, "processes that train together would wait for it"


@pytest.mark.parametrize("shape", [(17, 17), (2, 1, 17, 17), (2, 4, 17, 17), (1, 1, 1, 17)])
def test_a_mask_goes_with_the_queries_that_are_chosen(shape: tuple[int, ...]) -> None:
    module = modules_of(routed(skip=0.6))[0].eval()
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    mask = (torch.rand(shape) > 0.4).index_fill(-1, torch.tensor([0]), True)
    fast = module(x, attn_mask=mask)
    module.gathered = False
    torch.testing.assert_close(module(x, attn_mask=mask), fast, rtol=0, atol=1e-12)
    assert (module(x) - fast).abs().max() > 1e-6
    rows = module.branch(x, rows=1, attn_mask=mask).branch
    torch.testing.assert_close(rows, fast[:, :1], rtol=0, atol=1e-12)


def test_data_choose_the_shared_heads() -> None:
    model = build("timm_vit", dtype=torch.float64)
    for block in model.blocks:
        with torch.no_grad():
            block.attn.proj.weight[:, 16:24] *= 1e-3  # head 2 has large values, and adds nothing
            block.attn.qkv.weight[80:88] *= 10.0
    batches = [(images(model), None)]
    by_data = make("mixture_of_heads", {"shared": 0.75, "start": 0.0})
    decided = by_data.decide(view(model), 0.5, Evidence(batches))
    assert {d["shared"]["bits"] for d in decided.values()} == {"b"}


def test_heads_that_no_token_uses_are_removed(tmp_path: Path) -> None:
    model = routed(choice="token", skip=0.5, shared=0.25)
    x, before = images(unwrap(model)), measure(model)
    for module in modules_of(model):
        with torch.no_grad():
            module.router.bias[0] = -1e4
    expected = run(model, x)
    with pytest.raises(UnsupportedSite, match="routed heads already"):
        pv.wrap(copy.deepcopy(model), "mixture_of_heads")
    smaller = pv.wrap(model, "mixture_of_heads", data=[(x, None)], choice="token", unused=0.001)
    assert [site.count for site in view(unwrap(smaller)).heads] == [3] * 4
    after = measure(smaller)
    assert after.flops < before.flops
    assert after.params < before.params
    assert run(smaller, x).shape == expected.shape
    smaller.save_pretrained(tmp_path / "m")
    again = pv.load(tmp_path / "m", base=build("timm_vit", dtype=torch.float64))
    assert torch.equal(run(again, x), run(smaller, x))


def test_a_head_that_no_token_uses_goes_without_a_trace() -> None:
    model = routed(choice="token", skip=0.5, shared=0.25, protect=False)
    x = images(unwrap(model))
    for module in modules_of(model):
        with torch.no_grad():
            module.router.bias[0] = -1e4
    expected = run(model, x)
    for module in modules_of(model):
        module.keep_heads([1, 2, 3])
        assert module.now() == module.routing.share == 1.0, "two of two instead of two of three"
    torch.testing.assert_close(run(model, x), expected, rtol=0, atol=1e-10)


def test_tokens_choose_the_best_fixed_heads_at_first() -> None:
    model = pv.wrap(build("timm_vit"), "mixture_of_heads", choice="token", start=0.0)
    for module in modules_of(model):
        logits = module.router(torch.randn(2, 17, 32))
        assert (logits == logits[0, 0]).all()


@pytest.mark.parametrize("choice", ["head", "token"])
@pytest.mark.parametrize(
    "family", ["timm_vit", "timm_siglip", "timm_eva02_small", "hf_dinov3", "hf_clip"]
)
def test_images_teach_the_router_and_what_reads_the_heads(family: str, choice: str) -> None:
    model = build(family, dtype=torch.float64).eval()
    method = make("mixture_of_heads", {"choice": choice, "start": 0.0})
    x, errors = images(model, 16), {}
    for how in (Compensation("none"), Compensation("ridge")):
        smaller = copy.deepcopy(model)
        decided = method.decide(view(smaller), 0.7, Evidence())
        apply_compensated(smaller, [method], [decided], [x], how)
        errors[how.how] = float((run(smaller, x) - run(model, x)).square().mean())
    assert 0 < errors["ridge"] < 0.7 * errors["none"]


def test_a_fitted_head_serves_the_patches_that_it_gives_most() -> None:
    for module in modules_of(routed(skip=0.5)):
        width = module.router.routed.shape[1]
        with torch.no_grad():  # heads that attend sharply differ from patch to patch
            module.attention.qkv.weight[: 2 * width] *= 16
        x = torch.randn(32, 17, width, generator=torch.Generator().manual_seed(0)).double()
        dense = module.attention(x)
        with teaching(module, 1e-3):
            torch.testing.assert_close(module(x), dense, rtol=0, atol=1e-12)
            energy = module.lessons[0].wanted.exp().unflatten(0, (32, 16))
        served = preferences(module.router(x)[:, 1:]).topk(8, dim=-1).indices
        share = energy.transpose(1, 2).gather(2, served).sum((0, 2)) / energy.sum((0, 1))
        best = energy.topk(8, dim=1).values.sum((0, 1)) / energy.sum((0, 1))
        assert (share > 0.5 + 0.1 * (best - 0.5)).all()  # by chance: 8 of 16


def test_soft_gates_and_norms_are_not_fitted() -> None:
    x = torch.randn(2, 17, 32)
    soft = modules_of(pv.wrap(build("timm_vit"), "mixture_of_heads", start=0.0, gate="soft"))[0]
    norms = modules_of(pv.wrap(build("timm_vit"), "mixture_of_heads", start=0.0, router="norm"))[0]
    for module in (soft, norms):
        with teaching(module, 1e-3):
            module(x)
    assert not soft.router.routed.any()
    assert not list(norms.router.parameters())


def test_a_router_that_was_trained_is_not_fitted_again() -> None:
    model = routed("timm_vit", skip=0.5)
    x, before = images(model), [m.router.bias.clone() for m in modules_of(model)]
    model = pv.wrap(model, "magnitude", data=[(x, None)], ratio=0.5, heads=False)
    assert all(
        torch.equal(m.router.bias, bias) for m, bias in zip(modules_of(model), before, strict=True)
    )


@pytest.mark.parametrize("format", ["onnx", "torch.export"])
@pytest.mark.parametrize("kind", ["timm_vit", "timm_eva02_small", "hf_vit"])
def test_it_exports_with_any_batch_size(kind: str, format: str, tmp_path: Path) -> None:
    if format == "onnx" and kind != "timm_vit":
        pytest.skip("one family by ONNX, which takes long")
    torch.manual_seed(0)
    factory = {"timm_vit": timm_vit, "timm_eva02_small": eva02_small, "hf_vit": hf_vit}[kind]
    model = factory(**({"num_hidden_layers": 1} if kind == "hf_vit" else {"depth": 1}))
    model = pv.wrap(model, "mixture_of_heads", start=0.0, skip=0.6)
    path = tmp_path / ("m.onnx" if format == "onnx" else "m.pt2")
    assert export(model, path, format=format).batch_sizes_checked == (1, 2, 5)


@pytest.mark.parametrize("family", [*NO_TOKENS, "generic_cnn"])
def test_what_it_cannot_act_on_is_refused_by_name(family: str) -> None:
    with pytest.raises(UnsupportedSite, match=r"has no (tokens|heads)"):
        pv.wrap(build(family), "mixture_of_heads")


def test_causal_and_other_attention_are_refused_by_name() -> None:
    model = routed()
    x: Tensor = torch.randn(2, 17, 32, dtype=torch.float64)
    with pytest.raises(UnsupportedSite, match="as causal attention"):
        modules_of(model)[0](x, is_causal=True)
    with pytest.raises(UnsupportedSite, match="computed by RoutedAttention already"):
        make("sparse_attention").decide(view(unwrap(model)), 0.5, Evidence())


@pytest.mark.parametrize(
    "settings",
    [
        {"skip": 1.5},
        {"shared": -0.1},
        {"choice": "both"},
        {"gate": "hard"},
        {"router": "deep"},
        {"gate": "soft", "router": "norm"},
        {"start": 1.0},
        {"anneal": -1},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        make("mixture_of_heads", settings)


def test_images_need_no_labels() -> None:
    """Batches are images, or (images, labels), for whatever looks at them."""
    model = build("timm_vit")
    x = images(model)
    method = make("mixture_of_heads")
    plain = method.decide(view(model), 0.5, Evidence([x, x]))
    assert plain == method.decide(view(model), 0.5, Evidence([(x, torch.zeros(len(x)))] * 2))
