"""Union of Experts (UoE; Yang et al., 2025) for the MLP: a dense layer split into routed experts.

Hidden units whose weights point the same way are grouped by a balanced clustering. With all experts
on the MLP is exactly what it was; with a share of them, each image's tokens go where they count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from peft_vision.backbones.sites import Backbone, HiddenSite
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.base_weights import base_weight, is_plain
from peft_vision.layers.bottleneck import Behind, Beside
from peft_vision.layers.clusters import balanced_clusters
from peft_vision.layers.mlp import OwnMlp, keep_units
from peft_vision.layers.mlp_path import activation_in
from peft_vision.layers.routed_mlp import ExpertRouting, RoutedMlp
from peft_vision.method import Evidence, Method, Need, Stage, check_range
from peft_vision.plan import Decisions, Json

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
CHOICES, GATES = ("capacity", "sample"), ("binary", "soft")
LEAST = 0.02
"""Below this strength a router would cost more than what it sends away."""


@dataclass(frozen=True)
class UnionOfExperts(Method):
    """Split the MLPs' hidden units into experts and route to them."""

    skip: float = 0.5
    """Share of the patches that each expert leaves out, or of the experts that an image goes
    without, in [0, 1]; one always stays."""

    experts: int = 8
    """How many experts an MLP is split into, 2 to 36; never more than it has units."""

    choice: str = "capacity"
    """"capacity" (each expert takes its patches, as many in every image) or "sample" (each image
    takes its experts)."""

    gate: str = "binary"
    """"binary" (one for whom is served, with the gradient of the soft gate) or "soft" (gates scale
    what experts give; one everywhere until trained)."""

    start: float = 0.25
    """Blocks before this share of the depth stay dense, in [0, 1)."""

    anneal: int = 0
    """Training forwards over which the share falls from all to its target; evaluation uses the
    target at once."""

    beta: float = 0.01
    """Weight of the load balance loss of "sample", in [0, 1]; capacities balance themselves."""

    protect: bool = True
    """Class, distillation and register tokens are served by every expert ("capacity")."""

    needs: ClassVar[Need] = Need.NOTHING
    stage: ClassVar[Stage] = Stage.ROUTE
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "latency_ms"})

    def __post_init__(self) -> None:
        for name in ("skip", "beta"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        check_range("experts", self.experts, 2, len(DIGITS))
        check_range("start", self.start, 0.0, 0.999999)
        check_range("anneal", self.anneal, 0, 10**9)
        for name, known in (("choice", CHOICES), ("gate", GATES)):
            if getattr(self, name) not in known:
                raise BadSetting(
                    f"{name} is {getattr(self, name)!r}; possible: {', '.join(known)}."
                )

    @property
    def strength(self) -> float:
        """The share that is off."""
        return self.skip

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per MLP that routes: the expert of each unit, and how much is on.

        Raises:
            UnsupportedSite: units or first tokens are not known, or an MLP is not the family's own.
        """
        backbone.require("hidden", "tokens")
        first = round(self.start * len(backbone.blocks))
        sites = [s for s in backbone.hidden if s.block >= first and s.count > 1]
        for site in sites:
            self._require_free(site)
        if strength < LEAST:
            return {}
        prefix = 0 if backbone.tokens is None or not self.protect else backbone.tokens.prefix
        return {
            site.key: {
                "expert": evidence.once(
                    ("experts", site.key, self.experts), partial(self._experts, site)
                ),
                "share": 1.0 - strength,
                "protect": prefix,
                "in_order": all(is_plain(layer) for layer in _linears(site)),
            }
            for site in sites
        }

    def _require_free(self, site: HiddenSite) -> None:
        module = getattr(site.owner, site.attribute)
        while isinstance(module, Behind | Beside):
            module = module.inner
        if isinstance(module, OwnMlp):
            raise UnsupportedSite(
                f"{site.key} is computed by {type(module).__name__} already, and units can be "
                "grouped only where the MLP is the family's own. Do this first, or leave the other "
                "out."
            )
        activation_in(site.mlp, site.parts)
        even = site.count % min(int(self.experts), site.count) == 0
        if self.choice == "sample" and not even:
            raise UnsupportedSite(
                f"{site.key} has {site.count} units, which {self.experts} experts do not share "
                'evenly, as choice="sample" needs it. Choose a divisor, or choice="capacity".'
            )

    def _experts(self, site: HiddenSite) -> str:
        rows = _rows(site)
        found = balanced_clusters(rows, min(int(self.experts), site.count))
        return "".join(DIGITS[e] for e in found)

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Put routed MLPs in the place of those named; their units stand in expert order then."""
        sites = {site.key: site for site in backbone.hidden}
        for key, decision in decisions.items():
            self._convert(sites[key], cast("dict[str, Json]", decision), len(decisions))

    def _convert(self, site: HiddenSite, decision: dict[str, Json], layers: int) -> None:
        self._require_free(site)
        content = cast("dict[str, Any]", decision)
        expert = [DIGITS.index(digit) for digit in content["expert"]]
        if site.count != len(expert):
            raise UnsupportedSite(
                f"{site.key} had {len(expert)} units when they were grouped and has {site.count} "
                "now. Cut units in one call and group them in a second one."
            )
        if content["in_order"]:
            order = sorted(range(len(expert)), key=expert.__getitem__)
            keep_units(site.mlp, site.parts, order)
            expert = sorted(expert)
        routing = ExpertRouting(
            expert=tuple(expert),
            share=float(content["share"]),
            choice="capacity" if self.choice == "capacity" else "sample",
            soft=self.gate == "soft",
            protect=int(content["protect"]),
            anneal=int(self.anneal),
            balance=self.beta / layers,
            seed=site.block + 1,
        )
        owner, name = site.owner, site.attribute
        while isinstance(getattr(owner, name), Behind | Beside):
            owner, name = getattr(owner, name), "inner"
        setattr(owner, name, RoutedMlp(getattr(owner, name), site.parts, routing))


def _linears(site: HiddenSite) -> list[Any]:
    return [getattr(site.mlp, name) for name in (*site.parts.up, site.parts.down)]


def _rows(site: HiddenSite) -> Tensor:
    """What makes each unit fire, U x anything: its rows of all up products side by side."""
    pieces: list[Tensor] = []
    for name in site.parts.up:
        weight = base_weight(getattr(site.mlp, name))
        pieces += weight.chunk(site.parts.packed)
    return torch.cat([piece.float() for piece in pieces], dim=1)
