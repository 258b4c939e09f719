"""How much each head adds to the stream on given images, seen at the output projections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.layers.base_weights import base_weight
from peft_vision.layers.showing import show


@torch.no_grad()
def contributions(
    model: nn.Module, outputs: Sequence[tuple[nn.Module, int]], batches: Iterable[Any]
) -> list[Tensor]:
    """Mean norm of what each head adds to a token, one entry per head.

    Args:
        model: run in evaluation mode; its modes are put back.
        outputs: (output projection, number of heads) per attention module.
        batches: (images, labels) pairs.

    Returns:
        One float64 tensor of as many entries as heads per module.
    """
    sums = [torch.zeros(count, dtype=torch.float64) for _, count in outputs]
    tokens = [0 for _ in outputs]

    def note(index: int, layer: nn.Module, x: Tensor) -> None:
        count = outputs[index][1]
        weight = base_weight(layer).to(x.dtype).unflatten(1, (count, -1))  # type: ignore[no-untyped-call]
        heads: Tensor = x.flatten(0, -2).unflatten(1, (count, -1))  # type: ignore[no-untyped-call]
        for head in range(count):
            added = F.linear(heads[:, head], weight[:, head]).norm(dim=-1)
            sums[index][head] += added.double().sum().cpu()
        tokens[index] += heads.shape[0]

    hooks = [
        layer.register_forward_pre_hook(lambda m, given, i=i: note(i, m, given[0]))
        for i, (layer, _) in enumerate(outputs)
    ]
    try:
        show(model, batches)
    finally:
        for hook in hooks:
            hook.remove()
    return [total / max(seen, 1) for total, seen in zip(sums, tokens, strict=True)]
