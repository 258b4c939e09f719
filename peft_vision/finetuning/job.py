"""What a run does in its own way, by what it learns: data, model, task, and what is recorded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft_vision.compressed import CompressedModel
from peft_vision.history import History
from peft_vision.recipe import Recipe
from peft_vision.sources import create_model
from peft_vision.wrapping import wrap

if TYPE_CHECKING:
    from peft_vision.data.epoch_dataset import EpochDataset
    from peft_vision.memory.rehearsal import Rehearsal
    from peft_vision.tasks.task import Task

Say = Callable[[str], None]


@dataclass(frozen=True)
class Learning:
    """What `fit` takes.

    Attributes:
        model: what the task calls; its parameters are those of the wrapped model.
    """

    model: nn.Module
    task: Task
    train: EpochDataset
    validation: EpochDataset
    teacher: nn.Module | None = None


class Job(ABC):
    """One run of a recipe; its data are open.

    Attributes:
        notes: what the user should know of the data, a line each.
    """

    notes: tuple[str, ...] = ()

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What makes two runs on data the same, as nested JSON."""

    @abstractmethod
    def build(self) -> Any:
        """The wrapped model, untrained, with what belongs to it in its history."""

    @abstractmethod
    def rehearsal(self, model: Any, processes: int) -> Rehearsal:
        """A step of the run, to be rehearsed without numbers."""

    @abstractmethod
    def learning(self, model: Any) -> Learning:
        """What is trained, on what."""

    @abstractmethod
    def records(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Figures as they are stored: with the count and the data behind them."""


def plain_model(recipe: Recipe, outputs: int) -> nn.Module:
    """The recipe's backbone with so many outputs; random numbers are the seed's."""
    torch.manual_seed(recipe.seed)
    return create_model(
        recipe.model.name, pretrained=recipe.model.pretrained, **recipe.model.arguments(outputs)
    )


def wrapped(plain: nn.Module, recipe: Recipe, batches: list[Any] | None) -> Any:
    """The backbone with the recipe's methods on it; without any, all of it is trained."""
    if not recipe.methods:
        return CompressedModel(plain, History.of(plain)).requires_grad_(True)
    model: Any = plain
    for entry in recipe.methods:
        model = wrap(model, entry.name, data=batches, **entry.settings)
    return model
