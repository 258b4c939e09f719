"""Laws that every score of heads keeps, and what is made of several."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.errors import BadSetting, UnknownName, UnsupportedSite
from peft_vision.importance import Importance, find, kendall, mean_rank, names, scores
from peft_vision.importance._agreement import ranks
from tests.families import DEPTH, HEADS, NO_TOKENS, build, features, images
from tests.importance.laws import FEW, SAMPLE, away, batches, made, reorder, silence

NEED_CLASSES = {"discrete_codes"}
NOTHING_TO_SAY = {"attention_entropy", "weight_norm", "discrete_codes"}
"""They do not look at what comes behind a head."""


@pytest.mark.parametrize("family", SAMPLE)
def test_every_score_works_and_leaves_the_model_alone(family: str) -> None:
    model = made(family)
    before = copy.deepcopy(model)
    model.train()
    found = scores(model, batches(model))
    assert set(found.scores) | NEED_CLASSES == set(names())
    for name, score in found.scores.items():
        assert score.shape == (DEPTH, HEADS), name
        assert score.dtype == torch.float64
        assert bool(score.isfinite().all()), name
    assert all(module.training for module in model.modules())
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    x = images(model)
    assert torch.equal(features(model.eval()(x)), features(before(x)))


@pytest.mark.parametrize("family", FEW)
def test_a_head_that_nobody_reads_is_worth_nothing(family: str) -> None:
    model = made(family)
    silence(model, 1, 2)
    for name, score in scores(model, batches(model)).scores.items():
        if name not in NOTHING_TO_SAY:
            assert abs(float(score[1, 2])) < 1e-12, name
            assert float(score[1, 2]) == pytest.approx(float(score.min()), abs=1e-12), name
    weights = find("weight_norm")(view(model), ())
    assert int(weights[1].argmin()) == 2


@pytest.mark.parametrize("family", FEW)
def test_heads_in_another_order_have_their_scores_in_that_order(family: str) -> None:
    model, order = made(family), [2, 0, 3, 1]
    before = scores(model, batches(model)).scores
    reorder(model, 1, order)
    after = scores(model, batches(model)).scores
    for name, score in before.items():
        wanted = score.clone()
        wanted[1] = score[1, order]
        torch.testing.assert_close(after[name], wanted, rtol=1e-7, atol=1e-11, msg=name)


@pytest.mark.parametrize("family", FEW)
def test_scores_of_a_model_that_has_lost_heads(family: str) -> None:
    model = made(family)
    away(model, 1)
    for name, score in scores(model, batches(model)).scores.items():
        assert score[1].isnan().tolist() == [False, False, False, True], name
        assert bool(score[[0, 2, 3]].isfinite().all()), name


def test_a_block_without_attention_has_no_scores() -> None:
    from peft_vision.layers.absent import Absent

    model = made("timm_vit")
    backbone = view(model)
    site, tokens = backbone.heads[1], backbone.tokens
    assert tokens is not None
    tokens.trunk()  # a block cannot run without attention by itself
    setattr(site.owner, site.attribute, Absent(32).double())
    found = scores(model, batches(model))
    assert set(found.scores) == set(names())
    for score in found.scores.values():
        assert bool(score[1].isnan().all())
        assert int(score.isnan().sum()) == HEADS


@pytest.mark.parametrize("family", NO_TOKENS)
def test_blocks_that_cannot_be_opened_have_some_scores(family: str) -> None:
    model = made(family)
    found = scores(model, batches(model))
    assert {"leave_one_out", "taylor", "weight_norm"} <= set(found.scores)
    assert len(found.notes) + len(found.scores) == len(names())
    with pytest.raises(UnsupportedSite, match="normalize after"):
        scores(model, batches(model), ["attention_entropy"])


def test_heads_that_tokens_choose_are_scored_or_refused_by_name() -> None:
    model = pv.wrap(build("timm_vit"), "mixture_of_heads")
    found = scores(model, batches(model))
    assert {"leave_one_out", "taylor"} <= set(found.scores)
    with pytest.raises(UnsupportedSite, match="RoutedAttention"):
        scores(model, batches(model), ["contextual_decomposition"])


def test_scores_of_an_adapted_model_are_those_of_the_merged_one() -> None:
    model = pv.wrap(build("timm_vit"), "lora", r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2)
    model = model.double().eval()
    x = [image.double() for image in batches(build("timm_vit"))]
    one, other = scores(model, x), scores(pv.merge(copy.deepcopy(model)), x)
    for name, score in one.scores.items():
        torch.testing.assert_close(score, other.scores[name], rtol=1e-5, atol=1e-8, msg=name)


def test_a_model_that_loses_tokens_on_the_way() -> None:
    model = pv.wrap(build("timm_vit"), "token_reorganization")
    found = scores(model, batches(model))
    assert {"leave_one_out", "taylor", "attention_entropy"} <= set(found.scores)
    assert any("tokens that join, leave" in note for note in found.notes)


def test_what_cannot_be_scored_is_refused() -> None:
    model = build("timm_vit")
    with pytest.raises(UnknownName, match="leave_one_out"):
        scores(model, batches(model), ["leave_one"])
    with pytest.raises(UnsupportedSite, match="no heads"):
        scores(build("generic_cnn"), batches(model))
    with pytest.raises(BadSetting, match="no batch"):
        scores(model, [], ["taylor"])
    with pytest.raises(BadSetting, match="No score was named"):
        scores(model, batches(model), [])
    with pytest.raises(BadSetting, match="images is 0"):
        scores(model, Path(), images=0)


def tau_by_hand(x: list[float], y: list[float]) -> float:
    """Kendall's tau-b, pair by pair."""
    pairs = list(itertools.combinations(range(len(x)), 2))
    sign = [((x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])) for i, j in pairs]
    same = sum(a * b for a, b in sign)
    return same / math.sqrt(sum(a * a for a, _ in sign) * sum(b * b for _, b in sign))


@pytest.mark.parametrize("levels", [3, 1000])
def test_tau_is_that_of_all_pairs(levels: int) -> None:
    a, b = (torch.randint(levels, (12,)).double() for _ in range(2))
    assert kendall(a, b) == pytest.approx(tau_by_hand(a.tolist(), b.tolist()))


def test_tau_of_orders() -> None:
    a = torch.randn(3, 4, dtype=torch.float64)
    assert kendall(a, a.exp()) == pytest.approx(1.0)
    assert kendall(a, -a) == pytest.approx(-1.0)
    assert math.isnan(kendall(a, torch.zeros_like(a)))
    gap = a.clone()
    gap[0, 0] = torch.nan
    assert kendall(gap, a) == pytest.approx(1.0)


def test_mean_rank_is_that_of_heads_among_heads() -> None:
    one = torch.tensor([[3.0, 1.0], [2.0, torch.nan]], dtype=torch.float64)
    assert ranks(torch.tensor([5.0, 1.0, 5.0, 7.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
    assert mean_rank({"a": one})[0].tolist() == [1.0, 0.0]
    assert mean_rank({"a": one, "b": 1e6 * one, "c": one.exp()})[1, 0] == 0.5
    assert mean_rank({"a": one, "b": -one})[0].tolist() == [0.5, 0.5]
    with pytest.raises(BadSetting, match="no score"):
        mean_rank({})


def test_the_lowest_heads_leave_every_block_one() -> None:
    score = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    found = Importance({"a": score}, 1)
    assert found.lowest(3) == [(0, 0), (0, 1), (1, 0)]
    assert found.lowest(99) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found.agreement() == {}


def test_everything_is_plain_json() -> None:
    import json

    model = build("timm_vit")
    away(model, 0)
    found = scores(model, batches(model))
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["kendall"]["leave_one_out"] == pytest.approx(1.0)
    assert content["mean_rank"][0][-1] is None
    assert len(content["scores"]["taylor"]) == DEPTH
    assert content["images"] == 3
