"""Assignment and losses by hand (LoRAT, ECCV 2024)."""

from __future__ import annotations

import math

import pytest
import torch

from peft_vision.layers.readout import Boxes
from peft_vision.tracking.loss import tracking_losses
from peft_vision.tracking.task import Tracking, best


def test_by_hand_on_two_by_two_places() -> None:
    """The box covers the left column; one of its places answers exactly, the other half of it."""
    truth = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    boxes = torch.zeros(1, 2, 2, 4)
    boxes[0, 0, 0] = torch.tensor([0.0, 0.0, 0.5, 1.0])
    boxes[0, 1, 0] = torch.tensor([0.0, 0.0, 0.5, 0.5])
    found = tracking_losses(Boxes(torch.zeros(1, 2, 2), boxes), truth)
    assert found["box"].item() == pytest.approx((0 + 0.5) / 2)
    assert found["score"].item() == pytest.approx(4 * math.log(2) / 2), "all four places count"
    sure = torch.tensor([[[30.0, -30.0], [0.0, -30.0]]])
    found = tracking_losses(Boxes(sure, boxes), truth)
    assert found["score"].item() == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_scores_learn_the_overlap_and_do_not_move_boxes() -> None:
    scores = torch.zeros(2, 3, 3, requires_grad=True)
    boxes = torch.rand(2, 3, 3, 4).sort(-1).values.requires_grad_()
    truth = torch.tensor([[0.1, 0.1, 0.4, 0.6], [0.5, 0.2, 0.9, 0.9]])
    found = tracking_losses(Boxes(scores, boxes), truth)
    found["score"].backward()
    assert boxes.grad is None, "the target is the overlap as it is"
    assert scores.grad is not None
    assert scores.grad.abs().min() > 0, "every place learns"


def test_gradients_pull_a_box_towards_the_truth() -> None:
    boxes = torch.tensor([0.2, 0.2, 0.5, 0.5]).expand(1, 1, 1, 4).clone().requires_grad_()
    truth = torch.tensor([[0.3, 0.3, 0.8, 0.8]])
    for _ in range(400):
        loss = tracking_losses(Boxes(torch.zeros(1, 1, 1), boxes), truth)["box"]
        (grad,) = torch.autograd.grad(loss, boxes)
        boxes = (boxes - 0.01 * grad).detach().requires_grad_()
    torch.testing.assert_close(boxes.flatten(), truth[0], atol=0.03, rtol=0)


def test_a_target_outside_is_no_division_by_zero() -> None:
    found = tracking_losses(
        Boxes(torch.zeros(1, 2, 2), torch.rand(1, 2, 2, 4)), torch.tensor([[1.2, 1.2, 1.5, 1.5]])
    )
    assert found["box"].item() == 0
    assert found["score"].item() == pytest.approx(4 * math.log(2))


def test_the_best_place_and_the_figures() -> None:
    scores = torch.tensor([[[0.0, 3.0], [1.0, 2.0]], [[9.0, 3.0], [1.0, 2.0]]])
    boxes = torch.arange(32.0).reshape(2, 2, 2, 4)
    assert best(Boxes(scores, boxes)).tolist() == [[4, 5, 6, 7], [16, 17, 18, 19]]
    truth = torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 1, 1]])
    answers = torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 0.5, 1.0]])
    figures = Tracking().metrics(answers, truth)
    assert figures["iou"] == pytest.approx(0.75)
    assert figures["success50"] == pytest.approx(0.5), "0.5 is not above 0.5"
    assert figures["auc"] == pytest.approx((20 / 21 + 10 / 21) / 2)
    assert figures["n"] == 2
