"""timm models inside transformers' wrapper: seen like plain ones; adapters go both ways."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_vision as pv
from tests.families import images, moved, run, scramble

INNER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
NAME = "vit_tiny_patch16_224"


def both(name: str = NAME) -> tuple[nn.Module, nn.Module]:
    """The same model plain and wrapped."""
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    torch.manual_seed(0)
    plain = scramble(timm.create_model(name, num_classes=5, **INNER))
    config = TimmWrapperConfig(architecture=name, num_labels=5, model_args=INNER)
    wrapper = TimmWrapperForImageClassification(config).eval()
    wrapper.timm_model.load_state_dict(plain.state_dict())
    return plain, wrapper


def test_the_wrapper_is_seen_like_the_model_inside() -> None:
    plain, wrapper = both()
    inside, outside = pv.view(plain), pv.view(wrapper)
    assert outside.family == inside.family == "timm_vit"
    assert [s.key for s in outside.linears] == [s.key for s in inside.linears]
    assert outside.input_size == inside.input_size
    assert type(outside.core) is type(plain)
    assert pv.measure(wrapper).flops == pv.measure(plain).flops


@pytest.mark.parametrize("settings", [{}, {"split_qkv": True}], ids=["fused", "split"])
@pytest.mark.parametrize("way", ["in", "out"])
def test_adapters_go_both_ways(way: str, settings: dict[str, bool], tmp_path: Path) -> None:
    plain, wrapper = both()
    first, second = (wrapper, plain) if way == "in" else (plain, wrapper)
    x = images()
    adapted = moved(pv.wrap(copy.deepcopy(first), "lora", r=4, **settings))
    expected = run(adapted, x)
    adapted.save_pretrained(tmp_path / "out")
    assert torch.equal(run(pv.load(tmp_path / "out", base=first), x), expected)
    assert torch.equal(run(pv.load(tmp_path / "out", base=second), x), expected)


def test_a_compressed_wrapper_reloads(tmp_path: Path) -> None:
    _, wrapper = both()
    x = images()
    result = pv.compress(wrapper, target_flops=0.6)
    result.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out")
    assert torch.equal(run(again, x), run(result.model, x))
