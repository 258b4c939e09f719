"""What a report says, as plain data: it can be made, tested and stored without a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_vision.errors import BadSetting


@dataclass(frozen=True)
class Speed:
    """Images per second: the median of interleaved runs, and the range that holds half of them."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Reading:
    """One model: one row of the table and one point of the picture.

    Attributes:
        label: what stage this is, such as "dense" or "after recovery".
        accuracy: top-1, in [0, 1].
        images: how many images it was measured on.
        flops: for one image, 2 per multiply-accumulate.
        params: number of parameters.
        speed: images per second, where measured.
        file_bytes: size of the weights on the disk, where saved.
    """

    label: str
    accuracy: float
    images: int
    flops: int
    params: int
    speed: Speed | None = None
    file_bytes: int | None = None

    @property
    def gmacs(self) -> float:
        """Giga multiply-accumulates for one image."""
        return self.flops / 2e9

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy, from the number of images alone."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / max(self.images, 1))


@dataclass(frozen=True)
class Kept:
    """Which of `of` numbered things are still there."""

    of: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """What is left of one transformer block; None where the block has no such thing.

    Attributes:
        heads: attention heads.
        hidden: hidden units of the MLP.
        tokens: patch tokens that leave the block.
    """

    heads: Kept | None = None
    hidden: Kept | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Stage:
    """The patches that are left after one token reduction, numbered row by row."""

    label: str
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Overlay:
    """One image and the patches that the model kept of it.

    Attributes:
        title: what the image shows, for the caption and the alternative text.
        image: `H W 3`, uint8, what the model saw.
        grid: rows and columns of patches.
        stages: one for each reduction, in order.
    """

    title: str
    image: npt.NDArray[np.uint8]
    grid: tuple[int, int]
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Ranking:
    """What the attention heads of a model are worth.

    Attributes:
        model: which one was looked at, such as "dense".
        images: how many it was looked at with.
        rank: blocks x heads: mean rank over the scores in [0, 1], 1 = keep first; None: no head.
        agreement: score -> Kendall's tau with leaving heads out one by one; None where a score
            tells nothing apart.
        notes: which scores were left out, and why.
    """

    model: str
    images: int
    rank: Sequence[Sequence[float | None]]
    agreement: Mapping[str, float | None]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A command to try next, and what it does."""

    purpose: str
    line: str


@dataclass(frozen=True)
class ReportContent:
    """Everything a report shows.

    Attributes:
        title: the heading.
        summary: one or two sentences under it.
        readings: at least one model, the uncompressed one first and the final one last.
        baselines: accuracies in [0, 1] that need no network, by name.
        budget: the share of the first reading's FLOPs that was asked for.
        patches: patch tokens that enter the first block.
        blocks: what is left of each block of the final model, first to last.
        ranking: of the attention heads.
        overlays: images with the patches that were kept.
        settings: what was run, by name.
        versions: of the libraries, by name.
        seconds: what each step took, by name.
        notes: caveats that belong beside the figures.
        commands: what to try next.
    """

    title: str
    summary: str
    readings: tuple[Reading, ...]
    baselines: Mapping[str, float] = field(default_factory=dict)
    budget: float | None = None
    patches: int | None = None
    blocks: tuple[Block, ...] = ()
    ranking: Ranking | None = None
    overlays: tuple[Overlay, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    commands: tuple[Command, ...] = ()

    def __post_init__(self) -> None:
        if not self.readings:
            raise BadSetting("A report needs at least one reading (a measured model); it got none.")
        for overlay in self.overlays:
            rows, columns = overlay.grid
            beyond = [
                i for stage in overlay.stages for i in stage.kept if not 0 <= i < rows * columns
            ]
            if beyond:
                raise BadSetting(
                    f"The overlay {overlay.title!r} keeps patch {beyond[0]}, but its grid of "
                    f"{rows} x {columns} has the patches 0 to {rows * columns - 1}."
                )
