"""Surgery on what stands on the residual stream beside the linears of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

from torch import nn

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.absent import Absent
from peft_vision.layers.attention import OwnAttention
from peft_vision.layers.bottleneck import Beside
from peft_vision.layers.mlp import OwnMlp
from peft_vision.layers.narrow_attention import NarrowAttention
from peft_vision.layers.ownership import is_copied, plain_of
from peft_vision.layers.positions import TypeRows
from peft_vision.layers.prompts import Prompts
from peft_vision.layers.readout import (
    BoxReadout,
    LinearReadout,
    MaskReadout,
    PooledReadout,
    Readout,
)
from peft_vision.layers.reduction import Reducer
from peft_vision.layers.surgery import keep_features, keep_inputs, keep_outputs, select_parameter
from peft_vision.layers.votes import Votes


@keep_outputs.register(nn.Conv2d)
def _(layer: nn.Conv2d, indices: Sequence[int]) -> None:
    if layer.groups != 1 or not layer.weight.dtype.is_floating_point:
        raise UnsupportedSite("The outputs of a grouped or packed convolution cannot be cut.")
    select_parameter(layer, "weight", indices, 0)
    if layer.bias is not None:
        select_parameter(layer, "bias", indices, 0)
    layer.out_channels = len(indices)


@keep_outputs.register(nn.Embedding)
def _(layer: nn.Embedding, indices: Sequence[int]) -> None:
    select_parameter(layer, "weight", indices, 1)
    layer.embedding_dim = len(indices)


@keep_inputs.register(LinearReadout)
def _(layer: LinearReadout, indices: Sequence[int]) -> None:
    keep_features(layer.norm, indices)
    keep_inputs(layer.linear, indices)
    layer.inputs = len(indices)


@keep_inputs.register(PooledReadout)
@keep_inputs.register(MaskReadout)
def _(layer: Any, indices: Sequence[int]) -> None:
    keep_inputs(layer.layers[0], indices)
    layer.inputs = len(indices)


@keep_inputs.register(BoxReadout)
def _(layer: Any, indices: Sequence[int]) -> None:
    for branch in (layer.score, layer.box):
        keep_inputs(branch[0], indices)
    layer.inputs = len(indices)


def read_width(layer: nn.Module) -> int | None:
    """How many features a linear or a readout reads; None for what reads any number."""
    plain = plain_of(layer)
    if isinstance(plain, Readout):
        return plain.inputs
    if isinstance(plain, nn.Identity):
        return None
    found = getattr(plain, "in_features", None)
    return int(found) if found is not None else None


def keep_read(layer: nn.Module, indices: Sequence[int]) -> None:
    """Keep some of the features that a linear or a readout reads, and PEFT's copy of it as well.

    Raises:
        UnsupportedSite: there is no rule for this class of layer.
    """
    if is_copied(layer):
        both: Any = layer
        for one in (both.original_module, *both.modules_to_save.values()):
            keep_inputs(one, indices)
    else:
        keep_inputs(layer, indices)


@singledispatch
def keep_stream(module: nn.Module, indices: Sequence[int]) -> None:
    """Keep some features of the stream in what `module` itself holds for each of them, in place.

    Called for every module of a model; layers that views name are cut by name. A module of ours
    that holds something of the stream's width registers its own rule.

    Raises:
        UnsupportedSite: it is a module of ours that may hold such a thing, without a rule.
    """
    if isinstance(module, OwnAttention | OwnMlp | Reducer) and _holds(module):
        raise UnsupportedSite(
            f"There is no rule to cut the width of {type(module).__name__}. Cut the width first."
        )


def _holds(module: nn.Module) -> bool:
    """Whether a module of ours holds tensors beside the module that it keeps inside."""
    kept = {"attention", "inner"}
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return any(name.partition(".")[0] not in kept for name in names)


@keep_stream.register(NarrowAttention)
def _(module: NarrowAttention, indices: Sequence[int]) -> None:
    """What it holds is of a head's width."""


@keep_stream.register(Prompts)
def _(module: Prompts, indices: Sequence[int]) -> None:
    select_parameter(module, "tokens", indices, 1)


@keep_stream.register(Votes)
def _(module: Votes, indices: Sequence[int]) -> None:
    select_parameter(module, "scales", indices, 1)


@keep_stream.register(Absent)
def _(module: Absent, indices: Sequence[int]) -> None:
    if module.offset is not None:
        select_parameter(module, "offset", indices, 0)
    if module.first is not None:
        select_parameter(module, "first", indices, 1)


@keep_stream.register(TypeRows)
def _(module: TypeRows, indices: Sequence[int]) -> None:
    select_parameter(module, "type_embed", indices, 1)
    for name in list(module._buffers):  # noqa: SLF001
        select_parameter(module, name, indices, 1)


@keep_stream.register(Beside)
def _(module: Beside, indices: Sequence[int]) -> None:
    keep_inputs(module.bottleneck.down, indices)
    keep_outputs(module.bottleneck.up, indices)
