"""Plans, budgets, names and files: data in, the same data out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_vision.budget import LEAST, Budget, parse_one
from peft_vision.errors import BadBudget, CannotWrite, DamagedArtifact, OutputExists
from peft_vision.files import staged_folder, write_json_atomic
from peft_vision.lookup import nearest, unknown
from peft_vision.plan import Plan, Step, pack_indices, unpack_indices


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_index_sets_survive_packing(case: tuple[int, set[int]]) -> None:
    of, indices = case
    assert unpack_indices(pack_indices(indices, of=of)) == sorted(indices)


def test_packing_is_compact() -> None:
    assert len(str(pack_indices(range(1536), of=1536))) < 420


def test_an_index_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        pack_indices([8], of=8)


@pytest.mark.parametrize(
    "broken", [None, 3, {"of": 4}, {"of": 4, "bits": "xyz"}, {"of": 4, "bits": "ff"}]
)
def test_a_broken_index_set_is_named(broken: object) -> None:
    with pytest.raises(DamagedArtifact):
        unpack_indices(broken)  # type: ignore[arg-type]


def test_plan_round_trip() -> None:
    plan = Plan((Step("a", {"x": 1}, 0.5, {"blocks.0.heads": pack_indices([1], 4)}),))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.then(Step("b")).steps[1].method == "b"


@pytest.mark.parametrize("broken", [[], {"steps": "abc"}, {"steps": [{}]}, {"steps": [3]}])
def test_a_broken_plan_is_named(broken: object) -> None:
    with pytest.raises(DamagedArtifact):
        Plan.from_json(broken)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "base", "limit"),
    [
        ("0.4", 100.0, 40.0),
        (0.4, 100.0, 40.0),
        ("1", 100.0, 100.0),
        ("1.8G", 1.0, 1.8e9),
        ("900MMACs", 1.0, 1.8e9),
        ("0.9 gmacs", 1.0, 1.8e9),
        ("2e9", 1.0, 2e9),
    ],
)
def test_flops_budgets(asked: str | float, base: float, limit: float) -> None:
    assert Budget.parse("flops", asked).limit(base) == pytest.approx(limit)


@pytest.mark.parametrize(
    "asked", ["40", "0", "-1", "abc", "", "nan", "inf", "1.8Gparams", "0.4ms", "1.2.3"]
)
def test_bad_budgets_say_what_is_possible(asked: str) -> None:
    with pytest.raises(BadBudget, match="Possible"):
        Budget.parse("flops", asked)


@given(st.floats(1e-6, 1.0), st.floats(1.0, 1e12))
def test_the_band_is_open_below_and_closed_above(ratio: float, base: float) -> None:
    budget = Budget.parse("flops", ratio)
    limit = budget.limit(base)
    assert budget.met(limit, base)
    assert not budget.met(limit * LEAST * (1 - 1e-12), base)
    assert not budget.met(limit * (1 + 1e-9), base)


def test_exactly_one_budget() -> None:
    with pytest.raises(BadBudget, match="0 were given"):
        parse_one(None, None, None)
    with pytest.raises(BadBudget, match="2 were given"):
        parse_one("0.5", "0.5", None)


def test_nearest_names() -> None:
    assert nearest("vit_smal_patch16_224", ["vit_small_patch16_224", "resnet50"])[0].startswith(
        "vit_"
    )
    assert "Nearest: resnet50" in str(unknown("model", "resnet51", ["resnet50"]))


def test_staging_replaces_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_folder(target) as stage:
        (stage / "a").write_text("old")
    with pytest.raises(OutputExists, match="--overwrite"):
        staged_folder(target).__enter__()
    with staged_folder(target, overwrite=True) as stage:
        (stage / "a").write_text("new")
    assert (target / "a").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def write_half(target: Path) -> None:
    with staged_folder(target, overwrite=True) as stage:
        (stage / "a").write_text("half")
        raise OSError(28, "No space left on device")


def test_a_failed_block_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_folder(target) as stage:
        (stage / "a").write_text("old")
    with pytest.raises(CannotWrite, match="intact"):
        write_half(target)
    assert (target / "a").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert path.read_text().strip().startswith("{")
    assert os.listdir(tmp_path) == ["a.json"]  # noqa: PTH208
