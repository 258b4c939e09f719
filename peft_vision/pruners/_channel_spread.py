"""What channels are worth on images: how much of what the next layers vary by comes from them.

A layer that reads a channel of variance v through the columns w of its weight owes |w|^2 v of its
output's variance to it, were the channels independent (the rule of Wanda, Sun et al., 2023, for
whole columns). Unlike a norm of weights it knows of the batch norms and activations in between. The
mean does not count: batch norms take their statistics again after the cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones.channels import ChannelsSite
from peft_vision.layers.showing import show


def spread_scores(
    model: nn.Module, sites: Sequence[ChannelsSite], batches: Iterable[Any]
) -> list[Tensor | None]:
    """Per site a score for each unit; None where no layer that was called reads it alone.

    A score is the mean over the layers that read a unit, each relative to its mean over the site.
    """
    readers = [_readers(model, site) for site in sites]
    variances = _variances({layer for found in readers for layer, _ in found}, model, batches)
    return [_score(found, variances) for found in readers]


Reader = tuple[nn.Module, Tensor]
"""A layer, and the positions of each unit among its inputs: U x any."""


def _readers(model: nn.Module, site: ChannelsSite) -> list[Reader]:
    found = []
    for member in site.members:
        for path in member.paths:
            owner, _, name = path.rpartition(".")
            layer = model.get_submodule(owner)
            whole = getattr(layer, "groups", 1) == 1 and not getattr(layer, "transposed", False)
            plain = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
            if plain and whole and name == "weight" and member.dim == 1:
                found.append((layer, torch.from_numpy(member.positions)))
    return found


@torch.no_grad()
def _variances(
    layers: Iterable[nn.Module], model: nn.Module, batches: Iterable[Any]
) -> dict[nn.Module, Tensor]:
    """Of every input of each layer that is called: C, float64."""
    sums: dict[nn.Module, tuple[Tensor, int]] = {}
    middles: dict[nn.Module, Tensor] = {}  # near the means: squares of small numbers are exact

    def arrive(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if isinstance(layer, nn.Linear) else args[0].movedim(1, -1)
        flat = x.flatten(0, -2).float()
        flat = flat - middles.setdefault(layer, flat.mean(0))
        total, count = sums.get(layer, (torch.zeros(2, flat.shape[1], dtype=torch.float64), 0))
        now = torch.stack([flat.sum(0, dtype=torch.float64), (flat**2).sum(0, dtype=torch.float64)])
        sums[layer] = (total + now.cpu(), count + flat.shape[0])

    handles = [layer.register_forward_pre_hook(arrive) for layer in layers]
    try:
        show(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    means = {layer: total / count for layer, (total, count) in sums.items()}
    return {layer: (mean[1] - mean[0] ** 2).clamp_min(0.0) for layer, mean in means.items()}


def _score(readers: Sequence[Reader], variances: dict[nn.Module, Tensor]) -> Tensor | None:
    parts = []
    for layer, positions in readers:
        if layer in variances:
            columns = layer.get_parameter("weight").detach().transpose(0, 1).flatten(1)
            owed = (columns.double() ** 2).sum(1).cpu() * variances[layer]
            of_unit = owed[positions].sum(1)
            parts.append(of_unit / of_unit.mean().clamp_min(1e-30))
    return torch.stack(parts).mean(0) if parts else None
