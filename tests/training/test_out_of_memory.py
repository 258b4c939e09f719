"""A run that runs out of memory ends with the weights of one that had small passes all along."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.data.image_set import TensorSet
from peft_vision.errors import JobFailed
from peft_vision.layers.traits import Penalised
from peft_vision.tasks.classification import Classification
from peft_vision.training import accumulation, out_of_memory
from peft_vision.training.fit import fit
from peft_vision.training.out_of_memory import (
    RECORD,
    Fitting,
    is_out_of_memory,
    pieces,
    tried,
)
from peft_vision.training.settings import TrainSettings
from tests.families import timm_vit

SETTINGS: dict[str, Any] = {
    "loggers": [],
    "device": "cpu",
    "progress": False,
    "batch_size": 8,
    "epochs": 2,
    "learning_rate": 1e-2,
}


class Penalty(nn.Linear, Penalised):
    """A layer that adds its squared weights to the loss, in double on purpose."""

    def penalty(self) -> Tensor:
        return 0.1 * self.weight.square().sum()


class Small(nn.Module):
    """Dropout, running figures and a penalty: everything that a second try could get wrong."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 8, 8)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.head = Penalty(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.drop(self.norm(self.first(x)).relu().flatten(1))
        return self.head(hidden)


class Full(torch.autograd.Function):
    """Passes on; its backward finds no memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")


def limited(model: nn.Module, most: int, *, behind: nn.Module, backward: bool = False) -> nn.Module:
    """The model on a machine with memory for `most` images in training, and half in evaluation."""

    def check(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        room = most if module.training else max(1, most // 2)
        if len(output) <= room:
            return output
        if backward and module.training:
            return Full.apply(output)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    behind.register_forward_hook(check)
    return model


@pytest.fixture(autouse=True)
def no_search_for_cycles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes half a second with all libraries loaded, and one test has it."""
    if "really" not in request.node.name:
        monkeypatch.setattr(out_of_memory, "_clear", lambda: None)


def samples(count: int = 24) -> TensorSet:
    torch.manual_seed(1)
    labels = torch.arange(count) % 3
    pixels = 0.3 * torch.randn(count, 3, 32, 32)
    pixels[torch.arange(count), labels] += 1
    return TensorSet(pixels, labels)


def run(model: nn.Module, folder: Path, **settings: Any) -> dict[str, float]:
    return fit(
        model,
        Classification(),
        samples(),
        samples(9),
        TrainSettings(**{**SETTINGS, **settings}),
        run_dir=folder / "run",
        log_dir=folder / "logs",
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "logs" / "log.jsonl").read_text().splitlines()]


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("backward", "asked"),
    [pytest.param(False, 8, id="forward"), pytest.param(True, 4, id="backward, two passes")],
)
def test_it_ends_where_small_passes_from_the_start_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, backward: bool, asked: int
) -> None:
    whole, model = Small(), Small()
    figures = run(whole, tmp_path / "whole", micro_batch=2)
    limited(model, 2, behind=model.norm, backward=backward)
    with caplog.at_level(logging.WARNING, logger="peft_vision"):
        found = run(model, tmp_path / "short", micro_batch=asked)

    assert same(model, whole), "weights or running figures differ"
    assert found["top1"] == figures["top1"]
    assert found["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    said = [r.getMessage() for r in caplog.records if "at a time" in r.getMessage()]
    assert len(said) == 2, "once of training and once of evaluation"
    assert f"with {asked} images at a time" in said[0]
    assert "again with 2" in said[0]
    notes = [
        line for line in lines(tmp_path / "short") if "loss" not in line and "eval_loss" not in line
    ]
    assert notes == [{"step": 0, "micro_batch": 2}, {"step": 3, "evaluation_batch": 1}]
    ours = [line for line in lines(tmp_path / "short") if "loss" in line]
    assert ours == [line for line in lines(tmp_path / "whole") if "loss" in line]


def test_adapters_with_a_teacher(tmp_path: Path) -> None:
    def built() -> Any:
        torch.manual_seed(0)
        return pv.wrap(timm_vit(depth=1, drop_rate=0.2), "lora", r=2)

    def taught(model: nn.Module, **settings: Any) -> None:
        torch.manual_seed(3)
        teacher = timm_vit(depth=1)
        fit(
            model,
            Classification(),
            samples(),
            None,
            TrainSettings(**{**SETTINGS, "epochs": 1, **settings}),
            teacher=teacher,
        )

    whole, model = built(), built()
    taught(whole, micro_batch=4)
    limited(model, 4, behind=model.plain_model.blocks[0])
    taught(model)
    assert same(model, whole)


def test_it_is_kept_for_a_run_that_goes_on(tmp_path: Path) -> None:
    whole, model = Small(), Small()
    run(whole, tmp_path / "whole", micro_batch=2, epochs=1)
    run(limited(model, 2, behind=model.norm), tmp_path / "short", epochs=1)
    record = tmp_path / "short" / "run" / RECORD
    assert json.loads(record.read_text()) == {"micro_batch": 2, "evaluation_batch": 1}

    run(whole, tmp_path / "whole", micro_batch=2)
    again = Small()
    seen: list[int] = []
    again.first.register_forward_hook(lambda m, i, o: seen.append(len(o)) if m.training else None)
    run(again, tmp_path / "short")
    assert set(seen) == {2}
    assert same(again, whole)
    assert {"step": 3, "micro_batch": 2} in lines(tmp_path / "short")


def test_one_image_that_does_not_fit_is_the_end(tmp_path: Path) -> None:
    model = Small()
    limited(model, 0, behind=model.norm)
    with pytest.raises(JobFailed, match="a single image at a time") as caught:
        run(model, tmp_path)
    message = str(caught.value)
    for word in ("Tried to allocate", "asked for 8", "gradient_checkpointing", "frozen=bf16"):
        assert word in message
    assert "peft-vision memory" in message
    assert caught.value.exit_code == 1


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    model = Small()
    model.norm = nn.BatchNorm2d(5)
    with pytest.raises(RuntimeError, match="running_mean"):
        run(model, tmp_path)
    assert not (tmp_path / "run" / RECORD).exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_what_the_allocator_of_the_cpu_really_says() -> None:
    found, reason = tried(lambda: torch.empty(1 << 60, dtype=torch.uint8))
    assert found is None
    assert "allocate" in reason or "memory" in reason


@pytest.mark.parametrize(
    ("asked", "sizes"), [(8, [4, 2, 1]), (6, [3, 1]), (7, [1]), (20, [10, 5, 2, 1])]
)
def test_halves_divide_what_was_asked_for(tmp_path: Path, asked: int, sizes: list[int]) -> None:
    fitting, found = Fitting("micro_batch", asked, tmp_path), []
    while fitting.size > 1:
        fitting.shrink("")
        found.append(fitting.size)
    assert found == sizes
    assert Fitting("micro_batch", asked, tmp_path).size == 1
    with pytest.raises(JobFailed):
        fitting.shrink("")


def test_pieces_are_the_same_images() -> None:
    batch = {"x": torch.arange(6), "names": list("abcdef"), "scale": 2.0, "all": torch.ones(3)}
    cut = list(pieces(batch, 4))
    assert [len(piece["x"]) for piece in cut] == [4, 2]
    assert torch.equal(torch.cat([piece["x"] for piece in cut]), batch["x"])
    assert [name for piece in cut for name in piece["names"]] == batch["names"]
    assert all(piece["scale"] == 2.0 and len(piece["all"]) == 3 for piece in cut)
    assert next(pieces(batch, 6)) is batch


class Alone:
    """Stands for an accelerator with another process that has run out of memory once."""

    num_processes = 2
    process_index = 0
    device = torch.device("cpu")

    def no_sync(self, model: nn.Module) -> Any:
        import contextlib

        return contextlib.nullcontext()


def test_the_failure_of_another_process_is_ours_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [[0], [1], [1], [1]]
    monkeypatch.setattr(accumulation, "smallest", lambda numbers, device: answers.pop(0))
    monkeypatch.setattr(accumulation, "average_gradients", lambda model: None)
    fitting, seen = Fitting("micro_batch", 4, tmp_path), []

    def one_pass(model: nn.Module, piece: Any, count: int) -> Tensor:
        seen.append(len(piece["x"]))
        return torch.zeros(())

    how = accumulation.Accumulation(fitting, Alone(), False, one_pass, lambda: None)
    batch = [{"x": torch.ones(4)}]
    how.step(nn.Linear(1, 1), batch)
    assert seen == [4, 2, 2]
    for _ in range(2):
        how.step(nn.Linear(1, 1), batch)
    assert not answers, "asked in each of the first steps"
    how.step(nn.Linear(1, 1), batch)

    def fails(model: nn.Module, piece: Any, count: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    too_late = accumulation.Accumulation(fitting, Alone(), False, fails, lambda: None)
    with pytest.raises(JobFailed, match=r"cannot be taken back.*with 1 images"):
        too_late.step(nn.Linear(1, 1), batch)
    assert json.loads((tmp_path / RECORD).read_text()) == {"micro_batch": 1}
