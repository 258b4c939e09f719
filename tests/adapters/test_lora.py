"""What is peculiar to LoRA: targets by sites, and adapters that would be silent."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.errors import BadSetting, GradientMissing, UnsupportedSite
from peft_vision.proof import prove_gradient
from tests.families import FAMILIES

Tiny = Callable[..., nn.Module]


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def test_targets_by_group_and_role(tiny_timm: Tiny) -> None:
    counts = {
        "linears": 16,
        "attention": 8,
        "mlp": 8,
        "qkv": 4,
        "out": 4,
        "convs": 1,
    }
    for target, expected in counts.items():
        adapted = pv.wrap(tiny_timm(), "lora", targets=[target], r=2)
        assert len(adapter_layers(adapted.plain_model)) == expected, target


def test_separate_queries_and_values(tiny_transformers: Tiny) -> None:
    adapted = pv.wrap(tiny_transformers(), "lora", targets=["q", "v"], train_head=False)
    names = {n.split(".")[-1] for n, m in adapted.named_modules() if hasattr(m, "lora_A") and n}
    assert names == {"q_proj", "v_proj"}


def test_a_target_that_the_model_lacks_is_refused_with_what_it_has(tiny_timm: Tiny) -> None:
    with pytest.raises(UnsupportedSite, match="qkv"):
        pv.wrap(tiny_timm(), "lora", targets=["q"])


@pytest.mark.parametrize(
    "settings",
    [{"r": 0}, {"r": 1.5}, {"alpha": 0}, {"dropout": 1.0}, {"targets": ["query"]}, {"rank": 4}],
)
def test_bad_settings(tiny_timm: Tiny, settings: dict[str, object]) -> None:
    with pytest.raises(BadSetting):
        pv.wrap(tiny_timm(), "lora", **settings)


def test_only_adapters_and_head_train(tiny_timm: Tiny) -> None:
    adapted = pv.wrap(tiny_timm(), "lora")
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "modules_to_save" in n for n in trained)
    assert any("modules_to_save" in n for n in trained)


def test_the_bypass_would_be_silent_and_is_cured() -> None:
    """timm's EVA reads `qkv.weight` instead of calling `qkv`: plain PEFT trains nothing there."""
    import peft

    torch.manual_seed(0)
    stock = FAMILIES["timm_eva02_small"]()
    config = peft.LoraConfig(r=2, target_modules=["qkv"])
    inert = peft.get_peft_model(copy.deepcopy(stock), config)
    assert sum("lora_" in n for n, p in inert.named_parameters() if p.requires_grad) == 8
    assert not inert(torch.randn(1, *view(stock).input_size)).requires_grad

    cured = pv.wrap(copy.deepcopy(stock), "lora", r=2)
    cured(torch.randn(1, *view(stock).input_size)).sum().backward()
    assert all(p.grad is not None for n, p in cured.named_parameters() if "lora_" in n)


class Bypass(nn.Module):
    """Reads a linear's weight, as some attention modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).mean((2, 3))
        return self.head(nn.functional.linear(x, self.hidden.weight, self.hidden.bias))


def test_an_adapter_that_would_not_train_is_refused() -> None:
    with pytest.raises(GradientMissing, match="hidden"):
        pv.wrap(Bypass(), "lora", image_size=32)


def test_the_proof_uses_no_memory_and_counts_what_it_proved(tiny_timm: Tiny) -> None:
    adapted = pv.wrap(tiny_timm(), "lora")
    assert prove_gradient(adapted) == 16 * 2 + 2
    assert all(p.grad is None for p in adapted.parameters())


def test_the_last_blocks_only(tiny_timm: Tiny) -> None:
    adapted = pv.wrap(tiny_timm(), "lora", last=1, r=2)
    names = {n.split("blocks.")[1][0] for n, _ in adapted.named_parameters() if "lora_" in n}
    assert names == {"3"}
    split = pv.wrap(tiny_timm(), "lora", last=2, r=2, targets=["q", "v"], split_qkv=True)
    assert len(adapter_layers(split.plain_model)) == 4
    with pytest.raises(BadSetting, match="has 4 blocks"):
        pv.wrap(tiny_timm(), "lora", last=5)
    with pytest.raises(BadSetting, match="1 or more"):
        pv.wrap(tiny_timm(), "lora", last=0)


def test_a_model_of_convolutions_is_adapted_there() -> None:
    import timm

    convolutional = pv.wrap(timm.create_model("test_resnet"), "lora", r=2)
    mixed = pv.wrap(timm.create_model("test_convnext"), "lora", r=2)
    kinds = [
        {type(m.base_layer) for m in model.modules() if hasattr(m, "base_layer")}
        for model in (convolutional, mixed)
    ]
    assert kinds == [{nn.Conv2d}, {nn.Linear}], "most of a ConvNeXt's weights are in linears"
