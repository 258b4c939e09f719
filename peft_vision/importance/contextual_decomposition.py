"""What of the answer can be traced back to one head: contextual decomposition (CD-T).

Hsu et al., "Efficient Automated Circuit Discovery in Transformers using Contextual Decomposition"
(2024). What a head says beyond its mean is the relevant part of the stream behind its block, all
else is the rest; both are carried to the answer by the rules of `_decomposition`. A product of two
activations that the paper has no rule for (gated MLPs) is treated as its activations are: the rest
goes first. One forward pass for each head, from its block on, at more than twice its cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peft_vision.backbones.sites import Backbone, HeadsSite
from peft_vision.errors import UnsupportedSite
from peft_vision.importance._ahead import Ahead, opened
from peft_vision.importance._decomposed_blocks import (
    block_through,
    mlp_through,
    read_through,
    reader_through,
)
from peft_vision.importance._decomposition import Pair
from peft_vision.importance._probing import (
    at_most,
    classifies,
    images_for,
    means_of,
    reader,
    table,
)
from peft_vision.layers.attention import is_free
from peft_vision.layers.trunk import Trunk

SLACK = 1e-2
"""How far the two parts of an answer may be from the model's, relative to it; more in bfloat16."""


@torch.no_grad()
def score(
    backbone: Backbone, batches: Iterable[Any], *, images: int = 16, normalize: bool = True
) -> Tensor:
    """Mean over images of the absolute part of the answer that a head has, L H.

    Of a classifier: of the logit of the class that it predicts (labels are not read). Of other
    models: the sum of the absolute values of the relevant part of the features over that of the
    rest.

    Args:
        images: how many are decomposed; the heads' means are taken over all.
        normalize: divide the scores of each block by their L2 norm. Parts grow with every block
            that they pass, so that only heads of one block can be compared as they are.

    Raises:
        UnsupportedSite: the blocks cannot be run from their parts, or something in the model
            (routed attention, tokens that leave, prompts) has no rule.
        BadSetting: there is no image.
    """
    given = images_for(backbone, batches)
    means, rows = means_of(backbone, given), {}
    with opened(backbone) as trunk:
        _require_rules(backbone, trunk)
        some = at_most(given, images)
        named = classifies(backbone, backbone.model(some[0][:1]))
        ahead = Ahead(backbone, some, trunk)
        whole = list(ahead.answers())
        for site in backbone.heads:
            ahead.go(site.block)
            said = outputs(ahead, site)
            scores = []
            for head in range(site.count):
                found = []
                for number, values in enumerate(said):
                    source = beyond_mean(values, means[site.block], head, site.count)
                    answer = decomposed(ahead, site, number, source)
                    _require_sum(answer, whole[number])
                    found.append(_relevance(answer, whole[number], classes=named))
                scores.append(torch.cat(found).mean())
            row = torch.stack(scores)
            rows[site.block] = row / row.norm().clamp_min(1e-30) if normalize else row
    return table(backbone, rows)


def outputs(ahead: Ahead, site: HeadsSite) -> list[Tensor]:
    """The heads' outputs in the block that the images are before, B N F for each batch."""
    if ahead.walk is None:
        raise AssertionError("the caller opens the model")
    found: list[Tensor] = []
    ahead.walk.watch([reader(site)], lambda _, x, y: found.append(x))
    return found


def beyond_mean(values: Tensor, mean: Tensor, head: int, count: int) -> Pair:
    """One head's outputs beyond their mean, and the rest of all heads' outputs: B N F."""
    width = values.shape[-1] // count
    relevant = torch.zeros_like(values)
    columns = slice(head * width, (head + 1) * width)
    relevant[..., columns] = values[..., columns] - mean[columns].to(values)
    return Pair(relevant, values - relevant)


def decomposed(ahead: Ahead, site: HeadsSite, number: int, heads: Pair) -> Pair:
    """The model's answer for batch `number`, in the parts that those of the heads' outputs make.

    Args:
        ahead: images before the block of `site`. `heads`: B N F.
    """
    if ahead.walk is None or ahead.trunk is None:
        raise AssertionError("the caller opens the model")
    trunk, stream = ahead.trunk, ahead.walk.streams[number]
    block, parts = ahead.walk.block, trunk.parts
    added = reader_through(block, parts, heads)
    stays = stream.x[:, : added.rest.shape[1]]  # fewer where the last block is computed in part
    x = mlp_through(block, parts, Pair(added.relevant, stays + added.rest))
    for later in list(trunk.blocks)[site.block + 1 :]:
        x = block_through(later, parts, x, stream.rope)
    return read_through(ahead.backbone, trunk, x, ahead.images[number][:1])


def _relevance(answer: Pair, whole: Tensor, *, classes: bool) -> Tensor:
    """Per image, B."""
    if classes:
        chosen = whole.argmax(-1, keepdim=True)
        return answer.relevant.double().gather(1, chosen).flatten(0).abs()
    relevant, rest = (part.double().flatten(1).abs().sum(1) for part in answer)
    return relevant / rest.clamp_min(1e-30)


def _require_sum(answer: Pair, whole: Tensor) -> None:
    error = float((answer.total - whole).abs().max()) / max(float(whole.abs().max()), 1e-30)
    if not error < max(SLACK, 16 * torch.finfo(whole.dtype).eps):
        raise UnsupportedSite(
            f"The parts of an answer add up to something else (off by {error:.2g} of it): what "
            "reads the tokens does more than its layers say, and cannot be decomposed."
        )


def _require_rules(backbone: Backbone, trunk: Trunk) -> None:
    kinds = [
        type(module).__name__
        for site in backbone.heads
        if not is_free(module := getattr(site.owner, site.attribute))
    ]
    if len(trunk.reducers) or trunk.votes is not None or len(trunk.prompts):
        kinds.append("tokens that join, leave or vote between the blocks")
    if kinds:
        raise UnsupportedSite(f"There is no rule to decompose {kinds[0]}. Use another score.")
