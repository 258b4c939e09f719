"""The width of the residual stream: everything that stands on it, cut together."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.absent import Absent
from peft_vision.layers.attention import OpenAttention, OwnAttention
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.block import BlockParts, attention_of, mlp_of
from peft_vision.layers.ownership import plain_of
from peft_vision.layers.positions import without_rows
from peft_vision.layers.readout import LinearReadout
from peft_vision.layers.spread import spread
from peft_vision.layers.stream import keep_read, keep_stream, read_width
from peft_vision.layers.surgery import keep_features, keep_outputs, select_parameter
from peft_vision.layers.trunk import blocks_in

Held = tuple[nn.Module, str]
"""(owner, attribute): found anew each time, whatever has been wrapped around it since."""


@dataclass(frozen=True)
class WidthSite:
    """The residual stream, D wide.

    Attributes:
        model: what holds a configuration that says the width, if it does.
        patch: what embeds patches, a convolution.
        norms: norms through which everything behind them sees the stream.
        other_norms: norms over the stream before the first of these, or behind the last; those that
            a readout holds are cut with it.
        inputs: linears and readouts that read the stream, or several copies of it side by side.
        outputs: layers that write to it. `tables`: tensors whose last axis is the stream.
        numbers: attributes that say how wide it is.
        pools: modules behind the stream that go on reading the whole width.
        opens: (block, attribute, parts) of attention modules whose own forward assumes that their
            heads make up the width of the stream.
    """

    key: str
    model: nn.Module
    patch: Held
    norms: tuple[Held, ...]
    inputs: tuple[Held, ...]
    outputs: tuple[Held, ...]
    other_norms: tuple[Held, ...] = ()
    tables: tuple[Held, ...] = ()
    numbers: tuple[Held, ...] = ()
    pools: tuple[Held, ...] = ()
    opens: tuple[tuple[nn.Module, str, AttentionParts], ...] = field(default=())

    @property
    def count(self) -> int:
        """How wide the stream is now."""
        layer: Any = plain_of(without_rows(getattr(*self.patch)))
        return int(layer.weight.shape[0])

    @property
    def held_norms(self) -> tuple[Held, ...]:
        """Norms inside readouts that run over the features of the stream."""
        read = [plain_of(getattr(*place)) for place in self.inputs]
        return tuple((layer, "norm") for layer in read if isinstance(layer, LinearReadout))

    def keep(self, indices: Sequence[int]) -> None:
        """Keep these features, in place.

        Norms take their statistics over what is left: the model computes something else unless it
        was trained with that.

        Raises:
            UnsupportedSite: none would be left, or a layer has no rule.
        """
        if not indices:
            raise UnsupportedSite(f"{self.key}: at least one feature has to stay.")
        whole = self.count
        for place in (*self.norms, *self.other_norms):
            keep_features(getattr(*place), indices)
        self._keep_read(whole, indices)
        for owner, name in (self.patch, *self.outputs):
            keep_outputs(without_rows(getattr(owner, name)), indices)
        for owner, name in self.tables:
            select_parameter(owner, name, indices, getattr(owner, name).dim() - 1)
        for module in list(self.model.modules()):
            keep_stream(module, indices)
        for owner, name in self.pools:
            setattr(owner, name, spread(getattr(owner, name), whole, indices))
        self._open()
        self._say(len(indices))

    def _keep_read(self, whole: int, indices: Sequence[int]) -> None:
        for place in self.inputs:
            copies = (read_width(getattr(*place)) or 0) // whole
            if copies:
                beside = [number * whole + i for number in range(copies) for i in indices]
                keep_read(getattr(*place), beside)

    def _open(self) -> None:
        for block, name, parts in self.opens:
            module = getattr(block, name)
            if not isinstance(module, OwnAttention | Absent):
                setattr(block, name, OpenAttention(module, parts))

    def _say(self, width: int) -> None:
        for owner, name in self.numbers:
            setattr(owner, name, width)
        memo: dict[int, Any] = {}
        module: Any
        for module in self.model.modules():
            config = vars(module).get("config")
            if config is not None:  # models that were made from one configuration share it
                module.config = copy.deepcopy(config, memo)
                said = getattr(module.config, "vision_config", module.config)
                if getattr(said, "hidden_size", None) is not None:
                    said.hidden_size = width


@dataclass(frozen=True)
class InBlocks:
    """What stands on the stream in a list of blocks."""

    norms: tuple[Held, ...]
    inputs: tuple[Held, ...]
    outputs: tuple[Held, ...]
    tables: tuple[Held, ...]


def in_blocks(container: nn.Module, parts: BlockParts) -> InBlocks:
    """Everything in the blocks of `container`, which may hold a Trunk, that is as wide as they."""
    blocks = [block for _, _, block in blocks_in(container)]
    norms = [(block, name) for block in blocks for name in (parts.norm1, parts.norm2)]
    return InBlocks(
        norms=tuple(norms),
        inputs=tuple(held for block in blocks for held in _readers(block, parts)),
        outputs=tuple(held for block in blocks for held in _writers(block, parts)),
        tables=tuple(held for block in blocks for held in _scales(block, parts)),
    )


def _readers(block: nn.Module, parts: BlockParts) -> Iterator[Held]:
    attention, mlp = attention_of(block, parts), mlp_of(block, parts)
    if not isinstance(attention, Absent):
        gate = parts.attention_parts.gate
        yield from ((attention, name) for name in parts.attention_parts.qkv)
        if gate is not None and getattr(attention, gate) is not None:
            yield attention, gate
    if not isinstance(mlp, Absent):
        yield from ((mlp, name) for name in _names(mlp, *parts.mlp_parts.up))


def _writers(block: nn.Module, parts: BlockParts) -> Iterator[Held]:
    attention, mlp = attention_of(block, parts), mlp_of(block, parts)
    if not isinstance(attention, Absent):
        yield attention, parts.attention_parts.out
    if not isinstance(mlp, Absent):
        yield from ((mlp, name) for name in _names(mlp, parts.mlp_parts.down))


def _names(mlp: nn.Module, *names: str) -> tuple[str, ...]:
    """The names, or that of the one linear that stands where an MLP was."""
    own = dict(mlp.named_children())
    return names if all(name in own for name in names) else ("linear",)


def _scales(block: nn.Module, parts: BlockParts) -> Iterator[Held]:
    for name in dict.fromkeys((*parts.after1, *parts.after2)):
        part = getattr(block, name)
        if isinstance(part, nn.Parameter):
            yield block, name
        elif isinstance(part, nn.Module):
            yield from ((part, own) for own, _ in part.named_parameters(recurse=False))


def tensors(owner: nn.Module, names: Iterable[str]) -> tuple[Held, ...]:
    """Those of the names under which `owner` holds a tensor."""
    return tuple(
        (owner, name) for name in names if isinstance(getattr(owner, name, None), torch.Tensor)
    )


def modules(owner: nn.Module, names: Iterable[str]) -> tuple[Held, ...]:
    """Those of the names under which `owner` holds a module."""
    own = dict(owner.named_children())
    return tuple((owner, name) for name in names if name in own)
