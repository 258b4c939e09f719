"""What is chosen so that a run fits, and what is advised."""

from __future__ import annotations

import dataclasses

import pytest

from peft_vision.cli.memory import _print_advice
from peft_vision.errors import BadSetting
from peft_vision.memory.advice import EXACT, OTHER_RUN, advise
from peft_vision.memory.estimate import rehearsal_of
from peft_vision.memory.fitting import fit_to
from tests.memory.test_estimate import recipe


def small(tight: int, *methods: str, **train):
    """A recipe whose `memory` is so many bytes less than it takes, and its rehearsal."""
    made = recipe(*methods, train=train)
    rehearsal = rehearsal_of(made, 5)
    fixed = made.train.model_copy(update={"batch_size": 8, "micro_batch": None})
    size = rehearsal.run(fixed).peak - tight
    return made.model_copy(update={"memory": f"{size / 1e6:.6f}MB"}), rehearsal, size


def test_what_fits_is_left_as_it_is():
    found = fit_to(*small(0, "lora")[:2])
    assert found.changes == {}
    assert "nothing has to be changed" in found.words("24GB")


def test_what_costs_nothing_comes_first():
    made, rehearsal, size = small(20_000, "lora")
    found = fit_to(made, rehearsal)
    assert found.changes == {"frozen": "bf16"}
    assert "train.frozen=bf16" in found.words("1GB")
    assert found.estimate.fits(size)


def test_the_fewest_blocks_are_recomputed():
    made, rehearsal, size = small(20_000, "lora", frozen="keep")
    found = fit_to(made, rehearsal)
    assert found.changes == {"gradient_checkpointing": 1}
    assert found.estimate.fits(size)


def test_what_the_recipe_says_is_not_touched():
    kept = {"frozen": "keep", "gradient_checkpointing": False}
    made, rehearsal, size = small(20_000, "lora", **kept)
    found = fit_to(made, rehearsal)
    assert found.changes == {"micro_batch": 4}
    assert found.estimate.fits(size)
    made, rehearsal, size = small(20_000, "lora", **kept, micro_batch=8)
    found = fit_to(made, rehearsal)
    assert found.changes == {"norms": "low"}


def test_automatic_sizes():
    made, rehearsal, _ = small(0, "lora", batch_size="auto", gradient_checkpointing=False)
    found = fit_to(made, rehearsal)
    assert found.changes == {"batch_size": 8, "micro_batch": None}
    made, rehearsal, _ = small(-400_000, "lora", batch_size=16, micro_batch="auto")
    found = fit_to(made, rehearsal)
    assert found.changes == {"micro_batch": 8}
    assert found.estimate.passes == 2


def test_sizes_that_contradict_each_other():
    made, rehearsal, _ = small(0, "lora", batch_size="auto", micro_batch=4)
    with pytest.raises(BadSetting, match="Give one of the two"):
        fit_to(made, rehearsal)


def test_what_cannot_fit_is_refused_with_the_price_of_each_change():
    made, rehearsal, _ = small(0, "lora", gradient_checkpointing=False, micro_batch=8)
    made = made.model_copy(update={"memory": "800MB"})
    with pytest.raises(BadSetting) as caught:
        fit_to(made, rehearsal)
    text = str(caught.value)
    for words in ("gradient_checkpointing=true", "frozen=bf16", "norms=low", ".last=1", "(exact)"):
        assert words in text


def test_only_what_helps_is_advised_and_brackets_are_shown(capsys):
    made, rehearsal, size = small(20_000, "lora")
    advice = advise(made, rehearsal, size)
    assert all(change.estimate.peak < advice.estimate.peak for change in advice.changes)
    change = dataclasses.replace(advice.changes[0], words="methods: [nf4,lora]")
    _print_advice(dataclasses.replace(advice, changes=(change,)), "1GB")
    assert "methods: [nf4,lora]" in capsys.readouterr().out


def test_advice_is_priced_by_the_same_steps():
    made, rehearsal, size = small(20_000, "lora")
    advice = advise(made, rehearsal, size)
    assert not advice.fits
    assert advice.largest == 7
    kinds = [change.kind for change in advice.changes]
    assert kinds[:2] == [EXACT, EXACT]
    assert kinds[-1] == OTHER_RUN
    by_words = {change.words: change.estimate.peak for change in advice.changes}
    all_blocks = made.train.model_copy(update={"gradient_checkpointing": True})
    expected = rehearsal.run(all_blocks).peak
    assert by_words["train.gradient_checkpointing=true"] == expected
    assert by_words["train.gradient_checkpointing=1"] <= size
    assert advice.to_json()["largest"] == 7
