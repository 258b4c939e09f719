"""Which channels of a model may go, and what each is worth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.backbones.channels import ChannelsSite, channels, keep_channels
from peft_vision.backbones.sites import Backbone
from peft_vision.cost import count_flops, twin
from peft_vision.pruners._channel_spread import spread_scores

ENOUGH = 0.5
"""Of a model's cost: where more is left without the channels that leave the rest as it is, those
that pass a norm over channels go, too."""

STEPS = 8
"""Groups of units that a site has at least."""


@dataclass(frozen=True)
class Scored:
    """A site and the score of each of its units."""

    site: ChannelsSite
    score: Tensor

    def group(self, multiple: int) -> int:
        """Units that go at a time, so that channels stay in multiples.

        Half as many in narrow layers, until there are `STEPS` groups: with coarser steps a budget
        is not met. Two at least where a norm runs over them, for one has no variance.
        """
        fewest = 2 if self.site.normed else 1
        group = max(fewest, -(-multiple // self.site.width))
        while group > fewest and self.site.count < STEPS * group:
            group //= 2
        return group


def has_channels(backbone: Backbone) -> bool:
    """Whether it is worth a look: convolutions beyond the patches, or a model not known by name."""
    return not (backbone.heads or backbone.hidden) or any(c.role != "patch" for c in backbone.convs)


def channel_scores(backbone: Backbone, batches: Iterable[Any] | None) -> list[list[Scored]]:
    """Sites with scores, those that are comparable in one list.

    Units of a residual sum are in many weights at once; their scores are means over many, and lie
    closer together than those of units between two layers. The two kinds are not compared (Fang
    et al., "Isomorphic Pruning", 2024).

    Raises:
        UnsupportedSite: the model cannot be traced, or no channel can go.
    """
    apart: dict[bool, list[Scored]] = defaultdict(list)
    sites = _removable(backbone, channels(backbone))
    by_images: list[Tensor | None] = [None] * len(sites)
    if batches is not None and backbone.run is None:
        by_images = spread_scores(backbone.model, sites, batches)
    for site, score in zip(sites, by_images, strict=True):
        makers = sum(len(m.paths) for m in site.members if m.dim == 0 and _is_matrix(site, m.paths))
        apart[makers > 1].append(Scored(site, _score(site) if score is None else score))
    return [apart[kind] for kind in sorted(apart)]


def _is_matrix(site: ChannelsSite, paths: Sequence[str]) -> bool:
    return site.model.get_parameter(paths[0]).dim() > 1


def _removable(backbone: Backbone, sites: Sequence[ChannelsSite]) -> list[ChannelsSite]:
    """Sites that no other kind overlaps, and of these the exact ones where they are enough."""
    taken = _weights_of_others(backbone)
    named = dict(backbone.model.named_parameters())
    free = [site for site in sites if not any(id(named.get(p)) in taken for p in _paths(site))]
    exact = [site for site in free if not site.normed]
    others = bool(backbone.heads or backbone.hidden)
    return exact if others or len(exact) == len(free) or _left(backbone, exact) < ENOUGH else free


def _left(backbone: Backbone, sites: Sequence[ChannelsSite]) -> float:
    """What a model costs with one unit of each site, as a share of what it costs now."""
    whole, cut = twin(backbone.model), twin(backbone.model)
    keep_channels(view(cut), {site.key: site.decision([0]) for site in sites})
    size = backbone.input_size
    if size is None:
        before, after = (sum(p.numel() for p in model.parameters()) for model in (whole, cut))
    else:
        before, after = count_flops(whole, size), count_flops(cut, size)
    return after / max(before, 1)


def _paths(site: ChannelsSite) -> list[str]:
    return [path for member in site.members for path in member.paths]


def _weights_of_others(backbone: Backbone) -> set[int]:
    """Weights inside of attention modules and MLPs that have sites of their own."""
    modules: list[nn.Module] = [getattr(s.owner, s.attribute) for s in backbone.heads]
    modules += [getattr(s.owner, s.attribute) for s in backbone.hidden]
    return {id(w) for module in modules for w in module.parameters()}


def _score(site: ChannelsSite) -> Tensor:
    """The mean over all weights, each relative to its mean over the site."""
    squares = [(w.double() ** 2).sum(1) for w in site.weights()]
    relative = [square / square.mean().clamp_min(1e-30) for square in squares]
    return torch.stack(relative).mean(0).cpu()
