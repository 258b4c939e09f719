"""How often routed heads would be chosen on given images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.layers.routed_attention import RoutedAttention
from peft_vision.layers.router import Router, count_of, top_gates
from peft_vision.layers.showing import show


@torch.no_grad()
def head_usage(
    model: nn.Module, modules: Sequence[RoutedAttention], batches: Iterable[Any]
) -> list[list[float]]:
    """Per module, the share of patches that have each routed head among those they rank first.

    Heads that choose their tokens serve a fixed share of them; what counts for those, too, is
    whether tokens would choose them.

    Args:
        model: run in evaluation mode; its modes are put back.
        batches: (images, labels) pairs.
    """
    sums = [torch.zeros(len(module.routing.routed)) for module in modules]
    seen = [0 for _ in modules]
    firsts = [m.routing.protect if isinstance(m.router, Router) else 0 for m in modules]

    def note(index: int, logits: Tensor) -> None:
        members = logits.shape[-1]
        count = count_of(modules[index].routing.share, members)
        patches = logits[:, firsts[index] :]
        chosen = top_gates(patches, count)[0].flatten(0, -2).float().cpu()
        sums[index] += chosen.sum(0)
        seen[index] += chosen.shape[0]

    hooks = [
        module.router.register_forward_hook(lambda m, given, out, i=i: note(i, out))
        for i, module in enumerate(modules)
    ]
    try:
        show(model, batches)
    finally:
        for hook in hooks:
            hook.remove()
    # What was never asked (every token was served) says nothing against a head.
    return [
        (total / count).tolist() if count else [1.0] * len(total)
        for total, count in zip(sums, seen, strict=True)
    ]
