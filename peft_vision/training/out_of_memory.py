"""Out of memory in the middle of a run: the same images again, fewer at a time.

An optimizer step whose micro-batch does not fit is started anew with half of it and twice the
accumulation: the same images, the same normalization of the loss, the same random numbers as a run
that had the small micro-batch from its start. What was found is kept beside the checkpoints.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from peft_vision.errors import JobFailed
from peft_vision.files import write_json_atomic

RECORD = "out_of_memory.json"
_WORDS = (
    "out of memory",
    "not enough memory",
    "DefaultCPUAllocator: can't allocate",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
T = TypeVar("T")
Batch = Mapping[str, Any]


class Fitting:
    """How many images a process holds at a time: what was asked for, or less where that is much.

    Args:
        setting: "micro_batch", or "evaluation_batch"; the name in the log and in the record.
        asked: images per batch of the loader.
        folder: where the record is kept; an earlier run's, in the same folder, counts.

    Attributes:
        size: images at a time, a divisor of `asked`.
        calm: attempts in a row that fitted since the size was last changed.
    """

    def __init__(self, setting: str, asked: int, folder: Path) -> None:
        self.setting, self.asked, self.folder = setting, asked, folder
        self.calm = 0
        self.size = asked
        self.limit(_recorded(folder).get(setting, asked))

    def limit(self, most: int) -> None:
        """Hold at most so many images: the largest divisor of what was asked for, at least one."""
        wanted = max(1, min(most, self.size))
        self.size = next(n for n in range(wanted, 0, -1) if self.asked % n == 0)

    def cut(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same images in pieces of `size`."""
        return [piece for batch in batches for piece in pieces(batch, self.size)]

    def run(
        self, batches: Sequence[Batch], action: Callable[[Batch], T], apart: bool = True
    ) -> list[T]:
        """What `action` gives for each piece, done again in smaller ones until all fit.

        Args:
            apart: no other process waits for this one meanwhile.

        Raises:
            JobFailed: one image at a time does not fit, or another process waits.
        """
        while True:
            cut = self.cut(batches)
            found, reason = tried(lambda: [action(piece) for piece in cut])  # noqa: B023
            if found is not None:
                return found
            self.shrink(reason)
            if not apart:
                raise JobFailed(self.too_late(reason))

    def shrink(self, reason: str) -> None:
        """Hold half as many from now on, and in every later run in this folder.

        Raises:
            JobFailed: it is one image at a time already.
        """
        if self.size == 1:
            raise JobFailed(self._hopeless(reason))
        self.calm = 0
        self.limit(self.size // 2)
        write_json_atomic(self.folder / RECORD, {**_recorded(self.folder), self.setting: self.size})

    def say(self, before: int, step: int) -> None:
        """One line for the user about a change that helped."""
        again = "It was" if self.setting == "evaluation_batch" else "The step was"
        logging.getLogger("peft_vision").warning(
            "Out of memory with %d images at a time, after step %d. %s done again with %d, and so "
            "is all that follows; train.batch_size, losses and weights stay what they were. "
            "`peft-vision memory` says beforehand what fits.",
            before,
            step,
            again,
            self.size,
        )

    def too_late(self, reason: str) -> str:
        """What to say where other processes wait for this one in the middle of a pass."""
        return (
            "One process ran out of memory while others waited for it, which cannot be taken back: "
            f"{reason} The same command goes on from the newest checkpoint, with {self.size} "
            f"images per process at a time ({self.setting}) and the same global batch."
        )

    def _hopeless(self, reason: str) -> str:
        doing = "Evaluating" if self.setting == "evaluation_batch" else "Training on"
        return (
            f"{doing} a single image at a time runs out of memory: {reason} The run asked for "
            f"{self.asked} at a time, and every half of that was tried. What would help: "
            "train.gradient_checkpointing=true, train.frozen=bf16, a base with 4-bit weights, "
            "smaller images (data.image_size). `peft-vision memory RECIPE --gpu 24GB` says what "
            "each of them saves, without a GPU."
        )


def tried(action: Callable[[], T]) -> tuple[T | None, str]:
    """What `action` returns and "", or None and why its memory did not suffice."""
    try:
        return action(), ""
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sentences = str(error).partition("\n")[0].split(". ")
        reason = ". ".join(sentences[:2]).rstrip(".") + "."
    # Behind the except clause nothing refers to the frames, and so to the activations, any more.
    _clear()
    return None, reason


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, its allocators or its libraries say that memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch itself where it has at most `size` images, or dicts of so many each.

    Tensors and lists whose first axis counts the images are cut; all else goes to every piece.
    """
    count = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim), 0)
    if count <= size:
        yield batch
        return
    for start in range(0, count, size):
        yield {
            name: value[start : start + size] if _counts(value, count) else value
            for name, value in batch.items()
        }


def _counts(value: Any, count: int) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == count
    return isinstance(value, (list, tuple)) and len(value) == count


def _clear() -> None:
    import gc

    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _recorded(folder: Path) -> dict[str, int]:
    file = folder / RECORD
    if not file.is_file():
        return {}
    found: dict[str, int] = json.loads(file.read_text())
    return found
