"""Attention to some of the keys: chosen once per head for all queries, or per query by a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.attention import Attended, attend, branch_of, finish, project
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.chosen import mask_keys, rows_of
from peft_vision.layers.housed_attention import HousedAttention, bias_of, mask_of
from peft_vision.layers.mask_predictor import MaskPredictor
from peft_vision.layers.precision import in_full, wide
from peft_vision.layers.router import Anneal, count_of, recomputing, unused
from peft_vision.layers.traits import Penalised

SAMPLED = 16
"""Queries whose attention stands for that of all, at most."""


class SparseKeys(HousedAttention):
    """Each head attends to the keys that matter most to it in the image, the same for all queries.

    First tokens stay keys. Queries, keys and values are computed for all tokens; scores and the sum
    over values for the chosen keys alone.

    Attributes:
        keep: share of the patches that stay keys, in (0, 1].
        by: rank keys by the mean "query", or by the "attention" that some queries pay them.
        protect: how many first tokens stay keys.
        gathered: False computes all scores and masks, for comparison.
    """

    def __init__(
        self,
        attention: nn.Module,
        parts: AttentionParts,
        keep: float,
        by: Literal["query", "attention"],
        protect: int,
    ) -> None:
        super().__init__(attention, parts)
        self.keep, self.by, self.protect = keep, by, protect
        self.gathered = True
        self.train(attention.training)

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"keep={self.keep:g}, by={self.by}"

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
        """See `branch_of`. What a mask hides may still be chosen, and is then not seen."""
        mask = bias_of(masks.get("attn_mask"), key_bias, x)
        patches = x.shape[1] - self.protect
        count = count_of(self.keep, patches) if patches > 0 else 0
        if 2 * (patches - count) <= self._queries(x.shape[1]) - 1:  # ranking would cost more
            seen = mask_of(mask, rows)
            return branch_of(self.attention, self.parts, x, rope, rows=rows, attn_mask=seen)
        q, k, v = project(self.attention, self.parts, x, rope)
        ranked = self._ranked(q, k, key_bias)[:, :, self.protect :]
        places = rows_of(ranked.topk(count, dim=-1, sorted=False).indices, self.protect)
        asked = q if rows is None else q[:, :, :rows]
        heads = self._attended(asked, k, v, places, mask_of(mask, rows))
        normed = x if rows is None else x[:, :rows]
        return Attended(finish(self.attention, self.parts, heads, normed), asked, k, v)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, places: Tensor, mask: Tensor | None
    ) -> Tensor:
        if not self.gathered:
            kept = torch.zeros_like(k[..., 0], dtype=torch.bool).scatter(2, places, True)
            hidden = torch.zeros_like(k[..., 0]).masked_fill(~kept, -torch.inf).unsqueeze(2)
            return attend(self.attention, self.parts, q, k, v, attn_mask=_both(hidden, mask))
        index = places.unsqueeze(-1)
        k, v = (t.gather(2, index.expand(-1, -1, -1, t.shape[-1])) for t in (k, v))
        return attend(self.attention, self.parts, q, k, v, attn_mask=mask_keys(mask, places))

    def _queries(self, tokens: int) -> int:
        return 1 if self.by == "query" else min(SAMPLED, tokens)

    def _ranked(self, q: Tensor, k: Tensor, key_bias: Tensor | None) -> Tensor:
        """What keys are ranked by, B H N."""
        q, k = wide(q.detach()), wide(k.detach())
        if self.by == "query":
            asking = q.mean(2, keepdim=True)
        else:
            tokens, count = q.shape[2], self._queries(q.shape[2])
            asking = q[:, :, [i * tokens // count for i in range(count)]]
        with in_full(q):
            logits = asking @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if key_bias is not None:
            logits = logits + key_bias[:, None, None, :]
        ranked: Tensor = logits.softmax(-1).mean(2)
        return ranked


class SparseMask(HousedAttention, Penalised):
    """Each query attends to the keys that a predictor connects it to (Sparsifiner).

    Everything is computed and masked, so that nothing is saved. During the first training forwards
    attention is dense, and the predictor learns its map.

    Attributes:
        predictor: connects patches to patches. `keep`: share of the patches that each query sees.
        now: counts training forwards. `weight`: of the predictor's error in the loss.
    """

    def __init__(  # noqa: PLR0917
        self,
        attention: nn.Module,
        parts: AttentionParts,
        predictor: MaskPredictor,
        keep: float,
        protect: int,
        warm_up: int,
        weight: float,
    ) -> None:
        super().__init__(attention, parts)
        self.predictor, self.keep, self.protect = predictor, keep, protect
        self.now = Anneal(keep, warm_up, predictor.basis.device)
        self.weight = weight
        self._error: Tensor | None = None
        self.train(attention.training)

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"keep={self.keep:g}"

    def keep_queries(self, kept: Sequence[Sequence[int]]) -> None:
        """Refused.

        Raises:
            UnsupportedSite: always.
        """
        raise UnsupportedSite(
            "A predictor reads the queries of this model's attention as wide as they are. Cut them "
            "before keys are chosen."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_error": None}  # a copy of the module is not within a graph

    def penalty(self) -> Tensor:
        """The predictor's error in the last training forward, weighted; zero without one."""
        error, self._error = self._error, None
        if error is None:
            return torch.zeros((), device=self.now.steps.device)
        return self.weight * error

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
        """See `branch_of`."""
        mask = bias_of(masks.get("attn_mask"), key_bias, x)
        step, patches = self.now.step(), x.shape[1] - self.protect
        count = count_of(self.keep, patches)
        q, k, v = project(self.attention, self.parts, x, rope)
        if step is not None and step < self.now.over:
            if torch.is_grad_enabled() and not recomputing():
                self._error = self._reconstruction(q, k)
        elif count < patches:
            mask = _both(self._hidden(q, k, count), mask)
        asked, normed = (q, x) if rows is None else (q[:, :, :rows], x[:, :rows])
        seen = mask_of(mask, rows)
        heads = attend(self.attention, self.parts, asked, k, v, attn_mask=seen)
        branch = finish(self.attention, self.parts, heads, normed)
        if self._error is None and self.training and torch.is_grad_enabled():
            branch = unused(self.predictor, branch)
        return Attended(branch, asked, k, v)

    def _hidden(self, q: Tensor, k: Tensor, count: int) -> Tensor:
        """Minus infinity where a query does not see a key, B H N N; first tokens see all."""
        first = self.protect
        likely = self.predictor(q[:, :, first:].detach(), k[:, :, first:].detach()).detach()
        seen = likely.topk(count, dim=-1, sorted=False).indices
        away = torch.full_like(likely, -torch.inf).scatter(-1, seen, 0.0)
        return F.pad(away, (first, 0, first, 0)).to(q.dtype)

    def _reconstruction(self, q: Tensor, k: Tensor) -> Tensor:
        """Mean squared error of the predicted map of the patches' attention."""
        first, q, k = self.protect, wide(q.detach()), wide(k.detach())
        with torch.no_grad(), in_full(q):
            logits = q[:, :, first:] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            target = logits.softmax(-1)[..., first:]
        return F.mse_loss(self.predictor(q[:, :, first:], k[:, :, first:]), target)


def _both(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """One additive mask from two, the second of which may say true where a key is seen."""
    if mask is None:
        return hidden
    if mask.dtype == torch.bool:
        return hidden.masked_fill(~mask, -torch.inf)
    return hidden + mask
