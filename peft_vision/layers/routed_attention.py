"""Attention whose heads serve some tokens only: mixture of heads (Jin et al., 2024).

Some heads are shared: they serve every token. The others are routed. Either each of them takes the
tokens that it ranks first (every image as many, so that shapes are fixed: queries, scores and the
output projection are computed for those tokens alone), or each token takes the heads that it ranks
first (everything is computed, and masked). Keys and values are computed for all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.layers.attention import Attended, attend, before_output, branch_of, finish, project
from peft_vision.layers.attention_parts import AttentionParts, head_count
from peft_vision.layers.base_weights import base_weight, is_plain
from peft_vision.layers.chosen import (
    add_rows,
    head_queries,
    mask_heads,
    mask_rows,
    projected,
    put_heads,
    rows_of,
    take_heads,
)
from peft_vision.layers.head_routing import HeadRouting
from peft_vision.layers.head_surgery import keep_heads
from peft_vision.layers.housed_attention import HousedAttention, bias_of, mask_of
from peft_vision.layers.router import (
    Anneal,
    QueryNorms,
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


class RoutedAttention(HousedAttention, Penalised, Routing):
    """Somebody's attention module, with some of its heads routed.

    Attributes:
        gathered: compute chosen tokens only where that is possible; False computes everything and
            masks, for comparison.
    """

    def __init__(self, attention: nn.Module, parts: AttentionParts, routing: HeadRouting) -> None:
        super().__init__(attention, parts)
        self.routing = routing
        self.gathered = True
        like = next(p for p in attention.parameters() if p.is_floating_point())
        width = int(getattr(attention, parts.out).out_features)
        seed = None if routing.soft else routing.seed
        counts = (len(routing.routed), len(routing.shared))
        self.router = QueryNorms() if routing.by_norm else Router(width, *counts, like, seed)
        self.now = Anneal(routing.share, routing.anneal, like.device)
        self._balance: Tensor | None = None
        self.train(attention.training)

    def extra_repr(self) -> str:
        """Settings, for printing."""
        r = self.routing
        return f"shared={len(r.shared)}, routed={len(r.routed)}, share={r.share:g}, by={r.choice}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_balance": None}  # a copy of the module is not within a graph

    def penalty(self) -> Tensor:
        """The load balance of the last training forward, weighted; zero without one."""
        balance, self._balance = self._balance, None
        if balance is None:
            return torch.zeros((), device=self.now.steps.device)
        return self.routing.balance * balance

    def learn(self, ridge: float) -> None:
        """Have the router predict the logarithm of what each routed head would give.

        Soft gates are left as they are, one everywhere; norms of queries have nothing to fit.
        """
        if self.lessons and isinstance(self.router, Router) and not self.routing.soft:
            self.router.fit(self.lessons, ridge)

    def keep_heads(self, heads: Sequence[int]) -> None:
        """Keep whole heads, in place; each stays routed or shared as it was."""
        keep_heads(self.attention, self.parts, heads)
        r, place = self.routing, {head: i for i, head in enumerate(heads)}
        if isinstance(self.router, Router):
            rows = [[i for i, h in enumerate(kind) if h in place] for kind in (r.routed, r.shared)]
            self.router.keep(*rows)
        routed, shared = (
            tuple(place[h] for h in kind if h in place) for kind in (r.routed, r.shared)
        )
        share = r.share
        if r.choice == "token" and routed:  # a patch goes on being served by as many
            share = min(1.0, count_of(r.share, len(r.routed)) / len(routed))
        self.routing = replace(r, routed=routed, shared=shared, share=share)
        self.now.target = share

    def called(self, x: Tensor, rope: Any, mask: Tensor | None) -> Tensor:
        """The output alone; queries that nobody asks for are not computed."""
        return self._run(x, rope, None, mask, whole=False).branch

    def branch(
        self,
        x: Tensor,
        rope: Any = None,
        *,
        rows: int | None = None,
        key_bias: Tensor | None = None,
        whole: bool = False,
        **masks: Any,
    ) -> Attended:
        """See `branch_of`; the queries of all tokens cost what is saved on them."""
        whole = whole or self.routing.protect == 0
        mask = bias_of(masks.get("attn_mask"), key_bias, x)
        return self._run(x, rope, rows, mask, whole=whole)

    def _run(
        self, x: Tensor, rope: Any, rows: int | None, mask: Tensor | None, *, whole: bool
    ) -> Attended:
        first, learning = self._protected(x, rope), self.training and torch.is_grad_enabled()
        share = self.now()
        patches = x.shape[1] - first
        if not self.routing.routed or patches < 1 or (rows is not None and rows <= first):
            seen = mask_of(mask, rows)
            done = branch_of(self.attention, self.parts, x, rope, rows=rows, attn_mask=seen)
            return done._replace(branch=unused(self.router, done.branch)) if learning else done
        by_head = self.routing.choice == "head"
        count = count_of(share, patches if by_head else len(self.routing.routed))
        full = count == (patches if by_head else len(self.routing.routed))
        if self.lessons is not None:
            done = self._teach(x, rope, mask, first)
        elif full and not learning and not self.routing.soft:
            done = branch_of(self.attention, self.parts, x, rope, attn_mask=mask)
        elif by_head and self.gathered and not full:
            done = self._gather(x, rope, mask, first, count, whole=whole)
        else:
            done = self._mask(x, rope, mask, first, count)
        return done if rows is None else done._replace(branch=done.branch[:, :rows])

    def _protected(self, x: Tensor, rope: Any) -> int:
        """How many first tokens all heads serve: never fewer than have no rotary position."""
        if rope is None:
            return self.routing.protect
        table = rope[0] if isinstance(rope, tuple) else rope
        return max(self.routing.protect, x.shape[1] - int(table.shape[-2]))

    def _logits(self, x: Tensor, q: Tensor | None, first: int) -> Tensor:
        """What patches and routed heads have for each other, B n E."""
        if isinstance(self.router, Router):
            logits: Tensor = self.router(x)[:, first:]  # a slice of x would be copied
        elif q is not None:
            logits = self.router(take_heads(q, self.routing.routed)[:, :, first:])
        else:
            raise AssertionError("norms of queries are had from queries")
        return logits

    def _stages(self, x: Tensor, first: int) -> tuple[Tensor, Tensor] | None:
        """Gates of the shared heads, B n S, and the factor of the routed ones, B n 1."""
        return self.router.stages(x[:, first:]) if isinstance(self.router, Router) else None

    def _gates(self, x: Tensor, logits: Tensor, count: int, first: int) -> tuple[Tensor, Tensor]:
        """Gates of the routed (B n E) and shared heads (B n S), and what is not chosen at zero."""
        r = self.routing
        if r.choice == "head":
            kept = preferences(logits).topk(count, dim=-1, sorted=False).indices
            chosen = torch.zeros_like(logits).transpose(1, 2).scatter(2, kept, 1.0).transpose(1, 2)
            soft = open_gates(logits)
        else:
            chosen, soft = top_gates(logits, count)
            if r.balance and self.training and torch.is_grad_enabled() and not recomputing():
                self._balance = load_balance(logits, chosen)
        stages = self._stages(x, first)
        shared = logits.new_ones(*logits.shape[:2], len(r.shared))
        if stages is not None:
            shared, soft = stages[0], stages[1] * soft
        if not r.soft:
            soft, shared = straight_through(soft), straight_through(shared)
        return chosen * soft, shared

    def _mask(self, x: Tensor, rope: Any, mask: Tensor | None, first: int, count: int) -> Attended:
        """All heads for all tokens, and gates on what they give."""
        q, k, v = project(self.attention, self.parts, x, rope)
        gates = self._gates(x, self._logits(x, q, first), count, first)
        order = (*self.routing.routed, *self.routing.shared)
        back = sorted(range(len(order)), key=order.__getitem__)
        patches = torch.cat(gates, dim=-1)[..., back].transpose(1, 2)
        whole = torch.cat([patches.new_ones(*patches.shape[:2], first), patches], dim=2)
        heads = attend(self.attention, self.parts, q, k, v, attn_mask=mask)
        heads = heads * whole.unsqueeze(-1).to(heads.dtype)
        return Attended(finish(self.attention, self.parts, heads, x), q, k, v)

    def _teach(self, x: Tensor, rope: Any, mask: Tensor | None, first: int) -> Attended:
        """All heads for all tokens, and what each routed head gives noted."""
        module, parts = self.attention, self.parts
        q, k, v = project(module, parts, x, rope)
        heads = attend(module, parts, q, k, v, attn_mask=mask)
        read, width = before_output(module, parts, heads, x)[:, first:], heads.shape[-1]
        columns = (range(h * width, (h + 1) * width) for h in self.routing.routed)
        energy = surplus(read, base_weight(getattr(module, parts.out)), columns).flatten(0, 1)
        lesson = Lesson(x[:, first:].flatten(0, 1), logarithm(energy))
        self.lessons = [*(self.lessons or ()), lesson]
        return Attended(finish(module, parts, heads, x), q, k, v)

    def _gather(
        self,
        x: Tensor,
        rope: Any,
        mask: Tensor | None,
        first: int,
        count: int,
        *,
        whole: bool,
    ) -> Attended:
        """Queries, scores and output of the chosen tokens alone."""
        module, parts, r = self.attention, self.parts, self.routing
        contiguous = (*r.routed, *r.shared) == tuple(range(head_count(module, parts)))
        query_layer = getattr(module, parts.qkv[0])
        sliced = contiguous and not whole and not r.by_norm and is_plain(query_layer)
        q: Tensor | None = None
        if not sliced:
            q, k, v = project(module, parts, x, rope)
        logits = self._logits(x, q, first)
        kept = preferences(logits).topk(count, dim=-1, sorted=False).indices
        places = rows_of(kept, first)
        if q is None:
            shared_q, k, v = projected(module, parts, x, rope, len(r.routed))
            routed_q = head_queries(module, parts, x, rope, places, first).type_as(k)
            q = torch.cat([routed_q[:, :, :first], shared_q[:, :, :first]], dim=1)
        else:
            shared_q = take_heads(q, r.shared)
            index = places.unsqueeze(-1).expand(-1, -1, -1, q.shape[-1])
            routed_q = take_heads(q, r.routed).gather(2, index)
        heads = self._attend(r.routed, routed_q, k, v, mask_rows(mask, places, r.routed))
        always: Tensor | None = None
        if r.shared:
            always = self._attend(r.shared, shared_q, k, v, mask_heads(mask, r.shared))
        heads, always = self._gated(x, logits, kept, first, heads, always)
        return Attended(self._out(x, heads, always, places, contiguous=contiguous), q, k, v)

    def _attend(
        self, which: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        k, v = take_heads(k, which), take_heads(v, which)
        return attend(self.attention, self.parts, q, k, v, attn_mask=mask)

    def _gated(
        self,
        x: Tensor,
        logits: Tensor,
        kept: Tensor,
        first: int,
        heads: Tensor,
        always: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs of routed (B E R D) and shared heads (B S N D) times their gates."""
        soft, learning = self.routing.soft, self.training and torch.is_grad_enabled()
        if not soft and not learning:
            return heads, always
        routed = open_gates(logits)
        stages = self._stages(x, first)
        if stages is not None:
            routed = routed * stages[1]
            among = stages[0] if soft else straight_through(stages[0])
            if always is not None:
                always = always * _padded(among.transpose(1, 2), first).to(always.dtype)
        routed = routed if soft else straight_through(routed)
        mine = routed.transpose(1, 2).gather(2, kept)
        return heads * _padded(mine, first).to(heads.dtype), always

    def _out(
        self,
        x: Tensor,
        heads: Tensor,
        always: Tensor | None,
        places: Tensor,
        *,
        contiguous: bool,
    ) -> Tensor:
        """The branch's output from routed (B E R D) and shared heads (B S N D)."""
        module, parts, r = self.attention, self.parts, self.routing
        norm = None if parts.norm is None else getattr(module, parts.norm)
        gate = None if parts.gate is None else getattr(module, parts.gate)
        out = getattr(module, parts.out)
        bare = (norm is None or isinstance(norm, nn.Identity)) and gate is None
        if not (bare and contiguous and is_plain(out)):
            whole = put_heads(heads, always, places, (*r.routed, *r.shared), x.shape[1])
            return finish(module, parts, whole, x)
        y = add_rows(out, heads, always, places, x.shape[1])
        return getattr(module, parts.out_dropout)(y) if parts.out_dropout is not None else y


def _padded(gates: Tensor, first: int) -> Tensor:
    """Gates B H n as factors B H (first + n) 1, one for the first tokens."""
    ones = gates.new_ones(*gates.shape[:2], first)
    return torch.cat([ones, gates], dim=2).unsqueeze(-1)
