"""4-bit weights: the laws of quantizers, and what is peculiar to codes in blocks."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision.errors import BadSetting, MissingExtra
from peft_vision.method import make
from tests.families import build, images
from tests.quantizers import laws

pytest.importorskip("bitsandbytes")


def test_packs_linears() -> None:
    laws.check_it_packs_the_linears_of_the_blocks_and_nothing_else("nf4")


def test_errors() -> None:
    laws.check_errors("nf4", 0.085, 0.1)


def test_output() -> None:
    laws.check_output_stays_close("nf4", 0.1)


def test_cost() -> None:
    laws.check_cost("nf4", 0.145)  # (4 + 32 / 64) / 32 = 0.141, and the code


def test_deterministic() -> None:
    laws.check_applying_is_deterministic("nf4")


def test_on_meta() -> None:
    laws.check_a_twin_gets_the_same_structure("nf4")
    laws.check_weights_of_meta_layers_are_not_asked_for("nf4")


@pytest.mark.parametrize("double", [False, True])
def test_saved_weights(double: bool, tmp_path: Path) -> None:
    laws.check_saved_weights_come_back_bit_by_bit("nf4", tmp_path / "a", double_quant=double)


@pytest.mark.parametrize("family", laws.COMPOSED)
def test_training(family: str, tmp_path: Path) -> None:
    laws.check_it_trains_saves_and_reloads("nf4", family, tmp_path / "a")


def test_class_of_peft() -> None:
    laws.check_peft_takes_its_own_class("nf4", "Linear4bit")


def test_copies() -> None:
    laws.check_copies_share_nothing("nf4")


def test_forward_changes_nothing() -> None:
    laws.check_a_forward_pass_changes_no_number("nf4")


def test_casts() -> None:
    laws.check_casts_of_the_model_leave_the_codes("nf4")


def test_checkpointing() -> None:
    laws.check_recomputed_activations_give_the_same_gradients("nf4")


def test_refusals() -> None:
    laws.check_refusals_change_nothing("nf4")


def test_dequantizing() -> None:
    laws.check_dequantizing("nf4", 1e-5)


def test_merging() -> None:
    laws.check_merging("nf4", 1e-5)


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("timm_vit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"peft-vision\[quantize\]"):
        pv.wrap(model, "nf4")


@pytest.mark.parametrize(
    "settings",
    [{"double_quant": 1}, {"compute_dtype": "int"}, {"targets": ["query"]}, {"targets": []}],
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        make("nf4", settings)


def reference(layer: Any) -> torch.Tensor:
    """Codes times scales, block by block over the flattened weight."""
    codes = layer.weight.data.reshape(-1)
    state = layer.quant_state
    values = torch.stack([codes >> 4, codes & 15], 1).reshape(-1).long()
    count = layer.out_features * layer.in_features
    scales = state.absmax.repeat_interleave(layer.block)
    return (state.code.float()[values][:count] * scales[:count]).view(layer.out_features, -1)


@pytest.mark.parametrize("width", [1, 7, 16, 32, 48, 85, 96, 100, 160, 192])
def test_every_width_computes_with_its_own_weight(width: int) -> None:
    """The CPU kernel of bitsandbytes takes each row of some widths to begin a block of its own."""
    from peft_vision.layers.four_bit import FourBitLinear

    dense = nn.Linear(width, 24)
    layer = FourBitLinear(dense, "nf4", nested=False, compute_dtype=None)
    weight = reference(layer)
    assert torch.equal(layer.dequantized(), weight)
    assert laws.deviation(weight, dense.weight.detach()) < 0.13
    x = torch.randn(3, 5, width, requires_grad=True)
    out = layer(x)
    expected = nn.functional.linear(x, weight, dense.bias)
    assert torch.allclose(out, expected, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_weight_of_zeros() -> None:
    from peft_vision.layers.four_bit import FourBitLinear

    dense = nn.Linear(64, 8, bias=False)
    nn.init.zeros_(dense.weight)
    assert not FourBitLinear(dense, "nf4", nested=True, compute_dtype=None)(torch.ones(64)).any()


def test_scales_in_8_bits_take_less() -> None:
    one, other = (pv.wrap(laws.wide(), "nf4", double_quant=d) for d in (False, True))
    assert pv.measure(other).bytes < pv.measure(one).bytes
    means = [
        sum(d["error"] for d in model.history.plan.steps[0].decisions.values())
        for model in (one, other)
    ]
    assert means[1] == pytest.approx(means[0], rel=0.02)


def test_products_in_a_dtype_of_their_own() -> None:
    x = images()
    auto, half = (pv.wrap(laws.wide(), "nf4", compute_dtype=d) for d in ("auto", "bf16"))
    one, other = laws.run(auto, x), laws.run(half, x)
    assert other.dtype is torch.float32
    assert 0 < laws.deviation(other, one) < 0.05


def test_some_roles_only() -> None:
    packed = pv.wrap(build("hf_vit"), "nf4", targets=["up", "down"])
    assert {key.rpartition(".")[2] for key in packed.history.plan.steps[0].decisions} == {
        "up",
        "down",
    }
    mixed = pv.wrap(packed, "int8", targets=["q", "v"])
    adapted = pv.wrap(mixed, "lora", r=2)
    kinds = {type(m).__name__ for n, m in adapted.named_modules() if n.endswith(("up", "q_proj"))}
    assert "Linear8bitLt" in kinds


def test_trainer_of_transformers(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = pv.wrap(build("hf_vit"), "lora", quantize="nf4", r=2)
    x = images(batch=4)
    data = [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(x)]
    before = copy.deepcopy(model)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True,
        report_to="none", save_strategy="no", learning_rate=0.01, disable_tqdm=True,
        remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data).train()
    moved = [
        n
        for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(p, q)
    ]
    assert any("lora_B" in n for n in moved)
    assert not any("base_layer" in n for n in moved)
