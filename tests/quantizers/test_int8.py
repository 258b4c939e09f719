"""8-bit weights: the laws of quantizers, and what is peculiar to one scale per output."""

from __future__ import annotations

import importlib.util
import logging
import weakref
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
    laws.check_it_packs_the_linears_of_the_blocks_and_nothing_else("int8")


def test_errors() -> None:
    laws.check_errors("int8", 0.004, 0.01)


def test_output() -> None:
    laws.check_output_stays_close("int8", 0.015)  # inputs are rounded, too


def test_cost() -> None:
    laws.check_cost("int8", 0.26)


def test_deterministic() -> None:
    laws.check_applying_is_deterministic("int8")


def test_on_meta() -> None:
    laws.check_a_twin_gets_the_same_structure("int8")
    laws.check_weights_of_meta_layers_are_not_asked_for("int8")


def test_saved_weights(tmp_path: Path) -> None:
    laws.check_saved_weights_come_back_bit_by_bit("int8", tmp_path / "a")


@pytest.mark.parametrize("family", laws.COMPOSED)
def test_training(family: str, tmp_path: Path) -> None:
    laws.check_it_trains_saves_and_reloads("int8", family, tmp_path / "a")


def test_class_of_peft() -> None:
    laws.check_peft_takes_its_own_class("int8", "Linear8bitLt")


def test_copies() -> None:
    laws.check_copies_share_nothing("int8")


def test_forward_changes_nothing() -> None:
    laws.check_a_forward_pass_changes_no_number("int8")


def test_casts() -> None:
    laws.check_casts_of_the_model_leave_the_codes("int8")


def test_checkpointing() -> None:
    laws.check_recomputed_activations_give_the_same_gradients("int8")


def test_refusals() -> None:
    laws.check_refusals_change_nothing("int8")


def test_dequantizing() -> None:
    laws.check_dequantizing("int8", 0.03)  # dense layers do not round their inputs


def test_merging() -> None:
    laws.check_merging("int8", 0.03)


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("timm_vit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"peft-vision\[quantize\]"):
        pv.wrap(model, "int8")


@pytest.mark.parametrize("settings", [{"threshold": -1}, {"targets": ["fc"]}, {"targets": []}])
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        make("int8", settings)


def eight_bits(inputs: int, outputs: int, threshold: float = 0.0) -> tuple[nn.Linear, Any]:
    from peft_vision.layers.eight_bit import EightBitLinear

    dense = nn.Linear(inputs, outputs)
    return dense, EightBitLinear(dense, threshold)


@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 3, 32), (2, 3, 4, 32)])
@pytest.mark.parametrize("training", [True, False])
def test_inputs_of_any_rank(shape: tuple[int, ...], training: bool) -> None:
    dense, layer = eight_bits(32, 6)
    x = torch.randn(shape, requires_grad=True)
    out = layer.train(training)(x)
    expected = nn.functional.linear(x, layer.dequantized(), dense.bias)
    assert laws.deviation(out.detach(), expected.detach()) < 0.03
    ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (out, expected))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_features_with_outliers_are_not_rounded() -> None:
    x = torch.randn(8, 64)
    x[:, 3] = 80.0
    errors = []
    for threshold in (0.0, 6.0):
        torch.manual_seed(0)
        _, layer = eight_bits(64, 16, threshold)
        exact = nn.functional.linear(x, layer.dequantized(), layer.bias)
        with torch.no_grad():
            errors.append(laws.deviation(layer.eval()(x), exact))
    assert errors[1] < errors[0] / 3


def test_scales_stay_32_bit_and_move_after_a_forward_pass() -> None:
    _, layer = eight_bits(32, 6)
    layer(torch.randn(2, 32))
    scales = layer.SCB.clone()
    half = layer.half()
    assert torch.equal(half.SCB, scales)
    assert half.SCB.dtype is torch.float32
    assert half.eval()(torch.randn(2, 32).half()).dtype is torch.float16


def test_a_weight_of_zeros() -> None:
    from peft_vision.layers.eight_bit import EightBitLinear

    dense = nn.Linear(64, 8, bias=False)
    nn.init.zeros_(dense.weight)
    assert not EightBitLinear(dense, 6.0).eval()(torch.ones(1, 64)).any()


def test_batches_are_not_commented_on(caplog: pytest.LogCaptureFixture) -> None:
    packed = pv.wrap(build("timm_vit"), "int8")
    with caplog.at_level(logging.WARNING):
        laws.run(packed, images())
    assert not caplog.records


def test_no_input_is_kept_for_the_backward_pass() -> None:
    """Recomputing activations is of no use where a layer keeps them all the same."""
    _, layer = eight_bits(32, 6)
    x = torch.randn(4, 32, requires_grad=True)
    held = x * 1.0
    gone = weakref.ref(held)
    out = layer.train()(held)
    del held
    assert gone() is None
    out.sum().backward()
    assert x.grad is not None
