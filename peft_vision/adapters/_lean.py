"""PEFT's low-rank linear with a lean step: its parameters, names and files, another forward.

What a step holds for backward, and its time, are what `peft_vision.layers.low_rank` says. All else
(several active adapters, merged ones, variants, dropout, mixed batches) is left to PEFT's forward.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peft_vision.layers.low_rank import autocast_dtype, low_rank_linear

ADDED = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "forward",
)
"""Where somebody's hooks, or a forward of their own, would stand in a module."""


class LeanLinear(Linear):
    """PEFT's layer; one plain active adapter is computed by hand."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: ... x in to ... x out."""
        name = None if args or kwargs else self._only_adapter()
        if name is None or not self._is_plain(x, name):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base, down, up = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        return low_rank_linear(x, base.weight, base.bias, down, up, self.scaling[name])

    def _only_adapter(self) -> str | None:
        """The one adapter that is active, or None."""
        if self.disable_adapters or self.merged or torch.compiler.is_compiling():
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if len(active) != 1 or active[0] in self.lora_variant or traced:
            return None
        return str(active[0])

    def _is_plain(self, x: Tensor, name: str) -> bool:
        """Whether nothing but the two matrices comes on top of a frozen linear."""
        base, down, up = self.base_layer, self.lora_A[name], self.lora_B[name]
        dropout = self.lora_dropout[name]
        silent = not dropout.training or isinstance(dropout, nn.Identity)
        return (
            silent
            and all(_is_bare(layer) for layer in (base, down, up))
            and down.bias is None
            and up.bias is None
            and not base.weight.requires_grad
            and isinstance(self.scaling[name], float | int)
            and _fits(x, base.weight.dtype, down.weight.dtype, up.weight.dtype)
        )


def lean(target: nn.Module, adapter_name: str, **kwargs: Any) -> LeanLinear | None:
    """PEFT's hook for own layers: None leaves `target` to PEFT's own classes.

    Subclasses of nn.Linear may pack their weight (4-bit) or be read instead of called.
    """
    base = getattr(target, "base_layer", target)
    plain = type(base) is nn.Linear and base.weight.is_floating_point()
    if not plain or kwargs.get("parameter_name") or kwargs["config"].fan_in_fan_out:
        return None
    return LeanLinear(target, adapter_name, **kwargs)


def _is_bare(layer: nn.Module) -> bool:
    """Whether calling `layer` is nothing but its linear map: exactly this class, and no hooks."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) in (nn.Parameter, FakeTensor)
        and not any(vars(layer).get(name) for name in ADDED)
    )


def _fits(x: Tensor, base: torch.dtype, down: torch.dtype, up: torch.dtype) -> bool:
    """Whether the dtypes are those of ordinary training, where one dtype is computed in."""
    if autocast_dtype(x) is not None:
        return torch.float64 not in (base, down, up)
    narrow = base in (torch.bfloat16, torch.float16)
    return x.dtype == base and down == up and (down == base or (narrow and down == torch.float32))
