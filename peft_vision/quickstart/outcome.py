"""What the quickstart measured and wrote, and what to try next."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_vision.artifact import versions
from peft_vision.report.content import Command, Reading, Speed

if TYPE_CHECKING:
    from peft_vision.cost import Cost, Timing
    from peft_vision.exporting import ExportReport
    from peft_vision.importance import Importance

BUDGET = 0.4
"""Share of the FLOPs that the compressed model may cost."""

TIMED = 8
"""Images a batch where models are timed."""


@dataclass(frozen=True)
class Measured:
    """Figures, each measured in this run.

    Attributes:
        accuracies: top-1 in [0, 1] of the dense model, the compressed one before recovery, and the
            one loaded from its folder after recovery.
        costs: counted, of the dense and the compressed model.
        speeds: timed in turns, of the dense and the compressed model.
        baselines: validation accuracy of what needs no network, by name.
        exported: the file and how it was checked.
        importance: of the dense model's attention heads.
        seconds: of each step, by name.
        fast: whether the figures are those of a trial run.
    """

    accuracies: tuple[float, float, float]
    costs: tuple[Cost, Cost]
    speeds: tuple[Timing, Timing]
    baselines: Mapping[str, float]
    exported: ExportReport
    importance: Importance
    seconds: Mapping[str, float]
    fast: bool


@dataclass(frozen=True)
class Outcome:
    """What the quickstart measured and wrote.

    Attributes:
        folder: the output folder.
        measured: the figures.
        images: how many validation images the accuracies are on.
    """

    folder: Path
    measured: Measured
    images: int

    @property
    def adapter(self) -> Path:
        """The folder of the adapter."""
        return self.folder / "finetuned"

    @property
    def compressed(self) -> Path:
        """The folder of the compressed and recovered model."""
        return self.folder / "compressed"

    @property
    def report(self) -> Path:
        """The report."""
        return self.folder / "report.html"

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON, with the versions and the machine they were taken with."""
        return {
            "images": self.images,
            "fast": self.measured.fast,
            "models": [asdict(reading) for reading in self.readings],
            "baselines": dict(self.measured.baselines),
            "importance": self.measured.importance.to_json(),
            "seconds": dict(self.measured.seconds),
            "versions": versions(),
            "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        }

    @property
    def readings(self) -> tuple[Reading, Reading, Reading]:
        """The dense model, the compressed one, and the same after recovery."""
        (before, after), (slow, quick) = self.measured.costs, self.measured.speeds
        dense, pruned, recovered = self.measured.accuracies
        saved = weight_bytes(self.compressed)
        return (
            Reading(
                "dense", dense, self.images, before.flops, before.params, _speed(slow), before.bytes
            ),
            Reading("compressed", pruned, self.images, after.flops, after.params),
            Reading(
                "after recovery",
                recovered,
                self.images,
                after.flops,
                after.params,
                _speed(quick),
                saved,
            ),
        )

    @property
    def commands(self) -> tuple[Command, ...]:
        """What to try next, on one's own images."""
        return (
            Command(
                "Fine-tune on a folder of images, one subfolder for each class.",
                "peft-vision finetune demo/quickstart data.train=YOUR_IMAGES -o runs/mine",
            ),
            Command(
                "Compress what came of it, and recover on the same images.",
                f"peft-vision compress runs/mine --target-flops {BUDGET:g} --data YOUR_IMAGES "
                "--recover-epochs 3 -o runs/small",
            ),
            Command(
                "Export it to a file that runs without peft_vision.",
                "peft-vision export runs/small --format onnx",
            ),
        )


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors in a saved folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _speed(timing: Timing) -> Speed:
    """Images per second: the median and the quartiles."""
    slow, quick = timing.spread[1], timing.spread[0]
    return Speed(timing.images_per_second, 1e3 * timing.batch / slow, 1e3 * timing.batch / quick)
