"""How large a head's weights are: no image is looked at.

Queries, keys, values and outputs each count the same: the squares of each are divided by their mean
over the heads of the block. So only heads of one block are compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones.sites import Backbone, HeadsSite
from peft_vision.importance._probing import table
from peft_vision.layers.base_weights import base_weight
from peft_vision.layers.head_surgery import weights_by_head
from peft_vision.layers.quantized import Quantized
from peft_vision.layers.surgery import weight_of


def score(backbone: Backbone, batches: Iterable[Any] = ()) -> Tensor:
    """Root mean square of a head's weights relative to those of its block's heads, L H.

    Args:
        batches: not read.

    Raises:
        UnsupportedSite: the model has no heads, or there is no rule to read the weight of a layer.
    """
    backbone.require("heads")
    rows = {}
    for site in backbone.heads:
        squares = [weight.double().cpu().square().sum(1) for weight in _weights(site)]
        shares = [square / square.mean().clamp_min(1e-30) for square in squares]
        rows[site.block] = torch.stack(shares).mean(0).sqrt()
    return table(backbone, rows)


def _weights(site: HeadsSite) -> list[Tensor]:
    """Every weight of the heads, H x anything each; packed ones as what they stand for."""
    return weights_by_head(site.attention, site.parts, _weight)


def _weight(layer: nn.Module) -> Tensor:
    return base_weight(layer) if isinstance(layer, Quantized) else weight_of(layer)
