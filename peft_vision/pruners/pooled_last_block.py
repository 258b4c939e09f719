"""The last block for the pooled tokens only: the same logits for about 7 % fewer operations.

A classifier that reads its class token (and distillation token) needs no other token of the last
block: keys and values of all tokens, but queries, output projection and MLP of the pooled ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft_vision.backbones.sites import Backbone, TokensSite
from peft_vision.errors import UnsupportedSite
from peft_vision.method import Evidence, Method, Stage
from peft_vision.plan import Decisions

KEY = "blocks.last.tokens"


@dataclass(frozen=True)
class PooledLastBlock(Method):
    """Compute the last block for the tokens that the classifier reads; nothing else changes."""

    stage: ClassVar[Stage] = Stage.EXACT
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "latency_ms"})

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """How many first tokens are computed: all or nothing, at any strength above 0."""
        site = _tokens(backbone)
        present = site.trunk_if_any()
        if strength <= 0 or (present is not None and present.pooled is not None):
            return {}
        return {KEY: {"rows": site.class_tokens + site.distillation_tokens}}

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Open the blocks' trunk and tell it."""
        for decision in decisions.values():
            if not isinstance(decision, dict):
                raise UnsupportedSite(f"{KEY}: not a number of tokens: {decision!r}.")
            _tokens(backbone).trunk().pooled = int(decision["rows"])  # type: ignore[arg-type]


def _tokens(backbone: Backbone) -> TokensSite:
    backbone.require("tokens")
    site = backbone.tokens
    name = type(backbone.model).__name__
    if site is None or site.pooling != "class" or site.class_tokens != 1:
        pooled = site.pooling if site is not None else "other"
        raise UnsupportedSite(
            f"{name} reads more of its last block than the class token (pooling: {pooled})."
        )
    if backbone.positions is not None and backbone.positions.joint:
        raise UnsupportedSite(f"{name} takes several images, whose patches are read.")
    if not backbone.readouts:
        raise UnsupportedSite(
            f"{name} hands over all its tokens; only a classifier reads the class token alone."
        )
    return site
