"""Sparse attention: each head, or each query, sees some of the keys (after Sparsifiner, CVPR 2023).

Masking single entries of the attention map saves nothing on dense kernels. The default therefore
chooses keys per head, the same for all queries of an image, and computes scores for those alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone, HeadsSite
from peft_vision.cost import example_input_of, input_size, on_twin, run_images
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.attention import is_free
from peft_vision.layers.attention_parts import query_dim
from peft_vision.layers.mask_predictor import MaskPredictor
from peft_vision.layers.sparse_keys import SparseKeys, SparseMask
from peft_vision.method import Evidence, Method, Need, Stage, check_range
from peft_vision.plan import Decisions

MODES, RANKINGS = ("keys", "mask"), ("query", "attention")


@dataclass(frozen=True)
class SparseAttention(Method):
    """Attend to a share of the keys."""

    keep: float = 0.5
    """Share of the patches that a query sees, in (0, 1]; first tokens see and are seen always."""

    mode: str = "keys"
    """"keys" (per head, the same for all queries: scores are computed for the chosen keys alone) or
    "mask" (per query, by a predictor that has to be trained: research; it saves nothing)."""

    by: str = "query"
    """How "keys" ranks them: "query" (by the mean query) or "attention" (by the attention that up
    to 16 queries, evenly spread, pay them)."""

    start: float = 0.25
    """Blocks before this share of the depth stay dense, in [0, 1)."""

    warm_up: int = 500
    """Training forwards during which "mask" attends densely while its predictor learns the map."""

    beta: float = 0.01
    """Weight of the predictor's error in the loss during the warm-up, in [0, 1]."""

    needs: ClassVar[Need] = Need.NOTHING
    stage: ClassVar[Stage] = Stage.ROUTE
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "latency_ms"})

    def __post_init__(self) -> None:
        check_range("keep", self.keep, 1e-6, 1.0)
        check_range("start", self.start, 0.0, 0.999999)
        check_range("warm_up", self.warm_up, 0, 10**9)
        check_range("beta", self.beta, 0.0, 1.0)
        for name, known in (("mode", MODES), ("by", RANKINGS)):
            if getattr(self, name) not in known:
                raise BadSetting(
                    f"{name} is {getattr(self, name)!r}; possible: {', '.join(known)}."
                )
        if self.mode == "mask":  # everything is computed, and masked
            object.__setattr__(self, "reduces", frozenset())

    @property
    def strength(self) -> float:
        """One minus the share that is kept."""
        return 1.0 - self.keep

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per block from `start` on, the share of the keys that stays.

        Raises:
            UnsupportedSite: heads or first tokens are not known, or attention is not the family's
                own.
        """
        backbone.require("heads", "tokens")
        for site in backbone.heads:
            _require_free(site)
        if strength <= 0 or backbone.tokens is None:
            return {}
        first = round(self.start * len(backbone.blocks))
        sites = [site for site in backbone.heads if site.block >= first]
        decision = {"keep": 1.0 - strength, "protect": backbone.tokens.prefix}
        if self.mode == "keys":
            return {site.key: dict(decision) for site in sites}
        counts = evidence.once("tokens per block", lambda: _token_counts(backbone.model))
        return {site.key: {**decision, "tokens": counts[site.key]} for site in sites}

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Put sparse attention in the place of each module named."""
        sites = {site.key: site for site in backbone.heads}
        for key, decision in decisions.items():
            site, content = sites[key], cast("dict[str, Any]", decision)
            _require_free(site)
            keep, protect = float(content["keep"]), int(content["protect"])
            module: nn.Module
            if self.mode == "keys":
                by = "query" if self.by == "query" else "attention"
                module = SparseKeys(site.attention, site.parts, keep, by, protect)  # type: ignore[arg-type]
            else:
                patches = int(content["tokens"]) - protect
                module = self._masked(site, keep, protect, patches, len(decisions))
            setattr(site.owner, site.attribute, module)

    def _masked(
        self, site: HeadsSite, keep: float, protect: int, patches: int, layers: int
    ) -> SparseMask:
        attention, parts = site.attention, site.parts
        like = next(p for p in attention.parameters() if p.is_floating_point())
        predictor = MaskPredictor(
            query_dim(attention, parts), patches, max(1, patches // 6), like, site.block + 1
        )
        weight = self.beta / layers
        return SparseMask(attention, parts, predictor, keep, protect, int(self.warm_up), weight)


def _require_free(site: HeadsSite) -> None:
    module = getattr(site.owner, site.attribute)
    if not is_free(module):
        raise UnsupportedSite(
            f"{site.key} is computed by {type(module).__name__} already, and keys can be chosen "
            "only where attention is the family's own. Do this first, or leave the other out."
        )


def _token_counts(model: nn.Module) -> dict[str, int]:
    """How many tokens each block attends to, by a pass of a model without numbers."""
    size = input_size(model)

    def run(copied: nn.Module) -> dict[str, int]:
        counts: dict[str, int] = {}

        def note(key: str, x: Tensor) -> None:
            counts[key] = x.shape[1]

        backbone = view(copied)
        backbone.require("tokens")
        for site in backbone.heads:  # the norm before sees every token, also where few are read
            norm = getattr(site.owner, backbone.tokens.parts.norm1)  # type: ignore[union-attr]
            norm.register_forward_pre_hook(lambda m, given, key=site.key: note(key, given[0]))
        run_images(copied.eval(), example_input_of(copied, size))
        return counts

    return on_twin(model, run)
