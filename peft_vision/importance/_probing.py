"""What every score needs: images, the outputs of heads, and a model's answers.

A head is seen where its output leaves it: as some of the inputs of the linear that reads all heads
of its block. That works for fused and separate projections and for linears with adapters on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones.sites import Backbone, HeadsSite, device_of
from peft_vision.calibration import noting
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.showing import images_of

OUTPUTS = ("logits", "pooler_output", "image_embeds", "last_hidden_state")
"""What is looked at of an output object, in this order."""


def reader(site: HeadsSite) -> nn.Module:
    """The linear whose inputs are the outputs of the heads."""
    found: nn.Module = getattr(site.attention, site.parts.out)
    return found


def by_head(values: Tensor, count: int) -> Tensor:
    """... F -> ... H D."""
    split: Tensor = values.unflatten(-1, (count, -1))  # type: ignore[no-untyped-call]
    return split


def table(backbone: Backbone, rows: Mapping[int, Tensor]) -> Tensor:
    """Scores L H in float64 from block -> scores of its heads; NaN where there is no head."""
    width = max(site.count for site in backbone.heads)
    found = torch.full((len(backbone.blocks), width), torch.nan, dtype=torch.float64)
    for block, row in rows.items():
        found[block, : len(row)] = row.detach().double().cpu()
    return found


def images_for(backbone: Backbone, batches: Iterable[Any]) -> list[Tensor]:
    """The images of the batches, as the model takes them: B 3 H W each.

    Raises:
        UnsupportedSite: the model has no heads. BadSetting: there is no image.
    """
    backbone.require("heads")
    like = next(p for p in backbone.model.parameters() if p.is_floating_point())
    found = [images_of(batch).to(device_of(backbone.model), like.dtype) for batch in batches]
    if not found:
        raise BadSetting("The data gave no batch. An iterable of images B 3 H W works.")
    return found


def at_most(images: Sequence[Tensor], count: int) -> list[Tensor]:
    """The first `count` images."""
    size = max(len(batch) for batch in images)
    return list(torch.split(torch.cat(list(images))[:count], size))


def spread(images: Sequence[Tensor], count: int) -> list[Tensor]:
    """At most `count` images, at even distances: they may be sorted by class."""
    total, size = sum(len(batch) for batch in images), max(len(batch) for batch in images)
    if total <= count:
        return list(images)
    places = [place * total // count for place in range(count)]
    return list(torch.split(torch.cat(list(images))[places], size))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def answer_of(output: Any) -> Tensor:
    """Logits B C, or the features that a model without a classifier returns: B ...

    Raises:
        UnsupportedSite: the output is of no kind that is known.
    """
    values = [output, *(getattr(output, name, None) for name in OUTPUTS)]
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise UnsupportedSite(
        f"The model returns {type(output).__name__}; a tensor, or one of {', '.join(OUTPUTS)}, "
        "works."
    )


def classifies(backbone: Backbone, output: Any) -> bool:
    """Whether that output is logits of classes."""
    named = bool(backbone.classifier) if isinstance(output, Tensor) else "logits" in output
    return named and answer_of(output).dim() == 2


@contextmanager
def changing(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a layer read something else for a while."""
    handle = layer.register_forward_pre_hook(lambda _, given: (change(given[0]), *given[1:]))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def collected(
    backbone: Backbone, images: Iterable[Tensor], take: Callable[[Tensor], Tensor]
) -> dict[int, list[Tensor]]:
    """Block -> what `take` makes of the heads' outputs B N F, a tensor per batch.

    Raises:
        UnsupportedSite: the linear that reads the heads of a block is not called.
    """
    sites = backbone.heads
    found: dict[int, list[Tensor]] = {site.block: [] for site in sites}

    def note(number: int, arriving: Tensor, _: Tensor) -> None:
        found[sites[number].block].append(take(arriving))

    with evaluating(backbone.model), noting([reader(site) for site in sites], note):
        for batch in images:
            backbone.model(batch)
    for site in sites:
        if not found[site.block]:
            raise UnsupportedSite(
                f"{site.key} is computed by {type(getattr(site.owner, site.attribute)).__name__}, "
                "which never calls the linear that reads the heads. Score the model before."
            )
    return found


def means_of(backbone: Backbone, images: Sequence[Tensor]) -> dict[int, Tensor]:
    """Block -> mean of its heads' outputs over all images and tokens, F, in float64."""

    def take(x: Tensor) -> Tensor:
        flat = x.double().flatten(0, -2)
        return torch.cat([flat.sum(0), flat.new_tensor([len(flat)])])

    found = collected(backbone, images, take)
    sums = {block: torch.stack(parts).sum(0) for block, parts in found.items()}
    return {block: total[:-1] / total[-1] for block, total in sums.items()}
