"""Several adapters on one base: beside each other, switched, off, and summed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision.errors import BadSetting, UnknownName, UnsupportedSite, WrongBase
from tests.families import build, images, moved, run

FAMILIES = ("timm_vit", "timm_eva02_small", "hf_vit", "hf_dinov3")
every_family = pytest.mark.parametrize("family", FAMILIES)


def two_saved(dense: nn.Module, folder: Path, **second: Any) -> list[Any]:
    models = []
    for seed, settings in enumerate(({"r": 4}, {"r": 4, **second})):
        model = moved(pv.wrap(copy.deepcopy(dense), "lora", **settings), seed)
        model.save_pretrained(folder / str(seed))
        models.append(model)
    return models


@every_family
def test_a_second_adapter_is_loaded_beside_the_first_and_switched_to(
    family: str, tmp_path: Path
) -> None:
    dense = build(family)
    x = images(dense)
    one, two = (run(model, x) for model in two_saved(dense, tmp_path, r=8))
    both = pv.load(tmp_path / "0", base=dense)
    both.load_adapter(tmp_path / "1", "second")
    assert torch.equal(run(both, x), one), "loading does not activate"
    both.set_adapter("second")
    assert torch.equal(run(both, x), two)
    both.set_adapter("default")
    assert torch.equal(run(both, x), one)
    with both.disable_adapter():
        assert torch.equal(run(both, x), run(dense, x))
    assert torch.equal(run(both, x), one)


@every_family
def test_each_of_several_is_saved_with_a_record_of_its_own(family: str, tmp_path: Path) -> None:
    dense = build(family)
    x = images(dense)
    one, two = (run(model, x) for model in two_saved(dense, tmp_path, r=8))
    both = pv.load(tmp_path / "0", base=dense)
    both.load_adapter(tmp_path / "1", "second")
    both.save_pretrained(tmp_path / "both")
    assert torch.equal(run(pv.load(tmp_path / "both", base=dense), x), one)
    assert torch.equal(run(pv.load(tmp_path / "both" / "second", base=dense), x), two)


@every_family
def test_a_weighted_sum_is_the_base_plus_weighted_updates(family: str, tmp_path: Path) -> None:
    dense = build(family).double()
    x = images(dense)
    one, two = two_saved(dense, tmp_path)
    one.load_adapter(tmp_path / "1", "second")
    one.add_weighted_adapter(["default", "second"], [0.75, 0.25], "mix", combination_type="cat")
    expected = copy.deepcopy(dense).state_dict()
    first, second = pv.merge(one).state_dict(), pv.merge(two).state_dict()
    for name in expected:
        expected[name] = 0.75 * first[name] + 0.25 * second[name]
    mixed = copy.deepcopy(pv.merge(one))
    mixed.load_state_dict(expected)
    one.set_adapter("mix")
    assert (run(one, x) - run(mixed, x)).abs().max() < 1e-10
    assert (run(pv.merge(one), x) - run(mixed, x)).abs().max() < 1e-10
    one.set_adapter("second")
    assert torch.equal(run(one, x), run(two, x))


def test_names_and_bases_are_checked(tmp_path: Path) -> None:
    dense = build("timm_vit")
    one, _ = two_saved(dense, tmp_path, r=8)
    with pytest.raises(BadSetting, match="another adapter"):
        one.load_adapter(tmp_path / "1", "default")
    one.load_adapter(tmp_path / "1", "second")
    with pytest.raises(BadSetting, match="already"):
        one.load_adapter(tmp_path / "1", "second")
    with pytest.raises(UnknownName, match="default"):
        one.add_weighted_adapter(["default", "absent"], [1.0, 1.0], "mix")
    other = moved(pv.wrap(build("timm_vit", seed=3), "lora"), 0)
    with pytest.raises(WrongBase):
        other.load_adapter(tmp_path / "1", "second")
    assert set(one.peft_config) == {"default", "second"}


def test_parts_of_a_fused_linear_do_not_fit_beside_whole_ones(tmp_path: Path) -> None:
    dense = build("timm_vit")
    one, _ = two_saved(dense, tmp_path, split_qkv=True)
    with pytest.raises(UnsupportedSite, match="on its own"):
        one.load_adapter(tmp_path / "1", "second")


def test_a_folder_of_plain_peft_goes_beside_ours(tmp_path: Path) -> None:
    dense = build("timm_vit")
    x = images(dense)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(dense), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = moved(pv.wrap(copy.deepcopy(dense), "lora", train_head=False), 0)
    ours.load_adapter(str(tmp_path / "theirs"), "theirs")
    ours.set_adapter("theirs")
    assert (run(ours, x) - run(theirs, x)).abs().max() < 1e-6
