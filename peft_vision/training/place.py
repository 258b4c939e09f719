"""Where a run is decides what is random in it."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from peft_vision.data.epoch_dataset import EpochDataset
from peft_vision.training.batches import GlobalBatches


class Placed(TrainerCallback):
    """Tells order, augmentation and dropout where the run is."""

    def __init__(
        self, batches: GlobalBatches, train_set: Dataset[Any], seed: int, rank: int
    ) -> None:
        self.batches, self.train_set, self.seed, self.rank = batches, train_set, seed, rank

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the epoch of the batch order and of the augmentation."""
        epoch = state.global_step // self.batches.steps
        self.batches.set_epoch(epoch)
        if isinstance(self.train_set, EpochDataset):
            self.train_set.set_epoch(epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seed dropout and its like for one optimizer step."""
        self.seed_at(state.global_step)

    def seed_at(self, step: int) -> None:
        """The random numbers of an optimizer step, from their first."""
        place = random.Random(f"{self.seed}/{step}/{self.rank}").getrandbits(63)
        torch.manual_seed(place)
        random.seed(place)
