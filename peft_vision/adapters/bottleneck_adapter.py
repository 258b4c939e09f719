"""Bottleneck adapters: small MLPs behind, or beside, the branches of every block.

Behind attention and MLP: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (ICML
2019). Beside the MLP: Chen et al., "AdaptFormer" (NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from peft_vision.adapters._classifier import classifier_decisions, classifier_parameters
from peft_vision.backbones.sites import Backbone, HiddenSite, LayerSite, device_of
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.bottleneck import Behind, Beside, Bottleneck
from peft_vision.layers.ownership import parameters_of, plain_of, trained_dtype
from peft_vision.layers.readout import activation_of
from peft_vision.method import Adapter, Evidence, check_range
from peft_vision.plan import Decisions

PLACES = {
    "after_attention": ("out",),
    "after_mlp": ("down",),
    "both": ("out", "down"),
    "parallel_mlp": (),
}
"""Where -> roles of the layers that it stands behind; none: it stands beside the MLP."""


@dataclass(frozen=True)
class BottleneckAdapter(Adapter):
    """Small MLPs in the branches of frozen blocks; the classifier is trained with them."""

    width: int = 64
    """Units of each, at least 1."""

    place: Literal["after_attention", "after_mlp", "both", "parallel_mlp"] = "both"
    """Behind the attention, behind the MLP, behind both, or beside the MLP."""

    activation: str = "gelu"
    """Between the two layers of each: gelu, relu, silu or tanh."""

    scale: float = 1.0
    """What the output of each is multiplied by."""

    train_head: bool = True
    """Train the classifier in full and save it with them."""

    def __post_init__(self) -> None:
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise BadSetting(f"width is {self.width!r}; it has to be a whole number from 1 up.")
        if self.place not in PLACES:
            raise BadSetting(f"place is {self.place!r}; possible: {', '.join(PLACES)}.")
        activation_of(self.activation)
        check_range("scale", self.scale, 1e-9, 1e9)

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per place, the widths; the classifiers' keys."""
        if strength <= 0:
            return {}
        decisions: Decisions = {
            key: {"features": _features(site), "width": self.width}
            for key, site in _places(backbone)
            if self._wants(site)
        }
        if not decisions:
            backbone.require("hidden")
            raise UnsupportedSite(f"{type(backbone.model).__name__} has no place {self.place!r}.")
        for key, _ in _present(backbone):
            if key in decisions:
                raise UnsupportedSite(
                    f"{type(backbone.model).__name__} carries one at {key} already. Merge the "
                    "first, or choose another place."
                )
        return {**decisions, **(classifier_decisions(backbone) if self.train_head else {})}

    def _wants(self, site: LayerSite | HiddenSite) -> bool:
        if isinstance(site, HiddenSite):
            return self.place == "parallel_mlp"
        return site.role in PLACES[self.place]

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Put each in its place."""
        places = dict(_places(backbone))
        for key, decision in decisions.items():
            if not isinstance(decision, dict):
                continue
            site = places[key]
            with torch.device(device_of(backbone.model)):
                inserted = self._bottleneck(decision).to(trained_dtype(backbone.model))
            inner: nn.Module = getattr(site.owner, site.attribute)
            around = Beside if isinstance(site, HiddenSite) else Behind
            setattr(site.owner, site.attribute, around(inner, inserted).train(inner.training))

    def _bottleneck(self, decision: dict[str, Any]) -> Bottleneck:
        sizes = int(decision["features"]), int(decision["width"])
        return Bottleneck(*sizes, self.activation, self.scale)

    def start(self, backbone: Backbone, decisions: Decisions) -> None:
        """The first layer random, the second zero."""
        for key, inserted in _present(backbone):
            if key in decisions:
                inserted.draw()

    def trained(self, backbone: Backbone, decisions: Decisions) -> list[tuple[nn.Module, str]]:
        """Those put in, and the classifier unless PEFT trains a copy of it."""
        own = [inserted for key, inserted in _present(backbone) if key in decisions]
        return [
            *(place for inserted in own for place in parameters_of(inserted)),
            *classifier_parameters(backbone, decisions),
        ]

    def fold(self, backbone: Backbone, decisions: Decisions) -> bool:
        """What is not linear cannot be folded into a linear layer: all of it stays."""
        return False

    def foreign(self, backbone: Backbone, decisions: Decisions) -> str:
        """PEFT has no such adapter."""
        return "PEFT has no bottlenecks"


def _places(backbone: Backbone) -> Iterator[tuple[str, LayerSite | HiddenSite]]:
    """(key, site) of every place where one may stand, whether one stands there or not."""
    for layer in backbone.linears:
        if layer.role in ("out", "down"):
            yield f"{layer.key}.bottleneck", layer
    for hidden in backbone.hidden:
        if hidden.is_module:
            yield f"{hidden.key.removesuffix('.hidden')}.mlp.bottleneck", hidden


def _present(backbone: Backbone) -> Iterator[tuple[str, Bottleneck]]:
    """(key, module) of those that are in place."""
    for key, site in _places(backbone):
        holder = site.owner if isinstance(site, LayerSite) else getattr(site.owner, site.attribute)
        if isinstance(holder, Behind | Beside):
            yield key, holder.bottleneck


def _features(site: LayerSite | HiddenSite) -> int:
    if isinstance(site, HiddenSite):
        return int(plain_of(getattr(site.mlp, site.parts.down)).out_features)  # type: ignore[arg-type]
    return int(plain_of(site.layer).out_features)  # type: ignore[arg-type]
