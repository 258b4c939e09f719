"""Labeled images as a torch data set whose augmentation is a function of (seed, epoch, index)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_vision.data.epoch_dataset import EpochDataset
from peft_vision.data.images import LabeledImages, limited
from peft_vision.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageSet(EpochDataset):
    """Images through a transform: samples `{"pixel_values": 3 H W, "labels": int}`.

    Args:
        images: what to sample from.
        transform: PIL image -> tensor; may draw from torch's CPU generator.
        seed: of the augmentation.
    """

    def __init__(
        self, images: LabeledImages, transform: Callable[[Image], Tensor], seed: int = 0
    ) -> None:
        self.images, self.transform, self.seed = images, transform, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Augment as in epoch number `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample number `index`; the same for every process, worker and resumed run."""
        with drawing_from(self.seed, self.epoch, index):
            pixels = self.transform(self.images.image(index))
        return {"pixel_values": pixels, "labels": self.images.targets[index]}


class TensorSet(EpochDataset):
    """Ready images `N 3 H W` and labels `N`, held in memory."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def __len__(self) -> int:
        """Number of images."""
        return int(self.pixels.shape[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample number `index`."""
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def from_batches(batches: Iterable[tuple[Tensor, Tensor]]) -> TensorSet:
    """Keep an iterable of batches (images `B 3 H W`, labels `B`) in memory.

    Raises:
        DataError: there is no batch.
    """
    pairs = [(pixels.detach().cpu(), labels.detach().cpu()) for pixels, labels in batches]
    if not pairs:
        raise DataError("The data gave no batch. One of (images, labels) batches works.")
    return TensorSet(torch.cat([pixels for pixels, _ in pairs]), torch.cat([y for _, y in pairs]))


def batches_of(
    data: LabeledImages, transform: Callable[[Image], Tensor], count: int = 256
) -> list[tuple[Tensor, Tensor]]:
    """Batches (images `B 3 H W`, labels `B`) of `count` images, for methods that decide by data."""
    drawn = ImageSet(limited(data, count, seed=0), transform)
    loaded = torch.utils.data.DataLoader(drawn, batch_size=32)
    return [(batch["pixel_values"], batch["labels"]) for batch in loaded]


@contextmanager
def drawing_from(seed: int, *place: int) -> Iterator[None]:
    """Let torch's CPU generator be a function of `seed` and `place`, and restore it afterwards.

    The generator of a GPU is left alone: nothing in a transform draws from it.
    """
    words = ",".join(str(number) for number in (seed, *place)).encode()
    drawn = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(drawn)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
