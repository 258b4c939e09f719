"""BitFit (Ben Zaken, Ravfogel and Goldberg, ACL 2022): only the biases are trained.

No module is added. The biases keep their places, and a merged model is the plain one again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from peft_vision.adapters._classifier import (
    TRAIN,
    classifier_decisions,
    classifier_parameters,
)
from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone
from peft_vision.cost import example_input_of, input_size, run_images, twin
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.biases import Bias, biases_in
from peft_vision.layers.ownership import plain_of
from peft_vision.method import Adapter, Evidence
from peft_vision.plan import Decisions
from peft_vision.proof import USUAL_SIZE, total

ROLES = {
    "attention": ("q", "k", "v", "qkv", "out"),
    "mlp": ("up", "gate", "down"),
}


@dataclass(frozen=True)
class Bitfit(Adapter):
    """Train the biases of the backbone, and the classifier."""

    which: Literal["all", "attention", "mlp", "norms"] = "all"
    """Which biases: of every layer, of the attention's linears, of the MLPs' linears, or of the
    norms."""

    train_head: bool = True
    """Train the classifier in full and save it with the biases."""

    def __post_init__(self) -> None:
        if self.which not in ("all", "norms", *ROLES):
            raise BadSetting(f"which is {self.which!r}; possible: all, attention, mlp, norms.")

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """The label of each bias that the output depends on; the classifiers' keys."""
        if strength <= 0:
            return {}
        chosen = self._chosen(backbone)
        unread = _unread(backbone.model)
        decisions: Decisions = {b.label: TRAIN for b in chosen if b.label not in unread}
        if not decisions:
            raise UnsupportedSite(
                f"{type(backbone.model).__name__} has no biases of the kind {self.which!r}."
            )
        return {**decisions, **(classifier_decisions(backbone) if self.train_head else {})}

    def _chosen(self, backbone: Backbone) -> list[Bias]:
        found = _biases(backbone)
        if self.which == "all":
            return found
        if self.which == "norms":
            return [bias for bias in found if bias.of_norm]
        backbone.require("heads" if self.which == "attention" else "hidden")
        roles = ROLES[self.which]
        layers = {id(plain_of(s.layer)) for s in backbone.linears if s.role in roles}
        beside = {
            (id(site.attention), name)
            for site in (backbone.heads if self.which == "attention" else ())
            for name in site.parts.biases or ()
        }
        return [b for b in found if id(b.owner) in layers or (id(b.owner), b.attribute) in beside]

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Nothing is put in."""

    def trained(self, backbone: Backbone, decisions: Decisions) -> list[tuple[nn.Module, str]]:
        """The biases, and the classifier unless PEFT trains a copy of it."""
        biases = [b for b in _biases(backbone) if decisions.get(b.label) == TRAIN]
        return [
            *((bias.owner, bias.attribute) for bias in biases),
            *classifier_parameters(backbone, decisions),
        ]

    def foreign(self, backbone: Backbone, decisions: Decisions) -> str:
        """Plain PEFT trains biases beside layers that it injects, never alone."""
        return "it trains biases alone, for which PEFT has no words"


def _biases(backbone: Backbone) -> list[Bias]:
    return list(biases_in(backbone.core, [site.layer for site in backbone.classifier]))


def _unread(model: nn.Module) -> set[str]:
    """Labels of the biases that no output depends on, by a backward pass on `meta`.

    A classifier may stand behind a pooling head of the library's that it does not read. Where one
    image cannot be passed through, nothing is known, and what trains is proven later.
    """
    meta = twin(model)
    seen = view(meta)
    size = input_size(meta, None if seen.input_size else USUAL_SIZE)
    found = _biases(seen)
    for bias in found:
        getattr(bias.owner, bias.attribute).requires_grad_(True)
    try:
        with torch.enable_grad():
            torch.autograd.backward(total(run_images(meta.eval(), example_input_of(meta, size))))
    except (RuntimeError, ValueError, TypeError):
        return set()
    return {b.label for b in found if getattr(b.owner, b.attribute).grad is None}
