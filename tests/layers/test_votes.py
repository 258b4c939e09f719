"""Votes: the stream as a sum of paths, and the lesson that the long path gives the short ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.layers.traits import penalties
from peft_vision.layers.trunk import Trunk
from peft_vision.layers.votes import ENTRY, Lesson, Votes, path_of
from tests.families import SIZE, build, features, images

DEPTH, WIDTH = 4, 32


def voting(name: str = "timm_vit", rows: int | None = 1) -> tuple[nn.Module, Trunk, Votes]:
    model = build(name, dtype=torch.float64)
    tokens = view(model).tokens
    trunk = tokens.trunk()
    trunk.votes = Votes(DEPTH, WIDTH, rows).double().eval()
    return model, trunk, trunk.votes


def test_paths_are_numbered_as_they_are_added() -> None:
    assert [path_of(i, h) for i in range(2) for h in ("attention", "mlp")] == [1, 2, 3, 4]
    assert ENTRY == 0


@pytest.mark.parametrize("rows", [1, None])
def test_ones_give_the_stream_back(rows: int | None) -> None:
    x = images(None, dtype=torch.float64)
    expected = features(build("timm_vit", dtype=torch.float64)(x))
    assert (features(voting(rows=rows)[0](x)) - expected).abs().max() < 1e-12


def test_only_class_rows_are_summed_for_class_pooling() -> None:
    _, trunk, _ = voting()
    assert trunk(torch.randn(2, 17, WIDTH, dtype=torch.float64)).shape == (2, 1, WIDTH)


def test_the_result_is_the_sum_of_what_was_put_down() -> None:
    _, trunk, votes = voting(rows=None)
    nn.init.normal_(votes.scales)
    votes.ledger = {}
    total = trunk(torch.randn(2, 17, WIDTH, dtype=torch.float64))
    assert sorted(votes.ledger) == list(range(2 * DEPTH + 1))
    assert (torch.stack(list(votes.ledger.values())).sum(0) - total).abs().max() < 1e-12


def test_a_silent_path_is_left_out_and_the_stream_stays() -> None:
    x = torch.randn(2, 17, WIDTH, dtype=torch.float64)
    _, trunk, votes = voting(rows=None)
    votes.ledger = {}
    whole, shares = trunk(x), dict(votes.ledger)
    votes.ledger = None
    votes.silence([ENTRY, 3])
    assert votes.kept == [1, 2, 4, 5, 6, 7, 8]
    assert votes.scales.shape == (7, WIDTH)
    assert (trunk(x) - (whole - shares[ENTRY] - shares[3])).abs().max() < 1e-12
    votes.silence([3, 8])
    assert (trunk(x) - (whole - shares[ENTRY] - shares[3] - shares[8])).abs().max() < 1e-12


def test_every_scale_is_trained() -> None:
    model, _, votes = voting()
    features(model(images(model))).square().sum().backward()
    assert (votes.scales.grad.abs().sum(1) > 0).all()


def taught(
    depths: tuple[int, ...] = (0, 1), weight: float = 0.5, temperature: float = 2.0
) -> tuple[nn.Module, Trunk, Lesson]:
    model, trunk, votes = voting()
    votes.lesson = Lesson(depths, DEPTH - 1, weight, temperature)
    votes.lesson.read_by(model, trunk, (3, SIZE, SIZE))
    return model, trunk, votes.lesson


def partial_logits(model: nn.Module, depth: int, x: Tensor) -> Tensor:
    """The logits of a model whose blocks end behind `depth`."""
    short = copy.deepcopy(model)
    trunk = next(m for m in short.modules() if isinstance(m, Trunk))
    trunk.blocks = trunk.blocks[: depth + 1]
    return short.eval()(x)


def test_the_lesson_is_the_divergence_of_the_models_own_logits() -> None:
    model, _, lesson = taught()
    x = images(model, batch=3)
    model.train()(x)
    t, expected = 2.0, 0.0
    long = model.eval()(x)
    for depth in (0, 1):
        short = partial_logits(model, depth, x)
        p = (long / t).softmax(-1)
        kl = (p * (p.log() - (short / t).log_softmax(-1))).sum(-1).mean()
        expected += 0.5 * t * t * kl
    got = lesson.penalty()
    assert (got - expected).abs() < 1e-5  # taken in float32
    assert got > 0
    assert penalties(model) == [0.0], "a second time there is nothing left to say"


def test_nothing_is_noted_in_evaluation_or_without_gradient() -> None:
    model, _, lesson = taught()
    model.eval()(images(model))
    assert lesson.penalty() == 0
    with torch.no_grad():
        model.train()(images(model))
    assert lesson.penalty() == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_goes_to_the_short_paths_only(checkpointing: bool) -> None:
    model, trunk, lesson = taught(depths=(0, 1))
    trunk.checkpointing = checkpointing
    model.train()(images(model))
    lesson.penalty().backward()
    strength = trunk.votes.scales.grad.abs().sum(1)
    assert (strength[:5] > 0).all(), "what entered, and both halves of blocks 0 and 1"
    assert (strength[5:] == 0).all(), "the long path is the teacher"
    assert all(p.grad is None for block in trunk.blocks[2:] for p in block.parameters())
    assert all(p.grad is not None for p in trunk.blocks[0].mlp.parameters())


def test_forward_passes_that_were_not_asked_about_leave_nothing_behind() -> None:
    model, _, lesson = taught()
    once, twice = images(model, 2), images(model, 3)
    model.train()(once)
    model(twice)
    assert len(lesson.noted) == 3
    assert {len(total) for total in lesson.noted} == {3}


def test_a_copy_teaches_itself() -> None:
    model, trunk, _ = taught()
    model.train()(images(model))
    other = copy.deepcopy(model)
    twin = next(m for m in other.modules() if isinstance(m, Lesson))
    assert twin.reader[0] is other
    assert not twin.noted
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    other(images(other))
    assert twin.penalty() > 0
    assert trunk.given is None


def test_nothing_is_registered_twice() -> None:
    model, _, _ = taught()
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names))
    assert not [name for name in model.state_dict() if "lesson" in name]
