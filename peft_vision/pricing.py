"""What a candidate of the search costs: counted on a twin, or timed on the device."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence

from torch import nn

from peft_vision.applying import apply_all
from peft_vision.backbones.sites import device_of
from peft_vision.budget import Quantity
from peft_vision.cost import Cost, count_flops, example_input, input_size, time_on, twin
from peft_vision.method import Method
from peft_vision.plan import Decisions


class Pricing:
    """What a candidate costs: counted on a twin, or timed beside the dense model on its device."""

    def __init__(
        self,
        base: nn.Module,
        methods: Sequence[Method],
        quantity: Quantity,
        image_size: tuple[int, int] | int | None,
        batch_size: int,
    ) -> None:
        self.base = base
        self.methods = methods
        self.quantity = quantity
        self.size = input_size(base, image_size)
        self.empty = twin(base)
        self.batch_size = batch_size
        self.dense_ms = 0.0

    def of(self, methods: Sequence[Method]) -> Pricing:
        """The same prices for decisions of other methods."""
        other = copy.copy(self)
        other.methods = methods
        return other

    def base_cost(self, before: Cost) -> float:
        """What the model that went in costs."""
        return float(before.params if self.quantity == "params" else before.flops)

    def __call__(self, decisions: list[Decisions]) -> float:
        """What the model costs after these decisions, one set per method."""
        candidate = copy.deepcopy(self.base if self.quantity == "latency_ms" else self.empty)
        apply_all(candidate, self.methods, decisions)
        if self.quantity == "params":
            return float(sum(p.numel() for p in candidate.parameters()))
        if self.quantity == "flops":
            return float(count_flops(candidate, self.size))
        return self._time(candidate, rounds=9)

    def again(self, built: nn.Module, cost: Cost) -> float:
        """The cost of the model that was built; timed anew where it is a time."""
        if self.quantity == "latency_ms":
            return self._time(built, rounds=25)
        return float(cost.params if self.quantity == "params" else cost.flops)

    def _time(self, candidate: nn.Module, rounds: int) -> float:
        """Milliseconds: the ratio to the dense model in turns, times the dense model's own."""
        images = example_input(self.base, self.size[1:], self.batch_size)
        calls = 10 if device_of(self.base).type == "cuda" else 1
        if not self.dense_ms:
            alone = time_on({"dense": self.base}, images, rounds=25, calls=calls)
            self.dense_ms = alone["dense"].median
        both = time_on({"dense": self.base, "it": candidate}, images, rounds=rounds, calls=calls)
        pairs = zip(both["it"].milliseconds, both["dense"].milliseconds, strict=True)
        return statistics.median(it / dense for it, dense in pairs) * self.dense_ms
