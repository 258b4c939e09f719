"""Copies of a model whose tensors have shapes, dtypes and sizes, but no numbers and no memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_vision.layers.quantized import FLAG4, FLAG8, Quantized

if TYPE_CHECKING:
    from peft_vision.layers.four_bit import FourBitLinear

NESTED_BLOCK = 256
"""Scales that share a scale of their own, where scales are quantized, too (QLoRA)."""


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make all new tensors fake ones; small real ones that a model carries along are let in."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def fake_copy(model: nn.Module) -> nn.Module:
    """A copy of `model`, which may be on `meta`, on the fake CPU; inside `fake_tensors`.

    Linears with packed weights stay packed: their codes and scales have the sizes of real ones.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():  # noqa: SLF001 - ties and subclasses count
            if parameter is not None and id(parameter) not in memo:
                like = _like(parameter)
                memo[id(parameter)] = nn.Parameter(like, requires_grad=parameter.requires_grad)
        for value in (*module._buffers.values(), *vars(module).values()):  # noqa: SLF001
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = _like(value)
    for module in model.modules():
        if isinstance(module, Quantized):
            _give_scales(module, memo)
    return copy.deepcopy(model, memo)


def _like(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _give_scales(layer: Any, memo: dict[int, Any]) -> None:
    """What bitsandbytes keeps on its own kind of parameter, on the fake one."""
    weight = memo[id(layer.weight)]
    if layer.flag == FLAG8:
        weight.CB = weight.SCB = None
        # Filled anew in every forward pass; what a copy of them would hold is not there.
        memo[id(layer.state)] = _state8(layer)
    elif layer.flag == FLAG4:
        weight.quant_state, weight.bnb_quantized = _state4(layer), True


def _state8(layer: Any) -> Any:
    from bitsandbytes import MatmulLtState

    state = MatmulLtState()
    state.threshold, state.has_fp16_weights = layer.state.threshold, False
    return state


def _state4(layer: FourBitLinear) -> Any:
    from bitsandbytes.functional import QuantState

    blocks = math.ceil(layer.in_features * layer.out_features / layer.block)
    kind: dict[str, Any] = {"quant_type": layer.kind, "blocksize": layer.block}
    inner: dict[str, Any] = {}
    scales = torch.empty(blocks)
    if layer.nested:
        scales = torch.empty(blocks, dtype=torch.uint8)
        count = math.ceil(blocks / NESTED_BLOCK)
        second = QuantState(
            absmax=torch.empty(count),
            code=torch.empty(256),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        inner = {"offset": torch.empty(()), "state2": second}
    return QuantState(
        absmax=scales,
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=torch.empty(16),
        dtype=layer.dense_dtype,
        **kind,
        **inner,
    )


def scales_of(model: nn.Module) -> Iterator[Tensor]:
    """The tensors beside the codes of packed weights, which are neither parameters nor buffers."""
    for parameter in model.parameters():
        state = vars(parameter).get("quant_state")
        while state is not None:
            yield from (t for t in vars(state).values() if isinstance(t, Tensor))
            state = state.state2
