"""A backbone seen as sites: named places where a method may act.

A site is (owner module, attribute), never a dotted path: a path breaks when a block is re-housed.
It
holds no closure: a deep copy's closure would edit the original.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_vision.backbones.positions import PositionsSite
from peft_vision.backbones.width import WidthSite
from peft_vision.errors import UnsupportedSite
from peft_vision.layers import mlp as mlp_layer
from peft_vision.layers.attention import OpenAttention, OwnAttention, attention_inside
from peft_vision.layers.attention_parts import AttentionParts, head_count
from peft_vision.layers.block import BlockParts
from peft_vision.layers.bottleneck import around, inside
from peft_vision.layers.computed_attention import ComputedAttention
from peft_vision.layers.head_surgery import keep_heads, weights_by_head
from peft_vision.layers.mlp import MlpParts
from peft_vision.layers.named_parts import part_of
from peft_vision.layers.recomputed_blocks import recompute
from peft_vision.layers.surgery import weight_of
from peft_vision.layers.trunk import Trunk, trunk_in

Role = Literal["q", "k", "v", "qkv", "out", "gate", "up", "down", "patch", "pool", "other"]
Pooling = Literal["class", "average", "attention", "class+average", "none", "other"]


@dataclass(frozen=True)
class LayerSite:
    """A linear or a convolution that an adapter or a decomposition may act on.

    Attributes:
        key: stable label, e.g. ``blocks.3.q``.
        role: what the layer does in its block.
        block: depth of the block it belongs to, or None.
        sizes: how many outputs are queries, keys and values, of a linear that gives all three;
            empty where they are as many.
    """

    key: str
    owner: nn.Module
    attribute: str
    role: Role
    block: int | None = None
    sizes: tuple[int, ...] = ()

    @property
    def layer(self) -> nn.Module:
        """The layer as it is now."""
        return getattr(self.owner, self.attribute)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class HeadsSite:
    """The heads of one attention module.

    Attributes:
        owner: the block; `attribute` names its attention module.
        opens: the family's own forward breaks when heads are removed, so the module is opened.
    """

    key: str
    owner: nn.Module
    attribute: str
    parts: AttentionParts
    block: int
    opens: bool = False

    @property
    def attention(self) -> nn.Module:
        """The family's attention module."""
        return attention_inside(getattr(self.owner, self.attribute))

    @property
    def count(self) -> int:
        """How many heads there are now."""
        return head_count(self.attention, self.parts)

    def weights(self) -> list[Tensor]:
        """Every weight that belongs to a head, one row per head: tensors of H x anything."""
        return weights_by_head(self.attention, self.parts)

    def keep(self, heads: Sequence[int]) -> None:
        """Keep these heads, in place.

        Raises:
            UnsupportedSite: none would be left, or a layer has no rule.
        """
        if not heads:
            raise UnsupportedSite(f"{self.key}: at least one head has to stay.")
        module = getattr(self.owner, self.attribute)
        if isinstance(module, OwnAttention):
            module.keep_heads(heads)
            return
        keep_heads(module, self.parts, heads)
        if self.opens:
            computed = OpenAttention if self.parts.forward is None else ComputedAttention
            setattr(self.owner, self.attribute, computed(module, self.parts))


@dataclass(frozen=True)
class HiddenSite:
    """The hidden units of one MLP."""

    key: str
    owner: nn.Module
    attribute: str
    parts: MlpParts
    block: int

    @property
    def mlp(self) -> nn.Module:
        """The MLP module."""
        return inside(getattr(self.owner, self.attribute))

    @property
    def is_module(self) -> bool:
        """Whether the MLP is a module of its own, of linears, beside which another can stand."""
        down = part_of(self.mlp, self.parts.down)
        return "." not in self.parts.down and getattr(down, "in_features", None) is not None

    @property
    def count(self) -> int:
        """How many units there are now."""
        return mlp_layer.unit_count(self.mlp, self.parts)

    def weights(self) -> list[Tensor]:
        """Every weight that belongs to a unit, one row per unit: tensors of U x anything."""
        found = []
        for name in self.parts.up:
            found += list(weight_of(part_of(self.mlp, name)).flatten(1).chunk(self.parts.packed))
        return [*found, weight_of(part_of(self.mlp, self.parts.down)).transpose(0, 1).flatten(1)]

    def keep(self, units: Sequence[int]) -> None:
        """Keep these units, in place.

        Raises:
            UnsupportedSite: none would be left, or a layer has no rule.
        """
        if not units:
            raise UnsupportedSite(f"{self.key}: at least one hidden unit has to stay.")
        module = around(getattr(self.owner, self.attribute))
        if isinstance(module, mlp_layer.OwnMlp):
            module.keep_units(units)
        else:
            mlp_layer.keep_units(self.mlp, self.parts, units)


@dataclass(frozen=True)
class BlockSite:
    """One residual block and where it lives."""

    key: str
    owner: nn.Module
    attribute: str
    index: int

    @property
    def block(self) -> nn.Module:
        """The block as it is now."""
        return getattr(self.owner, self.attribute)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TokensSite:
    """The token stream: what comes first in it, how it is pooled, and the list of its blocks.

    Attributes:
        owner: the module that holds the list of blocks under `attribute`.
        parts: how to open a block.
        class_tokens: 1 when there is a class token, first in the sequence.
        distillation_tokens: 1 for distilled DeiT.
        register_tokens: registers after them; never scored, never dropped.
        pooling: what the head reads.
    """

    key: str
    owner: nn.Module
    attribute: str
    parts: BlockParts
    class_tokens: int
    distillation_tokens: int = 0
    register_tokens: int = 0
    pooling: Pooling = "class"

    @property
    def prefix(self) -> int:
        """How many tokens come before the patches."""
        return self.class_tokens + self.distillation_tokens + self.register_tokens

    def trunk_if_any(self) -> Trunk | None:
        """The Trunk that is in place already, if one is."""
        return trunk_in(getattr(self.owner, self.attribute))

    def trunk(self) -> Trunk:
        """The blocks as one Trunk, put in place of the model's list on first use."""
        container: nn.Module = getattr(self.owner, self.attribute)
        present = self.trunk_if_any()
        if present is not None:
            return present
        trunk = Trunk(list(container.children()), self.parts, self.prefix)
        setattr(self.owner, self.attribute, type(container)(*_as_arguments(container, trunk)))
        return trunk


def _as_arguments(container: nn.Module, trunk: Trunk) -> tuple[object, ...]:
    return (trunk,) if isinstance(container, nn.Sequential) else ([trunk],)


@dataclass(frozen=True)
class ReadoutSite:
    """Where features leave a backbone: the place of a classifier, whether one is there or not.

    Attributes:
        width: of the features that arrive, D.
        count: outputs of the classifier that is there; None where there is none.
        dense: (module, attribute, value) to set so that all tokens arrive (B N D) instead of pooled
            features (B D); None where the model's forward cannot be told to.
        grid: rows and columns of the patches; `prefix` tokens come before them.
    """

    key: str
    owner: nn.Module
    attribute: str
    width: int
    count: int | None
    dense: tuple[tuple[nn.Module, str, object], ...] | None = None
    grid: tuple[int, int] | None = None
    prefix: int = 0

    @property
    def layer(self) -> nn.Module:
        """What stands there now."""
        return getattr(self.owner, self.attribute)  # type: ignore[no-any-return]

    def open(self) -> None:
        """Let all tokens arrive, where the model can be told to."""
        for module, attribute, value in self.dense or ():
            setattr(module, attribute, value)


@dataclass(frozen=True)
class Backbone:
    """A model seen as sites.

    Attributes:
        family: stem of the file that understood the model.
        input_size: channels, height, width of the images, where the model says so.
        missing: kind of site -> why this model has none, in words.
        classifier: the last layer (or layers), trained with an adapter, never wrapped by one.
        readouts: where a classifier is, or could be put.
        bypasses: (module, attribute, value) to set so that every linear is called: some families
            read a linear's weight instead, and an adapter on it would never train.
        bypassed: such a family whose linears are called by now.
        prefix: name of the backbone within `model`, with a dot at its end, where a wrapper of a
            library's own stands around it; else empty.
        run: (model, images) -> what comes of images, for models that take more than images.
    """

    model: nn.Module
    family: str
    input_size: tuple[int, int, int] | None = None
    blocks: tuple[BlockSite, ...] = ()
    linears: tuple[LayerSite, ...] = ()
    convs: tuple[LayerSite, ...] = ()
    heads: tuple[HeadsSite, ...] = ()
    hidden: tuple[HiddenSite, ...] = ()
    tokens: TokensSite | None = None
    positions: PositionsSite | None = None
    width: WidthSite | None = None
    classifier: tuple[LayerSite, ...] = ()
    readouts: tuple[ReadoutSite, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    bypasses: tuple[tuple[nn.Module, str, object], ...] = ()
    bypassed: bool = False
    prefix: str = ""
    run: Callable[[nn.Module, Tensor], Any] | None = None

    @property
    def core(self) -> nn.Module:
        """The backbone without a library's wrapper around it."""
        return self.model.get_submodule(self.prefix.removesuffix("."))

    def put_readout(self, site: ReadoutSite, layer: nn.Module, count: int) -> None:
        """Put a classifier of `count` outputs there; what the model says of itself follows."""
        setattr(site.owner, site.attribute, layer.train(site.layer.training))
        for model in (self.core, self.model):
            if isinstance(getattr(model, "num_classes", None), int):
                model.num_classes = count  # type: ignore[assignment]
            config = getattr(model, "config", None)
            if isinstance(getattr(config, "num_labels", None), int):
                config.num_labels = model.num_labels = count  # type: ignore[union-attr, assignment]

    def call_every_linear(self) -> None:
        """Make the model call its linears where it would read their weights; same outputs."""
        for module, attribute, value in self.bypasses:
            setattr(module, attribute, value)

    def require(self, *kinds: str) -> None:
        """Refuse by name what cannot be done.

        Args:
            kinds: of "blocks", "linears", "convs", "heads", "hidden", "tokens", "width",
                "readouts".

        Raises:
            UnsupportedSite: the model has no site of that kind, with the reason.
        """
        for kind in kinds:
            if not getattr(self, kind):
                why = self.missing.get(kind) or ABSENCES.get(
                    kind, f"the {self.family} view finds none"
                )
                raise UnsupportedSite(f"{type(self.model).__name__} has no {kind}: {why}.")

    def set_checkpointing(self, on: bool | Collection[int]) -> None:
        """Recompute activations in the backward pass, block by block.

        Args:
            on: for every block, for none, or for the blocks of these indices.

        Raises:
            UnsupportedSite: the model has no blocks that can be recomputed.
        """
        trunk = next((m for m in self.model.modules() if isinstance(m, Trunk)), None)
        own = next((n for n in SWITCHES if getattr(self.core, n, None) is not None), None)
        if trunk is not None:
            trunk.checkpointing = on if isinstance(on, bool) else frozenset(on)
        elif own is None and not self.blocks:
            raise UnsupportedSite(
                f"{type(self.model).__name__} offers no gradient checkpointing of its own."
            )
        for site in self.blocks:
            alone = own is None if on is True else on is not False and site.index in on
            recompute(site.block, on=alone and trunk is None)
        if own is not None:  # around a whole trunk it would recompute all blocks at once
            _switch(self.core, own, on is True and trunk is None)


ABSENCES = {
    "readouts": "it returns its features, and no linear classifier is there to take the place of; "
    "the architecture's ForImageClassification class, or a timm model, has one"
}
"""Why a kind of site is usually absent, where the view does not say."""

SWITCHES = (
    "set_grad_checkpointing",
    "activation_checkpointing_enable",
    "gradient_checkpointing_enable",
)
"""What timm, transformers, and older transformers call their switch for checkpointing."""


def _switch(model: nn.Module, name: str, on: bool) -> None:
    method = getattr(model, name if on else name.replace("_enable", "_disable"))
    if name == "set_grad_checkpointing":
        method(on)
    elif on:
        method(**{name.replace("_enable", "_kwargs"): {"use_reentrant": False}})
    else:
        method()


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
