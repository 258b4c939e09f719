"""What keeps gates together: the price of what they let through, and a cost to be met.

loss = sum of weight x KL + l1 (s - t) + l2 (s - t)^2, where s is the share of the cost in
multiply-accumulates that is expected to go, and t the share that is to go. The multipliers l1 and
l2 start at zero and ascend (TVA-Prune, VTrans; Dutta et al., 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.layers.gates import UNBOUNDED, Gate, Hastened
from peft_vision.layers.traits import Penalised

ASCENT_LINEAR, ASCENT_QUADRATIC = 0.2, 20.0
"""How much faster than gates the multipliers learn.

Gates travel from wide open to the border before any of them saves anything. What the linear one
gathers on that way would carry them far beyond the target, so that it has to be slow; the quadratic
one, whose pull ends where the target is met, does the work.
"""


@dataclass(frozen=True)
class Term:
    """A part of a model's cost, proportional to the shares that are left at some gates.

    Attributes:
        macs: multiply-accumulates of one image, with everything in place.
        gates: the keys of the gates whose shares multiply it.
    """

    macs: float
    gates: tuple[str, ...] = ()


def cost_share(terms: Sequence[Term], shares: Mapping[str, Tensor]) -> Tensor:
    """The share of the cost that is left. A gate without a share counts as whole.

    Args:
        shares: key -> a scalar in [0, 1].
    """
    whole = sum(term.macs for term in terms)
    keys = list(shares)
    values = torch.stack([*shares.values(), torch.ones_like(next(iter(shares.values())))])
    at = {key: place for place, key in enumerate(keys)}
    longest = max(len(term.gates) for term in terms)
    rows = [[at.get(key, len(keys)) for key in term.gates] for term in terms]
    index = torch.tensor(
        [row + [len(keys)] * (longest - len(row)) for row in rows], device=values.device
    )
    macs = torch.tensor([term.macs / whole for term in terms]).to(values)
    return (macs * values[index].prod(dim=1)).sum()


class Controller(nn.Module, Penalised):
    """The penalty of all gates of a model.

    Attributes:
        gates: key -> gate. They belong to where they stand, and are not registered here.
        shared: the gate of the residual stream, which many norms share and this module owns.
        weights: key -> what its KL is multiplied by.
        terms: the model's cost.
        target: share of the cost that is to be left.
        ramp: number of steps over which the target falls from 1; `ramp_share` of all.
        steps: number of training steps that the gates have seen.
        thawed: names of the parameters that were trained before gates were put in.
    """

    steps: Tensor

    def __init__(
        self,
        gates: Mapping[str, Gate],
        shared: Gate | None,
        weights: Mapping[str, float],
        terms: Sequence[Term],
        target: float,
        speed: float,
        **like: Any,
    ) -> None:
        super().__init__()
        self.gates = dict(gates)
        self.shared = shared
        self.weights = dict(weights)
        self.terms = list(terms)
        self.target = target
        self.speed = speed
        self.ramp, self.ramp_share = 1, 0.0
        self.thawed: list[str] = []
        self.linear = nn.Parameter(torch.zeros((), **like))
        self.quadratic = nn.Parameter(torch.zeros((), **like))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=self.linear.device))

    def plan(self, steps: int) -> None:
        """Say how many training steps there will be."""
        self.ramp = max(1, round(self.ramp_share * steps))

    def hasten(self, times: float) -> None:
        """Let gates and multipliers learn so many times faster still, against slower weights.

        To be called before training: where they stand is an offset that counts `speed` times.
        """
        self.speed *= times
        for gate in self.gates.values():
            gate.speed *= times

    def expected(self) -> Tensor:
        """Share of the cost that is expected to be left, with gradient."""
        return cost_share(self.terms, {key: gate.share() for key, gate in self.gates.items()})

    @torch.no_grad()
    def settled(self) -> float:
        """Share of the cost that is left once what is worth nothing has gone."""
        shares = {key: gate.kept().sum() / gate.of for key, gate in self.gates.items()}
        return float(cost_share(self.terms, shares))

    def aim(self) -> Tensor:
        """Share of the cost that is to have gone by now."""
        reached = (self.steps / self.ramp).clamp(max=1.0)
        return (1.0 - self.target) * reached

    def penalty(self) -> Tensor:
        """Of one batch; called once for each while training, which is how steps are counted."""
        if self.training:
            self.steps += 1
        priced = [self.weights[key] * gate.kl() for key, gate in self.gates.items()]
        gap = 1.0 - self.expected() - self.aim()
        held = self._risen(self.linear, ASCENT_LINEAR) * gap
        held = held + self._risen(self.quadratic, ASCENT_QUADRATIC) * gap.square()
        return torch.stack(priced).sum() + held

    def _risen(self, multiplier: Tensor, ascent: float) -> Tensor:
        value: Tensor = Hastened.apply(multiplier, 0.0, ascent * self.speed, UNBOUNDED, True)
        return value


def controller_in(model: nn.Module) -> Controller | None:
    """The controller of the gates of `model`, if it has any."""
    return next((m for m in model.modules() if isinstance(m, Controller)), None)
