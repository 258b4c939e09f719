"""A ViT as an ensemble of paths (Chang et al., ICCV 2023): branches go, or lose their vote.

A pre-norm transformer's stream is the sum of what entered it and of what every attention and MLP
branch added. A branch may be removed from the stream (`remove`), lose its part in the final sum
while later branches go on reading it (`votes`, EnsembleScale), or an MLP may lose its activation,
which makes one linear of two (`activations`; HetDPT).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from peft_vision.backbones.sites import Backbone, TokensSite
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.trunk import Trunk
from peft_vision.layers.votes import ENTRY, Half, Lesson, path_of
from peft_vision.method import Evidence, Method, Stage, check_range
from peft_vision.plan import Decisions, Json
from peft_vision.pruners._path_cuts import linearize, new_votes, remove, trim
from peft_vision.pruners._path_order import Wish, order_of
from peft_vision.pruners._path_probe import Branch

MODES = ("remove", "votes", "activations")
RANKS = ("auto", "weights", "leave_one_out", "taylor", "influence")
HALVES: dict[str, tuple[Half, ...]] = {
    "both": ("attention", "mlp"),
    "attention": ("attention",),
    "mlp": ("mlp",),
}
VOTES, ENTRY_KEY = "tokens.votes", "tokens.entry"


@dataclass(frozen=True)
class PathPruning(Method):
    """Remove attention and MLP branches, their votes in the final sum, or MLPs' activations.

    The order in which paths go is found once, by data where there are any; a strength takes a
    beginning of it.
    """

    share: float = 0.25
    """Share of the paths that may go that `wrap` takes, in [0, 1]. Mode "votes" with 0: scales
    alone."""

    mode: str = "remove"
    """"remove": from the stream, physically. "votes": from the final sum only, where the other
    paths get a trained scale. "activations": make one linear of an MLP."""

    rank: str = "auto"
    """Judged again after each that goes: "leave_one_out": what that does to the output. "taylor":
    the same to first order. "influence": how far it turns the stream. Once: "weights": norms,
    without data; a weak hint. "auto": "leave_one_out" with data, else "weights"."""

    branches: str = "both"
    """Which kind of branches may go: "both", "attention" or "mlp"."""

    mean: bool = True
    """With data, leave room for the mean of a removed branch, which is added in its place. With
    rank "leave_one_out" only where that is better than nothing. No room where `compress` is told
    not to compensate: nothing would fill it."""

    images: int = 64
    """How many calibration images rank the paths, at least 1."""

    distill: float = 0.0
    """Mode "votes": weight of the loss by which the whole sum teaches shorter ones, >= 0."""

    temperature: float = 1.0
    """Of that loss, in [0.1, 100]."""

    depths: tuple[float, ...] = (0.5, 0.75)
    """Where the shorter sums end, as shares of the model's depth, each in (0, 1)."""

    stage: ClassVar[Stage] = Stage.DEPTH
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "params", "latency_ms"})

    def __post_init__(self) -> None:
        check_range("share", self.share, 0.0, 1.0)
        for name, value, possible in (
            ("mode", self.mode, MODES),
            ("rank", self.rank, RANKS),
            ("branches", self.branches, tuple(HALVES)),
        ):
            if value not in possible:
                raise BadSetting(f"{name} is {value!r}; possible: {', '.join(possible)}.")
        if not isinstance(self.images, int) or isinstance(self.images, bool) or self.images < 1:
            raise BadSetting(f"images is {self.images!r}; it has to be a whole number from 1 up.")
        check_range("distill", self.distill, 0.0, 1e6)
        check_range("temperature", self.temperature, 0.1, 100.0)
        if self.distill and self.mode != "votes":
            raise BadSetting(f'distill needs mode "votes"; the mode is {self.mode!r}.')
        if self.mode == "activations" and self.branches == "attention":
            raise BadSetting('Mode "activations" acts on MLPs; branches is "attention".')
        if not self.depths or any(not 0 < depth < 1 for depth in self.depths):
            raise BadSetting(f"depths is {self.depths!r}; it has to be shares in (0, 1).")

    @property
    def strength(self) -> float:
        """The share."""
        return self.share

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per branch that goes, what is left of it; in mode "votes" how many tokens vote."""
        site = _tokens(backbone)
        if strength <= 0 and not (self.mode == "votes" and self.share == 0):
            return {}
        rank = self._rank(evidence)
        halves = HALVES[self.branches]
        rows = _rows(backbone, site) if self.mode == "votes" else None
        fitted = evidence.batches is not None and evidence.fits
        wish = Wish(self.mode, rank, halves, self.mean and fitted, self.images, rows)
        order = evidence.once(
            (type(self).__qualname__, wish), partial(order_of, backbone, wish, evidence.batches)
        )
        going = sorted(order[: math.floor(strength * len(order) + 1e-9)])
        if self.mode == "votes":
            present = site.trunk_if_any()
            there = present is not None and present.votes is not None
            votes: Decisions = {} if there else {VOTES: {"rows": rows}}
            return {**votes, **{_vote_key(path): {"vote": False} for path, _ in going}}
        if self.mode == "activations":
            return {_key(path): {"linear": True, "fitted": fitted} for path, _ in going}
        return {_key(path): {"absent": True, "offset": stays} for path, stays in going}

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Take branches out, put linears in, count votes; what nobody reads any more goes too."""
        if not decisions:
            return
        trunk, silent = _tokens(backbone).trunk(), set()
        for key, decision in decisions.items():
            if not isinstance(decision, dict):
                raise UnsupportedSite(f"{key}: not a decision on a path: {decision!r}.")
            if "vote" in decision:
                silent.add(ENTRY if key == ENTRY_KEY else path_of(*_branch(key)))
            else:
                _carry_out(backbone, trunk, key, decision)
        if trunk.votes is not None:
            trim(trunk, trunk.votes, silent)
            if self.distill and trunk.votes.lesson is None:
                trunk.votes.lesson = self._lesson(backbone, trunk)

    def _rank(self, evidence: Evidence) -> str:
        if evidence.batches is None and self.rank not in ("auto", "weights"):
            raise BadSetting(
                f"rank={self.rank!r} looks at images and none were given. Pass data=(images, "
                'labels) batches, or rank="weights".'
            )
        if self.rank != "auto":
            return self.rank
        return "weights" if evidence.batches is None else "leave_one_out"

    def _lesson(self, backbone: Backbone, trunk: Trunk) -> Lesson:
        if not backbone.classifier or backbone.input_size is None:
            raise UnsupportedSite(
                f"{type(backbone.model).__name__} has no classifier, and without one the whole sum "
                "has nothing to teach. Leave distill at 0, or add a classifier first."
            )
        depth = len(trunk.blocks)
        behind = sorted({min(max(round(d * depth) - 1, 0), depth - 2) for d in self.depths})
        lesson = Lesson(behind, depth - 1, self.distill, self.temperature)
        lesson.read_by(backbone.model, trunk, backbone.input_size)
        return lesson.train(backbone.model.training)


def _tokens(backbone: Backbone) -> TokensSite:
    backbone.require("tokens")
    if backbone.tokens is None:
        raise AssertionError("require() has refused it")
    return backbone.tokens


def _rows(backbone: Backbone, site: TokensSite) -> int | None:
    """How many first tokens the head reads; None for all.

    Raises:
        UnsupportedSite: it reads all, and tokens leave on the way.
    """
    if site.pooling == "class" and backbone.readouts:
        return site.class_tokens + site.distillation_tokens
    trunk = site.trunk_if_any()
    if trunk is not None and len(trunk.reducers):
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} reads every token behind its blocks, and tokens "
            "leave on the way: these could not vote. A model that a classifier reads by its class "
            "token alone can have both."
        )
    return None


def _carry_out(backbone: Backbone, trunk: Trunk, key: str, decision: Mapping[str, Json]) -> None:
    if "rows" in decision:
        rows = decision["rows"]
        trunk.votes = new_votes(backbone, trunk, None if rows is None else int(rows))  # type: ignore[arg-type]
    elif "linear" in decision:
        linearize(backbone, _branch(key)[0], fitted=bool(decision["fitted"]))
    elif "absent" in decision:
        remove(trunk, _branch(key), offset=bool(decision["offset"]))
    else:
        raise UnsupportedSite(f"{key}: not a decision on a path: {dict(decision)!r}.")


def _key(path: int) -> str:
    index, mlp = divmod(path - 1, 2)
    return f"blocks.{index}.{'mlp' if mlp else 'attention'}"


def _vote_key(path: int) -> str:
    return ENTRY_KEY if path == ENTRY else _key(path)


def _branch(key: str) -> Branch:
    parts = key.split(".")
    if len(parts) != 3 or parts[2] not in ("attention", "mlp"):
        raise UnsupportedSite(f"{key!r} names no branch.")
    return int(parts[1]), "attention" if parts[2] == "attention" else "mlp"
