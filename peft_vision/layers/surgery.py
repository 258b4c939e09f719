"""Keep some rows or columns of a layer: one rule per layer class, nothing guesses.

A wrapper of somebody's layer registers its own rule (``keep_outputs.register(ItsClass)``), so
that a wrapped layer can be cut like the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

import torch
from torch import Tensor, nn

from peft_vision.errors import UnsupportedSite


def select(values: Tensor, indices: Sequence[int], dim: int) -> Tensor:
    """Rows (`dim=0`) or columns (`dim=1`) of a tensor; works on `meta` too."""
    index = torch.as_tensor(list(indices), dtype=torch.long, device=values.device)
    return values.detach().index_select(dim, index)


def select_parameter(owner: nn.Module, name: str, indices: Sequence[int], dim: int = 0) -> None:
    """Replace a parameter or buffer of `owner` by some of its rows or columns, in place."""
    values = getattr(owner, name)
    kept = select(values, indices, dim)
    if isinstance(values, nn.Parameter):
        setattr(owner, name, nn.Parameter(kept, requires_grad=values.requires_grad))
        return
    owner.register_buffer(name, kept, persistent=name not in owner._non_persistent_buffers_set)  # noqa: SLF001


@singledispatch
def keep_outputs(layer: nn.Module, indices: Sequence[int]) -> None:
    """Keep some output features of `layer`, in place.

    Raises:
        UnsupportedSite: there is no rule for this class of layer.
    """
    raise UnsupportedSite(f"There is no rule to cut the outputs of {type(layer).__name__}.")


@singledispatch
def keep_inputs(layer: nn.Module, indices: Sequence[int]) -> None:
    """Keep some input features of `layer`, in place.

    Raises:
        UnsupportedSite: there is no rule for this class of layer.
    """
    raise UnsupportedSite(f"There is no rule to cut the inputs of {type(layer).__name__}.")


@singledispatch
def keep_features(layer: nn.Module, indices: Sequence[int]) -> None:
    """Keep some features of a layer that maps each feature to itself (a norm), in place.

    Raises:
        UnsupportedSite: there is no rule for this class of layer.
    """
    if any(True for _ in layer.parameters()):
        raise UnsupportedSite(f"There is no rule to cut the features of {type(layer).__name__}.")


@singledispatch
def weight_of(layer: nn.Module) -> Tensor:
    """The weight (out x in) that `layer` computes with, detached.

    Raises:
        UnsupportedSite: there is no rule for this class of layer.
    """
    raise UnsupportedSite(f"There is no rule to read the weight of {type(layer).__name__}.")


@singledispatch
def output_tensors(layer: nn.Module) -> list[Tensor]:
    """Tensors with a row for each output, in which the outputs are linear: weights and biases.

    Raises:
        UnsupportedSite: there is no rule for this class of layer.
    """
    raise UnsupportedSite(f"There is no rule to mix the outputs of {type(layer).__name__}.")


@output_tensors.register(nn.Linear)
def _(layer: nn.Linear) -> list[Tensor]:
    _require_plain(layer)
    return [layer.weight, *([] if layer.bias is None else [layer.bias])]


@weight_of.register(nn.Linear)
def _(layer: nn.Linear) -> Tensor:
    _require_plain(layer)
    return layer.weight.detach()


@keep_outputs.register(nn.Linear)
def _(layer: nn.Linear, indices: Sequence[int]) -> None:
    _require_plain(layer)
    select_parameter(layer, "weight", indices, 0)
    if layer.bias is not None:
        select_parameter(layer, "bias", indices, 0)
    layer.out_features = len(indices)


@keep_inputs.register(nn.Linear)
def _(layer: nn.Linear, indices: Sequence[int]) -> None:
    _require_plain(layer)
    select_parameter(layer, "weight", indices, 1)
    layer.in_features = len(indices)


@keep_features.register(nn.LayerNorm)
def _(layer: nn.LayerNorm, indices: Sequence[int]) -> None:
    for name in ("weight", "bias"):
        if getattr(layer, name) is not None:
            select_parameter(layer, name, indices, 0)
    layer.normalized_shape = (len(indices),)


@keep_features.register(nn.RMSNorm)
def _(layer: nn.RMSNorm, indices: Sequence[int]) -> None:
    if layer.weight is not None:
        select_parameter(layer, "weight", indices, 0)
    layer.normalized_shape = (len(indices),)


def _require_plain(layer: nn.Linear) -> None:
    # Subclasses of Linear may pack their weight (4-bit) or carry more parameters (LoRA): cutting
    # only `weight` would leave them misaligned, so a subclass needs a rule of its own.
    if not layer.weight.dtype.is_floating_point or layer.weight.dim() != 2:
        raise UnsupportedSite(
            f"{type(layer).__name__} holds a packed weight ({layer.weight.dtype}, shape "
            f"{tuple(layer.weight.shape)}) that cannot be cut. Cut first, quantize afterwards."
        )


@singledispatch
def settle_sizes(layer: nn.Module, groups: float = 1.0) -> None:
    """Let a layer's own figures follow its weights, after some of their rows or columns went.

    Args:
        groups: share of a convolution's groups that stays.
    """


@settle_sizes.register(nn.modules.conv._ConvNd)  # noqa: SLF001
def _(layer: nn.modules.conv._ConvNd, groups: float = 1.0) -> None:
    layer.groups = round(layer.groups * groups)
    first, second = layer.weight.shape[:2]
    if layer.transposed:
        layer.in_channels, layer.out_channels = first, second * layer.groups
    else:
        layer.out_channels, layer.in_channels = first, second * layer.groups


@settle_sizes.register(nn.Linear)
def _(layer: nn.Linear, groups: float = 1.0) -> None:
    layer.out_features, layer.in_features = layer.weight.shape


@settle_sizes.register(nn.modules.batchnorm._NormBase)  # noqa: SLF001
def _(layer: nn.modules.batchnorm._NormBase, groups: float = 1.0) -> None:
    values = layer.running_mean if layer.running_mean is not None else layer.weight
    layer.num_features = int(values.shape[0])


@settle_sizes.register(nn.LayerNorm)
@settle_sizes.register(nn.RMSNorm)
def _(layer: nn.LayerNorm | nn.RMSNorm, groups: float = 1.0) -> None:
    layer.normalized_shape = tuple(layer.weight.shape)


@settle_sizes.register(nn.GroupNorm)
def _(layer: nn.GroupNorm, groups: float = 1.0) -> None:
    layer.num_channels = int(layer.weight.shape[0])
