"""What a linear layer with a packed weight promises, so that others need not know how it is packed.

Counting, proving and merging see such a layer as the dense one whose place it took.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from peft_vision.layers.split_linear import split_outputs

M = TypeVar("M", bound=nn.Module)


class Quantized(ABC):
    """Mixed into an ``nn.Linear`` whose weight is stored in fewer bits and never trained.

    Attributes:
        flag: what PEFT reads off a model that holds such layers, to inject layers that know them.
        dense_dtype: of the weight that was packed; follows the casts of the model.
    """

    flag: ClassVar[str]
    in_features: int
    out_features: int
    bias: nn.Parameter | None
    training: bool
    dense_dtype: torch.dtype

    @abstractmethod
    def dequantized(self) -> Tensor:
        """The weight that the layer computes with, out x in, in 32-bit floats."""

    @abstractmethod
    def packed(self, layer: nn.Linear) -> Quantized:
        """Another layer, packed in the same way."""

    def dense(self) -> nn.Linear:
        """A plain layer with the dequantized weight and the same bias."""
        return self._plain(self.dequantized().to(self.dense_dtype), self.bias)

    def dense_twin(self) -> nn.Linear:
        """A plain layer of the same shape on `meta`."""
        size = (self.out_features, self.in_features)
        bias = None
        if self.bias is not None:
            empty = torch.empty_like(self.bias, device="meta")
            bias = nn.Parameter(empty, requires_grad=self.bias.requires_grad)
        return self._plain(torch.empty(size, dtype=self.dense_dtype, device="meta"), bias)

    def _plain(self, weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = bias  # type: ignore[assignment]
        return layer.train(self.training)


@split_outputs.register(Quantized)
def _(layer: Any, sizes: Sequence[int]) -> list[nn.Module]:  # type: ignore[misc]
    empty = layer.weight.is_meta
    return [
        layer.packed(p)
        for p in split_outputs(layer.dense_twin() if empty else layer.dense(), sizes)
    ]


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """(dotted name, layer) of the layers of `model` that hold a packed weight."""
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            yield name, module


def dequantize(model: M) -> M:
    """Put plain layers with dequantized weights in the place of quantized ones, in place.

    What the model computes stays, up to the rounding of sums. Layers that PEFT injected around
    quantized ones are made for these and cannot be merged afterwards: unload them first.

    Returns:
        The model itself.
    """
    dense: dict[int, nn.Linear] = {}
    for owner in list(model.modules()):
        vars(owner).pop(FLAG4, None)
        vars(owner).pop(FLAG8, None)
        for name, child in list(owner._modules.items()):  # noqa: SLF001 - named_children hides ties
            if isinstance(child, Quantized):
                setattr(owner, name, dense.setdefault(id(child), child.dense()))
    return model


FLAG4, FLAG8 = "is_loaded_in_4bit", "is_loaded_in_8bit"


class Multiplied(torch.autograd.Function):
    """``x @ weight.T`` where the weight is dequantized again for the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantized) -> Tensor:
        """`... I` -> `... O`."""
        ctx.layer = layer
        return nn.functional.linear(x, layer.dequantized().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Of the input; the weight has none."""
        return grad @ ctx.layer.dequantized().to(grad.dtype), None


def relative_error(weight: Tensor, layer: Quantized) -> float:
    """Frobenius norm of what rounding changed, relative to that of the weight."""
    exact = weight.detach().double()
    norm = float(exact.norm())
    lost = float((layer.dequantized().to(exact) - exact).norm())
    return lost / norm if norm else 0.0
