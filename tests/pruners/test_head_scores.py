"""Pruners that rank heads by a score of `peft_vision.importance`, whichever it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision import importance
from peft_vision.backbones import view
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.importance import Importance, as_evidence
from peft_vision.method import Evidence, find, make, names, score_names
from peft_vision.plan import unpack_indices
from peft_vision.pruners._head_scores import standardized
from tests.families import DEPTH, HEADS, build, images

PRUNERS = [name for name in names() if "check_score" in vars(sys.modules[find(name).__module__])]
CUTTING = [name for name in PRUNERS if "params" in find(name).reduces]
each_pruner = pytest.mark.parametrize("pruner", PRUNERS)
each_score = pytest.mark.parametrize("score", score_names())


def made() -> nn.Module:
    return build("timm_vit", dtype=torch.float64)


def batches(model: nn.Module, count: int = 6) -> list[Tensor]:
    return list(images(model, count).split(4))


def evidence(model: nn.Module) -> Evidence:
    return Evidence(batches(model), heads=as_evidence)


def found(model: nn.Module, score: str) -> Tensor:
    """The score as `importance` gives it, by itself."""
    every = importance.scores(model, batches(model))
    return every.rank if score == "mean_rank" else every.scores[score]


def test_there_are_pruners_and_scores() -> None:
    assert len(PRUNERS) == 2
    assert len(CUTTING) == 1
    assert set(score_names()) == {*importance.names(), "mean_rank"}
    assert len(score_names()) == 8


@each_score
@pytest.mark.parametrize("pruner", CUTTING)
def test_the_head_that_a_score_ranks_lowest_goes_first(pruner: str, score: str) -> None:
    model = made()
    table = found(model, score)
    method = make(pruner, {"score": score, "hidden": False, "head_exponent": 1.0})
    for count in (1, 3):
        share = (count + 1e-4) / (DEPTH * (HEADS - 1))
        decisions = method.decide(view(model), share, evidence(model))
        gone = [
            float(row[head])
            for site, row in zip(view(model).heads, table, strict=True)
            if site.key in decisions
            for head in set(range(HEADS)) - set(unpack_indices(decisions[site.key]))
        ]
        lowest = Importance({score: table}, 6).lowest(count)
        assert sorted(gone) == sorted(float(table[place]) for place in lowest)


@each_score
@pytest.mark.parametrize("pruner", [name for name in PRUNERS if name not in CUTTING])
def test_the_heads_that_a_score_ranks_highest_are_shared(pruner: str, score: str) -> None:
    model = made()
    method = make(pruner, {"score": score, "shared": 0.5, "start": 0.0})
    decisions: Any = method.decide(view(model), 0.5, evidence(model))
    assert len(decisions) == DEPTH
    for site, row in zip(view(model).heads, found(model, score), strict=True):
        best = torch.argsort(row, descending=True, stable=True)[: HEADS // 2]
        decision = decisions[site.key]
        assert unpack_indices(decision["shared"]) == sorted(best.tolist())
        assert torch.tensor(decision["liking"]).isfinite().all()


@pytest.mark.parametrize("pruner", CUTTING)
def test_what_is_no_head_keeps_its_own_ranking(pruner: str) -> None:
    model = made()
    named, own = (
        make(pruner, {"score": score}).decide(view(model), 0.5, evidence(model))
        for score in ("taylor", "auto")
    )
    hidden = [site.key for site in view(model).hidden]
    assert [named[key] for key in hidden] == [own[key] for key in hidden]


@each_pruner
@each_score
def test_a_score_without_images_is_refused_by_name(pruner: str, score: str) -> None:
    if score == "weight_norm":  # the one that looks at weights alone
        pv.wrap(made(), pruner, score=score)
        return
    with pytest.raises(BadSetting, match=rf"{score}.*Pass data.*Without images: weight_norm"):
        pv.wrap(made(), pruner, score=score)


@each_pruner
def test_compression_refuses_it_too(pruner: str) -> None:
    with pytest.raises(BadSetting, match=r"taylor.*Pass data"):
        pv.compress(build("timm_vit"), target_flops=0.8, methods=make(pruner, {"score": "taylor"}))


@each_pruner
def test_a_score_that_does_not_exist_is_refused(pruner: str) -> None:
    with pytest.raises(BadSetting, match=r"'tailor'; possible: auto, .*, taylor, .*mean_rank"):
        make(pruner, {"score": "tailor"})
    with pytest.raises(BadSetting, match="no images were given"):
        make(pruner, {"score": "images"}).decide(view(made()), 0.5, Evidence())


@each_pruner
def test_a_score_that_the_model_does_not_allow_is_refused(pruner: str) -> None:
    model = build("hf_dinov2_swiglu")  # features and no classes
    with pytest.raises(UnsupportedSite, match="no classes"):
        pv.wrap(model, pruner, data=batches(model), score="discrete_codes")


@each_pruner
def test_evidence_without_scores_is_refused(pruner: str) -> None:
    model = made()
    with pytest.raises(BadSetting, match="heads=peft_vision"):
        make(pruner, {"score": "taylor"}).decide(view(model), 0.5, Evidence(batches(model)))

    def silent(*_: Any) -> Tensor:
        return torch.full((DEPTH, HEADS), torch.nan)

    with pytest.raises(UnsupportedSite, match="says nothing of some heads"):
        make(pruner, {"score": "taylor"}).decide(
            view(model), 0.5, Evidence(batches(model), heads=silent)
        )


@pytest.mark.parametrize("pruner", CUTTING)
def test_a_search_scores_once_and_a_saved_plan_replays_without(
    pruner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft_vision.compression as compression

    asked: list[str] = []

    def counted(name: str, *given: Any) -> Tensor:
        asked.append(name)
        return as_evidence(name, *given)

    monkeypatch.setattr(compression, "as_evidence", counted)
    torch.manual_seed(0)
    model = build("timm_vit")
    method = make(pruner, {"score": "taylor", "head_exponent": 1.0})
    result = pv.compress(model, target_flops=0.7, methods=method, data=batches(model))
    assert asked == ["taylor"]
    assert sum(site.count for site in view(result.model.plain_model).heads) < DEPTH * HEADS
    result.save_pretrained(tmp_path / "small")

    def missing(name: str) -> None:
        raise AssertionError(f"{name} was computed again")

    monkeypatch.setattr(importance, "find", missing)
    loaded = pv.load(tmp_path / "small", base=model)
    steps = {step.method: step.settings for step in loaded.history.plan.steps}
    assert steps[pruner]["score"] == "taylor"
    x = images(model)
    assert torch.equal(loaded.eval()(x), result.model.eval()(x))


def test_few_images_are_looked_at_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def score(backbone: Any, batches: Any) -> Tensor:
        seen.extend(batches)
        return torch.zeros(DEPTH, HEADS)

    monkeypatch.setattr(importance, "find", lambda _: score)
    model = build("timm_vit")
    numbered = torch.arange(200.0)[:, None, None, None].expand(200, 3, 2, 2)
    as_evidence("taylor", view(model), [(part, None) for part in numbered.split(32)])
    numbers = torch.cat(seen)[:, 0, 0, 0]
    assert len(numbers) == importance.IMAGES
    assert set(numbers.diff().tolist()) == {3.0, 4.0}
    assert numbers[-1] >= 195


def test_likings_are_comparable_whatever_the_numbers_of_a_score() -> None:
    for score in ([1.0, 10.0, 100.0], [0.0, 0.5, 1.0], [-3.0, 0.0, 3.0]):
        found = standardized(torch.tensor(score, dtype=torch.float64))
        torch.testing.assert_close(found.tolist(), [-(1.5**0.5), 0.0, 1.5**0.5])
    assert standardized(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("family", "heads"), [("generic_cnn", True), ("timm_vit", False)])
def test_a_score_without_heads_to_rank_is_refused(family: str, heads: bool) -> None:
    with pytest.raises(BadSetting, match="ranks attention heads"):
        pv.wrap(build(family), "magnitude", score="weight_norm", heads=heads)
