"""A linear probe: the backbone is frozen, and one linear layer on its features is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_vision.adapters._classifier import (
    TRAIN,
    classifier_decisions,
    classifier_parameters,
)
from peft_vision.backbones.sites import Backbone, ReadoutSite, device_of
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.ownership import parameters_of, trained_dtype
from peft_vision.layers.readout import LinearReadout
from peft_vision.method import Adapter, Evidence, check_range
from peft_vision.plan import Decisions

STD = 0.01
"""Deviation of a new layer's first weights, as in the linear probes of MAE (He et al., 2022)."""


@dataclass(frozen=True)
class LinearHead(Adapter):
    """Train the classifier that is there, or a new linear one; the backbone is frozen."""

    outputs: int | None = None
    """Outputs of a new layer; by default the classifier that is there is trained on."""

    bias: bool = True
    """A new layer has a bias."""

    norm: bool = False
    """A new layer reads the features through a LayerNorm, which is trained, too."""

    def __post_init__(self) -> None:
        if self.outputs is not None:
            check_range("outputs", self.outputs, 1, 2**20)
        if self.outputs is None and (self.norm or not self.bias):
            raise BadSetting(
                "norm and bias are of a new layer, and without outputs the one that is there is "
                "trained. Pass outputs=..."
            )

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per classifier, "train", or the sizes of the new one."""
        if strength <= 0:
            return {}
        if self.outputs is not None:
            backbone.require("readouts")
            return {site.key: self._decision(site) for site in backbone.readouts}
        if not backbone.classifier:
            raise UnsupportedSite(
                f"{type(backbone.model).__name__} has no classifier to train. Pass outputs=... "
                "for a model that has a place for one."
            )
        return classifier_decisions(backbone)

    def _decision(self, site: ReadoutSite) -> dict[str, Any]:
        plain = site.layer
        same = (
            isinstance(plain, nn.Linear)
            and (plain.in_features, plain.out_features) == (site.width, self.outputs)
            and (plain.bias is not None) == self.bias
            and not self.norm
        )
        return {"inputs": site.width, "outputs": self.outputs, "same": same}

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Put a new layer there, where one is wanted."""
        sites = {site.key: site for site in backbone.readouts}
        for key, decision in decisions.items():
            if not isinstance(decision, dict):
                continue
            inputs, outputs = int(decision["inputs"]), int(decision["outputs"])  # type: ignore[arg-type]
            with torch.device(device_of(backbone.model)):
                layer = self._layer(inputs, outputs)
            dtype = trained_dtype(backbone.model) if self.norm else _dtype(backbone.model)
            backbone.put_readout(sites[key], layer.to(dtype), outputs)

    def _layer(self, inputs: int, outputs: int) -> nn.Module:
        if self.norm:
            return LinearReadout(inputs, outputs, bias=self.bias)
        return nn.Linear(inputs, outputs, bias=self.bias)

    def start(self, backbone: Backbone, decisions: Decisions) -> None:
        """Small random weights and zero biases, of new layers alone."""
        for site in backbone.readouts:
            if decisions.get(site.key, TRAIN) == TRAIN:
                continue
            for layer in site.layer.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=STD)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)

    def trained(self, backbone: Backbone, decisions: Decisions) -> list[tuple[nn.Module, str]]:
        """The whole classifier, unless PEFT trains a copy of it."""
        new = [s for s in backbone.readouts if isinstance(decisions.get(s.key), dict)]
        return [
            *classifier_parameters(backbone, decisions),
            *(place for site in new for place in parameters_of(site.layer)),
        ]

    def fold(self, backbone: Backbone, decisions: Decisions) -> bool:
        """Nothing is left where the new layer has the shape of the one that was there."""
        return all(
            decision == TRAIN or (isinstance(decision, dict) and bool(decision["same"]))
            for decision in decisions.values()
        )

    def foreign(self, backbone: Backbone, decisions: Decisions) -> str:
        """Plain PEFT trains a classifier beside layers that it injects, never alone."""
        return "it trains the classifier alone, for which PEFT has no words"


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
