"""How much of what a head adds tells images apart, against all that it is added to.

Where a model carries noisy gates on its heads, it is what their training settles: mean^2 / variance
of each (variational information bottleneck; Dai et al., 2018). Elsewhere it is the variance over
images of what the head adds to the stream, relative to that of the stream; both are taken on
average over the tokens. The ratio of the gates can be had of what heads add, too, but it points the
other way there: what hardly varies over images is well replaced by its mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_vision.backbones.sites import Backbone, HeadsSite
from peft_vision.calibration import Walk
from peft_vision.errors import BadSetting
from peft_vision.importance._ahead import opened
from peft_vision.importance._probing import images_for, reader, table
from peft_vision.layers.block import branch_scale
from peft_vision.layers.gates import GatedLinear

Measure = Literal["variance", "mean"]


@torch.no_grad()
def score(backbone: Backbone, batches: Iterable[Any], *, measure: Measure = "variance") -> Tensor:
    """Signal over noise, L H; blocks whose heads have gates are scored by these.

    Args:
        measure: "variance" (over images, of what a head adds, over that of the stream) or "mean"
            (squared mean over variance of what a head adds).

    Raises:
        UnsupportedSite: the blocks cannot be run from their parts.
        BadSetting: there are fewer than two images.
    """
    images, rows = images_for(backbone, batches), {}
    if sum(len(batch) for batch in images) < 2:
        raise BadSetting("A variance over images needs two of them at least; one was given.")
    with opened(backbone):
        walk = Walk(backbone, images)
        for site in backbone.heads:
            while walk.index < site.block:
                walk.advance()
            gated = _of_gates(site)
            rows[site.block] = _of_added(walk, site, measure) if gated is None else gated
    return table(backbone, rows)


def _of_gates(site: HeadsSite) -> Tensor | None:
    """mean^2 / variance of gates on the heads, H; None where there are none."""
    layer = reader(site)
    if not isinstance(layer, GatedLinear) or layer.units is None or layer.units.units != site.count:
        return None
    return (-layer.units.log_alpha()).exp()


def _of_added(walk: Walk, site: HeadsSite, measure: Measure) -> Tensor:
    """From images before the block of `site`: H."""
    layer, pooled = reader(site), []
    walk.watch([layer], lambda _, x, y: pooled.append(x.mean(1)))
    said = torch.cat(pooled)
    stream = torch.cat([stream.x.mean(1) for stream in walk.streams]).double()
    scale = branch_scale(walk.block, walk.trunk.parts, "attention", stream.shape[-1]).double()
    noise = _variance(stream).clamp_min(1e-30)
    found = []
    for head in range(site.count):
        added = scale * _added(layer, said, head, site.count)
        mean, variance = added.mean(0).square().sum(), _variance(added)
        found.append(
            variance / noise if measure == "variance" else mean / variance.clamp_min(1e-30)
        )
    return torch.stack(found)


def _added(layer: nn.Module, said: Tensor, head: int, count: int) -> Tensor:
    """What one head adds, images x C: whatever the layer is made of, as long as it is linear."""
    width = said.shape[-1] // count
    alone = torch.zeros_like(said)
    columns = slice(head * width, (head + 1) * width)
    alone[:, columns] = said[:, columns]
    added: Tensor = layer(alone) - layer(torch.zeros_like(said))
    return added.double()


def _variance(values: Tensor) -> Tensor:
    """Over images, summed over features: M C -> a number."""
    return (values - values.mean(0)).square().sum(1).mean()
