"""What is peculiar to token merging: which pairs, their means, and what merging leaves exact."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import measure, twin
from peft_vision.errors import BadSetting
from peft_vision.layers.attention import Attended
from peft_vision.layers.reduction import Reduction
from peft_vision.layers.trunk import kept_positions
from peft_vision.method import Evidence, make
from peft_vision.pruners.token_merging import SimilarityReducer
from tests.families import PATCHES, build, images, run

Tiny = Callable[..., nn.Module]
METHOD = "token_merging"
F64 = torch.float64


def attended(k: Tensor) -> Attended:
    return Attended(k.flatten(1, 2), k, k, k)


def reduced(
    x: Tensor, k: Tensor, prefix: int, sizes: Tensor | None = None, **settings
) -> Reduction:
    reducer = SimilarityReducer(
        **{"share": 0.3, "margin": None, "by_keys": True, "proportional": True, **settings}
    )
    found = reducer(x, attended(k), prefix, sizes)
    assert found is not None
    return found


def slowly(
    x: Tensor, keys: Tensor, prefix: int, sizes: Tensor, share: float, margin: float | None
) -> tuple[Tensor, list[float], list[int]]:
    """One image (N C, what is compared P D): the tokens, their sizes, who carries each patch."""
    count = len(keys)
    alike = [
        [float(torch.cosine_similarity(keys[i], keys[j], dim=0)) for j in range(count)]
        for i in range(count)
    ]
    going = min(round(share * count), count // 2)
    if margin is None:
        ones, others = list(range(0, count, 2)), list(range(1, count, 2))
    else:

        def energy(i: int) -> float:
            worth = [
                a if a >= margin else float(torch.tensor(a - margin).exp()) - 1 for a in alike[i]
            ]
            return sum(worth) / count

        crowded = sorted(range(count), key=lambda i: -energy(i))[: 2 * going]
        ones, others = crowded[::2], crowded[1::2]
    pairs = [(max(alike[i][j] for j in others), i) for i in ones]
    gone = {}
    for _, i in sorted(pairs, reverse=True)[:going]:
        gone[i] = max(others, key=lambda j: alike[i][j])
    stay = [i for i in (*range(0, count, 2), *range(1, count, 2)) if i not in gone]
    tokens, weights = [*x[:prefix]], []
    for i in stay:
        members = [i, *(j for j, to in gone.items() if to == i)]
        total = sum(float(sizes[j]) for j in members)
        tokens.append(sum(sizes[j] * x[prefix + j] for j in members) / total)
        weights.append(total)
    carriers = [stay.index(gone.get(i, i)) for i in range(count)]
    return torch.stack(tokens), weights, carriers


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("margin", [None, 0.4], ids=["alternating", "protecting"])
@pytest.mark.parametrize("patches", [16, 13])
@pytest.mark.parametrize("by_keys", [True, False], ids=["keys", "stream"])
def test_pairs_and_means_are_those_of_a_slow_reference(
    prefix: int, margin: float | None, patches: int, by_keys: bool
) -> None:
    x = torch.randn(3, patches + prefix, 8, dtype=F64)
    k = torch.randn(3, 2, patches + prefix, 4, dtype=F64)
    sizes = torch.randint(1, 4, (3, patches)).to(F64)
    got = reduced(x, k, prefix, sizes, margin=margin, by_keys=by_keys)
    assert got.sizes is not None
    for i in range(3):
        tokens, weights, carriers = slowly(
            x[i], (k[i].mean(0) if by_keys else x[i])[prefix:], prefix, sizes[i], 0.3, margin
        )
        assert (got.x[i] - tokens).abs().max() < 1e-12
        assert got.sizes[i].tolist() == weights
        assert got.carriers[i].tolist() == carriers
        assert [carriers[place] for place in got.places[i].tolist()] == list(range(len(weights)))


def test_sizes_add_up_to_the_patches_and_the_mean_stays() -> None:
    x, sizes = torch.randn(2, 21, 8, dtype=F64), None
    mean, k = x[:, 1:].mean(1), torch.randn(2, 2, 21, 4, dtype=F64)
    for _ in range(4):
        found = reduced(x, k[:, :, : x.shape[1]], 1, sizes)
        assert torch.equal(found.x[:, 0], x[:, 0])
        x, sizes = found.x, found.sizes
        assert sizes is not None
        assert (sizes.sum(1) - 20).abs().max() < 1e-12
    assert ((sizes.unsqueeze(-1) * x[:, 1:]).sum(1) / 20 - mean).abs().max() < 1e-12
    assert x.shape[1] < 10


def tokens_as_set(found: Reduction, prefix: int) -> Tensor:
    """The tokens of one image in an order that their numbers give."""
    x = found.x[0, prefix:]
    return x[(x @ torch.arange(1, x.shape[1] + 1, dtype=x.dtype)).argsort()]


@pytest.mark.parametrize("margin", [None, 0.3], ids=["alternating", "protecting"])
def test_the_order_of_patches_does_not_matter(margin: float | None) -> None:
    """Of all patches where the sets follow likeness; within each set where they alternate."""
    x, k = torch.randn(1, 17, 8, dtype=F64), torch.randn(1, 2, 17, 4, dtype=F64)
    order = torch.randperm(16)
    if margin is None:
        order = torch.stack([2 * torch.randperm(8), 2 * torch.randperm(8) + 1], dim=1).flatten()
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + order])
    one = reduced(x, k, 1, margin=margin)
    two = reduced(x[:, order], k[:, :, order], 1, margin=margin)
    assert (tokens_as_set(one, 1) - tokens_as_set(two, 1)).abs().max() < 1e-12


def doubled(model: nn.Module) -> None:
    """Every patch enters the trunk twice, side by side."""
    trunk = view(model).tokens.trunk()

    def twice(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, prefix = args[0], trunk.prefix
        patches = x[:, prefix:].repeat_interleave(2, dim=1)
        return (torch.cat([x[:, :prefix], patches], dim=1), *args[1:])

    trunk.register_forward_pre_hook(twice)


@pytest.mark.parametrize(
    "name",
    ["timm_vit", "timm_deit_distilled", "timm_dinov2_registers", "timm_vit_normed", "hf_vit"],
)
@pytest.mark.parametrize("metric", ["keys", "stream"])
def test_merging_twins_changes_nothing(name: str, metric: str) -> None:
    """A merged token is exactly its twins when later attention counts it as often."""
    model = build(name, dtype=F64)
    doubled(model)
    other, lighter = copy.deepcopy(model), copy.deepcopy(model)
    x = images(model)
    decision = {"share": 0.5, "margin": None, "by_keys": metric == "keys"}
    for changed, proportional in ((other, True), (lighter, False)):
        make(METHOD).apply(
            view(changed), {"blocks.1.merging": {**decision, "proportional": proportional}}
        )
    before = run(model, x)
    assert (run(other, x) - before).abs().max() < 1e-10
    assert (run(lighter, x) - before).abs().max() > 1e-6


def test_pooling_what_was_merged_weighs_by_size() -> None:
    """The mean over all patches put back is the mean of the tokens, weighted by size."""
    model = build("timm_vit_average", dtype=F64)
    wrapped = pv.wrap(model, METHOD, ratio=0.2).eval()
    tokens = view(wrapped.plain_model).tokens
    assert tokens is not None
    trunk = tokens.trunk()
    assert trunk.restore
    inside: list[Tensor] = []
    restored = trunk.leave

    def spied(stream):
        inside.append(stream.x)
        assert (stream.sizes.sum(1) - PATCHES).abs().max() < 1e-12
        out = restored(stream)
        weighed = (stream.sizes.unsqueeze(-1) * stream.x[:, trunk.prefix :]).sum(1) / PATCHES
        assert out.shape[1] == PATCHES + trunk.prefix
        assert (out[:, trunk.prefix :].mean(1) - weighed).abs().max() < 1e-12
        return out

    trunk.leave = spied  # type: ignore[method-assign]
    run(wrapped, images(wrapped.plain_model))
    assert inside[0].shape[1] < PATCHES


@pytest.mark.parametrize("schedule", ["constant", "decreasing", "curve"])
@pytest.mark.parametrize("name", ["timm_vit", "timm_siglip"])
def test_cost_falls_with_strength_and_a_patch_stays(name: str, schedule: str) -> None:
    model, costs = build(name), []
    method = make(METHOD, {"schedule": schedule})
    for strength in (0.0, 0.15, 0.3, 0.5, 0.8, 1.0):
        smaller = twin(model)
        method.apply(view(smaller), method.decide(view(model), strength, Evidence()))
        costs.append(measure(smaller).flops)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.75 * costs[0]
    method.apply(view(model), method.decide(view(model), 1.0, Evidence()))
    assert run(model, images(model)).isfinite().all()
    assert kept_positions(model, images(model))[3].shape[1] <= 2


def test_a_constant_number_leaves_each_block() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    wrapped = pv.wrap(model, METHOD, ratio=13 / 196)
    found: list[int] = []
    for block in view(model).blocks:
        block.block.mlp.register_forward_pre_hook(lambda m, a: found.append(a[0].shape[1] - 1))
    wrapped(torch.zeros(1, 3, 224, 224, device="meta"))
    assert found == [196 - 13 * block for block in range(1, 13)]


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_merging_starts_where_it_is_told(start: float) -> None:
    decisions = make(METHOD, {"start": start}).decide(view(build("timm_vit")), 0.2, Evidence())
    assert min(decisions) == f"blocks.{int(4 * start)}.merging"


def test_more_than_half_never_leaves_a_block() -> None:
    decisions = make(METHOD).decide(view(build("timm_vit")), 1.0, Evidence())
    assert all(0 < decision["share"] <= 0.5 for decision in decisions.values())


def test_prefix_tokens_are_never_merged(tiny_timm: Tiny) -> None:
    wrapped = pv.wrap(tiny_timm("deit_tiny_distilled_patch16_224"), METHOD, ratio=0.5)
    seen: list[int] = []
    trunk = view(wrapped.plain_model).tokens.trunk()
    trunk.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    wrapped(torch.randn(1, 3, 32, 32))
    assert seen == [2 + 1]


@pytest.mark.parametrize(
    "settings",
    [{"ratio": 0.6}, {"ratio": -0.1}, {"schedule": "now"}, {"start": 1.0}, {"metric": "x"}],
)
def test_settings_have_ranges(settings: dict[str, object]) -> None:
    with pytest.raises(BadSetting):
        make(METHOD, settings)


def test_pictures_show_a_few_of_many_blocks(tiny_timm: Tiny) -> None:
    from peft_vision.report.anatomy import overlays_of

    model = pv.wrap(tiny_timm(depth=9), METHOD, ratio=1 / 16)
    found = overlays_of(
        model, torch.randn(1, 3, 32, 32), ["one"], {"mean": [0.5] * 3, "std": [0.5] * 3}
    )
    stages = found[0].stages
    assert [stage.label for stage in stages] == [f"after block {n}" for n in (2, 4, 6, 9)]
    assert [len(set(stage.kept)) for stage in stages] == [len(stage.kept) for stage in stages]
    assert all(set(b.kept) < set(a.kept) for a, b in itertools.pairwise(stages))
