"""How fast the loss moves when a head is closed a little: |dL/dg| at an open gate g = 1.

Michel et al., "Are Sixteen Heads Really Better than One?" (2019): one gate for each head and image,
absolute value per image, mean over images, all from one backward pass. The loss is the
cross-entropy with the class that the model itself predicts, so no labels are read. Of a model
without a classifier it is the features along random directions, of which the root mean square is
taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from peft_vision.backbones.sites import Backbone
from peft_vision.importance._probing import (
    answer_of,
    by_head,
    changing,
    classifies,
    evaluating,
    images_for,
    means_of,
    reader,
    table,
)

DIRECTIONS = 4
"""Random directions of features."""


def score(
    backbone: Backbone,
    batches: Iterable[Any],
    *,
    toward: Literal["mean", "zero"] = "mean",
    normalize: bool = False,
) -> Tensor:
    """Mean absolute gradient of the gates over the images, L H.

    Args:
        toward: what a closing gate leads to: the head's mean over images and tokens, as in an
            ablation by the mean, or zero, as published.
        normalize: divide the scores of each block by their L2 norm, as published. Blocks then
            count the same, and only heads of one block are compared.

    Raises:
        UnsupportedSite: the model has no heads. BadSetting: there is no image.
    """
    images = images_for(backbone, batches)
    means = means_of(backbone, images) if toward == "mean" else {}
    totals = [torch.zeros(site.count, dtype=torch.float64) for site in backbone.heads]
    with evaluating(backbone.model):
        for batch in images:
            found = _gradients(backbone, batch, means)
            totals = [t + g.sum(0) for t, g in zip(totals, found, strict=True)]
    count = sum(len(batch) for batch in images)
    rows = [total / count for total in totals]
    if normalize:
        rows = [row / row.norm().clamp_min(1e-30) for row in rows]
    return table(backbone, {s.block: row for s, row in zip(backbone.heads, rows, strict=True)})


def _gradients(backbone: Backbone, images: Tensor, means: dict[int, Tensor]) -> list[Tensor]:
    """Absolute gradient per image and head, B H for each block, in float64."""
    with ExitStack() as stack, torch.enable_grad():
        gates = []
        for site in backbone.heads:
            gate = images.new_ones(len(images), site.count, requires_grad=True)
            change = partial(_gated, gate=gate, mean=means.get(site.block))
            stack.enter_context(changing(reader(site), change))
            gates.append(gate)
        output = backbone.model(images)
        losses = _losses(answer_of(output), classes=classifies(backbone, output))
        squares = [torch.zeros(gate.shape, dtype=torch.float64) for gate in gates]
        for number, loss in enumerate(losses):
            last = number == len(losses) - 1
            found = torch.autograd.grad(loss, gates, retain_graph=not last)
            squares = [s + g.double().cpu().square() for s, g in zip(squares, found, strict=True)]
    return [(square / len(losses)).sqrt() for square in squares]


def _gated(x: Tensor, gate: Tensor, mean: Tensor | None) -> Tensor:
    heads = by_head(x, gate.shape[1])
    opened = gate.reshape(len(gate), *[1] * (x.dim() - 2), -1, 1)
    if mean is None:
        return (heads * opened).flatten(-2)
    rest = by_head(mean.to(x), gate.shape[1])
    return (rest + opened * (heads - rest)).flatten(-2)


def _losses(answer: Tensor, *, classes: bool) -> Sequence[Tensor]:
    """Numbers to differentiate, each a sum over images."""
    wide = answer.to(torch.promote_types(answer.dtype, torch.float32))
    if classes:
        return [torch.nn.functional.cross_entropy(wide, wide.argmax(-1), reduction="sum")]
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(DIRECTIONS):
        direction = torch.randn(wide.shape[1:], generator=generator, dtype=torch.float64).to(wide)
        found.append((wide * direction).sum() / direction.numel() ** 0.5)
    return found
