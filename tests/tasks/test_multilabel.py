"""Several labels per image: the loss and the figures by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from peft_vision.errors import BadSetting, DataError
from peft_vision.tasks.multilabel import MultiLabel, mean_average_precision


def test_average_precision_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.4]])
    targets = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 0]])
    assert mean_average_precision(scores, targets) == pytest.approx((1 + 2 / 3) / 2)
    assert mean_average_precision(scores, torch.zeros(4, 2)) == 0
    both = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 1]])
    assert mean_average_precision(scores, both) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


def test_ties_are_not_counted_as_found() -> None:
    assert mean_average_precision(torch.zeros(4, 1), torch.tensor([[1], [0], [0], [0]])) == 0.25


def test_loss_and_figures() -> None:
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    batch = {"pixel_values": torch.randn(4, 3), "labels": torch.tensor([[1, 0]] * 4)}
    assert MultiLabel().losses(model, batch)["labels"].item() == pytest.approx(math.log(2))
    heavy = MultiLabel(positive_weight=3.0).losses(model, batch)["labels"].item()
    assert heavy == pytest.approx(2 * math.log(2))
    logits = torch.tensor([[2.0, -1.0], [-2.0, 1.0]])
    found = MultiLabel().metrics(logits, torch.tensor([[1, 0], [1, 1]]))
    assert found["f1"] == pytest.approx(2 * 2 / (2 + 3))
    assert found["n"] == 2


def test_refusals() -> None:
    with pytest.raises(DataError, match="labels of a batch are"):
        MultiLabel().predict(
            nn.Linear(3, 2), {"pixel_values": torch.zeros(4, 3), "labels": torch.zeros(4)}
        )
    for settings in ({"positive_weight": 0.0}, {"threshold": 1.0}):
        with pytest.raises(BadSetting):
            MultiLabel(**settings)
