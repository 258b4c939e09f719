"""What `compress` returns: the model, what was asked, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from peft_vision.backbones import view
from peft_vision.backbones.queries import queries_in
from peft_vision.budget import Budget
from peft_vision.compressed import CompressedModel
from peft_vision.cost import Cost, measure, unwrap
from peft_vision.errors import BudgetUnreachable
from peft_vision.layers.attention_parts import head_dim
from peft_vision.loading import load
from peft_vision.plan import Plan


@dataclass
class Result:
    """What `compress` returns.

    Attributes:
        model: the compressed model; the model that went in is untouched.
        before: cost of the model that went in. `cost`: of the result, counted after it was built.
        budget: what was asked. `limit`: the absolute figure. `got`: what the result costs in it.
        plan: what was decided.
        seconds: how long the search took. `tried`: how many candidates were priced.
        notes: what a user should know (methods left out, for instance).
        kinds: heads and hidden units of the model that went in.
    """

    model: CompressedModel
    before: Cost
    cost: Cost
    budget: Budget
    limit: float
    got: float
    plan: Plan
    seconds: float
    tried: int
    notes: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """What the result costs as a share of the model that went in (FLOPs or parameters)."""
        if self.budget.quantity == "params":
            return self.cost.params / self.before.params
        return self.cost.flops / self.before.flops

    def __str__(self) -> str:
        rows = "\n".join(f"{name:>12}  {was:>14} -> {now:>14}" for name, was, now in self.table())
        share = self.got / self.limit
        return f"{rows}\nasked {self.budget.asked}, got {share:.4f} of the limit"

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of (quantity, before, after)."""
        after, left = self.cost, kinds_of(unwrap(self.model))
        return [
            ("GMACs", f"{self.before.gmacs:.4f}", f"{after.gmacs:.4f}"),
            ("parameters", f"{self.before.params:,}", f"{after.params:,}"),
            ("bytes", f"{self.before.bytes:,}", f"{after.bytes:,}"),
            *[(kind, str(count), str(left[kind])) for kind, count in self.kinds.items()],
            *self._compared(),
        ]

    def _compared(self) -> list[tuple[str, str, str]]:
        """A row on queries and keys, where some are narrower than values."""
        values, left = [], []
        for site in queries_in(view(unwrap(self.model))):
            values.append(head_dim(site.attention, site.parts))
            left.append(site.width)
        if left == values:
            return []
        return [("query width", f"{fmean(values):g}", f"{fmean(left):g} on average")]

    def summary(self) -> dict[str, Any]:
        """Asked and got, as plain JSON."""
        return {
            "quantity": self.budget.quantity,
            "asked": self.budget.asked,
            "limit": self.limit,
            "got": self.got,
            "share_of_limit": self.got / self.limit,
            "before": self.before.to_json(),
            "after": self.cost.to_json(),
            "seconds": self.seconds,
            "tried": self.tried,
            "notes": self.notes,
        }

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Save the model, and prove the budget on what was saved.

        Raises:
            OutputExists, CannotWrite: see `CompressedModel.save_pretrained`.
            BudgetUnreachable: the reloaded model does not cost what was counted.
        """
        self.model.save_pretrained(folder, overwrite=overwrite)
        if self.budget.quantity == "latency_ms" or self.model.history.source is None:
            return
        again = measure(load(folder), self.cost.image_size)
        if (again.flops, again.params) != (self.cost.flops, self.cost.params):
            raise BudgetUnreachable(
                f"{folder} reloads as {again}, but {self.cost} was counted before saving."
            )


def kinds_of(model: nn.Module) -> dict[str, int]:
    """How many heads and hidden units there are, where they are told apart."""
    backbone = view(model)
    counts = {
        "heads": sum(site.count for site in backbone.heads),
        "hidden": sum(site.count for site in backbone.hidden),
    }
    return {kind: count for kind, count in counts.items() if count}
