"""The last block for the tokens that are read: the same logits, and the cost that follows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.errors import UnsupportedSite
from tests.families import FAMILIES, images

METHOD = "pooled_last_block"
READ = [
    "hf_vit",
    "timm_clip",
    "timm_deit3",
    "timm_deit_distilled",
    "timm_dinov2_registers",
    "timm_eva02_small_class",
    "timm_eva_dinov3_qkv_bias",
    "timm_vit",
    "timm_vit_glu",
    "timm_vit_normed",
]


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]().double().eval()


def logits(output: Any) -> Tensor:
    return (
        output if isinstance(output, Tensor) else output.logits if "logits" in output else output[0]
    )


@pytest.mark.parametrize("family", READ)
def test_the_logits_stay_and_the_cost_falls(family: str) -> None:
    model = model_of(family)
    x, before = images(model).double(), pv.measure(model).flops
    expected = logits(model(x))
    wrapped = pv.wrap(model, METHOD)
    assert (logits(wrapped(x)) - expected).abs().max() < 1e-12
    assert pv.measure(wrapped).flops < before


def test_the_share_is_that_of_the_closed_form() -> None:
    """Of DeiT-S: keys and values of all tokens, everything else of one."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    n, d, before = 197, 384, pv.measure(model).flops
    saved = (4 * n * d**2 + 2 * n**2 * d + 8 * n * d**2) - (2 * n * d**2 + 10 * d**2 + 2 * n * d)
    share = pv.measure(pv.wrap(model, METHOD)).flops / before
    assert abs(share - (1 - 2 * saved / before)) < 1e-6
    assert round(share, 3) == 0.931


@pytest.mark.parametrize("order", ["adapter first", "block first"])
def test_adapters_before_and_after(order: str) -> None:
    model = model_of("timm_vit")
    x = images(model).double()
    methods = ("lora", METHOD) if order == "adapter first" else (METHOD, "lora")
    plain = pv.wrap(copy.deepcopy(model), "lora", r=2)
    changed: Any = model
    for method in methods:
        changed = pv.wrap(changed, method, **({"r": 2} if method == "lora" else {}))
    with torch.no_grad():
        tensors = (m.plain_model.named_parameters() for m in (plain, changed))
        for (_, one), (_, other) in zip(*tensors, strict=True):
            if one.requires_grad:
                one.normal_()
                other.copy_(one)
    assert (plain.eval()(x) - changed.eval()(x)).abs().max() < 1e-12


def test_gradients_are_those_of_the_whole_block() -> None:
    model = model_of("timm_vit")
    x, cheap = images(model).double(), copy.deepcopy(model)
    model(x).square().sum().backward()
    pv.wrap(cheap, METHOD)(x).square().sum().backward()
    pairs = zip(model.parameters(), cheap.parameters(), strict=True)
    assert all((a.grad - b.grad).abs().max() < 1e-10 for a, b in pairs)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("timm_vit_average", "pooling: average"),
        ("timm_siglip", "pooling: attention"),
        ("hf_dinov2_classifier", r"class\+average"),
        ("hf_dinov3", "hands over all its tokens"),
        ("generic_cnn", "no tokens"),
    ],
)
def test_what_reads_more_is_refused(family: str, why: str) -> None:
    with pytest.raises(UnsupportedSite, match=why):
        pv.wrap(model_of(family), METHOD)


def test_a_second_time_changes_nothing() -> None:
    model = pv.wrap(model_of("timm_vit"), METHOD)
    again = pv.wrap(model, METHOD)
    assert again.history.plan.steps[-1].decisions == {}
    assert view(again.plain_model).tokens.trunk_if_any().pooled == 1  # type: ignore[union-attr]


def test_a_dense_head_is_refused_behind_it() -> None:
    model = pv.wrap(model_of("timm_vit"), METHOD)
    with pytest.raises(UnsupportedSite, match="every patch"):
        pv.wrap(model, "mlp_head", readout="boxes")
