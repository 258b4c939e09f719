"""Mixture of heads (MoH; Jin et al., 2024): heads that serve only the tokens that need them.

A pretrained attention is converted in its place. The most important heads stay on for every token;
the others are routed. Training teaches the routers who serves whom; kept gates are one at first, so
that the model starts from its pretrained function and departs from it as the share anneals.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peft_vision.backbones.sites import Backbone, HeadsSite, TokensSite
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.attention import is_free
from peft_vision.layers.base_weights import is_plain
from peft_vision.layers.head_routing import HeadRouting
from peft_vision.layers.head_surgery import keep_heads
from peft_vision.layers.routed_attention import RoutedAttention
from peft_vision.layers.router import Router
from peft_vision.layers.usage import head_usage
from peft_vision.method import Evidence, Method, Need, Stage, check_range
from peft_vision.plan import Decisions, Json, pack_indices, unpack_indices
from peft_vision.pruners._head_scores import check_score, head_scores, standardized

CHOICES, GATES, ROUTERS = ("head", "token"), ("binary", "soft"), ("linear", "norm")
LEAST = 0.02
"""Below this strength a router would cost more than the tokens that it sends away."""


@dataclass(frozen=True)
class MixtureOfHeads(Method):
    """Route a part of the attention heads.

    On a model that is routed already, with data, it removes the routed heads that hardly any token
    would choose, keys and values included (see `unused`).
    """

    skip: float = 0.5
    """Share of the routed heads that a token goes without, in [0, 1]; one always stays."""

    shared: float = 0.25
    """Share of the heads that serve every token, in [0, 1]; at least one does."""

    choice: str = "head"
    """Who chooses: "head" (each routed head takes its tokens, as many in every image: faster, and
    exportable) or "token" (each token takes its heads, as published: all is computed, and masked).
    """

    gate: str = "binary"
    """"binary" (one for whom is served, with the gradient of the soft gate) or "soft" (the
    published gates scale the heads; one everywhere until trained)."""

    router: str = "linear"
    """"linear" (learned) or "norm" (no parameters: the norm of a head's query ranks it)."""

    start: float = 0.25
    """Blocks before this share of the depth stay dense, in [0, 1)."""

    anneal: int = 0
    """Training forwards over which the share falls from all to its target; evaluation uses the
    target at once."""

    beta: float = 0.01
    """Weight of the load balance loss, in [0, 1]; heads that choose are balanced as they are."""

    protect: bool = True
    """Class, distillation and register tokens are served by every head."""

    unused: float = 0.005
    """Routed heads that a smaller share of the patches would choose are removed, in [0, 1], where
    the method meets a model that it has routed before, with data."""

    score: str = "auto"
    """Which heads count most: "weights": those of the largest weights. "images": those that add
    most to the stream. "auto": by images where there are some. Or the name of a score of
    `peft_vision.importance`, or "mean_rank"."""

    needs: ClassVar[Need] = Need.NOTHING
    stage: ClassVar[Stage] = Stage.ROUTE
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "latency_ms"})

    def __post_init__(self) -> None:
        for name in ("skip", "shared", "beta", "unused"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        check_range("start", self.start, 0.0, 0.999999)
        check_score(self.score)
        check_range("anneal", self.anneal, 0, 10**9)
        for name, known in (("choice", CHOICES), ("gate", GATES), ("router", ROUTERS)):
            if getattr(self, name) not in known:
                raise BadSetting(
                    f"{name} is {getattr(self, name)!r}; possible: {', '.join(known)}."
                )
        if self.gate == "soft" and self.router == "norm":
            raise BadSetting('gate="soft" needs router="linear": norms would rescale the heads.')
        if self.choice == "token":  # everything is computed, and masked
            object.__setattr__(self, "reduces", frozenset())

    @property
    def strength(self) -> float:
        """The share of the routed heads that are off."""
        return self.skip

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per block that routes: which heads are shared, and how much of the others is on.

        Raises:
            UnsupportedSite: the heads or the first tokens are not known, or routed already.
        """
        tokens = _tokens(backbone)
        if any(isinstance(_module(site), RoutedAttention) for site in backbone.heads):
            return self._removals(backbone, evidence)
        for site in backbone.heads:
            _require_free(site)
        if strength < LEAST:
            return {}
        first = round(self.start * len(backbone.blocks))
        sites = [s for s in backbone.heads if s.block >= first and s.count > 1]
        scores = evidence.once(
            ("heads", self.score, evidence.batches is None, first),
            partial(head_scores, self.score, backbone, sites, evidence),
        )
        return {
            site.key: self._decision(site, score, strength, tokens.prefix)
            for site, score in zip(sites, scores, strict=True)
        }

    def _decision(
        self, site: HeadsSite, score: Tensor, strength: float, prefix: int
    ) -> dict[str, Json]:
        order = torch.argsort(score, descending=True, stable=True).tolist()
        shared = min(site.count - 1, max(1, round(self.shared * site.count)))
        return {
            "shared": pack_indices(order[:shared], of=site.count),
            "share": 1.0 - strength,
            "protect": prefix if self.protect else 0,
            "in_order": all(is_plain(layer) for layer in _linears(site)),
            "liking": [round(float(v), 6) for v in standardized(score)],
        }

    def _removals(self, backbone: Backbone, evidence: Evidence) -> Decisions:
        """Per routed block with heads that hardly any token chooses, the heads that stay."""
        if evidence.batches is None:
            raise UnsupportedSite(
                f"{type(backbone.model).__name__} has routed heads already. Pass data=... to "
                "remove those that no token chooses, or start from the model before routing."
            )
        found = {
            site: module
            for site in backbone.heads
            if isinstance(module := _module(site), RoutedAttention)
        }
        usage = head_usage(backbone.model, list(found.values()), evidence.batches)
        decisions: Decisions = {}
        for (site, module), used in zip(found.items(), usage, strict=True):
            stays = {
                h for h, u in zip(module.routing.routed, used, strict=True) if u >= self.unused
            }
            kept = sorted({*module.routing.shared, *stays}) or [0]
            if len(kept) < site.count:
                decisions[site.key] = {"keep": pack_indices(kept, of=site.count)}
        return decisions

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Put routed attention in the place of each module named, or remove heads from it."""
        sites = {site.key: site for site in backbone.heads}
        routed = sum("keep" not in cast("dict[str, Json]", d) for d in decisions.values())
        for key, decision in decisions.items():
            content = cast("dict[str, Any]", decision)
            if "keep" in content:
                sites[key].keep(unpack_indices(content["keep"]))
            else:
                self._convert(sites[key], content, routed)

    def _convert(self, site: HeadsSite, content: dict[str, Any], layers: int) -> None:
        _require_free(site)
        count, always = site.count, unpack_indices(content["shared"])
        if count != int(content["shared"]["of"]):
            raise UnsupportedSite(
                f"{site.key} had {content['shared']['of']} heads when they were ranked and has "
                f"{count} now. Cut heads in one call and route them in a second one."
            )
        order = [*(h for h in range(count) if h not in always), *always]
        if content["in_order"]:
            keep_heads(site.attention, site.parts, order)
            order = list(range(count))
        split = count - len(always)
        routing = HeadRouting(
            routed=tuple(order[:split]),
            shared=tuple(order[split:]),
            share=float(content["share"]),
            choice="head" if self.choice == "head" else "token",
            soft=self.gate == "soft",
            by_norm=self.router == "norm",
            protect=int(content["protect"]),
            anneal=int(self.anneal),
            balance=self.beta / layers,
            seed=site.block + 1,
        )
        module = RoutedAttention(site.attention, site.parts, routing)
        if isinstance(module.router, Router) and self.choice == "token" and self.gate == "binary":
            liking = [v for h, v in enumerate(content["liking"]) if h not in always]
            with torch.no_grad():  # what a patch is comes in as the router learns
                module.router.routed.zero_()
                module.router.bias.copy_(torch.tensor(liking))
        setattr(site.owner, site.attribute, module)


def _tokens(backbone: Backbone) -> TokensSite:
    backbone.require("heads", "tokens")
    if backbone.tokens is None:
        raise AssertionError("require() has seen to it")
    return backbone.tokens


def _module(site: HeadsSite) -> nn.Module:
    module: nn.Module = getattr(site.owner, site.attribute)
    return module


def _require_free(site: HeadsSite) -> None:
    module = _module(site)
    if not is_free(module):
        raise UnsupportedSite(
            f"{site.key} is computed by {type(module).__name__} already, and heads can be routed "
            "only where attention is the family's own. Route first, or leave the other out."
        )


def _linears(site: HeadsSite) -> list[nn.Module]:
    names = [*site.parts.qkv, site.parts.out, site.parts.gate]
    layers = [getattr(site.attention, name) for name in names if name is not None]
    return [layer for layer in layers if layer is not None]
