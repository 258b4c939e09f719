"""8-bit integer weights (Dettmers et al., LLM.int8(), NeurIPS 2022) through bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from peft_vision.backbones.sites import Backbone
from peft_vision.layers.quantized import Quantized
from peft_vision.method import Evidence, Method, Stage, check_range
from peft_vision.plan import Decisions
from peft_vision.quantizers._linears import (
    check_targets,
    decide_errors,
    put_in_place,
    require_bitsandbytes,
)


@dataclass(frozen=True)
class Int8(Method):
    """Store the linears of the blocks in 8 bits, one scale per output.

    The classifier, the patch embedding and all else stay as they are. In evaluation inputs are
    rounded to 8 bits, too, except features with outliers.
    """

    threshold: float = 6.0
    """In evaluation, input features with a value of at least this are multiplied in floating point;
    0 for none."""

    targets: tuple[str, ...] = ("linears",)
    """Which layers: "linears" (all but the classifier), or roles (q, k, v, qkv, out, up, gate,
    down, other)."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    derived: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0.0, 1e6)
        check_targets(self.targets)

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per layer, the relative error of its weight."""
        require_bitsandbytes("int8")
        if strength <= 0:
            return {}
        return decide_errors("int8", backbone, self.targets, self._pack)

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Pack the layers; on `meta` their structure alone."""
        require_bitsandbytes("int8")
        put_in_place("int8", backbone, decisions, self._pack)

    def _pack(self, layer: nn.Linear) -> Quantized:
        from peft_vision.layers.eight_bit import EightBitLinear

        return EightBitLinear(layer, float(self.threshold))
