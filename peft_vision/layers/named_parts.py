"""Parts of somebody's module by name, also parts of its parts."""

from __future__ import annotations

from typing import Any

from torch import nn


def part_of(owner: nn.Module, name: str) -> Any:
    """What `owner` calls `name`, which may lead through parts of it, with dots; None if absent."""
    found: Any = owner
    for step in name.split("."):
        found = getattr(found, step, None)
    return found


def holder_of(owner: nn.Module, name: str) -> tuple[Any, str]:
    """(module, attribute) where what `owner` calls `name` is held."""
    path, _, last = name.rpartition(".")
    return (part_of(owner, path) if path else owner), last


def put_part(owner: nn.Module, name: str, value: Any) -> None:
    """Put `value` where `owner` holds what it calls `name`."""
    setattr(*holder_of(owner, name), value)


def inputs_of(layer: nn.Module) -> int:
    """How many features a linear, or channels a convolution, reads."""
    width: Any = getattr(layer, "in_features", None)
    return int(layer.in_channels if width is None else width)  # type: ignore[arg-type]


def outputs_of(layer: nn.Module) -> int:
    """How many features a linear, or channels a convolution, gives."""
    width: Any = getattr(layer, "out_features", None)
    return int(layer.out_channels if width is None else width)  # type: ignore[arg-type]
