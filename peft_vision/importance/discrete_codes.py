"""How often what a head says belongs to one class alone: a cheap and noisy vote.

What a head gives the class token (the mean over tokens, where there is none) is rounded to one of a
few codes by k-means. The score is the share of the codes in use that two or more images have, all
of one predicted class. After the discrete codes of O'Neill and Bui (2024, 2405.12522), whose sparse
autoencoder of all heads is replaced by k-means for each head. With few images it says little: some
ten images for each code are needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peft_vision.backbones.sites import Backbone
from peft_vision.errors import UnsupportedSite
from peft_vision.importance._probing import (
    answer_of,
    by_head,
    classifies,
    collected,
    evaluating,
    images_for,
    table,
)

ROUNDS = 20
"""Of k-means, at most."""


@torch.no_grad()
def score(backbone: Backbone, batches: Iterable[Any], *, codes: int = 8) -> Tensor:
    """Share of a head's codes that belong to one predicted class, L H, in [0, 1].

    Args:
        codes: how many a head has, at most.

    Raises:
        UnsupportedSite: the model has no heads or no classifier. BadSetting: there is no image.
    """
    images = images_for(backbone, batches)
    with evaluating(backbone.model):
        outputs = [backbone.model(batch) for batch in images]
    if not classifies(backbone, outputs[0]):
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} returns features and no classes, by which codes are "
            "told apart. A model with a classifier works."
        )
    classes = torch.cat([answer_of(output).argmax(-1) for output in outputs]).cpu()
    first = backbone.tokens is not None and backbone.tokens.class_tokens > 0
    said = collected(backbone, images, lambda x: (x[:, 0] if first else x.mean(1)).double().cpu())
    rows = {}
    for site in backbone.heads:
        heads = by_head(torch.cat(said[site.block]), site.count).unbind(1)
        rows[site.block] = torch.stack([_purity(assigned(x, codes), classes) for x in heads])
    return table(backbone, rows)


def assigned(points: Tensor, codes: int) -> Tensor:
    """The code of each point (M D): k-means from points that are far from each other, M.

    The first is the one farthest from the mean, so that the same points get the same codes.
    """
    centers = [points[(points - points.mean(0)).square().sum(1).argmax()]]
    while len(centers) < min(codes, len(points)):
        away = torch.cdist(points, torch.stack(centers)).amin(1)
        if float(away.max()) == 0.0:
            break
        centers.append(points[away.argmax()])
    middle = torch.stack(centers)
    code = torch.cdist(points, middle).argmin(1)
    for _ in range(ROUNDS):
        members = torch.nn.functional.one_hot(code, len(middle)).to(points)
        count = members.sum(0)
        moved = torch.where(
            count[:, None] > 0, (members.t() @ points) / count[:, None].clamp_min(1), middle
        )
        again = torch.cdist(points, moved).argmin(1)
        if torch.equal(again, code):
            break
        middle, code = moved, again
    return code


def _purity(code: Tensor, classes: Tensor) -> Tensor:
    used = torch.unique(code)
    pure = [
        len(mine) > 1 and len(torch.unique(mine)) == 1
        for mine in (classes[code == c] for c in used)
    ]
    return torch.tensor(sum(pure) / len(used), dtype=torch.float64)
