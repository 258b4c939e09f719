"""Which path goes first, second, and so on; a strength takes a beginning of this order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft_vision.backbones.sites import Backbone, TokensSite
from peft_vision.errors import UnsupportedSite
from peft_vision.layers.absent import Absent
from peft_vision.layers.bottleneck import inside
from peft_vision.layers.linear_mlp import LinearMlp
from peft_vision.layers.votes import ENTRY, Half, path_of
from peft_vision.pruners import _path_ranking as ranking
from peft_vision.pruners import _path_stand_ins as stand_ins
from peft_vision.pruners._path_cuts import halves, new_votes, why_not_linear
from peft_vision.pruners._path_probe import Branch, Probe
from peft_vision.pruners._path_scores import BY_IMAGES, Scores, norms
from peft_vision.pruners._path_votes import Ballot, by_length


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        mode: what a path loses. `rank`: by what it is judged.
        kinds: the halves that may go.
        mean: a branch's mean stays. `images`: how many of them judge.
        rows: how many first tokens vote; None for all.
    """

    mode: str
    rank: str
    kinds: tuple[Half, ...]
    mean: bool
    images: int
    rows: int | None


def order_of(
    backbone: Backbone, wish: Wish, batches: Iterable[Any] | None
) -> list[tuple[int, bool]]:
    """Paths (see `votes.path_of`), the first to go first, and whether the mean of each stays.

    What has to stay is not among them.

    Raises:
        UnsupportedSite: none may go, with the reason.
    """
    site = backbone.tokens
    if site is None:
        raise AssertionError("the caller requires tokens")
    left = _present(backbone, site)
    if wish.mode == "votes":
        return [(p, False) for p in _silenced(backbone, site, wish, left, batches)]
    free = _free(backbone, site, wish, left, data=batches is not None)
    if wish.rank == "weights":
        scores = norms(backbone, free)
        once = ranking.one_shot(scores, left) if wish.mode == "remove" else _ascending(scores)
        return [(path_of(*branch), wish.mean) for branch in once]
    probe, linear = Probe(backbone, batches or (), wish.images), wish.mode == "activations"
    removed = stand_ins.means if wish.mean else stand_ins.absent
    found = ranking.greedy(
        probe,
        free,
        left,
        stand_ins.fitted if linear else removed,
        score=BY_IMAGES[wish.rank],
        empties=linear,
    )
    return [(path_of(*branch), stays) for branch, stays in found]


def _ascending(scores: Scores) -> list[Branch]:
    return sorted(scores, key=lambda branch: scores[branch])


def _present(backbone: Backbone, site: TokensSite) -> list[Branch]:
    """The branches that are there."""
    return [
        (block.index, half)
        for block in backbone.blocks
        for half, name in halves(site.parts)
        if not isinstance(getattr(block.block, name), Absent)
    ]


def _free(
    backbone: Backbone, site: TokensSite, wish: Wish, left: list[Branch], *, data: bool
) -> list[Branch]:
    """The branches that may go at all."""
    if wish.mode == "remove":
        trunk = site.trunk_if_any()
        # Tokens are chosen by this attention.
        held = set() if trunk is None else {(int(i), "attention") for i in trunk.reducers}
        return [b for b in left if b[1] in wish.kinds and b not in held]
    mlps = [b for b in left if b[1] == "mlp" and not _is_linear(backbone, site, b)]
    reasons = {b: why_not_linear(backbone, b[0], data=data) for b in mlps}
    if reasons and all(reasons.values()):
        raise UnsupportedSite(
            f"No MLP of {type(backbone.model).__name__} can become one linear: "
            f"{next(iter(reasons.values()))}."
        )
    return [branch for branch, reason in reasons.items() if not reason]


def _is_linear(backbone: Backbone, site: TokensSite, branch: Branch) -> bool:
    mlp = getattr(backbone.blocks[branch[0]].block, site.parts.mlp)
    return isinstance(inside(mlp), LinearMlp)


def _silenced(
    backbone: Backbone,
    site: TokensSite,
    wish: Wish,
    left: list[Branch],
    batches: Iterable[Any] | None,
) -> list[int]:
    own = [ENTRY, *(path_of(*branch) for branch in left if branch[1] in wish.kinds)]
    if wish.rank != "weights":
        probe = Probe(backbone, batches or (), wish.images)
        return Ballot(probe, new_votes(backbone, probe.trunk, wish.rows)).order(wish.rank, own)
    present = site.trunk_if_any()
    there = None if present is None else present.votes
    paths = [ENTRY, *(path_of(*branch) for branch in left)]
    order = by_length([p for p in paths if there is None or p in there.kept])
    return [path for path in order if path in own]
