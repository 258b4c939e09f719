"""What a method is trained on before it decides: images of any source, and labels that fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from peft_vision.data.image_set import ImageSet, TensorSet
from peft_vision.data.images import LabeledImages, limited, without_bad
from peft_vision.data.preprocessing import (
    Preprocessing,
    evaluation_transform,
    training_transform,
)
from peft_vision.data.settings import Augmentation, DataSettings
from peft_vision.data.source import Split, open_for_calibration, open_split
from peft_vision.errors import DataError

EVERY = 2**62
"""More images than there are."""


@dataclass(frozen=True)
class Wanted:
    """How much is needed.

    Attributes:
        share: of the training images, with their labels; None: `count` images without labels.
        count: how many images the planned steps take.
        seed: of the draw.
        classes: names of the model's classes, or only how many there are; 0 without a classifier.
    """

    share: float | None
    count: int
    seed: int
    classes: Sequence[str] | int

    @property
    def outputs(self) -> int:
        """Number of classes."""
        return self.classes if isinstance(self.classes, int) else len(self.classes)


@dataclass(frozen=True)
class Material:
    """Images to train on.

    Attributes:
        images: samples `{"pixel_values": 3 H W, "labels": int}`.
        labeled: whether the labels are the model's classes.
        notes: for a user.
    """

    images: Dataset[Any]
    labeled: bool
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)  # type: ignore[arg-type]


def opened(data: Any, wanted: Wanted, described: Preprocessing) -> Material:
    """The images to train on.

    Args:
        data: a folder of images, or another source as in a recipe: its training split, of which a
            fifth stays aside where it has no other one, as in recovery. A split that is open
            already. Or batches of images B 3 H W, or (images, labels) pairs: all of them.
        described: how the model wants its images; batches are ready as they are.

    Raises:
        DataError: there are none.
    """
    if isinstance(data, str | Path | Split):
        return _pictures(data, wanted, described)
    if not isinstance(data, Iterable):
        raise DataError(
            "Images are needed to train gates. Pass data: a folder, batches of images, (images, "
            "labels) pairs, or an opened split."
        )
    pairs = [(batch, None) if isinstance(batch, Tensor) else tuple(batch)[:2] for batch in data]
    if not pairs:
        raise DataError("The data gave no batch. One of images, or (images, labels), works.")
    pixels = torch.cat([given.detach().cpu() for given, _ in pairs])
    known, notes = _labels([labels for _, labels in pairs], wanted)
    targets = torch.zeros(len(pixels), dtype=torch.long) if known is None else known
    count = max(1, math.ceil((wanted.share or 1.0) * len(pixels)))
    drawn = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(wanted.seed))
    chosen = drawn[:count]
    return Material(TensorSet(pixels[chosen], targets[chosen]), known is not None, notes)


def _labels(given: list[Any], wanted: Wanted) -> tuple[Tensor | None, tuple[str, ...]]:
    """The labels of all batches, where there are any that are classes of the model."""
    if wanted.share is None or not all(isinstance(labels, Tensor) for labels in given):
        return None, ()
    found = [labels.detach().cpu() for labels in given]
    if all(labels.dim() == 1 and not labels.is_floating_point() for labels in found):
        together = torch.cat(found).long()
        if len(together) and 0 <= int(together.min()) <= int(together.max()) < wanted.outputs:
            return together, ()
    return None, (_alone(f"they are not classes 0 to {wanted.outputs - 1}"),)


def _pictures(data: str | Path | Split, wanted: Wanted, described: Preprocessing) -> Material:
    if wanted.share is None:
        images = (
            limited(data.train, wanted.count, wanted.seed)
            if isinstance(data, Split)
            else open_for_calibration(str(data), wanted.count)
        )
        return Material(ImageSet(images, evaluation_transform(described), wanted.seed), False)
    transform = training_transform(described, Augmentation())
    try:
        settings = None if isinstance(data, Split) else DataSettings(train=str(data), check="none")
        split = data if settings is None else open_split(settings, wanted.seed)
        whole = _relabeled(split.train, wanted)  # type: ignore[union-attr]
        notes: tuple[str, ...] = ()
    except DataError as reason:
        notes = (_alone(str(reason).rstrip(".")),)
        whole = data.train if isinstance(data, Split) else open_for_calibration(str(data), EVERY)
    count = max(1, math.ceil(wanted.share * len(whole)))
    part = without_bad(limited(whole, count, wanted.seed), "skip", "full")
    return Material(ImageSet(part, transform, wanted.seed), not notes, notes)


def _relabeled(images: LabeledImages, wanted: Wanted) -> LabeledImages:
    """The images with the model's numbers of their classes.

    Raises:
        DataError: they have other classes than the model.
    """
    if not isinstance(wanted.classes, int):
        return images.relabeled(wanted.classes)
    if len(images.names) != wanted.classes:
        raise DataError(
            f"{images.origin} has {len(images.names)} classes, and the model {wanted.classes}."
        )
    return images


def _alone(reason: str) -> str:
    return f"Labels were not used, and the dense model alone was imitated: {reason}."
