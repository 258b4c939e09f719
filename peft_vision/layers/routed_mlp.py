"""An MLP whose hidden units are experts (Union of Experts; Yang et al., 2025).

The units are grouped; with every group on, the sum over groups is the dense MLP itself. Either each
expert takes the tokens of an image that it ranks first (every image as many), or each image takes
the experts that it ranks first. Shapes are fixed either way, and no image sees its batch mates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.layers.base_weights import base_weight, is_plain
from peft_vision.layers.chosen import add_to, flat_places, rows_of
from peft_vision.layers.mlp import MlpParts, OwnMlp, keep_units
from peft_vision.layers.mlp_path import bent, dropped, ended, halves, has_norm, slices
from peft_vision.layers.router import (
    Anneal,
    Router,
    count_of,
    load_balance,
    logarithm,
    open_gates,
    preferences,
    recomputing,
    straight_through,
    surplus,
    top_gates,
    unused,
)
from peft_vision.layers.traits import Lesson, Penalised, Routing


@dataclass(frozen=True)
class ExpertRouting:
    """How one MLP routes.

    Attributes:
        expert: of each hidden unit, 0 to E - 1.
        share: of the patches that an expert serves ("capacity"), or of the experts that serve an
            image ("sample"), in (0, 1].
        choice: who chooses: each expert its tokens, or each image its experts.
        soft: gates scale what experts give; otherwise they are one for whom is served.
        protect: how many first tokens every expert serves ("capacity").
        anneal: training forwards until the share is reached. `balance`: weight of the load balance.
    """

    expert: tuple[int, ...]
    share: float
    choice: Literal["capacity", "sample"]
    soft: bool = False
    protect: int = 1
    anneal: int = 0
    balance: float = 0.0
    seed: int = 0

    @property
    def sizes(self) -> list[int]:
        """Units of each expert."""
        return [self.expert.count(e) for e in range(max(self.expert) + 1)]

    @property
    def in_order(self) -> bool:
        """Whether the units of an expert are neighbors, expert after expert."""
        return list(self.expert) == sorted(self.expert)


class RoutedMlp(OwnMlp, Penalised, Routing):
    """Somebody's MLP, with its hidden units in experts.

    Attributes:
        gathered: compute what is chosen only where that is possible; False computes everything and
            masks, for comparison.
    """

    def __init__(self, inner: nn.Module, parts: MlpParts, routing: ExpertRouting) -> None:
        super().__init__(inner, parts)
        self.routing = routing
        self.gathered = True
        like = next(p for p in inner.parameters() if p.is_floating_point())
        width = int(getattr(inner, parts.down).out_features)
        seed = None if routing.soft else routing.seed
        self.router = Router(width, len(routing.sizes), 0, like, seed)
        self.now = Anneal(routing.share, routing.anneal, like.device)
        self._balance: Tensor | None = None
        self.train(inner.training)

    def extra_repr(self) -> str:
        """Settings, for printing."""
        r = self.routing
        return f"experts={len(r.sizes)}, share={r.share:g}, by={r.choice}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_balance": None}  # a copy of the module is not within a graph

    def penalty(self) -> Tensor:
        """The load balance of the last training forward, weighted; zero without one."""
        balance, self._balance = self._balance, None
        if balance is None:
            return torch.zeros((), device=self.now.steps.device)
        return self.routing.balance * balance

    def learn(self, ridge: float) -> None:
        """Have the router predict the logarithm of what each expert would give.

        Soft gates are left as they are, one everywhere.
        """
        if self.lessons and not self.routing.soft:
            self.router.fit(self.lessons, ridge)

    def _lesson(self, x: Tensor) -> Lesson:
        """What each expert would give."""
        hidden = self._hidden(x)
        if self.parts.norm is not None:
            hidden = getattr(self.inner, self.parts.norm)(hidden)
        experts = range(len(self.routing.sizes))
        units = ([u for u, e in enumerate(self.routing.expert) if e == one] for one in experts)
        energy = surplus(hidden, base_weight(getattr(self.inner, self.parts.down)), units)
        if self.routing.choice == "sample":
            read, energy = x.mean(1), energy.mean(1)
        else:
            first = self.routing.protect
            read, energy = x[:, first:].flatten(0, 1), energy[:, first:].flatten(0, 1)
        return Lesson(read, logarithm(energy))

    def keep_units(self, units: Sequence[int]) -> None:
        """Keep some hidden units, in place; an expert without units is gone."""
        keep_units(self.inner, self.parts, units)
        expert = [self.routing.expert[u] for u in units]
        left = sorted(set(expert))
        self.router.keep(left, [])
        self.routing = replace(self.routing, expert=tuple(left.index(e) for e in expert))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The branch's output, B N C."""
        r, experts = self.routing, len(self.routing.sizes)
        share, first = self.now(), self.routing.protect
        patches = x.shape[1] - first
        members = experts if r.choice == "sample" else patches
        learning = self.training and torch.is_grad_enabled()
        count = count_of(share, members) if members > 0 else 0
        if self.lessons is not None:
            self.lessons.append(self._lesson(x))
            count = members
        if experts == 1 or members < 1 or (count == members and not learning and not r.soft):
            whole: Tensor = self.inner(x, *args, **kwargs)
            return unused(self.router, whole) if learning else whole
        logits = self._logits(x, count)
        possible = self.gathered and r.in_order and count < members
        if possible and self._plain(*self.parts.up):
            if r.choice == "capacity":
                return self._take_tokens(x, logits, count, learning=learning)
            if self._even and self._plain(self.parts.down):
                return self._take_experts(x, logits, count, learning=learning)
        gates = self._gates(logits, count, x.shape[1], learning=learning)
        return self._ended(self._hidden(x) * gates.to(x.dtype))

    def _plain(self, *names: str) -> bool:
        return all(is_plain(getattr(self.inner, name)) for name in names)

    @property
    def _even(self) -> bool:
        return len(set(self.routing.sizes)) == 1 and not has_norm(self.inner, self.parts)

    def _logits(self, x: Tensor, count: int) -> Tensor:
        """B n E of the patches, or B 1 E of images by the mean of their tokens."""
        r = self.routing
        if r.choice == "capacity":
            ranked: Tensor = self.router(x)[:, r.protect :]  # a slice of x would be copied
            return ranked
        logits: Tensor = self.router(x.mean(1, keepdim=True))
        if r.balance and self.training and torch.is_grad_enabled() and not recomputing():
            self._balance = load_balance(logits, top_gates(logits, count)[0])
        return logits

    def _hidden(self, x: Tensor) -> Tensor:
        products = [getattr(self.inner, name)(x) for name in self.parts.up]
        return bent(self.inner, self.parts, halves(self.parts, products))

    def _gates(self, logits: Tensor, count: int, tokens: int, *, learning: bool) -> Tensor:
        """A gate for each unit and token, B N U; zero where its expert does not serve."""
        r = self.routing
        if r.choice == "sample":
            chosen, soft = top_gates(logits, count)
        else:
            kept = preferences(logits).topk(count, dim=-1, sorted=False).indices
            chosen = torch.zeros_like(logits).transpose(1, 2).scatter(2, kept, 1.0).transpose(1, 2)
            soft = open_gates(logits)
        if not r.soft:
            soft = straight_through(soft) if learning else torch.ones_like(soft)
        gates = chosen * soft
        if r.choice == "capacity":
            ahead = gates.new_ones(gates.shape[0], r.protect, gates.shape[-1])
            gates = torch.cat([ahead, gates], dim=1)
        return gates.expand(-1, tokens, -1)[..., list(r.expert)]

    def _take_tokens(self, x: Tensor, logits: Tensor, count: int, *, learning: bool) -> Tensor:
        """Each expert computed for its own tokens."""
        r, (batch, tokens, width) = self.routing, x.shape
        kept = preferences(logits).topk(count, dim=-1, sorted=False).indices
        places = rows_of(kept, r.protect)
        flat = flat_places(places, tokens).view(len(r.sizes), -1)
        rows, gates = x.reshape(-1, width), self._taken_gates(logits, kept, learning=learning)
        bare = self._plain(self.parts.down) and not has_norm(self.inner, self.parts)
        down, start, put = getattr(self.inner, self.parts.down), 0, []
        y = x.new_zeros(batch, tokens, down.out_features) if bare else x
        y = y if not bare or down.bias is None else y + down.bias
        for expert, size in enumerate(r.sizes):
            hidden = self._expert_hidden(rows.index_select(0, flat[expert]), start, size)
            if gates is not None:
                hidden = hidden * gates[:, expert].reshape(-1, 1).to(hidden.dtype)
            if bare:
                added = F.linear(hidden, down.weight[:, start : start + size])
                y = add_to(y, added, flat[expert])
            else:
                index = places[:, expert].unsqueeze(-1).expand(-1, -1, size)
                empty = hidden.new_zeros(batch, tokens, size)
                put.append(empty.scatter(1, index, hidden.view(batch, -1, size)))
            start += size
        return dropped(self.inner, y) if bare else self._ended(torch.cat(put, dim=-1))

    def _ended(self, hidden: Tensor) -> Tensor:
        return ended(self.inner, self.parts, hidden)

    def _expert_hidden(self, taken: Tensor, start: int, size: int) -> Tensor:
        products = [
            F.linear(
                taken,
                weight[start : start + size],
                None if bias is None else bias[start : start + size],
            )
            for weight, bias in slices(self.inner, self.parts)
        ]
        return bent(self.inner, self.parts, products)

    def _taken_gates(self, logits: Tensor, kept: Tensor, *, learning: bool) -> Tensor | None:
        """Gates of the tokens that each expert takes, B E R; None where all are one."""
        if not self.routing.soft and not learning:
            return None
        mine = open_gates(logits).transpose(1, 2).gather(2, kept)
        mine = mine if self.routing.soft else straight_through(mine)
        return torch.cat([mine.new_ones(*mine.shape[:2], self.routing.protect), mine], dim=-1)

    def _take_experts(self, x: Tensor, logits: Tensor, count: int, *, learning: bool) -> Tensor:
        """The experts of each image, by weights that are put together for it."""
        size, batch = self.routing.sizes[0], x.shape[0]
        kept = logits[:, 0].topk(count, dim=-1, sorted=False).indices
        products = []
        for weight, bias in slices(self.inner, self.parts):
            chosen = weight.view(-1, size, weight.shape[1])[kept].flatten(1, 2).transpose(1, 2)
            product = torch.bmm(x, chosen)
            if bias is not None:
                product = product + bias.view(-1, size)[kept].view(batch, 1, -1)
            products.append(product)
        hidden = bent(self.inner, self.parts, products)
        if self.routing.soft or learning:
            soft = top_gates(logits, count)[1]
            soft = soft if self.routing.soft else straight_through(soft)
            mine = soft[:, 0].gather(1, kept).repeat_interleave(size, dim=1)
            hidden = hidden * mine.unsqueeze(1).to(hidden.dtype)
        down = getattr(self.inner, self.parts.down)
        columns = down.weight.t().view(-1, size, down.out_features)[kept].flatten(1, 2)
        y = torch.bmm(hidden, columns)
        return dropped(self.inner, y if down.bias is None else y + down.bias)
