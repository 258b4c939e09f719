"""First values for a chain that is to be trained from scratch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_vision.layers.layer_shape import LayerShape, kernel_of


def fresh_weights(dense: Tensor, shapes: Sequence[LayerShape]) -> list[Tensor]:
    """Normal values, so that the chain's output varies as much as the dense layer's did.

    Each factor keeps the variance of what it reads (1 / fan-in); one scale, divided equally over
    the factors, then gives the kernel they stand for the norm of the dense kernel. Drawn from
    torch's global generator, as the first values of any layer.
    """
    drawn = [
        torch.randn(shape.size, dtype=torch.float64, device=dense.device)
        / (shape.weights / shape.outputs) ** 0.5
        for shape in shapes
    ]
    whole = kernel_of([(w, shape.groups) for w, shape in zip(drawn, shapes, strict=True)])
    norm = float(whole.norm())
    wanted = float(dense.double().norm())
    scale = (wanted / norm) ** (1 / len(drawn)) if norm > 0 else 1.0
    return [scale * weight for weight in drawn]
