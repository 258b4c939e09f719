"""Whole numbers of a configuration that fit the layers it is for: PEFT's default, or less."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping, Sequence

import peft
import torch
from torch import Tensor, nn

from peft_vision.errors import MissingExtra, UnsupportedSite

Build = Callable[[Mapping[str, int], list[str]], peft.PeftConfig]
"""Makes a configuration with these numbers for these names of layers."""


def fitted(
    name: str, layers: Sequence[nn.Module], build: Build, free: Mapping[str, int]
) -> dict[str, int]:
    """The numbers that PEFT takes for these layers, where its defaults are too large for them.

    One layer of each shape is tried and called, as a copy. What PEFT refuses says which number is
    too large, and that one is halved; one that the user gave is never touched.

    Args:
        name: of the method, for messages.
        layers: the layers to adapt.
        build: see `Build`.
        free: numbers that may be changed, with PEFT's defaults.

    Raises:
        UnsupportedSite: PEFT refuses for a reason that no smaller number helps.
        MissingExtra: PEFT needs a package that is not installed.
    """
    changed: dict[str, int] = {}
    while (refusal := _refusal(layers, build, changed)) is not None:
        current = {**free, **changed}
        blamed = [key for key, value in current.items() if value > 1 and _blames(refusal, value)]
        blamed = [key for key in blamed if re.search(rf"\b{key}\b", refusal)] or blamed
        if not blamed:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            raise UnsupportedSite(f"{name} does not take these layers ({kinds}): {refusal}")
        changed |= {key: current[key] // 2 for key in blamed}
    return changed


def _refusal(layers: Sequence[nn.Module], build: Build, changed: Mapping[str, int]) -> str | None:
    """What PEFT says against it, or None."""
    kinds: dict[tuple[object, ...], nn.Module] = {}
    for layer in layers:
        shapes = [tuple(parameter.shape) for parameter in layer.parameters()]
        kinds.setdefault((type(layer), *shapes), layer)
    try:
        _inject([copy.deepcopy(layer) for layer in kinds.values()], build, changed)
    except ImportError as error:
        raise MissingExtra(f"PEFT needs another package for this: {error}") from error
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        return str(error)
    return None


def _inject(layers: Sequence[nn.Module], build: Build, changed: Mapping[str, int]) -> None:
    toy = nn.ModuleDict({f"layer{n}": layer for n, layer in enumerate(layers)})
    widths = [(name, getattr(layer, "in_features", None)) for name, layer in toy.items()]
    with torch.random.fork_rng(), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.PeftModel(toy, build(changed, list(toy)))
        for name, width in widths:
            if isinstance(width, int):
                toy[name](_rows(toy[name], width))


def _rows(layer: nn.Module, width: int) -> Tensor:
    """Inputs of two tokens (1 2 C), in the layer's dtype and on its device."""
    like = next((p for p in layer.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, 2, width, dtype=like.dtype, device=like.device, requires_grad=True)


def _blames(refusal: str, value: int) -> bool:
    return re.search(rf"(?<!\d){value}(?!\d)", refusal) is not None
