"""What is peculiar to token reorganization: the class row, the counts, the published cost."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import measure, twin
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.attention import Attended
from peft_vision.layers.trunk import GONE, kept_positions
from peft_vision.method import Evidence, make
from peft_vision.plan import Plan
from peft_vision.pruners.token_reorganization import AttentionReducer, attention_to
from tests.families import PATCHES, build, images, run

Tiny = Callable[..., nn.Module]
METHOD = "token_reorganization"


def full_map(q: Tensor, k: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_rows_are_the_rows_of_the_full_map(rows: int) -> None:
    q, k = torch.randn(2, 2, 3, 20, 8, dtype=torch.float64).unbind(0)
    got = attention_to(attended(q[:, 0], q, k), rows)
    assert (got - full_map(q, k)[:, :, :rows].mean((1, 2))).abs().max() < 1e-12


def test_a_token_that_stands_for_several_is_attended_to_as_often() -> None:
    q, k = torch.randn(2, 1, 2, 9, 8, dtype=torch.float64).unbind(0)
    sizes = torch.tensor([[3.0, 1, 1, 2, 1, 1, 1, 1]], dtype=torch.float64)
    bias = torch.cat([torch.zeros(1, 1, dtype=torch.float64), sizes.log()], 1)[:, None, None]
    expected = full_map(q, k, bias)[:, :, 0].mean(1)
    assert (attention_to(attended(q[:, 0], q, k), 1, sizes) - expected).abs().max() < 1e-12


def test_by_value_is_weighted_head_by_head() -> None:
    q, k, v = torch.randn(3, 2, 3, 20, 8, dtype=torch.float64).unbind(0)
    got = attention_to(Attended(q[:, 0], q, k, v), by_value=True)
    expected = (full_map(q, k)[:, :, 0] * v.square().sum(-1).sqrt()).sum(1)
    assert (got - expected / expected.sum(1, keepdim=True)).abs().max() < 1e-12


def test_attention_received_ranks_like_the_mean_of_the_map() -> None:
    """Exact where all queries agree; near it where they differ little."""
    same, k = torch.randn(2, 2, 3, 1, 8, dtype=torch.float64).unbind(0)
    k = torch.randn(2, 3, 20, 8, dtype=torch.float64)
    q = same + 0.3 * torch.randn(2, 3, 20, 8, dtype=torch.float64)
    expected = full_map(q, k).mean((1, 2))
    got = attention_to(attended(q[:, 0], q, k), 0)
    both = torch.stack([got.flatten(), expected.flatten()])
    assert both.corrcoef()[0, 1] > 0.98
    flat = attention_to(attended(q[:, 0], same.expand_as(q), k), 0)
    exact = full_map(same.expand_as(q), k).mean((1, 2))
    assert (flat - exact).abs().max() < 1e-12


def reorganized(x: Tensor, scores: Tensor, keep: float, prefix: int) -> list[Tensor]:
    """The paper's rule, one image at a time."""
    out = []
    for tokens, score in zip(x, scores, strict=True):
        patches, values = tokens[prefix:], score[prefix:]
        count = math.ceil(keep * len(patches))
        best = set(values.topk(count).indices.tolist())
        kept = [patches[i] for i in range(len(patches)) if i in best]
        fused = sum(values[i] * patches[i] for i in range(len(patches)) if i not in best)
        out.append(torch.stack([*tokens[:prefix], *kept, fused]))
    return out


def attended(x: Tensor, q: Tensor, k: Tensor) -> Attended:
    return Attended(x, q, k, k)


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_keep_and_fuse_follow_the_paper(prefix: int) -> None:
    x = torch.randn(3, 20 + prefix, 8, dtype=torch.float64)
    q, k = torch.randn(2, 3, 2, 20 + prefix, 4, dtype=torch.float64).unbind(0)
    got, places, *_ = AttentionReducer(0.6, fuse=True)(x, attended(x, q, k), prefix, None)
    expected = torch.stack(reorganized(x, attention_to(attended(x, q, k)), 0.6, prefix))
    assert (got - expected).abs().max() < 1e-12
    assert all(row.tolist() == sorted(row.tolist()) for row in places[:, :-1])


def test_the_order_of_patches_does_not_matter() -> None:
    """Permuting patches permutes what is kept; the set and the fused token stay."""
    x = torch.randn(1, 17, 8, dtype=torch.float64)
    q, k = torch.randn(2, 1, 2, 17, 4, dtype=torch.float64).unbind(0)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(16)])
    reducer = AttentionReducer(0.5, fuse=True)
    one = reducer(x, attended(x, q, k), 1, None).x
    two = reducer(x[:, order], attended(x, q[:, :, order], k[:, :, order]), 1, None).x
    key = torch.randn(8, dtype=torch.float64)
    assert (one[:, -1] - two[:, -1]).abs().max() < 1e-12
    assert (
        (one[0, :-1] @ key).sort().values - (two[0, :-1] @ key).sort().values
    ).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("keep_rate", "published"),
    [(0.9, 0.875), (0.8, 0.756), (0.7, 0.659), (0.5, 0.502), (0.3, 0.395)],
)
def test_the_published_cost_of_deit_small(keep_rate: float, published: float) -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    dense = measure(model).flops
    technique = make(METHOD, {"keep_rate": keep_rate})
    technique.apply(view(model), technique.decide(view(model), technique.strength, Evidence()))
    assert measure(model).flops / dense == pytest.approx(published, abs=6e-4)


def test_nothing_is_fused_when_nothing_is_saved(tiny_timm: Tiny) -> None:
    model, x = tiny_timm(), torch.randn(2, 3, 32, 32)
    before = model(x)
    wrapped = pv.wrap(model, METHOD, keep_rate=0.99)
    assert torch.equal(wrapped(x), before)


def test_prefix_tokens_are_never_dropped(tiny_timm: Tiny) -> None:
    model = tiny_timm("deit_tiny_distilled_patch16_224")
    wrapped = pv.wrap(model, METHOD, keep_rate=0.05, fuse=False)
    trunk = view(wrapped.plain_model).tokens.trunk()
    seen = []
    trunk.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    wrapped(torch.randn(1, 3, 32, 32))
    assert seen == [2 + 1]


def test_kept_positions_are_positions_of_the_image(tiny_timm: Tiny) -> None:
    wrapped = pv.wrap(tiny_timm(), METHOD, keep_rate=0.5)
    found = kept_positions(wrapped, torch.randn(3, 3, 32, 32))
    assert list(found) == [1, 2, 3]
    before = set(range(16))
    for places in found.values():
        assert all(len(set(row.tolist()) - {GONE}) == (row != GONE).sum() for row in places)
        assert set(places.flatten().tolist()) - {GONE} <= before
    first = found[1]
    assert first.shape == (3, 9)
    assert (first[:, -1] == GONE).all()
    survivors = [set(row.tolist()) - {GONE} for row in found[1]]
    assert all(set(row.tolist()) - {GONE} <= s for row, s in zip(found[3], survivors, strict=True))


def test_depths_are_relative() -> None:
    import timm

    for depth, expected in ((12, {"3", "6", "9"}), (24, {"6", "12", "18"}), (4, {"1", "2", "3"})):
        with torch.device("meta"):
            model = timm.create_model("vit_tiny_patch16_224", depth=depth)
        technique = make(METHOD)
        technique.apply(view(model), technique.decide(view(model), 0.3, Evidence()))
        assert set(view(model).tokens.trunk().reducers) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_rate": 0},
        {"keep_rate": 1.5},
        {"at": []},
        {"at": [1.0]},
        {"score": "loud"},
        {"schedule": "sometimes"},
        {"warm_up": -1},
        {"warm_up": 0.5},
    ],
)
def test_settings_have_ranges(settings: dict[str, object]) -> None:
    with pytest.raises(BadSetting):
        make(METHOD, settings)


def test_a_mask_is_refused(tiny_timm: Tiny) -> None:
    wrapped = pv.wrap(tiny_timm(), METHOD)
    trunk = view(wrapped.plain_model).tokens.trunk()
    with pytest.raises(UnsupportedSite, match="mask"):
        trunk(torch.randn(1, 17, 48), attn_mask=torch.zeros(17, 17))
    assert twin(wrapped.plain_model) is not None


def decided(name: str, strength: float, **settings: object) -> dict[str, dict[str, float]]:
    return make(METHOD, settings).decide(view(build(name)), strength, Evidence())  # type: ignore[return-value]


@pytest.mark.parametrize("schedule", ["drops", "every", "curve"])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "dropped"])
@pytest.mark.parametrize("name", ["timm_vit", "timm_siglip"])
def test_cost_falls_with_strength_and_a_patch_stays(name: str, schedule: str, fuse: bool) -> None:
    model, costs = build(name), []
    method = make(METHOD, {"schedule": schedule, "fuse": fuse})
    for strength in (0.0, 0.15, 0.3, 0.5, 0.8, 1.0):
        smaller = twin(model)
        method.apply(view(smaller), method.decide(view(model), strength, Evidence()))
        costs.append(measure(smaller).flops)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.85 * costs[0]
    method.apply(view(model), method.decide(view(model), 1.0, Evidence()))
    assert run(model, images(model)).isfinite().all()


def test_every_block_but_the_first_reduces() -> None:
    assert list(decided("timm_vit", 0.3, schedule="every")) == [
        f"blocks.{i}.tokens" for i in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("keep", "published"), [(0.918, 0.7), (0.885, 0.6), (0.837, 0.5), (0.771, 0.4)]
)
def test_a_drop_in_every_block_costs_what_the_closed_form_says(
    keep: float, published: float
) -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    dense = measure(model).flops
    technique = make(METHOD, {"keep_rate": keep, "schedule": "every", "fuse": True})
    technique.apply(view(model), technique.decide(view(model), technique.strength, Evidence()))
    assert measure(model).flops / dense == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "dropped"])
def test_a_curve_leaves_the_counts_it_names(fuse: bool) -> None:
    import timm

    from peft_vision.pruners._token_counts import counts, curve

    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    expected = counts(curve(0.5, 12), 196, least=1 + fuse)
    technique = make(METHOD, {"keep_rate": 0.5, "schedule": "curve", "fuse": fuse})
    technique.apply(view(model), technique.decide(view(model), 0.5, Evidence()))
    found: list[int] = []
    for block in view(model).blocks:
        block.block.mlp.register_forward_pre_hook(lambda m, a: found.append(a[0].shape[1] - 1))
    model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert found == expected
    assert sum(expected) / (12 * 196) == pytest.approx((1 + 11 * 0.5) / 12, abs=0.01)


def test_an_old_plan_means_what_it_meant() -> None:
    """Decisions without the newer settings: the class row ranks, at once."""
    model, other = build("timm_deit_distilled"), build("timm_deit_distilled")
    method = make(METHOD)
    method.apply(view(model), {"blocks.1.tokens": {"keep_rate": 0.5, "fuse": True}})
    method.apply(
        view(other),
        {
            "blocks.1.tokens": {
                "keep_rate": 0.5,
                "fuse": True,
                "rows": 1,
                "by_value": False,
                "warm_up": 0,
            }
        },
    )
    x = images(model)
    assert torch.equal(run(model, x), run(other, x))
    assert not view(model).tokens.trunk().restore
    assert model.state_dict().keys() == other.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "score", "rows"),
    [
        ("timm_vit", "auto", 1),
        ("timm_deit_distilled", "auto", 2),
        ("timm_dinov2_registers", "auto", 1),
        ("hf_dinov2_classifier", "auto", 1),
        ("timm_vit_average", "auto", 0),
        ("timm_vit_average", "class", 1),
        ("timm_siglip", "auto", 0),
        ("timm_siglip", "value", 0),
        ("timm_vit", "received", 0),
    ],
)
def test_what_ranks_the_patches(name: str, score: str, rows: int) -> None:
    found = decided(name, 0.5, score=score)
    assert {d["rows"] for d in found.values()} == {rows}
    assert {d["by_value"] for d in found.values()} == {score == "value"}


def test_a_class_token_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="score='received'"):
        decided("timm_siglip", 0.5, score="class")


def test_two_reducers_of_one_block_act_in_turn(tiny_timm: Tiny) -> None:
    wrapped = pv.wrap(pv.wrap(tiny_timm(), METHOD, at=(0.5,)), METHOD, at=(0.5,), keep_rate=0.5)
    found = kept_positions(wrapped, torch.randn(2, 3, 32, 32))
    assert found[2].shape == (2, math.ceil(0.5 * (math.ceil(0.7 * 16) + 1)) + 1)
    assert (found[2][:, -1] == GONE).all()


def warmed(passes: int) -> nn.Module:
    model = build("timm_vit")
    return pv.wrap(model, METHOD, keep_rate=0.5, at=(0.5,), fuse=False, warm_up=passes)


def test_the_keep_rate_falls_while_training_only() -> None:
    model = warmed(4)
    x = images(model.plain_model)
    expected = run(model, x)
    found: list[int] = []
    model.plain_model.blocks[0].register_forward_hook(lambda m, a, out: found.append(out.shape[1]))
    model.train()
    for _ in range(6):
        model(x)
    with torch.no_grad():
        model(x)
    model.eval()(x)
    cosine = [0.5 + 0.25 * (math.cos(math.pi * min(i, 4) / 4) + 1) for i in range(6)]
    assert [int(r.passes) for r in model.modules() if isinstance(r, AttentionReducer)] == [6], (
        "passes without gradients are not training"
    )
    seen: list[int] = []
    reducer = next(m for m in model.modules() if isinstance(m, AttentionReducer))
    reducer.passes.zero_()
    reducer.register_forward_hook(
        lambda m, a, out: seen.append(PATCHES if out is None else out.places.shape[1])
    )
    model.train()
    for _ in range(6):
        model(x)
    assert seen == [math.ceil(rate * PATCHES - 1e-9) for rate in cosine]
    assert torch.equal(run(model, x), expected)


def test_a_warm_up_is_recomputed_as_it_was() -> None:
    model = warmed(4)
    view(model.plain_model).set_checkpointing(True)
    for _ in range(5):
        model.train()(images(model.plain_model)).sum().backward()
    assert [int(r.passes) for r in model.modules() if isinstance(r, AttentionReducer)] == [5]


def test_a_warm_up_is_saved_and_replayed(tmp_path) -> None:
    model, dense = warmed(3), build("timm_vit")
    x = images(dense)
    model.train()(x)
    model.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=dense)
    assert torch.equal(run(again, x), run(model, x))
    assert [int(r.passes) for r in again.modules() if isinstance(r, AttentionReducer)] == [1]
    assert Plan.from_json(again.history.plan.to_json()) == model.history.plan
