"""Losses, figures, and the many shapes in which models return logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from peft_vision.errors import BadSetting, UnsupportedBackbone
from peft_vision.tasks.classification import Classification, Distillation, accuracy, logits_of


class Linear(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.layer = nn.Linear(6, classes)

    def forward(self, pixel_values):
        return self.layer(pixel_values)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return {"pixel_values": torch.randn(5, 6), "labels": torch.tensor([0, 1, 2, 3, 0])}


def test_cross_entropy_with_smoothing(batch):
    model = Linear()
    found = Classification(label_smoothing=0.1).losses(model, batch)
    logits = model(batch["pixel_values"])
    expected = functional.cross_entropy(logits, batch["labels"], label_smoothing=0.1)
    assert found.keys() == {"labels"}
    assert torch.equal(found["labels"], expected)


def test_a_teacher_that_is_the_student_adds_nothing(batch):
    model, task = Linear(), Classification(distillation=Distillation(weight=0.25))
    teacher = Linear()
    teacher.load_state_dict(model.state_dict())
    found = task.with_teacher(teacher).losses(model, batch)
    assert found["teacher"].item() == pytest.approx(0, abs=1e-6)
    assert found["labels"].item() == pytest.approx(
        0.75 * task.losses(model, batch)["labels"].item()
    )


def test_the_teacher_is_frozen_and_the_student_learns_from_it(batch):
    teacher, student = Linear(), Linear()
    task = Classification(distillation=Distillation(weight=1, temperature=3)).with_teacher(teacher)
    losses = task.losses(student, batch)
    sum(losses.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    heat = 3
    soft = functional.softmax(teacher(batch["pixel_values"]) / heat, -1)
    log = functional.log_softmax(student(batch["pixel_values"]) / heat, -1)
    by_hand = heat**2 * (soft * (soft.log() - log)).sum(-1).mean()
    assert losses["teacher"].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_accuracy_counts():
    logits = torch.eye(7)[[0, 1, 2, 3]]
    logits[3] = torch.tensor([6.0, 5, 4, 0, 3, 2, 1])
    found = accuracy(logits, torch.tensor([0, 1, 2, 3]))
    assert found["top1"] == 0.75
    assert found["top5"] == 0.75
    assert found["n"] == 4
    assert "top5" not in accuracy(torch.eye(5), torch.arange(5))


def test_logits_of_everything():
    logits = torch.randn(2, 3)
    assert logits_of(logits) is logits
    assert logits_of(ImageClassifierOutput(logits=logits)) is logits
    assert torch.allclose(logits_of((logits, logits + 2)), logits + 1)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (torch.zeros(2, 5, 3), "tensor of 2 x 5 x 3"),
        (BaseModelOutput(last_hidden_state=torch.zeros(2, 5, 3)), "no classification head"),
        (None, "NoneType without logits"),
    ],
)
def test_models_without_a_head_are_refused(output, said):
    with pytest.raises(UnsupportedBackbone, match=said):
        logits_of(output)


def test_ranges():
    for make in (
        lambda: Classification(label_smoothing=1.0),
        lambda: Distillation(weight=2),
        lambda: Distillation(temperature=0),
    ):
        with pytest.raises(BadSetting):
            make()
