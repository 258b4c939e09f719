"""Paths: what is removed is gone, what is silent has no vote, and the order follows the output."""

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
from peft_vision.backbones.sites import Backbone
from peft_vision.cost import count_flops, input_size, measure, twin, unwrap
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.exporting import export
from peft_vision.layers.absent import Absent
from peft_vision.layers.linear_mlp import LinearMlp
from peft_vision.layers.trunk import Trunk, kept_positions
from peft_vision.method import Evidence, make
from peft_vision.plan import Plan
from peft_vision.pruners import _path_ranking as ranking
from peft_vision.pruners import _path_stand_ins as stand_ins
from peft_vision.pruners._path_probe import Probe
from peft_vision.pruners._path_scores import BY_IMAGES, taylor
from tests.families import (
    CLASS_POOLED,
    DEPTH,
    NO_TOKENS,
    SIZE,
    TRANSFORMERS,
    build,
    features,
    images,
    moved,
    run,
)

METHOD = "path_pruning"
BRANCHES = [(i, half) for i in range(DEPTH) for half in ("attention", "mlp")]
GATED = ("timm_vit_glu", "timm_vit_swiglu", "timm_eva02_base", "hf_dinov3_gated")
SAMPLE = ("timm_vit", "timm_vit_average", "timm_siglip", "timm_eva_dinov3", "hf_dinov2_classifier")


def key_of(branch: tuple[int, str]) -> str:
    return f"blocks.{branch[0]}.{branch[1]}"


def gone(*branches: tuple[int, str], offset: bool = False) -> dict[str, Any]:
    return {key_of(b): {"absent": True, "offset": offset} for b in branches}


def silent(*branches: tuple[int, str], rows: int | None = 1) -> dict[str, Any]:
    return {"tokens.votes": {"rows": rows}, **{key_of(b): {"vote": False} for b in branches}}


def linear(*blocks: int, fitted: bool = False) -> dict[str, Any]:
    return {f"blocks.{i}.mlp": {"linear": True, "fitted": fitted} for i in blocks}


def cut(model: nn.Module, decisions: dict[str, Any], **settings: Any) -> nn.Module:
    make(METHOD, settings).apply(view(model), decisions)
    return model


def rows_of(model: nn.Module) -> int | None:
    decisions = make(METHOD, {"mode": "votes"}).decide(view(model), 0.1, Evidence())
    return decisions["tokens.votes"]["rows"]


def data(model: nn.Module, batches: int = 2, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    x = torch.randn(batches, size, 3, SIZE, SIZE, dtype=next(model.parameters()).dtype)
    return [(batch, torch.zeros(size, dtype=torch.long)) for batch in x]


def order(model: nn.Module, **settings: Any) -> list[str]:
    """Keys in the order in which they go, with data."""
    evidence = Evidence(data(model))
    method, backbone = make(METHOD, settings), view(model)
    found: list[str] = []
    for step in range(1, 41):
        now = [k for k in method.decide(backbone, step / 40, evidence) if k != "tokens.votes"]
        found += [key for key in now if key not in found]
    return found


# Removal


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_branch_that_adds_zero_may_as_well_be_removed(name: str) -> None:
    model = build(name, dtype=torch.float64)
    going = {(0, "attention"): "out", (0, "mlp"): "down", (2, "mlp"): "down"}
    with torch.no_grad():
        for site in view(model).linears:
            if site.role in [role for b, role in going.items() if b[0] == site.block]:
                site.layer.weight.zero_()
                if site.layer.bias is not None:
                    site.layer.bias.zero_()
    x = images(model)
    before = model(x)
    cut(model, gone(*going))
    after = model(x)
    assert (features(after) - features(before)).abs().max() < 1e-12
    assert type(after) is type(before)
    backbone = view(model)
    assert [site.block for site in backbone.heads] == [1, 2, 3]
    assert [site.block for site in backbone.hidden] == [1, 3]
    assert not [s for s in backbone.linears if s.block == 0]


@pytest.mark.parametrize("name", SAMPLE)
def test_every_removal_saves_and_the_network_is_never_empty(name: str) -> None:
    model, method, evidence = build(name), make(METHOD), Evidence()
    backbone, costs, sizes, seen = view(model), [], [], [set()]
    for count in range(2 * DEPTH - 1):
        strength = count / (2 * DEPTH - 2)
        decisions = method.decide(backbone, strength, evidence)
        assert seen[-1] <= set(decisions), "a strength takes a beginning of one order"
        seen.append(set(decisions))
        smaller = twin(model)
        method.apply(view(smaller), decisions)
        costs.append(count_flops(smaller, input_size(model)))
        sizes.append(sum(p.numel() for p in smaller.parameters()))
    for figures in (costs, sizes):
        assert all(after < before for before, after in itertools.pairwise(figures))
    assert len(seen[-1]) == 2 * DEPTH - 2
    assert {key.rpartition(".")[2] for key in map(key_of, BRANCHES)} == {
        key.rpartition(".")[2] for key in {key_of(b) for b in BRANCHES} - seen[-1]
    }


def test_norm_and_scale_go_with_the_branch() -> None:
    model = build("timm_dinov2")
    before = {name for name, _ in model.named_parameters()}
    cut(model, gone((1, "mlp")))
    left = {name.replace("blocks.0.blocks", "blocks") for name, _ in model.named_parameters()}
    parts = {n.split(".")[2] for n in before - left}
    assert parts == {"norm2", "ls2", "mlp"}
    assert not left - before


def test_the_scale_outside_of_modules_goes_too() -> None:
    model = cut(build("timm_eva_dinov3"), gone((1, "attention")))
    left = {n.split(".", 4)[-1] for n, _ in model.named_parameters() if ".blocks.1." in n}
    assert left == {"gamma_2", *(n for n in left if n.startswith(("norm2", "mlp")))}


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_only_the_branches_asked_for_go(kind: str) -> None:
    decisions = make(METHOD, {"branches": kind}).decide(view(build("timm_vit")), 1.0, Evidence())
    assert {key.rpartition(".")[2] for key in decisions} == {kind}
    assert len(decisions) == DEPTH - 1


def test_without_data_the_ends_go_last() -> None:
    decisions = make(METHOD).decide(view(build("timm_vit")), 0.5, Evidence())
    assert decisions
    assert {key.split(".")[1] for key in decisions} <= {"1", "2"}


# The mean in its place


def observed(model: nn.Module, batches: list[Any]) -> dict[tuple[int, str], list[Tensor]]:
    """What every branch adds to the stream, batch by batch."""
    trunk, seen = view(model).tokens.trunk(), {}
    trunk.observer = lambda i, half, _, added: seen.setdefault((i, half), []).append(added.detach())
    for batch, _ in batches:
        model(batch)
    trunk.observer = None
    return seen


def fold_means(model: nn.Module, dense: nn.Module, batches: list[Any]) -> None:
    """Set the offset of every removed branch to the mean of what the dense model's added."""
    seen = observed(dense, batches)
    for site in view(model).blocks:
        for half, name in (("attention", "attn"), ("mlp", "mlp")):
            branch = getattr(site.block, name)
            if isinstance(branch, Absent):
                branch.fit(torch.cat(seen[site.index, half]))


@pytest.mark.parametrize("branch", [(0, "mlp"), (2, "attention"), (3, "mlp")])
def test_the_mean_leaves_less_error_than_nothing(branch: tuple[int, str]) -> None:
    dense = build("timm_vit_average", dtype=torch.float64)
    batches = data(dense)
    with_mean = cut(copy.deepcopy(dense), gone(branch, offset=True))
    with_nothing = cut(copy.deepcopy(dense), gone(branch))
    x = batches[0][0]
    assert torch.equal(with_mean(x), with_nothing(x)), "an offset is zero until it is fitted"
    fold_means(with_mean, copy.deepcopy(dense), batches)

    def error(model: nn.Module) -> Tensor:
        """Of what enters the next half, over all tokens and images."""
        total = torch.zeros((), dtype=torch.float64)
        full = observed(copy.deepcopy(dense), batches)[branch]
        got = observed(model, batches).get(branch, [torch.zeros_like(t) for t in full])
        for then, now in zip(full, got, strict=True):
            total += (then - now).square().sum()
        return total

    assert error(with_mean) < 0.999 * error(with_nothing)


def test_room_for_the_mean_is_made_with_data_and_when_asked() -> None:
    model = build("timm_vit")
    with_data = make(METHOD, {"rank": "influence"})
    without = make(METHOD, {"rank": "influence", "mean": False})
    evidence = Evidence(data(model))
    for method, expected in ((with_data, True), (without, False)):
        decided = method.decide(view(model), 0.5, evidence)
        assert {decision["offset"] for decision in decided.values()} == {expected}
    offsets = [
        m.offset
        for m in pv.wrap(model, with_data, data=data(model)).modules()
        if isinstance(m, Absent)
    ]
    assert offsets
    assert all(o.shape == (32,) and bool(o.any()) for o in offsets), "fitted on the images"


def test_a_mean_that_is_worse_than_nothing_does_not_stay() -> None:
    branch = (1, "mlp")
    probe = Probe(view(build("timm_vit", dtype=torch.float64)), data(build("timm_vit")), 8)
    nothing = probe.harms(stand_ins.absent(probe, [branch]))[branch]
    for amount in (0.0, 0.3, 3.0, 30.0):
        constant = Absent(32).double()
        nn.init.normal_(constant.offset, std=amount)
        harm = probe.harms({branch: constant})[branch]
        stays = ranking.greedy(probe, [branch], BRANCHES, lambda *_, c=constant: {branch: c})
        assert stays == [(branch, harm <= nothing)]
        probe = Probe(view(build("timm_vit", dtype=torch.float64)), data(build("timm_vit")), 8)
    assert harm > nothing, "the last one is far off"


# The order


def quiet(*loud: tuple[int, str]) -> nn.Module:
    """A model whose branches add nothing but those named."""
    model = build("timm_vit", dtype=torch.float64)
    with torch.no_grad():
        for site in view(model).linears:
            half = {"out": "attention", "down": "mlp"}.get(site.role)
            if half and (site.block, half) not in loud:
                site.layer.weight.zero_()
                site.layer.bias.zero_()
    return model


@pytest.mark.parametrize("rank", ["leave_one_out", "taylor", "influence", "weights"])
@pytest.mark.parametrize("mode", ["remove", "votes"])
def test_the_branch_that_does_nothing_goes_first(rank: str, mode: str) -> None:
    if rank == "weights" and mode == "votes":
        pytest.skip("without data votes go by length")
    loud = [b for b in BRANCHES if b != (2, "attention")]
    first, *_ = order(quiet(*loud), rank=rank, mode=mode)
    assert first == "blocks.2.attention"


@pytest.mark.parametrize("mode", ["remove", "votes"])
def test_scoring_again_is_better_than_once(mode: str) -> None:
    """Two branches say the same: each alone may go, but not both."""
    model = quiet((0, "mlp"), (1, "mlp"), (2, "mlp"))
    torch.manual_seed(0)
    with torch.no_grad():
        same = torch.randn(32, dtype=torch.float64)
        for index, amount in ((0, 20.0), (1, 20.0)):
            model.blocks[index].mlp.fc2.weight.zero_()
            model.blocks[index].mlp.fc2.bias.copy_(amount * same)
        model.blocks[2].mlp.fc2.weight.zero_()
        model.blocks[2].mlp.fc2.bias.copy_(6.0 * torch.randn(32, dtype=torch.float64))
    settings = {"mode": mode, "mean": False, "branches": "mlp"}
    greedy = order(model, **settings, rank="leave_one_out")
    greedy = [key for key in greedy if key in ("blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp")]
    assert {greedy[0], greedy[1]} != {"blocks.0.mlp", "blocks.1.mlp"}
    if mode == "remove":
        probe = Probe(view(model), data(model), 64)
        branches = [(0, "mlp"), (1, "mlp"), (2, "mlp")]
        alone = probe.harms(stand_ins.absent(probe, branches))
        assert max(alone[branches[0]], alone[branches[1]]) < alone[branches[2]]
        one_shot = harm_of(model, ["blocks.0.mlp", "blocks.1.mlp"])
        assert harm_of(model, greedy[:2]) < 0.9 * one_shot


def cut_so_far(model: nn.Module, keys: list[str], mode: str) -> nn.Module:
    """A copy of a model without these branches, or without their votes."""
    if mode == "votes":
        votes: dict[str, Any] = {key: {"vote": False} for key in keys}
        return cut(copy.deepcopy(model), {"tokens.votes": {"rows": 1}, **votes})
    return cut(copy.deepcopy(model), {key: {"absent": True, "offset": False} for key in keys})


@pytest.mark.parametrize("rank", ["taylor", "influence"])
@pytest.mark.parametrize("mode", ["remove", "votes"])
def test_next_goes_what_would_go_first_of_what_is_left(mode: str, rank: str) -> None:
    """Of the model without those that have gone: scores are taken again, by every rank."""
    model = build("timm_vit", dtype=torch.float64)
    with torch.no_grad():
        for site in view(model).linears:
            if site.role in ("out", "down"):
                site.layer.weight *= 8.0  # so that branches depend on each other
    settings = {"mode": mode, "rank": rank, "mean": False}
    found = without_entry(order(model, **settings))
    assert len(found) >= 6
    x, _ = data(model)[0]
    for count in range(1, 6):
        smaller = cut_so_far(model, found[:count], mode)
        # Answers are the log-probabilities of the classes that the whole model chooses.
        if rank == "influence" or run(smaller, x).argmax(-1).equal(run(model, x).argmax(-1)):
            assert without_entry(order(smaller, **settings))[0] == found[count]


def without_entry(keys: list[str]) -> list[str]:
    return [key for key in keys if key != "tokens.entry"]


@pytest.mark.parametrize("rank", ["leave_one_out", "taylor"])
def test_the_order_is_the_same_where_only_the_class_token_goes_on(rank: str) -> None:
    """Nobody reads what the last block with attention would make of patches."""
    model = build("timm_vit", dtype=torch.float64)
    pooled = unwrap(pv.wrap(copy.deepcopy(model), "pooled_last_block"))
    found = order(model, rank=rank)
    assert order(pooled, rank=rank) == found
    assert "blocks.3.attention" in found


def harm_of(model: nn.Module, keys: list[str]) -> float:
    dense, total = copy.deepcopy(model), 0.0
    smaller = cut(copy.deepcopy(model), {key: {"absent": True, "offset": False} for key in keys})
    for x, _ in data(model):
        p, q = run(dense, x).log_softmax(-1), run(smaller, x).log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total


def test_the_harm_of_one_branch_is_that_of_the_model_without_it() -> None:
    model = build("timm_deit_distilled", dtype=torch.float64)
    probe = Probe(view(model), data(model), 8)
    found = probe.harms(stand_ins.absent(probe, BRANCHES))
    for branch in BRANCHES:
        assert found[branch] * 8 == pytest.approx(harm_of(model, [key_of(branch)]), rel=1e-6)


def test_taylor_is_the_derivative_of_each_image() -> None:
    model = build("timm_vit", dtype=torch.float64)
    probe = Probe(view(model), data(model), 8)
    scores = taylor(probe, stand_ins.absent(probe, BRANCHES))
    site = next(s for s in view(model).linears if s.block == 1 and s.role == "down")
    weight, bias = site.layer.weight.detach().clone(), site.layer.bias.detach().clone()
    total, step = 0.0, 1e-5
    for x, _ in data(model):
        chosen = model(x).argmax(-1, keepdim=True)
        ends = []
        for w in (1 + step, 1 - step):
            with torch.no_grad():
                site.layer.weight.copy_(w * weight)
                site.layer.bias.copy_(w * bias)
            ends.append(run(model, x).log_softmax(-1).gather(-1, chosen).squeeze(-1))
        total += float(((ends[0] - ends[1]) / (2 * step)).abs().sum())
    assert scores[1, "mlp"] == pytest.approx(total / 8, rel=1e-5)


@pytest.mark.parametrize("kind", ["means", "fitted"])
def test_taylor_and_influence_judge_what_stands_in_the_place(kind: str) -> None:
    """A step towards the substitute's stream, and the angle between both streams."""
    model = build("timm_dinov2", dtype=torch.float64)
    probe, branch = Probe(view(model), data(model), 8), (1, "mlp")
    (module,) = getattr(stand_ins, kind)(probe, [branch]).values()
    total, step, angles = 0.0, 1e-5, []
    for number, batch in enumerate(probe.batches):
        whole = halfway = probe.step(batch, 0, probe.start(batch))
        whole = probe.step(batch, 1, halfway)
        with probe.instead(branch, module), torch.no_grad():
            other = probe.step(batch, 1, halfway)
        ends = []
        for w in (step, -step):
            x = whole.x + w * (other.x - whole.x)
            ends.append(probe.answers(number, probe.finish(batch, 2, whole._replace(x=x))))
        total += float(((ends[0] - ends[1]) / (2 * step)).abs().sum())
        angles.append(1 - nn.functional.cosine_similarity(whole.x, other.x, dim=-1))
    found = BY_IMAGES["taylor"](probe, {branch: module})
    assert found[branch] == pytest.approx(total / 8, rel=1e-5)
    found = BY_IMAGES["influence"](probe, {branch: module})
    assert found[branch] == pytest.approx(float(torch.cat(angles).mean()), rel=1e-9)


def test_features_are_compared_where_there_are_no_classes() -> None:
    model = build("hf_dinov2", dtype=torch.float64)
    probe = Probe(view(model), data(model), 8)
    assert not probe.classifies
    assert min(probe.harms(stand_ins.absent(probe, BRANCHES)).values()) > 0
    assert min(taylor(probe, stand_ins.absent(probe, BRANCHES)).values()) > 0


def test_a_limit_of_images_is_kept_and_the_model_is_not_touched() -> None:
    model = build("timm_vit")
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    probe = Probe(view(model), data(model, batches=3), 6)
    ranking.greedy(probe, BRANCHES[:4], BRANCHES, stand_ins.means)
    assert [len(batch.images) for batch in probe.batches] == [4, 2]
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_order_is_found_once() -> None:
    class Counted:
        passes = 0

        def __iter__(self) -> Any:
            Counted.passes += 1
            return iter(data(build("timm_vit"), batches=1))

    method, evidence, backbone = make(METHOD), Evidence(Counted()), view(build("timm_vit"))
    for strength in (0.3, 0.6, 0.9):
        assert method.decide(backbone, strength, evidence)
    assert Counted.passes == 1


# Votes


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_equal_votes_are_the_identity(name: str) -> None:
    model = build(name, dtype=torch.float64)
    x = images(model)
    before = features(model(x))
    wrapped = pv.wrap(model, METHOD, mode="votes", share=0.0)
    assert (features(wrapped(x)) - before).abs().max() < 1e-12
    scales = next(p for n, p in wrapped.named_parameters() if n.endswith("votes.scales"))
    assert scales.requires_grad
    assert (rows_of(build(name)) is None) == (
        name not in CLASS_POOLED
        or name in ("hf_dinov2", "hf_dinov2_swiglu", "hf_clip")
        or name in ("hf_dinov2_registers", "hf_dinov3", "hf_dinov3_gated")
    )


@pytest.mark.parametrize("name", SAMPLE)
def test_dead_ends_are_removed_and_compute_the_same(name: str) -> None:
    model = build(name, dtype=torch.float64)
    rows, x = rows_of(model), images(model)
    dense, plain = measure(model), copy.deepcopy(model)
    late = [(3, "mlp"), (3, "attention"), (1, "mlp")]
    cut(model, silent(*late, rows=rows))
    blocks = [site.block for site in view(model).blocks]
    parts = view(model).tokens.parts
    assert isinstance(getattr(blocks[3], parts.mlp), Absent)
    assert isinstance(getattr(blocks[3], parts.attention), Absent)
    assert not isinstance(getattr(blocks[1], parts.mlp), Absent)
    assert measure(model).flops < 0.85 * dense.flops
    cut(plain, silent(rows=rows))
    votes = view(plain).tokens.trunk().votes
    with torch.no_grad():
        for i, half in late:
            votes.scales[1 + 2 * i + (half == "mlp")] = 0
    assert (features(model(x)) - features(plain(x))).abs().max() < 1e-12


def test_a_vote_that_is_read_later_stays_in_the_stream() -> None:
    model = build("timm_vit")
    before = measure(model).flops
    cut(model, silent((0, "mlp"), (2, "attention"), (3, "attention")))
    assert measure(model).flops == before


def test_with_data_late_votes_may_go_and_one_branch_keeps_its_own() -> None:
    model = build("timm_vit")
    wrapped = pv.wrap(copy.deepcopy(model), METHOD, mode="votes", share=1.0, data=data(model))
    votes = view(unwrap(wrapped)).tokens.trunk().votes
    assert len(votes.kept) == 1
    assert votes.kept != [0]
    assert run(wrapped, images(model)).isfinite().all()


def test_the_offset_of_a_removed_branch_votes() -> None:
    model = cut(build("timm_vit", dtype=torch.float64), gone((1, "mlp"), offset=True))
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, Absent)).offset.normal_()
    x = images(model)
    before = model(x)
    assert (cut(model, silent())(x) - before).abs().max() < 1e-12


def test_a_branch_removed_after_votes_loses_its_scale() -> None:
    model = cut(build("timm_vit"), silent())
    cut(model, gone((1, "mlp")))
    votes = view(model).tokens.trunk().votes
    assert 4 not in votes.kept
    assert len(votes.scales) == 2 * DEPTH


def test_prompts_do_not_vote() -> None:
    for name in ("timm_vit", "timm_vit_average"):
        model = pv.wrap(build(name, dtype=torch.float64), "vpt", tokens=3)
        moved(model)
        x = images(unwrap(model))
        before = run(model, x)
        pv.wrap(model, METHOD, mode="votes", share=0.0)
        assert (run(model, x) - before).abs().max() < 1e-12


def test_votes_of_all_tokens_and_tokens_that_leave_are_refused() -> None:
    model = build("timm_vit_average")
    try:
        pv.wrap(model, "token_merging")
    except UnsupportedSite:
        pytest.skip("no token method acts on average pooling here")
    with pytest.raises(UnsupportedSite, match="could not vote"):
        pv.wrap(unwrap(model), METHOD, mode="votes")


# Activations


@pytest.mark.parametrize("name", ["timm_vit", "timm_dinov2", "hf_vit", "hf_clip", "timm_siglip"])
def test_an_mlp_without_activation_is_one_linear(name: str) -> None:
    model = build(name, dtype=torch.float64)
    other, x = copy.deepcopy(model), images(model)
    tokens = view(other).tokens
    for site in view(other).blocks[1:3]:
        mlp = getattr(site.block, tokens.parts.mlp)
        names = [n for n, m in mlp.named_children() if "act" in n.lower()]
        assert names
        for activation in names:
            setattr(mlp, activation, nn.Identity())
    dense = measure(model)
    cut(model, linear(1, 2))
    assert (features(model(x)) - features(other(x))).abs().max() < 1e-11
    after = measure(model)
    assert after.flops < dense.flops
    assert after.params == dense.params - 2 * (2 * 32 * 128 + 128 + 32) + 2 * (32 * 32 + 32)
    backbone = view(model)
    assert [site.block for site in backbone.hidden] == [0, 3]
    assert [s.key for s in backbone.linears if s.block == 1][-1] == "blocks.1.down"


@pytest.mark.parametrize("name", GATED)
def test_gated_mlps_need_data(name: str) -> None:
    model = build(name, dtype=torch.float64)
    with pytest.raises(UnsupportedSite, match=r"gated.*pass data"):
        pv.wrap(model, METHOD, mode="activations")
    wrapped = pv.wrap(model, METHOD, mode="activations", share=1.0, data=data(model))
    assert len(view(unwrap(wrapped)).hidden) == 0
    assert sum(isinstance(m, LinearMlp) for m in wrapped.modules()) == DEPTH


def test_a_narrow_mlp_saves_nothing_and_stays() -> None:
    model = build("timm_vit")
    for site in view(model).hidden[:3]:
        site.keep(list(range(16)))
    decisions = make(METHOD, {"mode": "activations"}).decide(view(model), 1.0, Evidence())
    assert list(decisions) == ["blocks.3.mlp"]


def test_adapters_and_packed_weights_are_refused_by_name() -> None:
    for first in ("lora", "int8"):
        model = pv.wrap(build("timm_vit"), first)
        with pytest.raises(UnsupportedSite, match="merge adapters and do this before quant"):
            pv.wrap(model, METHOD, mode="activations")


def test_the_best_linear_map_stands_in_while_mlps_are_ranked() -> None:
    model = build("timm_vit", dtype=torch.float64)
    probe = Probe(view(model), data(model), 8)
    mlps = [b for b in BRANCHES if b[1] == "mlp"]
    fitted = probe.harms(stand_ins.fitted(probe, mlps))
    nothing = probe.harms(stand_ins.absent(probe, mlps))
    assert sum(fitted.values()) < sum(nothing.values())


@pytest.mark.parametrize("rank", ["auto", "leave_one_out", "taylor", "influence"])
def test_an_mlp_whose_activation_does_nothing_loses_it_first(rank: str) -> None:
    """Although it adds more than any other: not the MLP goes but its activation."""
    model = build("timm_vit", dtype=torch.float64)
    mlp = model.blocks[1].mlp
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight *= 4.0
        mlp.fc1.bias += 50.0  # where GELU is the identity
        mlp.fc2.weight *= 3.0
        mlp.fc2.bias -= 50.0 * mlp.fc2.weight.sum(1)
    assert order(model, rank=rank, branches="mlp")[0] != "blocks.1.mlp"
    found = order(model, rank=rank, mode="activations")
    assert found[0] == "blocks.1.mlp"
    assert len(found) == DEPTH


# Plans, folders, other methods

KINDS = {
    "remove": {"share": 0.4},
    "votes": {"mode": "votes", "share": 0.4, "rank": "influence"},
    "activations": {"mode": "activations", "share": 0.5},
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("remove", "timm_eva_dinov3"),
        ("votes", "timm_vit"),
        ("votes", "timm_siglip"),
        ("votes", "hf_dinov2_classifier"),
        ("activations", "timm_vit_average"),
        ("activations", "hf_dinov3_gated"),
    ],
)
def test_plans_replay_on_meta_and_folders_reload(name: str, kind: str, tmp_path: Path) -> None:
    model = build(name)
    dense, fresh, x = copy.deepcopy(model), twin(model), images(model)
    changed = pv.wrap(model, METHOD, **KINDS[kind], data=data(model))
    moved(changed)
    for step in Plan.from_json(changed.history.plan.to_json()).steps:
        make(step.method, dict(step.settings)).apply(view(fresh), step.decisions)
    shapes = {n: t.shape for n, t in unwrap(changed).state_dict().items()}
    assert {n: t.shape for n, t in fresh.state_dict().items()} == shapes
    assert count_flops(fresh, input_size(dense)) == measure(changed).flops
    changed.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=dense)
    assert torch.equal(run(again, x), run(changed, x))


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("remove", True),
        ("remove", False),
        ("votes", True),
        ("votes", False),
        ("activations", False),
    ],
)
def test_lora_before_and_after(kind: str, first: bool, tmp_path: Path) -> None:
    model = build("timm_vit")
    dense, batches, x = copy.deepcopy(model), data(model), images(model)
    if first:
        adapted = pv.wrap(pv.wrap(model, "lora"), METHOD, **KINDS[kind], data=batches)
    else:
        adapted = pv.wrap(pv.wrap(model, METHOD, **KINDS[kind], data=batches), "lora")
    moved(adapted)
    adapted.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=dense)
    assert torch.equal(run(again, x), run(adapted, x))
    merged = pv.merge(adapted)
    assert (run(merged, x) - run(adapted, x)).abs().max() < 1e-4


def test_lora_updates_the_one_linear() -> None:
    model = pv.wrap(cut(build("timm_vit"), linear(0, 1, 2, 3)), "lora", targets=("mlp",))
    assert len([n for n, _ in model.named_parameters() if "lora_A" in n]) == DEPTH


@pytest.mark.parametrize("decisions", [gone((1, "mlp"), (2, "attention")), linear(1)], ids=str)
def test_magnitude_before_and_after(decisions: dict[str, Any]) -> None:
    model = build("timm_vit")
    before = pv.wrap(cut(copy.deepcopy(model), decisions), "magnitude", ratio=0.5)
    after = cut(unwrap(pv.wrap(copy.deepcopy(model), "magnitude", ratio=0.5)), decisions)
    x = images(model)
    for smaller in (unwrap(before), after):
        assert run(smaller, x).isfinite().all()
        assert "blocks.1.hidden" not in [site.key for site in view(smaller).hidden]
    keys = list(before.history.plan.steps[-1].decisions)
    assert "blocks.1.hidden" not in keys


def test_attention_by_which_tokens_leave_stays() -> None:
    model = unwrap(pv.wrap(build("timm_vit"), "token_reorganization"))
    decisions = make(METHOD).decide(view(model), 1.0, Evidence())
    kept = {key_of(b) for b in BRANCHES} - set(decisions)
    assert {"blocks.1.attention", "blocks.2.attention", "blocks.3.attention"} <= kept


def test_tokens_that_leave_where_the_attention_is_gone_are_chosen_by_the_one_before() -> None:
    model = build("timm_vit", dtype=torch.float64)
    reduced = unwrap(pv.wrap(copy.deepcopy(model), "token_reorganization", at=(0.5,)))
    early = unwrap(pv.wrap(copy.deepcopy(model), "token_reorganization", at=(0.25,)))
    costs = [measure(reduced).flops]
    cut(reduced, gone((2, "attention")))
    costs.append(measure(reduced).flops)
    assert costs[1] < costs[0]
    x = images(model)
    chosen = kept_positions(reduced, x)
    assert list(chosen) == [2]
    # The class token's attention in block 1 is the same in both: nothing before it has changed.
    assert torch.equal(chosen[2], kept_positions(early, x)[1])


def test_without_any_attention_before_every_token_goes_on() -> None:
    model = unwrap(pv.wrap(build("timm_vit"), "token_reorganization", at=(0.25,)))
    cut(model, gone((0, "attention"), (1, "attention")))
    assert kept_positions(model, images(model)) == {}


@pytest.mark.parametrize("name", ["timm_vit", "hf_vit"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    found = []
    for on in (False, True):
        model = build(name, dtype=torch.float64)
        cut(model, gone((1, "attention"), offset=True))
        cut(model, silent((0, "mlp")))
        view(model).set_checkpointing(on)
        features(model.train()(images(model))).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(g, found[1][n], atol=1e-12) for n, g in found[0].items())


def test_export_takes_any_batch(tmp_path: Path) -> None:
    model = build("timm_vit")
    changed = model
    for kind in KINDS.values():
        changed = pv.wrap(changed, METHOD, **kind, data=data(model))
    moved(changed)
    report = export(changed, tmp_path / "m.pt2", format="torch.export", image_size=SIZE)
    assert report.max_difference < 1e-5


def test_a_budget_is_met_together_with_finer_methods() -> None:
    model = build("timm_vit")
    methods = [METHOD, "token_reorganization"]
    result = pv.compress(model, target_flops=0.5, methods=methods)
    assert 0.49 < result.ratio <= 0.5
    assert METHOD in [step.method for step in result.plan.steps]


def test_the_whole_sum_teaches_in_a_saved_model_too(tmp_path: Path) -> None:
    from peft_vision.layers.traits import penalties

    model = build("timm_vit")
    dense = copy.deepcopy(model)
    wrapped = pv.wrap(model, METHOD, mode="votes", share=0.0, distill=0.3, depths=(0.5,))
    wrapped.save_pretrained(tmp_path / "out")
    for one in (wrapped, pv.load(tmp_path / "out", base=dense)):
        one.train()(images(model))
        (term,) = penalties(one)
        assert term > 0
        term.backward()
        assert penalties(one)[0] == 0


# Refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 1.5}, "share"),
        ({"mode": "skip"}, "mode is 'skip'; possible: remove"),
        ({"rank": "luck"}, "rank is 'luck'"),
        ({"branches": "all"}, "branches is 'all'"),
        ({"images": 0}, "images is 0"),
        ({"distill": 0.5}, 'distill needs mode "votes"'),
        ({"mode": "activations", "branches": "attention"}, "acts on MLPs"),
        ({"depths": (1.0,)}, "depths"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadSetting, match=words):
        make(METHOD, settings)


def test_a_rank_by_data_needs_data() -> None:
    with pytest.raises(BadSetting, match=r"taylor.*images and none were given"):
        pv.wrap(build("timm_vit"), METHOD, rank="taylor")
    with pytest.raises(BadSetting, match="no batch"):
        pv.wrap(build("timm_vit"), METHOD, data=[])


@pytest.mark.parametrize("name", [*NO_TOKENS, "generic_cnn"])
def test_models_without_a_stream_are_refused_by_name(name: str) -> None:
    model = build(name)
    with pytest.raises(UnsupportedSite, match=rf"{type(model).__name__} has no tokens"):
        pv.wrap(model, METHOD)


def test_a_teacher_needs_a_classifier() -> None:
    with pytest.raises(UnsupportedSite, match="has no classifier"):
        pv.wrap(build("hf_dinov2"), METHOD, mode="votes", share=0.0, distill=1.0)


def test_a_decision_that_is_none_is_refused() -> None:
    backbone: Backbone = view(build("timm_vit"))
    for decisions in ({"blocks.1.mlp": True}, {"blocks.1.mlp": {"keep": 1}}):
        with pytest.raises(UnsupportedSite, match="not a decision on a path"):
            make(METHOD).apply(backbone, decisions)


def test_the_view_finds_the_trunk_and_no_family_block_is_called() -> None:
    model = cut(build("hf_vit"), gone(*[b for b in BRANCHES if b[0] == 1]))
    assert sum(isinstance(m, Trunk) for m in model.modules()) == 1
    assert run(model, images(model)).isfinite().all()
