"""What a layer of ours may promise; found by type, never by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class Temporary(ABC):
    """A layer that lives only while a method is being trained."""

    @abstractmethod
    def settle(self) -> nn.Module:
        """The layer that takes its place afterwards."""


class Penalised(ABC):
    """A layer that adds a term to the training loss."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """A scalar, already weighted."""


class Paced(ABC):
    """A layer that changes with the passes of training."""

    @abstractmethod
    def advance(self) -> None:
        """Called once before each forward pass that is trained on; never in evaluation."""


class Lesson(NamedTuple):
    """What a router reads of some tokens (M D), and what it should say of them (M E)."""

    read: Tensor
    wanted: Tensor


class Routing(ABC):
    """A layer that sends tokens to parts of itself, by a router that can be fitted on images.

    Attributes:
        gathered: compute what is chosen alone; False computes everything and masks.
        lessons: where there is a list, everything counts, and each forward appends to it.
    """

    gathered: bool
    lessons: list[Lesson] | None = None

    @abstractmethod
    def learn(self, ridge: float) -> None:
        """Fit the router on the lessons, in place; without any, all stays as it is."""


@contextmanager
def masking(routing: Routing | None) -> Iterator[None]:
    """Everything computed and masked inside, so that every layer is called with whole tensors."""
    if routing is None:
        yield
        return
    before, routing.gathered = routing.gathered, False
    try:
        yield
    finally:
        routing.gathered = before


@contextmanager
def teaching(routing: Routing, ridge: float) -> Iterator[None]:
    """What passes inside is what the router is fitted on, in the end."""
    routing.lessons = []
    try:
        yield
        routing.learn(ridge)
    finally:
        routing.lessons = None


class Foldable(ABC):
    """A layer that can be folded into a plain one that computes the same."""

    @abstractmethod
    def fold(self) -> nn.Module:
        """The plain layer."""


def penalties(model: nn.Module) -> list[Tensor]:
    """The penalties of all layers of `model` that have one."""
    return [module.penalty() for module in model.modules() if isinstance(module, Penalised)]
