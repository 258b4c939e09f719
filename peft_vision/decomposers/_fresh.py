"""First values for a chain that is to be trained from scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peft_vision.layers.layer_shape import LayerShape


def fresh_weights(
    dense: Tensor, shapes: Sequence[LayerShape], product: Callable[[list[Tensor]], Tensor]
) -> list[Tensor]:
    """Normal values, so that the chain's output varies as much as the dense layer's did.

    Each factor keeps the variance of what it reads (1 / fan-in); one scale, divided equally over
    the factors, then gives the kernel they stand for the norm of the dense kernel. Drawn from
    torch's global generator, as the first values of any layer.

    Args:
        product: the kernel that such factors stand for.
    """
    drawn = [
        torch.randn(shape.size, dtype=torch.float64, device=dense.device)
        / (shape.weights / shape.outputs) ** 0.5
        for shape in shapes
    ]
    norm = float(product(drawn).norm())
    wanted = float(dense.double().norm())
    scale = (wanted / norm) ** (1 / len(drawn)) if norm > 0 else 1.0
    return [scale * weight for weight in drawn]
