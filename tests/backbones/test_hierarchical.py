"""Backbones of several stages: cutting a head or a unit is the same as silencing it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")

import peft_vision as pv
from peft_vision.backbones import families, view
from peft_vision.errors import UnsupportedSite
from peft_vision.layers.named_parts import part_of
from peft_vision.method import make
from tests.families import features
from tests.hierarchical import HEADLESS, HIERARCHICAL, SIDE, hierarchical, large_images

SITES = {"swin": (4, 4), "pvt_v2": (4, 4), "cait": (2, 4), "gcvit": (4, 7), "tnt": (4, 4)}
"""Sites of heads and of hidden units: all but talking heads; all but blocks with global queries."""


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    """What a head would read; of a backbone with several outputs, the last one."""
    out = model(x)
    return out[-1] if isinstance(out, list | tuple) else features(out)


def forget(model: nn.Module) -> None:
    """Empty the tables that LeViT's relatives keep of their biases."""
    for module in model.modules():
        if isinstance(getattr(module, "attention_bias_cache", None), dict):
            module.attention_bias_cache.clear()


def silence(weight: Tensor, count: int, gone: list[int], *, innermost: bool) -> None:
    """Zeros where a linear or a 1 x 1 convolution reads these of `count` members."""
    width = weight.shape[1] // count
    for member in gone:
        columns = (
            slice(member, None, count) if innermost else slice(member * width, (member + 1) * width)
        )
        weight[:, columns] = 0


@torch.no_grad()
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_sliced_is_masked(name: str) -> None:
    model, x = hierarchical(name, torch.float64), large_images(torch.float64)
    dense, backbone = run(model, x), view(model)
    assert backbone.family in families()
    assert {s.key.rpartition(".")[2] for s in (*backbone.heads, *backbone.hidden)} <= {
        "heads",
        "hidden",
    }
    assert (len(backbone.heads) == 0) == (name in HEADLESS)
    for kind in ("heads", "hidden"):
        masked, cut = copy.deepcopy(model), copy.deepcopy(model)
        forget(masked)
        before = {site.key: site for site in getattr(view(masked), kind)}
        for site in getattr(view(cut), kind):
            gone = [i for i in range(site.count) if i % 3 == 0][: site.count - 1]
            old: Any = before[site.key]
            module, last = (
                (old.attention, old.parts.out) if kind == "heads" else (old.mlp, old.parts.down)
            )
            weight = part_of(module, last).weight
            silence(weight, old.count, gone, innermost=kind == "heads" and name == "nest")
            site.keep([i for i in range(site.count) if i not in gone])
            assert getattr(view(cut), kind)  # what is cut can be seen again
        if before:
            torch.testing.assert_close(run(cut, x), run(masked, x), rtol=0, atol=1e-10)
            assert (run(cut, x) - dense).abs().max() > 1e-4
            assert sum(p.numel() for p in cut.parameters()) < sum(
                p.numel() for p in model.parameters()
            )
    if name in SITES:
        assert (len(backbone.heads), len(backbone.hidden)) == SITES[name]


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_what_cannot_be_done_is_refused_by_name(name: str) -> None:
    backbone = view(hierarchical(name))
    with pytest.raises(UnsupportedSite, match="has no tokens"):
        make("token_merging").decide(backbone, 0.5, pv.method.Evidence())
    for kind in ("heads", "tokens", "width"):
        assert getattr(backbone, kind) or len(backbone.missing[kind].split()) > 3


TRAINED = ("swin_v2", "pvt_v2", "mvit_v2", "maxvit_rmlp", "crossvit", "convit", "volo", "tnt")


@pytest.mark.parametrize("name", TRAINED)
def test_adapters_get_a_gradient(name: str) -> None:
    adapted = pv.wrap(hierarchical(name), method="lora", image_size=SIDE)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad and "lora_" in n]
    assert len(trained) >= 2 * len(view(hierarchical(name)).hidden)


@pytest.mark.parametrize("name", ["swin_v2", "levit"])
def test_a_budget_is_met_and_comes_back(name: str, tmp_path: Path) -> None:
    method = make("magnitude", {"multiple": 1})
    result = pv.compress(hierarchical(name), target_flops=0.7, methods=method, image_size=SIDE)
    assert 0.98 < result.got / result.limit <= 1.0
    result.save_pretrained(tmp_path / "smaller")
    back = pv.load(tmp_path / "smaller", base=hierarchical(name))
    x = large_images()
    assert torch.equal(run(back, x), run(result.model.eval(), x))
