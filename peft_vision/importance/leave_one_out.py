"""What becomes of a model's answers when one head alone says nothing of the image any more.

The head's output is replaced by its mean over all images and tokens: what is left when a head is
removed and its mean is kept in a bias. One head at a time, so this is what other scores try to
guess; it costs half as many passes through the model as there are heads. Li et al. (2023,
2303.13731) rank heads by such ablations.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from peft_vision.backbones.sites import Backbone
from peft_vision.errors import UnsupportedSite
from peft_vision.importance._ahead import Ahead, opened_if_possible
from peft_vision.importance._probing import (
    changing,
    classifies,
    evaluating,
    images_for,
    means_of,
    reader,
    table,
)

Harm = Literal["divergence", "drop", "flips"]


@torch.no_grad()
def score(backbone: Backbone, batches: Iterable[Any], *, harm: Harm = "divergence") -> Tensor:
    """Mean harm over the images, L H.

    Args:
        harm: "divergence" (Kullback-Leibler divergence of the classes from the whole model's, in
            nats; of a model without a classifier the squared distance of the features relative to
            their square), "drop" (of the probability of the class that the whole model predicts) or
            "flips" (share of images whose predicted class changes).

    Raises:
        UnsupportedSite: the model has no heads; or no classifier, whose classes were asked for.
        BadSetting: there is no image.
    """
    images = images_for(backbone, batches)
    means, rows = means_of(backbone, images), {}
    with evaluating(backbone.model):
        named = classifies(backbone, backbone.model(images[0][:1]))
    if harm != "divergence" and not named:
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} returns features and no classes, so {harm} is not "
            'defined. harm="divergence" works.'
        )
    with opened_if_possible(backbone) as trunk:
        ahead = Ahead(backbone, images, trunk)
        whole = list(ahead.answers())
        for site in backbone.heads:
            ahead.go(site.block)
            harms = []
            for head in range(site.count):
                change = partial(_ablated, mean=means[site.block], head=head, count=site.count)
                with changing(reader(site), change):
                    found = [
                        _harm(dense, now, harm, classes=named)
                        for dense, now in zip(whole, ahead.answers(), strict=True)
                    ]
                harms.append(torch.cat(found).mean())
            rows[site.block] = torch.stack(harms)
    return table(backbone, rows)


def _ablated(x: Tensor, mean: Tensor, head: int, count: int) -> Tensor:
    width = x.shape[-1] // count
    changed, columns = x.clone(), slice(head * width, (head + 1) * width)
    changed[..., columns] = mean[columns].to(x)
    return changed


def _harm(whole: Tensor, now: Tensor, harm: Harm, *, classes: bool) -> Tensor:
    """Per image, B."""
    dense, given = whole.double(), now.double()
    if not classes:
        square = (dense - given).flatten(1).square().sum(1)
        return square / dense.flatten(1).square().sum(1).clamp_min(1e-30)
    chosen = dense.argmax(-1, keepdim=True)
    if harm == "flips":
        return (given.argmax(-1, keepdim=True) != chosen).double().flatten(0)
    p, q = dense.log_softmax(-1), given.log_softmax(-1)
    if harm == "drop":
        return (p.gather(1, chosen).exp() - q.gather(1, chosen).exp()).flatten(0)
    return (p.exp() * (p - q)).sum(1)
