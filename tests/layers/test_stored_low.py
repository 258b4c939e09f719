"""Weights in low precision for a while; tests of whole runs are in tests/training/test_lean.py."""

from __future__ import annotations

import torch
from torch import nn

from peft_vision.layers.stored_low import StoredLow


def test_shared_weights_stay_shared_and_come_back() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.LayerNorm(4), nn.Linear(4, 2)).requires_grad_(False)
    model[3].weight.requires_grad_(True)
    original, values = first.weight, first.weight.clone()
    stored = StoredLow(model, torch.bfloat16)
    assert first.weight is second.weight
    assert first.weight.dtype == torch.bfloat16
    assert {model[2].weight.dtype, model[3].weight.dtype, first.bias.dtype} == {torch.float32}
    stored.restore()
    assert first.weight is second.weight is original
    assert torch.equal(original, values)


def test_what_has_no_numbers_waits_nowhere() -> None:
    model = nn.Linear(4, 4, device="meta").requires_grad_(False)
    stored = StoredLow(model, torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    stored.restore()
    assert model.weight.dtype == torch.float32
    assert model.weight.is_meta
