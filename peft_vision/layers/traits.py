"""What a layer of ours may promise; found by type, never by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


class Routing(ABC):
    """A layer that sends tokens to parts of itself, by a router that can be fitted on images.

    Attributes:
        gathered: compute what is chosen alone; False computes everything and masks.
    """

    gathered: bool

    @abstractmethod
    def learn(self, arrived: Sequence[Tensor], ridge: float) -> None:
        """Fit the router on what arrives at the layer, B N D each, in place."""


@contextmanager
def masking(routing: Routing) -> Iterator[None]:
    """Everything computed and masked inside, so that every layer is called with whole tensors."""
    before, routing.gathered = routing.gathered, False
    try:
        yield
    finally:
        routing.gathered = before


class Foldable(ABC):
    """A layer that can be folded into a plain one that computes the same."""

    @abstractmethod
    def fold(self) -> nn.Module:
        """The plain layer."""


def penalties(model: nn.Module) -> list[Tensor]:
    """The penalties of all layers of `model` that have one."""
    return [module.penalty() for module in model.modules() if isinstance(module, Penalised)]
