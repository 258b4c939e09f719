"""A transformer's MLP as named parts: units are the columns of the last linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from peft_vision.layers.surgery import keep_features, keep_inputs, keep_outputs


@dataclass(frozen=True)
class MlpParts:
    """The names of the parts of an MLP.

    Attributes:
        up: linears that produce the hidden units; two when gate and value are separate.
        down: the linear that consumes them.
        packed: 2 when one `up` linear holds the gate and the value halves, one after the other.
        norm: norm over the hidden units before `down`, if any.
    """

    up: tuple[str, ...]
    down: str
    packed: int = 1
    norm: str | None = None


def unit_count(mlp: nn.Module, parts: MlpParts) -> int:
    """How many hidden units there are now."""
    return int(getattr(mlp, parts.down).in_features)


def keep_units(mlp: nn.Module, parts: MlpParts, units: Sequence[int]) -> None:
    """Keep some hidden units, in place. A norm over the units then sees the kept ones only."""
    count = unit_count(mlp, parts)
    rows = [half * count + unit for half in range(parts.packed) for unit in units]
    for name in parts.up:
        keep_outputs(getattr(mlp, name), rows)
    if parts.norm is not None:
        keep_features(getattr(mlp, parts.norm), units)
    keep_inputs(getattr(mlp, parts.down), units)
