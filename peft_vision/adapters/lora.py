"""LoRA (Hu et al., ICLR 2022) through PEFT, on targets taken from sites.

The adapter is an ordinary PEFT folder. PEFT's names of layers are never typed by hand: the
backbone's view says which layers are attention, MLP and classifier, for every family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from peft_vision.backbones.sites import Backbone, LayerSite
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.surgery import keep_inputs, keep_outputs, weight_of
from peft_vision.method import Adapter, Evidence, check_range
from peft_vision.plan import Decisions

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "qkv", "out"),
    "mlp": ("up", "gate", "down"),
}
ROLES = ("q", "k", "v", "qkv", "out", "up", "gate", "down")


@dataclass(frozen=True)
class Lora(Adapter):
    """Low-rank updates beside frozen linears; the classifier is trained and saved with them."""

    r: int = 16
    """Rank of each update, at least 1."""

    alpha: float = 16.0
    """The update is scaled by alpha / r."""

    dropout: float = 0.0
    """Dropout on the input of the update, in [0, 1)."""

    targets: tuple[str, ...] = ("linears",)
    """Which layers: "linears" (all but the classifier), "convs" (ungrouped ones), "attention",
    "mlp", or roles (q, k, v, qkv, out, up, gate, down)."""

    train_head: bool = True
    """Train the classifier in full and save it with the adapter."""

    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (Kalajdzievski, 2023)."""

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise BadSetting(f"r is {self.r!r}; it has to be a whole number of at least 1.")
        check_range("alpha", self.alpha, 1e-9, 1e9)
        check_range("dropout", self.dropout, 0.0, 0.999)
        known = {"linears", "convs", *GROUPS, *ROLES}
        if not self.targets or any(target not in known for target in self.targets):
            raise BadSetting(
                f"targets is {list(self.targets)!r}; possible: {', '.join(sorted(known))}."
            )

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per layer, rank and alpha; the classifier's key where it is trained."""
        if strength <= 0:
            return {}
        decisions: Decisions = {
            site.key: {"r": self.r, "alpha": float(self.alpha)} for site in self._chosen(backbone)
        }
        if self.train_head:
            decisions.update({site.key: "train" for site in backbone.classifier})
        return decisions

    def config(self, backbone: Backbone, decisions: Decisions) -> LoraConfig:
        """PEFT's configuration; PEFT folders written with it load in plain PEFT."""
        names = {id(module): name for name, module in backbone.model.named_modules()}
        sites = {s.key: s for s in (*backbone.linears, *backbone.convs, *backbone.classifier)}
        heads = {site.key for site in backbone.classifier}
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            target_modules=[_path(sites[key], names) for key in decisions if key not in heads],
            modules_to_save=[_path(sites[key], names) for key in decisions if key in heads] or None,
        )

    def _chosen(self, backbone: Backbone) -> list[LayerSite]:
        wanted = {role for t in self.targets for role in GROUPS.get(t, (t,))}
        chosen: list[LayerSite] = []
        if "linears" in wanted:
            backbone.require("linears")
            chosen += backbone.linears
        else:
            chosen += [site for site in backbone.linears if site.role in wanted]
        if "convs" in wanted:
            backbone.require("convs")
            # Updates of grouped convolutions cannot be merged, and depthwise ones outgrow the
            # layer.
            chosen += [site for site in backbone.convs if _is_dense(site.layer)]
        if not chosen:
            found = sorted({site.role for site in backbone.linears})
            raise UnsupportedSite(
                f"{type(backbone.model).__name__} has none of the targets {list(self.targets)!r}. "
                f"Its linears are: {', '.join(found) or 'none'}."
            )
        return chosen


def _is_dense(layer: nn.Module) -> bool:
    return getattr(getattr(layer, "base_layer", layer), "groups", 1) == 1


def _path(site: LayerSite, names: dict[int, str]) -> str:
    owner = names[id(site.owner)]
    return f"{owner}.{site.attribute}" if owner else site.attribute


@keep_outputs.register(LoraLinear)
def _(layer: Any, indices: Sequence[int]) -> None:
    _refuse_variants(layer)
    keep_outputs(layer.base_layer, indices)
    for name in layer.lora_B:
        keep_outputs(layer.lora_B[name], indices)
    layer.out_features = len(indices)


@keep_inputs.register(LoraLinear)
def _(layer: Any, indices: Sequence[int]) -> None:
    _refuse_variants(layer)
    keep_inputs(layer.base_layer, indices)
    for name in layer.lora_A:
        keep_inputs(layer.lora_A[name], indices)
    layer.in_features = len(indices)


@weight_of.register(LoraLinear)
def _(layer: Any) -> Tensor:
    weight = weight_of(layer.base_layer)
    with torch.no_grad():
        for name in layer.active_adapters:
            if name in layer.lora_A and not layer.merged:
                weight = weight + layer.get_delta_weight(name).to(weight)
    return weight


def _refuse_variants(layer: nn.Module) -> None:
    extra = [name for name, _ in layer.named_children() if name == "lora_magnitude_vector"]
    if extra and len(layer.get_submodule(extra[0])._modules):  # noqa: SLF001
        raise UnsupportedSite("A weight-normalized update cannot be cut; merge the adapter first.")
