"""4-bit NormalFloat weights (Dettmers et al., QLoRA, NeurIPS 2023) through bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft_vision.backbones.sites import Backbone
from peft_vision.errors import BadSetting
from peft_vision.layers.quantized import Quantized
from peft_vision.method import Evidence, Method, Stage
from peft_vision.plan import Decisions
from peft_vision.quantizers._linears import (
    check_targets,
    decide_errors,
    put_in_place,
    require_bitsandbytes,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Nf4(Method):
    """Store the linears of the blocks in 4 bits; saves memory, costs time.

    Each block of 64 weights shares a scale, and each weight is the nearest of 16 quantiles of a
    normal distribution. The classifier, the patch embedding and all else stay as they are.
    """

    double_quant: bool = False
    """Store the scales in 8 bits, too: 4.13 bits per weight instead of 4.5."""

    compute_dtype: str = "auto"
    """What the products are computed in: "fp32", "bf16", "fp16", or "auto" for the input's own."""

    targets: tuple[str, ...] = ("linears",)
    """Which layers: "linears" (all but the classifier), or roles (q, k, v, qkv, out, up, gate,
    down, other)."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    derived: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.double_quant, bool):
            raise BadSetting(f"double_quant is {self.double_quant!r}; it is true or false.")
        if self.compute_dtype not in {"auto", *DTYPES}:
            raise BadSetting(
                f"compute_dtype is {self.compute_dtype!r}; possible: auto, {', '.join(DTYPES)}."
            )
        check_targets(self.targets)

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per layer, the relative error of its weight."""
        require_bitsandbytes("nf4")
        if strength <= 0:
            return {}
        return decide_errors("nf4", backbone, self.targets, self._pack)

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Pack the layers; on `meta` their structure alone."""
        require_bitsandbytes("nf4")
        put_in_place("nf4", backbone, decisions, self._pack)

    def _pack(self, layer: nn.Linear) -> Quantized:
        from peft_vision.layers.four_bit import FourBitLinear

        dtype = DTYPES.get(self.compute_dtype)
        return FourBitLinear(layer, "nf4", nested=self.double_quant, compute_dtype=dtype)
