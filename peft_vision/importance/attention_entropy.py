"""How widely a head looks: the entropy of its attention, or the confidence of it.

A head that looks at few tokens is taken for a specialized one that should stay (Voita et al.,
2019, keep heads of high confidence). Attention is computed again from queries and keys, for fused
kernels keep none.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from peft_vision.backbones.sites import Backbone, HeadsSite
from peft_vision.calibration import Walk
from peft_vision.errors import UnsupportedSite
from peft_vision.importance._ahead import opened
from peft_vision.importance._probing import images_for, table
from peft_vision.layers.attention import is_free, project
from peft_vision.layers.trunk import Stream


@torch.no_grad()
def score(
    backbone: Backbone,
    batches: Iterable[Any],
    *,
    measure: Literal["entropy", "confidence"] = "entropy",
) -> Tensor:
    """Mean over images and queries, L H.

    Args:
        measure: "entropy" (1 minus the entropy as a share of its maximum, the log of the number of
            keys) or "confidence" (the largest probability).

    Raises:
        UnsupportedSite: the blocks cannot be run from their parts, or a block's attention is not
            the family's own. BadSetting: there is no image.
    """
    images, rows = images_for(backbone, batches), {}
    for site in backbone.heads:
        _require_own(site)
    with opened(backbone) as trunk:
        walk = Walk(backbone, images)
        for site in backbone.heads:
            while walk.index < site.block:
                walk.advance()
            normed: list[Tensor] = []
            norm = getattr(walk.block, trunk.parts.norm1)
            walk.watch([norm], partial(_keep, normed))
            found = [
                _measured(probabilities(site, x, stream, trunk.prefix), measure)
                for x, stream in zip(normed, walk.streams, strict=True)
            ]
            rows[site.block] = torch.cat(found).mean(0)
    return table(backbone, rows)


def _keep(into: list[Tensor], _: int, __: Tensor, given: Tensor) -> None:
    into.append(given)


def probabilities(site: HeadsSite, x: Tensor, stream: Stream, prefix: int) -> Tensor:
    """What each query gives each key: B H N N, float32 or wider.

    Args:
        x: what attention reads, B N C. `stream`: where it came from.
    """
    q, k, _ = project(site.attention, site.parts, x, stream.rope)
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(wide) @ k.to(wide).transpose(-2, -1) * q.shape[-1] ** -0.5
    if stream.sizes is not None and stream.proportional:
        bias = functional.pad(stream.sizes.log(), (prefix + stream.extra, 0))
        logits = logits + bias[:, None, None, :].to(wide)
    result: Tensor = logits.softmax(-1)
    return result


def _measured(p: Tensor, measure: str) -> Tensor:
    """Per image and head, B H."""
    if measure == "confidence":
        return p.amax(-1).double().mean(-1)
    entropy = torch.special.entr(p.double()).sum(-1).mean(-1)
    most = torch.log(torch.tensor(float(max(p.shape[-1], 2)), dtype=torch.float64))
    specialized: Tensor = 1 - entropy / most.to(entropy.device)
    return specialized


def _require_own(site: HeadsSite) -> None:
    module = getattr(site.owner, site.attribute)
    if not is_free(module):
        raise UnsupportedSite(
            f"{site.key} is computed by {type(module).__name__}, whose attention is not what "
            "queries and keys alone would give. Score the model before."
        )
