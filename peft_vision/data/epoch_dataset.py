"""A data set that knows which epoch it is."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch.utils.data import Dataset


class EpochDataset(Dataset[dict[str, Any]]):
    """A data set whose samples may differ from epoch to epoch, through augmentation."""

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Sample as in epoch number `epoch`, counted from 0."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""
