"""Merging: the same function, nothing of the adapter left, the live model untouched."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import peft_vision as pv
from peft_vision.errors import WrongBase
from tests.families import build, images, moved, run


def test_a_plain_model_is_copied() -> None:
    model = build("timm_vit")
    merged = pv.merge(model)
    assert merged is not model
    assert torch.equal(run(merged, images()), run(model, images()))


@pytest.mark.parametrize("family", ["timm_vit", "timm_eva02_small"])
def test_split_parts_are_fused_again(family: str) -> None:
    model = build(family).double()
    names = set(model.state_dict())
    adapted = moved(pv.wrap(model, "lora", split_qkv=True))
    x = images(adapted.plain_model)
    merged = pv.merge(adapted)
    assert set(merged.state_dict()) == names
    assert (run(merged, x) - run(adapted, x)).abs().max() < 1e-10


def test_the_structure_stays_when_the_adapter_goes(tmp_path: Path) -> None:
    dense = build("timm_vit")
    x = images()
    adapted = moved(pv.wrap(pv.wrap(copy.deepcopy(dense), "magnitude", ratio=0.5), "lora"))
    merged = pv.merge(adapted)
    assert [step.method for step in merged.history.plan.steps] == ["magnitude"]
    merged.save_pretrained(tmp_path / "out")
    assert torch.equal(run(pv.load(tmp_path / "out", base=dense), x), run(merged, x))


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("split", [False, True])
def test_a_base_in_fewer_bits_is_merged_in_full_precision(bits: str, split: bool) -> None:
    dense = build("timm_vit")
    x = images()
    adapted = moved(pv.wrap(copy.deepcopy(dense), "lora", quantize=bits, r=4, split_qkv=split))
    full = copy.deepcopy(dense)
    reference = pv.wrap(full, "lora", r=4, split_qkv=split)
    reference.load_tensors(adapted.adapter_tensors(), {})
    merged = pv.merge(adapted, base=dense)
    assert (run(merged, x) - run(reference, x)).abs().max() < 1e-5
    assert set(merged.state_dict()) == set(dense.state_dict())
    rounded = pv.merge(adapted, dequantize=True)
    assert (run(rounded, x) - run(adapted, x)).abs().max() < 2e-2 * run(adapted, x).abs().max()
    assert not torch.equal(rounded.blocks[0].mlp.fc1.weight, merged.blocks[0].mlp.fc1.weight)


def test_another_base_is_refused() -> None:
    adapted = pv.wrap(build("timm_vit"), "lora", quantize="nf4")
    with pytest.raises(WrongBase, match="merge"):
        pv.merge(adapted, base=build("timm_vit", seed=7))
    with pytest.raises(WrongBase, match="merge"):
        pv.merge(adapted)


def test_what_stays_is_structure_and_takes_a_further_adapter(tmp_path: Path) -> None:
    dense = build("timm_vit")
    x = images()
    headed = moved(pv.wrap(copy.deepcopy(dense), "mlp_head", outputs=3))
    merged = pv.merge(headed)
    assert merged.history.merged == 1
    assert torch.equal(run(merged, x), run(headed, x))
    again = moved(pv.wrap(merged, "lora", r=4, train_head=False))
    trained = [name for name, p in again.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained), "a merged head is frozen like the rest"
    again.save_pretrained(tmp_path / "out")
    loaded = pv.load(tmp_path / "out", base=dense)
    assert torch.equal(run(loaded, x), run(again, x))
    assert loaded.history.plan == again.history.plan
    plain = pv.merge(loaded)
    assert [step.method for step in plain.history.plan.steps] == ["mlp_head"]
    assert (run(plain, x) - run(again, x)).abs().max() < 1e-5
