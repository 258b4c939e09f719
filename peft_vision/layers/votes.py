"""The residual stream as a sum of paths, each of which votes in the result (Chang et al., 2023)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_vision.layers.surgery import select_parameter
from peft_vision.layers.traits import Penalised

Half = Literal["attention", "mlp"]

ENTRY = 0
"""The path of what enters the blocks."""


def path_of(index: int, half: Half) -> int:
    """The number of the path through a branch of block `index`."""
    return 1 + 2 * index + (half == "mlp")


class Votes(nn.Module):
    """A second sum of what the branches add, each scaled: what the head reads in the end.

    The stream itself stays as it is; a scale of one everywhere gives the stream back.

    Attributes:
        kept: the paths that vote, ascending: `ENTRY`, then attention and MLP of each block.
        scales: len(kept) x D, one row for each of them. A path that lost its vote has none.
        rows: how many first tokens vote; None when all do.
        lesson: the whole sum teaches sums of fewer blocks; None: no such term in the loss.
        ledger: if there is one, each path's share is put down in it.
    """

    def __init__(self, depth: int, width: int, rows: int | None) -> None:
        super().__init__()
        self.kept = list(range(2 * depth + 1))
        self.scales = nn.Parameter(torch.ones(2 * depth + 1, width))
        self.rows = rows
        self.lesson: Lesson | None = None
        self.ledger: dict[int, Tensor] | None = None

    def extra_repr(self) -> str:
        """How many vote, for printing."""
        return f"{len(self.kept)} paths, {'all tokens' if self.rows is None else self.rows}"

    def silence(self, paths: Collection[int]) -> None:
        """Take the vote of these paths for good, in place."""
        places = [place for place, path in enumerate(self.kept) if path not in paths]
        self.kept = [self.kept[place] for place in places]
        select_parameter(self, "scales", places)

    def begin(self, x: Tensor) -> Tensor:
        """The sum's first addend, from the stream that enters the blocks (B N D)."""
        first = x if self.rows is None else x[:, : self.rows]
        return torch.zeros_like(first) if ENTRY not in self.kept else self.share(ENTRY, x)

    def add(self, total: Tensor, index: int, half: Half, branch: Tensor) -> Tensor:
        """The sum with what a branch of block `index` added to the stream (B N D)."""
        path = path_of(index, half)
        return total + self.share(path, branch) if path in self.kept else total

    def share(self, path: int, x: Tensor) -> Tensor:
        """What a path that votes adds to the sum, where it added x (B N D) to the stream."""
        own = x if self.rows is None else x[:, : self.rows]
        share = own * self.scales[self.kept.index(path)].to(x.dtype)
        if self.ledger is not None:
            self.ledger[path] = share
        return share

    def passed(self, index: int, total: Tensor) -> None:
        """The sum behind block `index`."""
        if self.lesson is not None and self.training and torch.is_grad_enabled():
            self.lesson.note(index, total)


class _Noted(list[Tensor]):
    """Tensors of one forward pass; a copy of the model has none of them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Noted:
        return _Noted()


class Lesson(nn.Module, Penalised):
    """Self-distillation from the long path to short ones.

    What the model's own norm and head say of the whole sum teaches what they say of the sum behind
    some earlier blocks: weight x sum of KL(softmax(long / t) || softmax(short / t)) x t^2.

    Attributes:
        depths: the short paths end behind these blocks, ascending. `last`: the long one's.
        weight, temperature: of the term.
    """

    def __init__(self, depths: Sequence[int], last: int, weight: float, temperature: float) -> None:
        super().__init__()
        self.depths = list(depths)
        self.last = last
        self.weight = weight
        self.temperature = temperature
        self.noted = _Noted()
        # In a tuple, so that nothing is registered: they hold this module. A copy of the model
        # copies them with it.
        self.reader: tuple[nn.Module, Any, tuple[int, int, int]] | None = None

    def read_by(self, model: nn.Module, trunk: nn.Module, size: tuple[int, int, int]) -> None:
        """Say whose norm and head give logits: of `model`, around `trunk`, for images of `size`."""
        self.reader = (model, trunk, size)

    def note(self, index: int, total: Tensor) -> None:
        """Keep a sum that the next `penalty` needs."""
        if index == min([*self.depths, self.last]):
            self.noted.clear()
        if index in self.depths or index == self.last:
            self.noted.append(total)

    def penalty(self) -> Tensor:
        """The term for the last training batch, once; then zero until the next."""
        if self.reader is None:
            raise AssertionError("read_by() comes first")
        if len(self.noted) <= len(self.depths):
            return next(self.reader[0].parameters()).new_zeros(())
        *short, long = self.noted
        self.noted.clear()
        logits = self.read(torch.cat([long.detach(), *short])).float() / self.temperature
        long_logits, short_logits = logits[: len(long)].detach(), logits[len(long) :]
        target = long_logits.softmax(-1).repeat(len(short), 1)
        term = F.kl_div(short_logits.log_softmax(-1), target, reduction="sum") / len(long)
        return self.weight * self.temperature**2 * term

    def read(self, total: Tensor) -> Tensor:
        """The logits (B K) of sums (B R D), by what follows the blocks in the model."""
        if self.reader is None:
            raise AssertionError("read_by() comes first")
        model, trunk, size = self.reader
        trunk.given = total
        try:
            output = model(total.new_zeros(len(total), *size))
        finally:
            trunk.given = None
        logits: Tensor = getattr(output, "logits", output)
        return logits
