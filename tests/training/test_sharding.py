"""What can be cut over processes, and what is refused; test_distributed does the cutting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision.errors import BadSetting, UnsupportedBackbone
from peft_vision.training import sharding
from tests.families import timm_vit


def told(model: nn.Module, version: int = 2) -> Any:
    plugin = SimpleNamespace(fsdp_version=version)
    sharding.prepare(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)
    return plugin


def test_blocks_are_cut_one_by_one_and_nothing_is_cast() -> None:
    plugin = told(pv.wrap(timm_vit(depth=1), "lora", r=2))
    assert plugin.transformer_cls_names_to_wrap == ["Block"]
    assert plugin.mixed_precision_policy.param_dtype is None


def test_blocks_that_are_opened_are_cut_with_the_rest() -> None:
    model = pv.wrap(timm_vit(depth=2), "token_merging", ratio=0.3)
    assert told(model).transformer_cls_names_to_wrap == []


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: pv.wrap(timm_vit(depth=1), "lora", quantize="int8", r=2), "packed weights"),
        (lambda: pv.wrap(timm_vit(depth=1), "adalora"), "moves its ranks"),
    ],
    ids=["packed", "allocated"],
)
def test_what_cannot_be_cut_is_refused(model: Any, words: str) -> None:
    with pytest.raises(UnsupportedBackbone, match=words) as caught:
        told(model())
    assert "ddp-*.yaml" in str(caught.value)


def test_other_versions_and_optimizers_are_refused() -> None:
    with pytest.raises(BadSetting, match="set fsdp_version: 2"):
        told(timm_vit(depth=1), version=1)
    weights = [nn.Parameter(torch.ones(2))]
    sharding.require_optimizer(torch.optim.AdamW(weights))
    with pytest.raises(BadSetting, match=r"Adagrad does not work.*adamw, sgd"):
        sharding.require_optimizer(torch.optim.Adagrad(weights))


def test_one_process_has_everything_in_one_piece() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    assert not sharding.is_cut(model)
    assert sharding.gathered({"w": model.weight})["w"].data_ptr() == model.weight.data_ptr()
    sharding.put(model.weight, torch.ones(2, 2))
    assert not torch.equal(model.weight, before)
    sharding.close(model)
