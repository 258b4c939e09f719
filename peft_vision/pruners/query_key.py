"""Narrower queries and keys (CORP; Zhang and Yang, 2026): attention compares fewer features.

A logit is a product of a query and a key, so that a head whose logits live in few directions needs
no more of either; values stay as they are. With calibration images the directions that count most
are turned into the features that stay, in closed form, and the output projection is fitted again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from peft_vision.backbones.queries import QueriesSite, queries_in
from peft_vision.backbones.sites import Backbone
from peft_vision.calibration import FittedByBlock, Walk
from peft_vision.errors import UnsupportedSite
from peft_vision.layers.named_parts import part_of
from peft_vision.layers.train_linear import require_cuttable
from peft_vision.method import Evidence, Method, Stage, check_range
from peft_vision.plan import Decisions, Json, pack_indices, unpack_indices
from peft_vision.pruners._query_spectra import (
    moments_of,
    rows_of,
    set_rows,
    weight_energies,
)


@dataclass(frozen=True)
class QueryKey(Method, FittedByBlock):
    """Remove features of queries and keys, as many in each head of a block.

    Ranked over all blocks, a few features of every head of a block at a time: by how far logits
    change without them (with images), or by the sizes of their weights.
    """

    ratio: float = 0.5
    """Share of the features of queries and keys that go, in [0, 1]; `least` always stay."""

    multiple: int = 8
    """Heads stay a multiple of this wide (1 to 256), where they were: kernels are slower on odd
    widths. Narrow heads: of half of their width at most."""

    least: int = 8
    """So many features of each head stay, at least 1; of narrow heads half of them."""

    stage: ClassVar[Stage] = Stage.QUERIES
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "params", "latency_ms"})

    def __post_init__(self) -> None:
        check_range("ratio", self.ratio, 0.0, 1.0)
        check_range("multiple", self.multiple, 1, 256)
        check_range("least", self.least, 1, 4096)

    @property
    def strength(self) -> float:
        """The ratio."""
        return self.ratio

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per attention module, the features of each head that stay.

        Raises:
            UnsupportedSite: heads are not known, or logits are not products of queries and keys
                alone.
        """
        sites = _sites(backbone)
        ranked = evidence.once("query_key", partial(_ranked, backbone, sites, evidence.batches))
        steps = [_steps(s.width, int(self.multiple), int(self.least), s.mates) for s in sites]
        going = sorted(
            (float(r.lost[narrow:wide].sum()), -wide, number, narrow)
            for number, (r, widths) in enumerate(zip(ranked, steps, strict=True))
            for wide, narrow in itertools.pairwise(widths)
        )[: math.floor(strength * sum(len(s) - 1 for s in steps) + 1e-9)]
        left: dict[int, int] = {}
        for _, _, number, narrow in going:
            left[number] = min(narrow, left.get(number, narrow))
        return {
            sites[number].key: _packed(ranked[number].order[:, :width], sites[number].width)
            for number, width in sorted(left.items())
        }

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Cut queries and keys; attention computed from its parts takes the place of the family's.

        Raises:
            UnsupportedSite: a layer has no rule, or heads are not as many as they were.
        """
        sites = {site.key: site for site in queries_in(backbone)}
        for key in decisions:
            attention, parts = sites[key].attention, sites[key].parts
            require_cuttable(*(part_of(attention, name) for name in parts.qkv))
        for key, decision in decisions.items():
            if why := sites[key].why_not():
                raise UnsupportedSite(f"{key} cannot be cut: {why}.")
            sites[key].keep(_unpacked(decision))

    def apply_at(self, backbone: Backbone, decisions: Decisions, walk: Walk) -> None:
        """Cut, and turn the best directions on these images into the features that stay.

        Raises:
            UnsupportedSite: as `apply`, or the outputs of a layer cannot be mixed.
        """
        for key in decisions:
            site = next(site for site in queries_in(backbone) if site.key == key)
            if site.mates is not None:  # what is rotated cannot be turned into something else
                self.apply(backbone, {key: decisions[key]})
                continue
            rows, seen = rows_of(site), moments_of(walk, site)
            self.apply(backbone, {key: decisions[key]})
            set_rows(site, rows.turned(*seen.best(site.width)))


@dataclass(frozen=True)
class _Ranked:
    """Features of each head of one attention module, the best first, and what goes with each place.

    Attributes:
        order: H D. `lost`: mean square of the logits that goes with it, over the heads, D, falling;
            by weights, their share of the block's.
    """

    order: Tensor
    lost: Tensor


def _sites(backbone: Backbone) -> tuple[QueriesSite, ...]:
    """Those whose features can be removed.

    Raises:
        UnsupportedSite: there are none, with the reason.
    """
    backbone.require("heads", "tokens")
    found = queries_in(backbone)
    if why := next((why for site in found if (why := site.why_not())), ""):
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} has no queries and keys that could be cut: {why}."
        )
    return found


def _ranked(
    backbone: Backbone, sites: Sequence[QueriesSite], batches: Iterable[Any] | None
) -> list[_Ranked]:
    walk = None if batches is None else Walk(backbone, batches)
    found = []
    for site in sites:
        while walk is not None and walk.index < site.block:
            walk.advance()
        seen = None if walk is None else moments_of(walk, site)
        carried = weight_energies(site) if seen is None else seen.carried
        order, energies = _in_order(carried, site.mates)
        if seen is not None and site.mates is None:
            energies = seen.spectrum
        lost = energies.mean(0)
        if seen is None:  # weights of one block say nothing beside those of another
            lost = lost / lost.sum().clamp_min(1e-300)
        found.append(_Ranked(order, lost))
    return found


def _in_order(carried: Tensor, mates: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Features of each head from the one that carries most, and what they carry: H D each.

    Those that are rotated together stay together.
    """
    if mates is None:
        energies, order = carried.sort(dim=1, descending=True, stable=True)
        return order, energies
    pairs = torch.tensor([(i, m) for i, m in enumerate(mates) if i < m])
    together = carried[:, pairs].sum(-1)
    energies, first = together.sort(dim=1, descending=True, stable=True)
    return pairs[first].flatten(1), energies.repeat_interleave(2, 1) / 2


def _steps(width: int, multiple: int, least: int, mates: Sequence[int] | None) -> list[int]:
    """Widths that a head may have, falling, from the one that it has."""
    half = max(1, width // 2)
    size = math.lcm(min(multiple, half), 1 if mates is None else 2)
    first = (width - 1) // size * size
    return [width, *(w for w in range(first, 0, -size) if w >= min(least, half))]


def _packed(kept: Tensor, width: int) -> dict[str, Json]:
    """Features of each head that stay (H n), in the order of their places."""
    heads = len(kept)
    places = (kept + width * torch.arange(heads)[:, None]).flatten().sort().values
    return {"heads": heads, "kept": pack_indices(places.tolist(), of=heads * width)}


def _unpacked(decision: Json) -> list[list[int]]:
    content = cast("dict[str, Any]", decision)
    heads, kept = int(content["heads"]), unpack_indices(content["kept"])
    width = int(content["kept"]["of"]) // heads
    return [[i - head * width for i in kept if i // width == head] for head in range(heads)]
