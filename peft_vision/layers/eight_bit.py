"""A linear layer in 8 bits: bitsandbytes' own, made to save, to move and to load like any other.

The layer of bitsandbytes keeps its scales beside its parameters and loses them when the model moves
after a forward pass, takes no images of B H W C in evaluation, and casts its bias in place. Here
the scales are a buffer, inputs are flattened and the bias is cast for the product.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes import MatmulLtState, matmul
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn

from peft_vision.layers.quantized import FLAG8, Multiplied, Quantized

# It would say so for every layer of every batch, and there is nothing to be done about it.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: "inputs will be cast" not in str(record.msg)
)


class EightBitLinear(Quantized, Linear8bitLt):  # type: ignore[misc, unused-ignore]
    """A frozen linear layer of 8-bit integers and one scale per output.

    Args:
        layer: the dense layer; its bias is taken over, its weight is packed. On `meta` the
            structure alone is made.
        threshold: in evaluation, input features with a value of at least this are multiplied in
            floating point; 0 for none.
    """

    flag = FLAG8
    weight: Any
    SCB: Tensor
    state: MatmulLtState

    def __init__(self, layer: nn.Linear, threshold: float) -> None:
        super().__init__(
            layer.in_features,
            layer.out_features,
            bias=False,
            has_fp16_weights=False,
            threshold=threshold,
            device="meta",
        )
        self.packing = type(self.weight)
        self.bias = layer.bias
        self.dense_dtype = layer.weight.dtype
        self.train(layer.training)
        if layer.weight.is_meta:
            self.register_buffer("SCB", torch.empty(self.out_features, device="meta"))
            self._hold(torch.empty_like(layer.weight).char())
            return
        # On the CPU whatever the device: a plan that is replayed elsewhere gives the same numbers.
        exact = layer.weight.detach().cpu().float().contiguous()
        packed = self.packing(exact, requires_grad=False).to("cpu")
        self.register_buffer("SCB", packed.SCB.to(layer.weight.device))
        self._hold(packed.data.to(layer.weight.device))

    def _hold(self, codes: Tensor) -> None:
        self.weight = self.packing(codes, requires_grad=False)
        self._bind()

    def _bind(self) -> MatmulLtState:
        """Show bitsandbytes and PEFT the numbers where they look for them."""
        if self.weight.SCB is not None:  # PEFT has merged, and packed the weight anew
            self.SCB = self.weight.SCB
            self.weight.CB = self.weight.SCB = None
        self.state.CB, self.state.SCB = self.weight.data, self.SCB
        self.state.is_training = False
        return self.state

    def dequantized(self) -> Tensor:
        """The weight that the layer computes with, out x in, in 32-bit floats."""
        state = self._bind()
        weight: Tensor = state.CB.float() * (state.SCB / 127).unsqueeze(1)
        return weight

    def packed(self, layer: nn.Linear) -> EightBitLinear:
        """Another layer, packed in the same way."""
        return EightBitLinear(layer, self.state.threshold)

    def forward(self, x: Tensor) -> Tensor:
        """`... I` -> `... O`; in training with the weight rounded, in evaluation the input, too.

        In training bitsandbytes rounds inputs on some devices and not on others, and keeps every
        input until the backward pass, so that recomputing activations would save nothing.
        """
        if self.training:
            product: Tensor = Multiplied.apply(x, self)
            return product if self.bias is None else product + self.bias.to(product.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        flat = x.reshape(-1, self.in_features)
        out: Tensor = matmul(flat, self.weight, bias=bias, state=self._bind())
        return out.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EightBitLinear:
        scales = self._bind().SCB
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype)).dtype
        super()._apply(fn, recurse)
        if not scales.is_meta:
            self.SCB = scales.to(self.weight.device)  # kernels take 32-bit scales only
        self._hold(self.weight.data)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._hold(self.weight.data)
