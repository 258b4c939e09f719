"""What routes tokens to heads or experts: scores, gates, choices, balance, and annealing.

Tensors: ``x`` is B N D, scores and gates are B N E for E heads or experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.layers.precision import in_full, wide
from peft_vision.layers.surgery import select_parameter
from peft_vision.layers.traits import Lesson

SPREAD = 0.02
"""Standard deviation of a router's first weights; equal ones would leave every choice tied."""
LEAST_ENERGY = 1e-12
"""Below this a member gives a token nothing."""


class Router(nn.Module):
    """Linear scores for routed members, and the two-stage gates beside shared ones (MoH).

    Computes in float32 or wider whatever the model computes in.

    Args:
        width: D. `routed`: E. `shared`: how many members are always on; 0 leaves the gates of one
            stage.
        like: a parameter whose device and dtype are taken.
        seed: of the first weights; None leaves them zero, so that every gate is exactly one.
    """

    shared: nn.Parameter | None
    balance: nn.Parameter | None

    def __init__(
        self, width: int, routed: int, shared: int, like: Tensor, seed: int | None
    ) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        if not dtype.is_floating_point:
            dtype = torch.float32
        drawn = torch.zeros(routed, width)
        if seed is not None:
            drawn.normal_(0.0, SPREAD, generator=torch.Generator().manual_seed(seed))

        def zeros(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*size, device=like.device, dtype=dtype))

        self.routed = nn.Parameter(drawn.to(like.device, dtype))
        self.bias = zeros(routed)
        self.shared = zeros(shared, width) if shared else None
        self.balance = zeros(2, width) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the routed members, B N E."""
        x = wide(x)
        with in_full(x):
            return F.linear(x, self.routed.to(x.dtype), self.bias.to(x.dtype))

    def stages(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Gates of the shared members (B N S) and the factor of the routed ones (B N 1).

        Each is one on average; None where no member is shared.
        """
        if self.shared is None or self.balance is None:
            return None
        x, count = wide(x), self.shared.shape[0]
        with in_full(x):
            shares = 2 * F.linear(x, self.balance.to(x.dtype)).softmax(-1)
            among = count * F.linear(x, self.shared.to(x.dtype)).softmax(-1)
        return shares[..., :1] * among, shares[..., 1:]

    @torch.no_grad()
    def fit(self, lessons: Sequence[Lesson], ridge: float) -> None:
        """Have the logits predict what is wanted, in closed form and in place.

        Args:
            lessons: at least one.
            ridge: added to the diagonal of the covariance of what is read, relative to its mean.
        """
        x = torch.cat([lesson.read for lesson in lessons]).double()
        wanted = torch.cat([lesson.wanted for lesson in lessons]).double()
        mean, level = x.mean(0), wanted.mean(0)
        centered = x - mean
        spread = centered.t() @ centered / len(x)
        spread.diagonal().add_(ridge * spread.diagonal().mean().clamp_min(1e-30))
        both = centered.t() @ (wanted - level) / len(x)
        weight = torch.linalg.solve(spread, both).t()
        self.routed.copy_(weight)
        self.bias.copy_(level - weight @ mean)

    def keep(self, routed: Sequence[int], shared: Sequence[int]) -> None:
        """Keep some members, in place."""
        select_parameter(self, "routed", routed)
        select_parameter(self, "bias", routed)
        if self.shared is not None and not shared:
            self.shared = self.balance = None
        elif self.shared is not None:
            select_parameter(self, "shared", shared)


class QueryNorms(nn.Module):
    """Logits without parameters: norms of the queries, over their deviation across heads."""

    def forward(self, q: Tensor) -> Tensor:
        """From queries B E N D: B N E."""
        norms = wide(q).norm(dim=-1).transpose(1, 2)
        spread = norms.std(-1, correction=0, keepdim=True).clamp_min(1e-6)
        logits: Tensor = norms / spread
        return logits


class Anneal(nn.Module):
    """Counts training forwards, and lowers the share that stays on from one to the target.

    The counter is saved with the model. Evaluation always uses the target, so that what is
    measured is what will run.
    """

    steps: Tensor

    def __init__(self, target: float, over: int, device: torch.device) -> None:
        super().__init__()
        self.target = target
        self.over = over
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=device))

    def forward(self) -> float:
        """The share now; in training the counter goes on, but for activations computed again."""
        step = self.step()
        if step is None:
            return self.target
        progress = min(1.0, step / self.over)
        return self.target + (1.0 - self.target) * (1.0 + math.cos(math.pi * progress)) / 2.0

    def step(self) -> int | None:
        """Which training forward this is, from 0, and counts it; None where that does not matter.

        Activations that are computed again in the backward pass are not another forward.
        """
        if not self.training or self.over <= 0 or self.steps.is_meta:
            return None
        again = recomputing()
        step = int(self.steps) - int(again)
        if not again:
            self.steps += 1
        return step


def recomputing() -> bool:
    """Whether a backward pass is running: checkpointed activations are then computed again."""
    return int(torch._C._current_graph_task_id()) >= 0  # noqa: SLF001 - how torch's checkpoint asks


def unused(module: nn.Module, output: Tensor) -> Tensor:
    """The same output, which no parameter of `module` had a part in.

    Each gets a gradient of zero all the same: processes that train together wait for one from all.
    """
    idle = [p.sum().to(output.dtype) for p in module.parameters() if p.requires_grad]
    return output + 0.0 * torch.stack(idle).sum() if idle else output


@torch.no_grad()
def surplus(read: Tensor, weight: Tensor, members: Iterable[Sequence[int]]) -> Tensor:
    """Energy of what each member gives a token beyond what it gives on average, B N E.

    What a member gives everywhere is left out: it can join the bias.

    Args:
        read: B N F, what a linear reads. `weight`: D F, the linear's. `members`: columns of each.
    """
    found = []
    for columns in members:
        given = F.linear(read[..., columns], weight[:, columns].to(read.dtype))
        found.append((given - given.mean((0, 1))).float().square().sum(-1))
    return torch.stack(found, dim=-1)


def logarithm(energy: Tensor) -> Tensor:
    """Of energies; below what counts as nothing it is not looked at."""
    return energy.clamp_min(LEAST_ENERGY).log()


def count_of(share: float, members: int) -> int:
    """How many of `members` a share is, rounded up, at least one."""
    return min(members, max(1, math.ceil(share * members - 1e-9)))


def preferences(logits: Tensor) -> Tensor:
    """What each member ranks tokens by, from logits B N E: B E N.

    The logits themselves. A token's softmax would set members against each other, so that a token
    which matters to all of them would be served by none.
    """
    return logits.transpose(1, 2)


def open_gates(logits: Tensor) -> Tensor:
    """Soft gates B N E that are one on average over members: one exactly where logits are equal."""
    count = logits.shape[-1]
    return 2 * logits.sigmoid() if count == 1 else count * logits.softmax(-1)


def top_gates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each token, and their soft gates: both B N E.

    Returns:
        chosen: 1.0 or 0.0. gates: softmax renormalized over the chosen, times `count`; 0 elsewhere.
    """
    places = logits.topk(count, dim=-1).indices
    chosen = torch.zeros_like(logits).scatter(-1, places, 1.0)
    weighted = logits.softmax(-1) * chosen
    return chosen, count * weighted / weighted.sum(-1, keepdim=True)


def straight_through(soft: Tensor) -> Tensor:
    """Exactly one, with the gradient of `soft`."""
    return 1.0 + (soft - soft.detach())


def load_balance(logits: Tensor, chosen: Tensor) -> Tensor:
    """E^2 x mean over members of (mean probability x share of tokens): K when balanced.

    Args:
        logits: ... E. `chosen`: ... E of 1.0 and 0.0, K ones in each row.
    """
    members = logits.shape[-1]
    probability = logits.softmax(-1).flatten(0, -2).mean(0)
    load = chosen.detach().flatten(0, -2).mean(0)
    return members**2 * (probability * load).mean()
