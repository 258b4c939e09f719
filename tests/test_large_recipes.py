"""The recipes for large models on one 24 GB GPU build as written, without weights or network."""

from __future__ import annotations

import re

import pytest

from peft_vision.layers.quantized import quantized_layers
from peft_vision.memory.estimate import rehearsal_of
from peft_vision.recipe import load_recipe, shipped

LARGE = [name for name in shipped() if name.endswith("-24gb")]
# Building 40 blocks without numbers takes seconds all the same: the others are of the same kind.
BUILT = {
    "classification/vit_large_dinov2-lora-24gb": 224,
    "classification/vit_so400m_siglip2_384-lora-24gb": 384,
    "classification/vit_7b_dinov3-qlora-24gb": 256,
}


def test_all_are_there() -> None:
    assert len(LARGE) >= 7


@pytest.mark.parametrize("name", LARGE)
def test_the_header_says_what_a_user_has_to_know(name: str) -> None:
    recipe, header = load_recipe(name).recipe, shipped()[name].read_text().partition("\nmodel:")[0]
    for words in ("Expected memory:", "not measured on a GPU", "Weights:", "sqrt(batch / "):
        assert words in header
    assert f"at a global batch of {recipe.train.batch_size}" in header
    rate = re.search(r"Learning rate: (\S+) at", header)
    assert rate is not None
    assert float(rate[1]) == recipe.train.learning_rate
    assert recipe.train.frozen == "bf16"


@pytest.mark.parametrize("name", BUILT)
def test_it_builds_and_trains_little(name: str) -> None:
    rehearsal = rehearsal_of(load_recipe(name).recipe, classes=10)
    assert rehearsal.image_size == (3, BUILT[name], BUILT[name])
    trained = sum(p.numel() for p in rehearsal.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in rehearsal.model.parameters())
    assert 1e6 < trained < total / 25
    assert any(True for _ in quantized_layers(rehearsal.model)) is ("7b" in name)
