"""An MLP in the place of the classifier: classes, labels, an embedding, boxes or masks.

Three layers without a norm, as in the tracker of Lin et al., "Tracking Meets LoRA" (LoRAT, ECCV
2024), from which the boxes' parametrization comes. The projection on an embedding, dropped after
training, is that of Chen et al. (SimCLR, 2020) and Khosla et al. (SupCon, 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from peft_vision.backbones.sites import Backbone, ReadoutSite, device_of
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.ownership import parameters_of, trained_dtype
from peft_vision.layers.readout import (
    BoxReadout,
    MaskReadout,
    PooledReadout,
    Readout,
    activation_of,
)
from peft_vision.method import Adapter, Evidence, check_range
from peft_vision.plan import Decisions

POOLED = ("classification", "multilabel", "embedding")
DENSE = ("boxes", "masks")


@dataclass(frozen=True)
class MlpHead(Adapter):
    """An MLP takes the place of the model's classifier and is trained; the backbone is frozen."""

    readout: Literal["classification", "multilabel", "embedding", "boxes", "masks"] = (
        "classification"
    )
    """What the model returns: logits of classes or of labels (B C), an embedding (B C), scores and
    boxes of every patch (B H W and B H W 4), or logits of every patch (B C H W)."""

    outputs: int | None = None
    """Classes, labels or width of the embedding; by default as many as the classifier that is there
    has, and an embedding is as wide as the features. Boxes have theirs."""

    layers: int = 3
    """Linear layers, 1 to 16."""

    hidden: int | None = None
    """Width between them; by default that of the features."""

    activation: str = "gelu"
    """Between them: gelu, relu, silu or tanh."""

    std: float = 0.02
    """Weights start truncated normal with this deviation; biases start at zero."""

    projection: int | None = None
    """Width of a projection of the embedding that is returned while training, and dropped by
    merging; in evaluation mode the embedding is returned."""

    upsample: bool = False
    """Interpolate masks from the grid of patches to the size of the image."""

    keeps_function: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.readout not in (*POOLED, *DENSE):
            known = ", ".join((*POOLED, *DENSE))
            raise BadSetting(f"readout is {self.readout!r}; possible: {known}.")
        for name in ("outputs", "hidden", "projection"):
            value = getattr(self, name)
            if value is not None:
                _check_whole(name, value, 2**20)
        _check_whole("layers", self.layers, 16)
        activation_of(self.activation)
        check_range("std", self.std, 1e-9, 1e3)
        self._check_fit()

    def _check_fit(self) -> None:
        if self.readout == "boxes" and self.outputs is not None:
            raise BadSetting(
                f"outputs is {self.outputs} for boxes, which have one score and four sides each. "
                "Leave it out."
            )
        if self.projection is not None and self.readout != "embedding":
            raise BadSetting(
                f"projection goes with readout='embedding', and readout is {self.readout!r}."
            )
        if self.upsample and self.readout != "masks":
            raise BadSetting(
                f"upsample goes with readout='masks', and readout is {self.readout!r}."
            )

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per classifier, the widths, and for dense readouts the grid of patches."""
        if strength <= 0:
            return {}
        backbone.require("readouts")
        # The tokens of several images are read once, whatever else a model would read them with.
        sites = backbone.readouts[:1] if self._joint(backbone) else backbone.readouts
        return {site.key: self._decision(backbone, site) for site in sites}

    def _joint(self, backbone: Backbone) -> bool:
        positions = backbone.positions
        return self.readout in DENSE and positions is not None and positions.joint

    def _decision(self, backbone: Backbone, site: ReadoutSite) -> dict[str, Any]:
        count = 5 if self.readout == "boxes" else self.outputs or site.count
        if self.readout == "embedding":
            count = self.outputs or site.width
        if count is None:
            raise BadSetting(
                f"{type(backbone.model).__name__} has no classifier whose outputs could be "
                "counted. Pass outputs=..."
            )
        sizes = {"inputs": site.width, "outputs": count}
        return sizes if self.readout in POOLED else {**sizes, **self._grid(backbone, site)}

    def _grid(self, backbone: Backbone, site: ReadoutSite) -> dict[str, Any]:
        positions = backbone.positions
        if site.dense is None and self._joint(backbone) and positions and positions.types:
            # The model pools, but the pass of several images does not go through its end.
            grid = list(positions.types.grids[-1])
            return {"inputs": positions.width, "grid": grid, "prefix": 0, "size": None}
        if site.dense is None or site.grid is None:
            raise UnsupportedSite(
                f"{type(backbone.model).__name__} pools its tokens before {site.key} and cannot be "
                f"told otherwise: {self.readout} need every patch. Models that hand over their "
                "tokens work: timm's VisionTransformer and Eva."
            )
        trunk = backbone.tokens.trunk_if_any() if backbone.tokens else None
        if trunk is not None and not (trunk.plain or trunk.restore):
            raise UnsupportedSite(
                f"{type(backbone.model).__name__} drops tokens on the way, and {self.readout} need "
                "every patch."
            )
        size = list(backbone.input_size[1:]) if self.upsample and backbone.input_size else None
        return {"grid": list(site.grid), "prefix": site.prefix, "size": size}

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Put the MLP there; for dense readouts the model stops pooling."""
        sites = {site.key: site for site in backbone.readouts}
        for key in decisions:
            decision: dict[str, Any] = dict(decisions[key])  # type: ignore[arg-type]
            if self.readout in DENSE:
                sites[key].open()
            with torch.device(device_of(backbone.model)):
                head = self._head(**decision).to(trained_dtype(backbone.model))
            backbone.put_readout(sites[key], head, int(decision["outputs"]))

    def _head(
        self,
        inputs: int,
        outputs: int,
        grid: list[int] | None = None,
        prefix: int = 0,
        size: list[int] | None = None,
    ) -> Readout:
        shape: dict[str, Any] = {
            "layers": self.layers,
            "hidden": self.hidden,
            "activation": self.activation,
        }
        if grid is None:
            return PooledReadout(inputs, outputs, projection=self.projection, **shape)
        rows, columns = grid
        shape |= {"grid": (rows, columns), "prefix": prefix}
        if self.readout == "boxes":
            return BoxReadout(inputs, **shape)
        return MaskReadout(inputs, outputs, size=(size[0], size[1]) if size else None, **shape)

    def start(self, backbone: Backbone, decisions: Decisions) -> None:
        """Truncated normal weights, zero biases."""
        for head in self._heads(backbone, decisions):
            head.draw(self.std)

    def trained(self, backbone: Backbone, decisions: Decisions) -> list[tuple[nn.Module, str]]:
        """The whole head, unless PEFT trains a copy of it."""
        sites = [site for site in backbone.readouts if site.key in decisions]
        return [place for site in sites for place in parameters_of(site.layer)]

    def fold(self, backbone: Backbone, decisions: Decisions) -> bool:
        """Drop the projection; the MLP stays."""
        for head in self._heads(backbone, decisions):
            head.settle()
        return False

    def foreign(self, backbone: Backbone, decisions: Decisions) -> str:
        """Plain PEFT would look for the classifier that is gone."""
        return "an MLP of ours took the place of the classifier"

    def _heads(self, backbone: Backbone, decisions: Decisions) -> list[Readout]:
        found = [site.layer for site in backbone.readouts if site.key in decisions]
        return [layer for layer in found if isinstance(layer, Readout)]


def _check_whole(name: str, value: object, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise BadSetting(f"{name} is {value!r}; it has to be a whole number from 1 to {high:,}.")
