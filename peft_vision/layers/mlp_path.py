"""The way through somebody's MLP, step by step: products in, activation, norm, product out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.mlp import MlpParts

ABSENT = object()


def activation_in(mlp: nn.Module, parts: MlpParts) -> nn.Module:
    """The module between `up` and `down` that bends: the only child without a role or parameters.

    Raises:
        UnsupportedSite: there is none, or several.
    """
    named = {*parts.up, parts.down, parts.norm}
    found = [
        child
        for name, child in mlp.named_children()
        if name not in named
        and not isinstance(child, nn.Dropout | nn.Identity)
        and not any(True for _ in child.parameters())
    ]
    if len(found) != 1:
        kinds = ", ".join(type(child).__name__ for child in found) or "none"
        raise UnsupportedSite(
            f"{type(mlp).__name__} should have one activation between its linears; found: {kinds}."
        )
    return found[0]


def bent(mlp: nn.Module, parts: MlpParts, products: Sequence[Tensor]) -> Tensor:
    """Hidden units before the norm, ... U, from the products of `up`: one, or gate and value.

    Args:
        products: of each linear in `up`; of a packed one its two halves.
    """
    act = activation_in(mlp, parts)
    if len(products) == 1:
        hidden: Tensor = act(products[0])
    elif getattr(mlp, "gate_last", False):
        hidden = products[0] * act(products[1])
    else:
        hidden = act(products[0]) * products[1]
    return _dropped(mlp, "drop1", hidden)


def ended(mlp: nn.Module, parts: MlpParts, hidden: Tensor) -> Tensor:
    """The branch's output from all hidden units before the norm."""
    if parts.norm is not None:
        hidden = getattr(mlp, parts.norm)(hidden)
    return _dropped(mlp, "drop2", getattr(mlp, parts.down)(hidden))


def dropped(mlp: nn.Module, y: Tensor) -> Tensor:
    """The branch's output behind the last dropout, if there is one."""
    return _dropped(mlp, "drop2", y)


def halves(parts: MlpParts, products: Sequence[Tensor]) -> list[Tensor]:
    """Products of the linears in `up`, packed ones in their halves."""
    return [half for product in products for half in product.chunk(parts.packed, dim=-1)]


def slices(mlp: nn.Module, parts: MlpParts) -> list[tuple[Tensor, Tensor | None]]:
    """(weight, bias) of each product that `halves` gives: views, for plain linears."""
    found: list[tuple[Tensor, Tensor | None]] = []
    for name in parts.up:
        layer: Any = getattr(mlp, name)
        weights = layer.weight.chunk(parts.packed)
        biases = [None] * parts.packed if layer.bias is None else layer.bias.chunk(parts.packed)
        found += zip(weights, biases, strict=True)
    return found


def has_norm(mlp: nn.Module, parts: MlpParts) -> bool:
    """Whether the units are normed before `down`, all together."""
    return parts.norm is not None and not isinstance(getattr(mlp, parts.norm), nn.Identity)


def _dropped(mlp: nn.Module, name: str, x: Tensor) -> Tensor:
    layer = getattr(mlp, name, ABSENT)
    return layer(x) if isinstance(layer, nn.Module) else x
