"""Codes: far groups of points get codes of their own, and what belongs to one class counts."""

from __future__ import annotations

import torch

from peft_vision.backbones import view
from peft_vision.importance.discrete_codes import _purity, assigned, score
from tests.families import images
from tests.importance.laws import made


def test_groups_that_lie_apart_are_told_apart() -> None:
    group = torch.arange(4).repeat_interleave(5)
    points = 10.0 * torch.eye(4, dtype=torch.float64)[group] + 0.1 * torch.randn(20, 4).double()
    code = assigned(points, 4)
    assert len(torch.unique(code)) == 4
    assert all(len(torch.unique(code[group == g])) == 1 for g in range(4))
    shuffled = torch.randperm(20)
    same = assigned(points[shuffled], 4)
    assert bool(((same[:, None] == same) == (code[shuffled][:, None] == code[shuffled])).all())


def test_equal_points_share_a_code() -> None:
    assert assigned(torch.ones(5, 3, dtype=torch.float64), 4).tolist() == [0] * 5


def test_purity() -> None:
    code, classes = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([3, 3, 3, 4, 4])
    # The first code is of one class, the second of two, the third is a single image's.
    assert float(_purity(code, classes)) == 1 / 3


def test_scores_are_shares() -> None:
    model = made("hf_siglip_classifier")
    found = score(view(model), [images(model, 8)], codes=3)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
