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

from peft_vision.adapters._lean import lean
from peft_vision.adapters._targets import check_targets, chosen_layers, exactly, split_paths
from peft_vision.backbones.sites import Backbone, LayerSite
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.named_parts import outputs_of
from peft_vision.layers.recomputed import unwatch, watch
from peft_vision.layers.split_linear import NAMES, SplitLinear, fuse, split_outputs
from peft_vision.layers.surgery import keep_inputs, keep_outputs, output_tensors, weight_of
from peft_vision.method import Adapter, Evidence, check_range
from peft_vision.plan import Decisions

INITS = ("standard", "trunc_normal")


@dataclass(frozen=True)
class Lora(Adapter):
    """Low-rank updates beside frozen linears; the classifier is trained and saved with them."""

    r: int = 16
    """Rank of each update, at least 1."""

    alpha: float = 16.0
    """The update is scaled by alpha / r."""

    dropout: float = 0.0
    """Dropout on the input of the update, in [0, 1)."""

    targets: tuple[str, ...] = ("auto",)
    """Which layers: "linears" (all but the classifier), "convs" (plain ones), "attention",
    "mlp", or roles (q, k, v, qkv, out, up, gate, down). "auto": the linears, and with them the
    convolutions of a model that holds most of its weights in those."""

    train_head: bool = True
    """Train the classifier in full and save it with the adapter."""

    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (Kalajdzievski, 2023)."""

    split_qkv: bool = False
    """An update each for queries, keys and values where one linear computes all three."""

    init: str = "standard"
    """First values: "standard" (A uniform, B zero: the function is kept), or "trunc_normal" (both
    truncated normal, standard deviation 0.02, as in LoRAT: training starts elsewhere)."""

    last: int | None = None
    """Only the last so many blocks, at least 1; the gradient goes no deeper, and the blocks before
    hold nothing for it. None: every block, and layers outside of them."""

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise BadSetting(f"r is {self.r!r}; it has to be a whole number of at least 1.")
        if self.last is not None and (isinstance(self.last, bool) or self.last < 1):
            raise BadSetting(f"last is {self.last!r}; it has to be a number of blocks, 1 or more.")
        check_range("alpha", self.alpha, 1e-9, 1e9)
        check_range("dropout", self.dropout, 0.0, 0.999)
        if self.init not in INITS:
            raise BadSetting(f"init is {self.init!r}; possible: {', '.join(INITS)}.")
        check_targets(self.targets)

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per layer, rank and alpha; the classifier's key where it is trained."""
        if strength <= 0:
            return {}
        update = {"r": self.r, "alpha": float(self.alpha)}
        decisions: Decisions = {
            key: dict(update) for site in self._chosen(backbone) for key in self._keys(site)
        }
        if self.train_head:
            decisions.update({site.key: "train" for site in backbone.classifier})
        return decisions

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Have every linear called, and split those whose parts get an update each."""
        backbone.call_every_linear()
        for site in backbone.linears:
            if site.role == "qkv" and any(key in decisions for key in _thirds(site)):
                setattr(
                    site.owner, site.attribute, SplitLinear(split_outputs(site.layer, _sizes(site)))
                )
        watch(backbone.model)

    def start(self, backbone: Backbone, decisions: Decisions) -> None:
        """LoRAT's first values, where they are asked for."""
        if self.init == "standard":
            return
        for site in (*backbone.linears, *backbone.convs):
            if site.key in decisions:
                layer: Any = site.layer
                for factor in (layer.lora_A["default"], layer.lora_B["default"]):
                    nn.init.trunc_normal_(factor.weight, std=0.02)

    def fold(self, backbone: Backbone, decisions: Decisions) -> bool:
        """Fuse again what was split."""
        unwatch(backbone.model)
        for owner in list(backbone.model.modules()):
            for name, child in list(owner.named_children()):
                if isinstance(child, SplitLinear):
                    setattr(owner, name, fuse(child))
        return True

    def foreign(self, backbone: Backbone, decisions: Decisions) -> str:
        """Parts of a fused linear have no names in a plain base."""
        split = any(isinstance(module, SplitLinear) for module in backbone.model.modules())
        return "it updates parts of a linear that plain bases have in one" if split else ""

    def config(self, backbone: Backbone, decisions: Decisions) -> LoraConfig:
        """PEFT's configuration; PEFT folders written with it load in plain PEFT."""
        layers, heads = split_paths(backbone, decisions)
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            target_modules=exactly(backbone, layers),
            modules_to_save=heads or None,
        )
        config._register_custom_module({nn.Linear: lean})  # noqa: SLF001 - PEFT's hook for layers
        return config

    def _chosen(self, backbone: Backbone) -> list[LayerSite]:
        """The layers of the targets, in the blocks that were asked for."""
        chosen = chosen_layers(backbone, self._targets())
        if self.last is None:
            return chosen
        backbone.require("blocks")
        depth = len(backbone.blocks)
        if self.last > depth:
            raise BadSetting(f"last is {self.last}, and the model has {depth} blocks.")
        first = depth - self.last
        return [site for site in chosen if site.block is not None and site.block >= first]

    def _targets(self) -> tuple[str, ...]:
        """The targets; queries alone are a part of what computes all three, once it is split."""
        parts = self.split_qkv and set(self.targets) & set(NAMES)
        return (*self.targets, "qkv") if parts else self.targets

    def _keys(self, site: LayerSite) -> list[str]:
        if not self.split_qkv or site.role != "qkv":
            return [site.key]
        wanted = set(self.targets) & set(NAMES) or set(NAMES)
        return [key for key, name in zip(_thirds(site), NAMES, strict=True) if name in wanted]


def _sizes(site: LayerSite) -> tuple[int, ...]:
    """How many outputs are queries, keys and values."""
    return site.sizes or (outputs_of(site.layer) // 3,) * 3


def _thirds(site: LayerSite) -> list[str]:
    """The keys of the three parts of a linear that computes queries, keys and values."""
    return [f"{site.key.removesuffix('qkv')}{name}" for name in NAMES]


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


@output_tensors.register(LoraLinear)
def _(layer: Any) -> list[Tensor]:
    _refuse_variants(layer)
    parts = (layer.base_layer, *layer.lora_B.values())
    return [tensor for part in parts for tensor in output_tensors(part)]


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
