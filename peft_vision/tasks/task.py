"""The contract of a task: losses for training, outputs and metrics for evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.errors import BadSetting

Batch = Mapping[str, Tensor]


class Task(ABC):
    """What is learned: settings and, at most, a frozen teacher; the model is an argument.

    `headline` names the metric that sums up an evaluation; larger is better.
    """

    headline: str = "loss"

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named scalar losses of a batch; their sum is minimized."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs and targets of a batch for `metrics`, both with the batch as first axis."""

    @abstractmethod
    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Figures over a whole data set from the joined `outputs` and `targets`."""

    def with_teacher(self, teacher: nn.Module) -> Task:
        """The same task that also learns from `teacher`.

        Raises:
            BadSetting: where the task has no use for one.
        """
        raise BadSetting(f"{type(self).__name__} has no use for a teacher; fit it without one.")

    def example(
        self, model: nn.Module, count: int, image_size: tuple[int, int, int]
    ) -> dict[str, Tensor]:
        """A batch of `count` samples of the right shapes; its numbers are of no account.

        Args:
            image_size: channels, height and width of the images.
        """
        return {
            "pixel_values": torch.empty(count, *image_size),
            "labels": torch.empty(count, dtype=torch.int64),
        }

    def collate(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        """Join samples to a batch: by default each entry of their dicts is stacked."""
        from torch.utils.data import default_collate

        joined: dict[str, Tensor] = default_collate(list(samples))
        return joined
