"""Images shown to a model for what hooks note on the way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.errors import BadSetting


@torch.no_grad()
def show(model: nn.Module, batches: Iterable[Any]) -> None:
    """Run a model over batches in evaluation mode, on its device and in its dtype."""
    modes = [(module, module.training) for module in model.modules()]
    place = next(model.parameters())
    try:
        model.eval()
        for batch in batches:
            model(images_of(batch).to(place.device, place.dtype))
    finally:
        for module, training in modes:
            module.training = training


def images_of(batch: Any) -> Tensor:
    """The images of a batch: itself, or the first of a pair."""
    images = batch[0] if isinstance(batch, list | tuple) else batch
    if isinstance(images, dict):
        images = images["pixel_values"]
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise BadSetting(
            f"The data gave a batch of {type(images).__name__}; batches of (images B 3 H W, labels "
            "B) work."
        )
    return images
