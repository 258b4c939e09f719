"""Metric learning: the contrast by hand, and neighbors that are found."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import peft_vision as pv
from peft_vision.errors import BadSetting
from peft_vision.tasks.embedding import Embedding, recalls, supervised_contrast
from tests.families import build, images


def test_contrast_by_hand() -> None:
    x = functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1)
    labels = torch.tensor([0, 1, 0, 0, 2])
    total, counted = 0.0, 0
    for i in range(5):
        fellows = [j for j in range(5) if j != i and labels[j] == labels[i]]
        if not fellows:
            continue
        others = sum(torch.exp(x[i] @ x[j] / 0.2) for j in range(5) if j != i)
        total -= sum(torch.log(torch.exp(x[i] @ x[j] / 0.2) / others) for j in fellows) / len(
            fellows
        )
        counted += 1
    assert counted == 3
    found = supervised_contrast(x, labels, 0.2)
    torch.testing.assert_close(found, total / counted, rtol=0, atol=1e-12)


def test_without_fellows_there_is_nothing_to_learn() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    loss = supervised_contrast(functional.normalize(x, dim=1), torch.arange(3), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert not bool(x.grad.any())


def test_recalls() -> None:
    angles = torch.tensor([0.0, 0.1, 0.25, 2.0, 2.1, 4.0, 4.1])
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = recalls(x, torch.tensor([0, 0, 1, 1, 1, 2, 2]))
    assert found["recall1"] == pytest.approx(6 / 7)
    assert recalls(x[:3], torch.tensor([0, 0, 1])) == {"recall1": pytest.approx(2 / 3)}
    assert recalls(x[:1], torch.tensor([0])) == {"recall1": 0.0}


def test_a_projected_embedding_is_learned() -> None:
    """The projection is contrasted in training; what is measured is the embedding itself."""
    model = build("timm_vit")
    settings = {"outputs": 8, "projection": 4, "layers": 1, "std": 0.3}
    adapted = pv.wrap(model, "mlp_head", readout="embedding", **settings)
    x, labels = images(model, batch=8), torch.arange(8) % 2
    batch, task = {"pixel_values": x, "labels": labels}, Embedding()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, 3e-3), []
    for _ in range(30):
        loss = sum(task.losses(adapted.train(), batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        outputs, targets = task.predict(adapted.eval(), batch)
    assert outputs.shape == (8, 8)
    assert set(task.metrics(outputs, targets)) == {"loss", "recall1", "recall5", "n"}


def test_directions_count_and_lengths_do_not() -> None:
    batch = {"pixel_values": torch.randn(4, 3), "labels": torch.arange(4)}
    outputs, _ = Embedding().predict(nn.Identity(), batch)
    torch.testing.assert_close(outputs.norm(dim=1), torch.ones(4))
    with pytest.raises(BadSetting):
        Embedding(temperature=0)
