"""A linear layer in 4 bits: bitsandbytes' own, made to save, to move and to compute the same.

Four things are done here that the layer of bitsandbytes does not do. It loads from a state dict.
Its evaluation on CPUs with AVX512-BF16 does not repack the weight (which would round its scales for
good). Its bias is cast for the product, not in place. And widths that are no multiple of the block
are dequantized block by block: the CPU kernel takes each row to begin a block of its own there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from peft_vision.layers.quantized import FLAG4, Multiplied, Quantized

BLOCKS = (64, 32)
"""Sizes of the blocks that share a scale, the best known first."""

COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take."""


class FourBitLinear(Quantized, Linear4bit):  # type: ignore[misc, unused-ignore]
    """A frozen linear layer of 4-bit codes and one scale per block of 64 weights.

    Where 64 does not divide the width and 32 does, blocks are of 32.

    Args:
        layer: the dense layer; its bias is taken over, its weight is packed. On `meta` the
            structure alone is made.
        kind: of the code, as bitsandbytes names it.
        nested: quantize the scales, too.
        compute_dtype: of the product; None takes that of the input.
    """

    flag = FLAG4
    weight: Any

    def __init__(
        self, layer: nn.Linear, kind: str, *, nested: bool, compute_dtype: torch.dtype | None
    ) -> None:
        super().__init__(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=compute_dtype,
            compress_statistics=nested,
            quant_type=kind,
            device="meta",
        )
        self.kind, self.nested = kind, nested
        self.bias = layer.bias
        self.dense_dtype = layer.weight.dtype
        self.block = next((size for size in BLOCKS if self.in_features % size == 0), BLOCKS[0])
        self.train(layer.training)
        if layer.weight.is_meta:
            count = (layer.weight.numel() + 1) // 2
            self._hold(torch.empty(count, 1, dtype=torch.uint8, device="meta"), None)
            return
        # On the CPU whatever the device: a plan that is replayed elsewhere gives the same codes.
        exact = layer.weight.detach().cpu().contiguous()
        exact = exact if exact.dtype in COMPUTED else exact.float()
        codes, state = quantize_4bit(
            exact, blocksize=self.block, compress_statistics=nested, quant_type=kind
        )
        state.to(layer.weight.device)
        self._hold(codes.to(layer.weight.device), state)

    def _hold(self, codes: Tensor, state: QuantState | None) -> None:
        """Have `codes` as the weight; bitsandbytes and PEFT find the scales on the parameter."""
        self.weight = Params4bit(
            codes,
            requires_grad=False,
            quant_state=state,
            blocksize=self.block,
            compress_statistics=self.nested,
            quant_type=self.kind,
            bnb_quantized=True,
        )

    @property
    def quant_state(self) -> QuantState | None:
        """The scales, where the parameter has them: copies and moves carry one, not two."""
        return self.weight.quant_state

    @quant_state.setter
    def quant_state(self, state: QuantState | None) -> None:
        self.weight.quant_state = state

    def dequantized(self) -> Tensor:
        """The weight that the layer computes with, out x in, in 32-bit floats."""
        state: Any = copy.copy(self.quant_state)
        codes = self.weight.data.reshape(-1)
        count = self.out_features * self.in_features
        blocks = -(-count // self.block)
        state.shape, state.dtype = torch.Size((blocks, self.block)), torch.float32
        room = blocks * self.block // 2 - codes.numel()
        values: Tensor = dequantize_4bit(nn.functional.pad(codes, (0, room)).view(-1, 1), state)
        return values.flatten()[:count].view(self.out_features, self.in_features)

    def packed(self, layer: nn.Linear) -> FourBitLinear:
        """Another layer, packed in the same way."""
        dtype = self.compute_dtype
        return FourBitLinear(layer, self.kind, nested=self.nested, compute_dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`... I` -> `... O`, in the input's dtype."""
        dtype = self.compute_dtype or (x.dtype if x.dtype in COMPUTED else torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        out: Tensor
        if self.in_features % self.block == 0:
            out = matmul_4bit(x.to(dtype), self.weight, self.quant_state, bias=bias)
        else:
            out = Multiplied.apply(x.to(dtype), self)
            out = out if bias is None else out + bias
        return out.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourBitLinear:
        state = self.quant_state
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype)).dtype
        super()._apply(fn, recurse)
        if state is not None and not self.weight.is_meta:
            state.to(self.weight.device)
            self._hold(self.weight.data, state)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        start = f"{prefix}weight."
        names = [name for name in state_dict if name.startswith(start)]
        parts = {name.removeprefix(start): state_dict.pop(name) for name in names}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}weight" not in state_dict:
            return
        if not parts:
            missing: list[str] = args[2]
            missing.append(f"{start}quant_state")
            return
        codes = self.weight.data
        self._hold(codes, QuantState.from_dict(parts, device=codes.device))
