"""Frozen weights stored in low precision for a while.

Autocast rounds the weight of a linear or a convolution whenever it multiplies by it, and, for one
that is frozen, keeps the rounded copy for the backward pass: 6 bytes a number where 2 are used.
Stored rounded, the products are the same bit for bit. Biases, norms, scales and positions, which
autocast does not round, stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.conv import _ConvNd

MULTIPLIES = (nn.Linear, _ConvNd)


class StoredLow:
    """Frozen 32-bit weights of a model's linears and convolutions in `dtype`, until `restore`.

    The weights themselves wait in the memory of the host, and come back unchanged. Those without
    numbers (fake, or on meta) wait nowhere.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._places: list[tuple[nn.Module, nn.Parameter | None]] = []
        stored: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for module in model.modules():
            weight = module._parameters.get("weight")  # noqa: SLF001 - properties are no places
            if not isinstance(module, MULTIPLIES) or weight is None or not _is_frozen(weight):
                continue
            empty = isinstance(weight, FakeTensor) or weight.is_meta
            if id(weight) not in stored:  # two modules may share it
                stored[id(weight)] = (weight, _as(weight, dtype))
                if not empty:
                    weight.data = weight.data.cpu()
            module.weight = stored[id(weight)][1]
            self._places.append((module, None if empty else weight))

    def restore(self) -> None:
        """Put the weights back, on the device where the model is now."""
        for module, original in self._places:
            current: nn.Parameter = module.weight  # type: ignore[assignment]
            if original is None:
                module.weight = _as(current, torch.float32)
            else:
                original.data = original.data.to(current.device)
                module.weight = original


def _is_frozen(weight: nn.Parameter) -> bool:
    plain = type(weight) is nn.Parameter or isinstance(weight, FakeTensor)
    return plain and not weight.requires_grad and weight.dtype == torch.float32


def _as(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(dtype), requires_grad=False)
