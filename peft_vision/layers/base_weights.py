"""The weight below whatever stands around a linear layer: adapters, packing, splitting."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_vision.layers.ownership import plain_of
from peft_vision.layers.quantized import Quantized
from peft_vision.layers.split_linear import NAMES, SplitLinear
from peft_vision.layers.surgery import weight_of


def base_weight(layer: nn.Module) -> Tensor:
    """Out x in, detached: of the layer that an adapter stands around; dequantized where packed.

    Raises:
        UnsupportedSite: there is no rule to read the layer's weight.
    """
    plain = plain_of(layer)
    if isinstance(plain, SplitLinear):
        return torch.cat([base_weight(getattr(plain, name)) for name in NAMES])
    if isinstance(plain, Quantized):
        return plain.dequantized()
    return weight_of(plain)


def is_plain(layer: nn.Module) -> bool:
    """Whether a product with a slice of the weight is all that a call of the layer would do."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks  # noqa: SLF001 - who else is told
    return type(layer) is nn.Linear and not hooked
