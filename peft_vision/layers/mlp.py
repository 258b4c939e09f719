"""A transformer's MLP as named parts: units are the columns of the last linear."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peft_vision.layers.named_parts import inputs_of, part_of
from peft_vision.layers.surgery import keep_features, keep_inputs, keep_outputs


@dataclass(frozen=True)
class MlpParts:
    """The names of the parts of an MLP.

    Attributes:
        up: linears that produce the hidden units; two when gate and value are separate.
        down: the linear that consumes them.
        packed: 2 when one `up` linear holds the gate and the value halves, one after the other.
        norm: norm over the hidden units before `down`, if any.
        between: what else maps every unit to itself: depthwise convolutions, norms of a batch.

    `up`, `down` and `between` may name parts of parts, with dots.
    """

    up: tuple[str, ...]
    down: str
    packed: int = 1
    norm: str | None = None
    between: tuple[str, ...] = ()


def unit_count(mlp: nn.Module, parts: MlpParts) -> int:
    """How many hidden units there are now."""
    return inputs_of(part_of(mlp, parts.down))


def keep_units(mlp: nn.Module, parts: MlpParts, units: Sequence[int]) -> None:
    """Keep some hidden units, in place. A norm over the units then sees the kept ones only."""
    count = unit_count(mlp, parts)
    rows = [half * count + unit for half in range(parts.packed) for unit in units]
    for name in parts.up:
        keep_outputs(part_of(mlp, name), rows)
    for name in parts.between:
        keep_features(part_of(mlp, name), units)
    if parts.norm is not None:
        keep_features(getattr(mlp, parts.norm), units)
    keep_inputs(part_of(mlp, parts.down), units)


class OwnMlp(nn.Module, ABC):
    """A module of ours in the place of a family's MLP, which it keeps as `inner`."""

    def __init__(self, inner: nn.Module, parts: MlpParts) -> None:
        super().__init__()
        self.inner = inner
        self.parts = parts

    @abstractmethod
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The branch's output, B N C."""

    def keep_units(self, units: Sequence[int]) -> None:
        """Keep some hidden units, in place; what this module has of its own for them follows."""
        keep_units(self.inner, self.parts, units)
