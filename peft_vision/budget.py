"""A Budget: what may be spent, as asked by the user and as an absolute figure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from peft_vision.errors import BadBudget

Quantity = Literal["flops", "params", "latency_ms"]

LEAST = 0.98
"""A result lies in (LEAST, 1.00] of its budget."""

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_FIGURE = re.compile(
    r"^\s*([-+]?[0-9.]+(?:e[-+]?\d+)?)\s*([kmgt]?)\s*(flops?|macs?|params?|ms)?\s*$", re.IGNORECASE
)
_EXAMPLES = {
    "flops": "0.4 (a ratio in (0, 1]), 1.8G (FLOPs, two per multiply-accumulate) or 0.9GMACs",
    "params": "0.4 (a ratio in (0, 1]), 9M",
    "latency_ms": "3.5 (milliseconds a batch, on the device named)",
}
_FLAGS = {"flops": "target_flops", "params": "target_params", "latency_ms": "target_latency_ms"}


@dataclass(frozen=True)
class Budget:
    """At most `value` of `quantity`; a ratio when `relative`.

    `flops` counts two per multiply-accumulate at batch size 1; `latency_ms` is milliseconds per
    batch.
    """

    quantity: Quantity
    value: float
    relative: bool = False
    asked: str = ""

    @classmethod
    def parse(cls, quantity: Quantity, asked: str | float) -> Budget:
        """Read what a user typed.

        Args:
            quantity: what is limited.
            asked: a ratio in (0, 1], or an absolute figure with a unit (`1.8G`, `900MMACs`, `9M`).
                A bare number above 1 is refused unless it has a unit or is at least 1000.

        Raises:
            BadBudget: it is not a number, is not positive, or is a ratio above 1.

        >>> Budget.parse("flops", "0.4").limit(100.0)
        40.0
        >>> Budget.parse("flops", "0.9GMACs").limit(1e12)
        1800000000.0
        """
        found = _FIGURE.match(str(asked))
        try:
            number = float(found[1]) if found else math.nan
        except ValueError:
            number = math.nan
        if found is None or not math.isfinite(number):
            raise _refusal(quantity, asked, "is not a figure")
        if number <= 0:
            raise _refusal(quantity, asked, "is not above zero")
        unit, kind = found[2].lower(), (found[3] or "").lower()
        _check_kind(quantity, asked, kind)
        if quantity == "latency_ms":
            return cls(quantity, number * _UNITS[unit], relative=False, asked=str(asked))
        if not unit and not kind and number < 1000:
            if number > 1:
                raise _refusal(quantity, asked, "is a ratio above 1, more than the model has")
            return cls(quantity, number, relative=True, asked=str(asked))
        per = 2.0 if kind.startswith("mac") else 1.0
        return cls(quantity, number * _UNITS[unit] * per, relative=False, asked=str(asked))

    def limit(self, base: float) -> float:
        """The absolute limit for a model that costs `base`."""
        return self.value * base if self.relative else self.value

    def met(self, cost: float, base: float) -> bool:
        """Whether `cost` lies in (LEAST, 1.00] of the limit."""
        return LEAST * self.limit(base) < cost <= self.limit(base)


def parse_one(
    flops: str | float | None, params: str | float | None, latency_ms: str | float | None
) -> Budget:
    """The one budget that was given.

    Raises:
        BadBudget: none or several were given, or it cannot be read.
    """
    asked: list[tuple[Quantity, str | float | None]] = [
        ("flops", flops),
        ("params", params),
        ("latency_ms", latency_ms),
    ]
    given = [(quantity, value) for quantity, value in asked if value is not None]
    if len(given) != 1:
        raise BadBudget(
            f"Exactly one budget is needed, {len(given)} were given. Possible: --target-flops, "
            "--target-params or --target-latency."
        )
    quantity, value = given[0]
    return Budget.parse(quantity, value)


def _check_kind(quantity: Quantity, asked: str | float, kind: str) -> None:
    allowed = {"flops": ("flop", "mac"), "params": ("param",), "latency_ms": ("ms",)}[quantity]
    if kind and not kind.startswith(allowed):
        raise _refusal(quantity, asked, f"is a figure in {kind}")


def _refusal(quantity: Quantity, asked: str | float, why: str) -> BadBudget:
    return BadBudget(f"{_FLAGS[quantity]} {asked!r} {why}. Possible: {_EXAMPLES[quantity]}.")
