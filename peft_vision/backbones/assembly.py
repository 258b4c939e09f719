"""Sites from the parts of a transformer: what families share once they have named their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_vision.backbones.sites import (
    BlockSite,
    HeadsSite,
    HiddenSite,
    LayerSite,
    ReadoutSite,
    Role,
)
from peft_vision.layers.absent import Absent
from peft_vision.layers.attention_parts import AttentionParts, thirds_of
from peft_vision.layers.block import BlockParts, attention_of, mlp_of
from peft_vision.layers.bottleneck import inside, place_inside
from peft_vision.layers.factorized import earlier_factors, last_factor
from peft_vision.layers.linear_mlp import LinearMlp
from peft_vision.layers.mlp import MlpParts
from peft_vision.layers.ownership import plain_of
from peft_vision.layers.readout import Readout
from peft_vision.layers.split_linear import SplitLinear
from peft_vision.layers.trunk import Trunk, blocks_in

ABSENT = object()
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Assembly:
    """The sites of a list of blocks."""

    blocks: tuple[BlockSite, ...]
    linears: tuple[LayerSite, ...]
    heads: tuple[HeadsSite, ...]
    hidden: tuple[HiddenSite, ...]


def assemble(container: nn.Module, parts: BlockParts, *, opens: bool = False) -> Assembly:
    """Sites of the blocks in `container`, which may hold a Trunk by now.

    Args:
        container: the model's list of blocks.
        parts: the names of a block's parts.
        opens: removing heads needs the attention module opened (see `HeadsSite.opens`).
    """
    found = list(blocks_in(container))
    blocks = [BlockSite(f"blocks.{i}", o, a, i) for i, (o, a, _) in enumerate(found)]
    linears = [s for i, (_, _, block) in enumerate(found) for s in _linears(block, parts, i)]
    heads = [
        HeadsSite(
            f"blocks.{i}.heads", block, parts.attention, parts.attention_parts, i, opens=opens
        )
        for i, (_, _, block) in enumerate(found)
        if not isinstance(getattr(block, parts.attention), Absent)
    ]
    hidden = [
        HiddenSite(f"blocks.{i}.hidden", block, parts.mlp, parts.mlp_parts, i)
        for i, (_, _, block) in enumerate(found)
        if not isinstance(mlp_of(block, parts), Absent | LinearMlp)
    ]
    return Assembly(tuple(blocks), tuple(linears), tuple(heads), tuple(hidden))


def _linears(block: nn.Module, parts: BlockParts, index: int) -> Iterator[LayerSite]:
    named = [
        *_in_attention(attention_of(block, parts), parts),
        *_in_mlp(mlp_of(block, parts), parts),
    ]
    for owner, name, role in named:
        label = "head_gate" if role == "other" else role
        place = last_factor(*place_inside(owner, name))
        sizes = thirds_of(owner, parts.attention_parts) if role == "qkv" else ()
        yield LayerSite(f"blocks.{index}.{label}", *place, role, index, tuple(sizes))
    for part in (attention_of(block, parts), mlp_of(block, parts)):
        yield from _factors(part, index)


def _factors(part: nn.Module, index: int) -> Iterator[LayerSite]:
    """The factors of chains in an attention module or an MLP but the last, which has the role."""
    for name, _ in part.named_children():
        for number, place in enumerate(earlier_factors(*place_inside(part, name))):
            yield LayerSite(f"blocks.{index}.{name}.factor{number}", *place, "other", index)


Named = tuple[nn.Module, str, Role]


def _in_attention(attention: nn.Module, parts: BlockParts) -> Iterator[Named]:
    if isinstance(attention, Absent):
        return
    roles: Sequence[Role] = ("q", "k", "v") if len(parts.attention_parts.qkv) == 3 else ("qkv",)
    for name, role in zip(parts.attention_parts.qkv, roles, strict=True):
        layer = getattr(*last_factor(attention, name))
        if isinstance(layer, SplitLinear):
            yield from ((layer, "q", "q"), (layer, "k", "k"), (layer, "v", "v"))
        else:
            yield attention, name, role
    gate = parts.attention_parts.gate
    if gate is not None and getattr(attention, gate) is not None:
        yield attention, gate, "other"
    yield attention, parts.attention_parts.out, "out"


def _in_mlp(mlp: nn.Module, parts: BlockParts) -> Iterator[Named]:
    if isinstance(mlp, Absent):
        return
    if isinstance(mlp, LinearMlp):
        yield mlp, "linear", "down"
        return
    ups: Sequence[Role] = ("gate", "up") if len(parts.mlp_parts.up) == 2 else ("up",)
    yield from ((mlp, name, role) for name, role in zip(parts.mlp_parts.up, ups, strict=True))
    yield mlp, parts.mlp_parts.down, "down"


def whole_mlp(blocks: Iterable[nn.Module], name: str) -> nn.Module | None:
    """The first MLP that still is the family's own; None where all were removed or replaced."""
    found = (inside(getattr(block, name)) for block in blocks)
    return next((mlp for mlp in found if not isinstance(mlp, Absent | LinearMlp)), None)


def find_blocks(model: nn.Module, kind: type[nn.Module]) -> tuple[nn.Module, str] | None:
    """(owner, attribute) of the list whose members are all of class `kind`, or its Trunk."""
    for owner in model.modules():
        for name, child in owner.named_children():
            members = list(child.children())
            if (
                isinstance(child, nn.ModuleList)
                and members
                and all(type(member) in (kind, Trunk) for member in members)
            ):
                return owner, name
    return None


def lacking(container: nn.Module, parts: BlockParts) -> str:
    """What some block lacks of the parts named, in words; empty when nothing is lacking.

    Names change between versions of a library: what is not found is said, never guessed.
    """
    for _, _, block in blocks_in(container):
        names = (parts.norm1, parts.attention, *parts.after1, parts.norm2, parts.mlp, *parts.after2)
        if absent := _absent(block, names):
            return absent
        attention, mlp = attention_of(block, parts), mlp_of(block, parts)
        absent = _absent(attention, _attention_names(parts.attention_parts)) or _absent(
            mlp, _mlp_names(parts.mlp_parts)
        )
        if absent:
            return absent
    return ""


def _attention_names(parts: AttentionParts) -> tuple[str, ...]:
    always = (*parts.qkv, parts.out, *parts.heads, *parts.width)
    norms = (parts.q_norm, parts.k_norm, parts.norm)
    optional = (parts.head_dim, *norms, parts.gate, parts.dropout, parts.out_dropout)
    return (*always, *(name for name in optional if name is not None))


def _mlp_names(parts: MlpParts) -> tuple[str, ...]:
    return (*parts.up, parts.down, *((parts.norm,) if parts.norm is not None else ()))


def _absent(owner: nn.Module, names: Iterable[str]) -> str:
    if isinstance(owner, Absent | LinearMlp):
        return ""
    missing = [name for name in names if getattr(owner, name, ABSENT) is ABSENT]
    return f"{type(owner).__name__} has no {', '.join(missing)}" if missing else ""


def is_linear(layer: nn.Module) -> bool:
    """A linear, or a wrapper of somebody's around one."""
    inner = _wrapped(layer)
    return isinstance(layer, nn.Linear) or (inner is not None and is_linear(inner))


def is_conv(layer: nn.Module) -> bool:
    """A convolution over one, two or three axes, or a wrapper of somebody's around one."""
    inner = _wrapped(layer)
    return isinstance(layer, CONVS) or (inner is not None and is_conv(inner))


def _wrapped(layer: nn.Module) -> nn.Module | None:
    """What PEFT's wrappers keep of the layer that they took the place of."""
    for name in ("base_layer", "original_module"):
        inner = getattr(layer, name, None)
        if isinstance(inner, nn.Module):
            return inner
    return None


def layers_in(
    owner: nn.Module, kind: Callable[[nn.Module], bool], key: str = "", role: Role = "other"
) -> Iterator[LayerSite]:
    """Sites of the layers below `owner` that `kind` accepts and that are called as modules.

    nn.MultiheadAttention reads the weight of its `out_proj` instead of calling it; nothing below a
    wrapped layer, or in a readout, is a site of its own.
    """
    for name, child in owner.named_children():
        label = f"{key}.{name}" if key else name
        if kind(child):
            if not isinstance(owner, nn.MultiheadAttention):
                yield LayerSite(label, owner, name, role)
        elif _wrapped(child) is None and not isinstance(child, Readout):
            yield from layers_in(child, kind, label, role)


def last_layers(owner: nn.Module, *names: str) -> tuple[LayerSite, ...]:
    """Sites of those children of `owner` that hold parameters: its classifiers."""
    children = dict(owner.named_children())
    held = [n for n in names if n in children and any(True for _ in children[n].parameters())]
    return tuple(LayerSite(name, owner, name, "other") for name in held)


def readouts_in(owner: nn.Module, width: int, *names: str, **dense: Any) -> tuple[ReadoutSite, ...]:
    """Sites of those children of `owner` that are classifiers, or keep the place of one.

    Args:
        width: of the features that arrive where no classifier says it.
        dense: what `ReadoutSite` says of readouts of every patch.
    """
    children = dict(owner.named_children())
    return tuple(
        ReadoutSite(name, owner, name, *(_sizes(children[name]) or (width, None)), **dense)
        for name in names
        if name in children
    )


def _sizes(classifier: nn.Module) -> tuple[int, int] | None:
    """Width of the features that a classifier reads, and the number of its outputs."""
    plain = plain_of(classifier)
    if isinstance(plain, Readout):
        return plain.inputs, plain.outputs
    if isinstance(plain, nn.Linear):
        return plain.in_features, plain.out_features
    return None


def bypasses_in(model: nn.Module) -> tuple[tuple[nn.Module, str, object], ...]:
    """Attention modules that read their linear's weight unless told to add the biases apart."""
    name = "qkv_bias_separate"
    return tuple(
        (module, name, True) for module in model.modules() if getattr(module, name, None) is False
    )


def is_bypassed(model: nn.Module) -> bool:
    """Whether some attention module calls its linear only because it was told to."""
    return any(
        getattr(module, "qkv_bias_separate", False) and getattr(module, "q_bias", None) is not None
        for module in model.modules()
    )


def size_in_config(config: Any) -> tuple[int, int, int]:
    """Channels, height and width in a transformers vision configuration."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return (int(config.num_channels), int(height), int(width))
