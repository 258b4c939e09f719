"""The blocks of a transformer as one module, so that tokens may leave on the way.

A Trunk takes the place of a model's list of blocks as its only element: the model's own loop
calls it once. Which tokens are left is then a local variable of one forward pass, which keeps the
model re-entrant and exportable; a state shared between separate blocks would be neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.absent import Absent
from peft_vision.layers.attention import Attended
from peft_vision.layers.block import (
    BlockParts,
    attention_half,
    attention_of,
    mlp_half,
    refuse_mask,
)
from peft_vision.layers.prompts import Prompts, without
from peft_vision.layers.votes import Half, Votes

GONE = -1
"""Position of a token that stands for several patches."""


class Reduction(NamedTuple):
    """A stream with fewer tokens, and what became of those that were there.

    Attributes:
        x: B N' C, with the first `prefix` tokens as they were.
        places: B K: for each patch token that goes on, which of the arriving ones it is; one that
            stands for several is listed with the one whose position it takes.
        carriers: B P: for each arriving patch token, which of the K carries it on; -1 for none. Its
            own state is put back in the end where a model reads every patch.
        sizes: B K: how many patches each stands for; None where tokens are dropped only.
    """

    x: Tensor
    places: Tensor
    carriers: Tensor
    sizes: Tensor | None = None


class Reducer(nn.Module, ABC):
    """Decides which tokens go on after the attention of one block.

    Attributes:
        proportional: later attention counts a token that stands for several patches that often.
    """

    proportional = False

    @abstractmethod
    def forward(
        self, x: Tensor, attended: Attended, prefix: int, sizes: Tensor | None
    ) -> Reduction | None:
        """Drop or merge tokens.

        Args:
            x: the stream, B N C; the first `prefix` tokens are never dropped.
            attended: queries, keys and values of this block.
            sizes: B (N - prefix): how many patches each stands for; None when one each.

        Returns:
            The shorter stream, or None when nothing is to be saved.
        """

    @property
    @abstractmethod
    def fused(self) -> int:
        """How many of the last tokens stand for several patches, for drawings."""


class Stream(NamedTuple):
    """What flows through the blocks of a Trunk in one forward pass.

    Attributes:
        x: B N C. `sizes`: B P, see `Reduction`.
        carriers: B P0: the token that carries each original patch now, -1 for none.
        idle: B P0 C: the last state of those that none carries.
        total: the sum of votes, if they are counted.
        rope: rotary tables of the patches that are left.
    """

    x: Tensor
    sizes: Tensor | None = None
    carriers: Tensor | None = None
    idle: Tensor | None = None
    total: Tensor | None = None
    rope: Any = None
    proportional: bool = False


class Trunk(nn.Module):
    """Blocks in a row, with reducers inside some of them. Input and output: B N C.

    Prompts join the stream before the blocks named, and have left it behind the last block.

    Attributes:
        reducers: block index -> what shortens the stream there.
        restore: all patches are there again behind the last block, each with the state of the token
            that carried it, or with its last own one.
        pooled: the last block is computed for this many first tokens only; None for all.
        votes: the result is the sum of scaled paths; None for the stream itself.
    """

    def __init__(self, blocks: list[nn.Module], parts: BlockParts, prefix: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.reducers = nn.ModuleDict()
        self.prompts = nn.ModuleDict()
        self.parts = parts
        self.prefix = prefix
        self.restore = False
        self.pooled: int | None = None
        self.votes: Votes | None = None
        self.checkpointing = False

    @property
    def plain(self) -> bool:
        """Whether every block sees and gives on all tokens, as without a Trunk."""
        return not len(self.reducers) and self.pooled is None and self.votes is None

    def insert(self, prompts: dict[int, Prompts]) -> None:
        """Put prompts before blocks, all of one count; they replace those of the block before.

        Like the class token they have no position: rotary attention leaves them unrotated.
        """
        self.prompts.update({str(index): tokens for index, tokens in prompts.items()})
        name = self.parts.attention_parts.unrotated
        first = min(prompts)
        for block in list(self.blocks)[first:] if name is not None else ():
            attention: nn.Module = attention_of(block, self.parts)
            setattr(attention, str(name), getattr(attention, str(name)) + prompts[first].count)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The stream after all blocks.

        Raises:
            UnsupportedSite: an attention mask was passed.
        """
        refuse_mask(self.parts, args, kwargs)
        rope = kwargs.get(self.parts.rope) if self.parts.rope else None
        total = None if self.votes is None else self.votes.begin(x)
        stream, prompts, extra = Stream(x, total=total, rope=rope), dict(self.prompts.items()), 0
        for index in range(len(self.blocks)):
            prompt = prompts.get(str(index))
            if isinstance(prompt, Prompts):
                x, extra = prompt(stream.x, self.prefix, extra), prompt.count
                stream = stream._replace(x=x)
            if self.checkpointing and self.training:
                stream = checkpoint(
                    self._step, index, stream, extra, args, kwargs, use_reentrant=False
                )
            else:
                stream = self._step(index, stream, extra, args, kwargs)
        if stream.total is not None:
            return stream.total
        if self.pooled is not None:
            return stream.x
        return self._restored(stream._replace(x=without(stream.x, self.prefix, extra)))

    def _step(
        self,
        index: int,
        stream: Stream,
        extra: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Stream:
        block, reducer = self.blocks[index], self._reducer(index)
        rows = self.pooled if index == len(self.blocks) - 1 else None
        untouched = stream.total is None and stream.carriers is None
        if untouched and reducer is None and rows is None and not _cut(block, self.parts):
            return stream._replace(x=block(stream.x, *args, **kwargs))
        prefix = self.prefix + extra
        half = attention_half(
            block, self.parts, stream.x, stream.rope, rows=rows, key_bias=_bias(stream, prefix)
        )
        stream = self._counted(stream._replace(x=half.x), index, "attention", half.added)
        if reducer is not None and rows is None:
            if half.attended is None:
                raise UnsupportedSite(f"Block {index} has no attention to choose tokens by.")
            reduction = reducer(stream.x, half.attended, prefix, stream.sizes)
            stream = _reduced(stream, reduction, prefix, reducer.proportional, keep=self.restore)
        x, added = mlp_half(block, self.parts, stream.x)
        return self._counted(stream._replace(x=x), index, "mlp", added)

    def _reducer(self, index: int) -> Reducer | None:
        found = dict(self.reducers.items()).get(str(index))
        return found if isinstance(found, Reducer) else None

    def _counted(self, stream: Stream, index: int, half: Half, added: Tensor | None) -> Stream:
        if self.votes is None or stream.total is None or added is None:
            return stream
        return stream._replace(total=self.votes.add(stream.total, index, half, added))

    def _restored(self, stream: Stream) -> Tensor:
        if not self.restore or stream.carriers is None:
            return stream.x
        first, patches = stream.x[:, : self.prefix], stream.x[:, self.prefix :]
        carried = _take(patches, stream.carriers.clamp_min(0))
        if stream.idle is not None:
            carried = torch.where(stream.carriers.unsqueeze(-1) < 0, stream.idle, carried)
        return torch.cat([first, carried], dim=1)


def _cut(block: nn.Module, parts: BlockParts) -> bool:
    """Whether a branch was removed from the block, which its own forward cannot know."""
    return any(isinstance(getattr(block, n), Absent) for n in (parts.attention, parts.mlp))


def _bias(stream: Stream, prefix: int) -> Tensor | None:
    """Log of how many patches each token stands for, B N, where attention counts that."""
    if stream.sizes is None or not stream.proportional:
        return None
    return nn.functional.pad(stream.sizes.log(), (prefix, 0))


def _reduced(
    stream: Stream, reduction: Reduction | None, prefix: int, proportional: bool, *, keep: bool
) -> Stream:
    if reduction is None:
        return stream
    before, carriers, idle = stream.carriers, reduction.carriers, stream.idle
    if keep:
        patches = stream.x[:, prefix:]
        left = reduction.carriers
        if before is not None:
            there = before.clamp_min(0)
            carriers = torch.where(before < 0, before, left.gather(1, there))
            patches = _take(patches, there)
        # The last state of what none carries from here on; what was idle before stays as it was.
        gone = (carriers < 0) if before is None else (carriers < 0) & (before >= 0)
        idle = patches if idle is None else torch.where(gone.unsqueeze(-1), patches, idle)
    rope = None if stream.rope is None else take_positions(stream.rope, reduction.places)
    return stream._replace(
        x=reduction.x,
        sizes=reduction.sizes,
        carriers=carriers,
        idle=idle,
        rope=rope,
        proportional=stream.proportional or proportional,
    )


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Tokens of B N C at `places` (B K): B K C."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def take_positions(rope: Any, places: Tensor) -> Any:
    """Rotary tables of the patches at `places` (B K): tables of N D become B 1 K D."""
    if isinstance(rope, tuple):
        return tuple(take_positions(table, places) for table in rope)
    if rope.dim() == 2:
        return rope[places].unsqueeze(1)
    index = places[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[-1])
    return rope.expand(places.shape[0], -1, -1, -1).gather(2, index)


def blocks_in(container: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(owner, attribute, block) for each block in a model's list of blocks, through a Trunk."""
    for name, child in container.named_children():
        if isinstance(child, Trunk):
            for inner, block in child.blocks.named_children():
                yield child.blocks, inner, block
        else:
            yield container, name, child


def trunk_in(container: nn.Module) -> Trunk | None:
    """The Trunk that has taken the place of a model's blocks, if any."""
    children = list(container.children())
    return children[0] if len(children) == 1 and isinstance(children[0], Trunk) else None


@torch.no_grad()
def kept_positions(model: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """Which patches of each image are left after each reduction.

    Args:
        model: a model with a Trunk somewhere inside.
        images: B 3 H W, preprocessed.

    Returns:
        block index -> places of the original patches, B K, row by row from the top left; `GONE`
        marks a token that stands for several patches.
    """
    seen: dict[int, tuple[Tensor, int]] = {}
    trunk = next((m for m in model.modules() if isinstance(m, Trunk)), None)
    if trunk is None:
        return {}

    def note(index: int, reducer: nn.Module, reduction: Reduction | None) -> None:
        if reduction is not None:
            fused = reducer.fused if isinstance(reducer, Reducer) else 0
            seen[index] = (reduction.places, fused)

    hooks = [
        reducer.register_forward_hook(lambda m, given, out, i=int(name): note(i, m, out))
        for name, reducer in trunk.reducers.items()
    ]
    was_training = model.training
    try:
        model.eval()(images)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return _compose(seen)


def _compose(seen: dict[int, tuple[Tensor, int]]) -> dict[int, Tensor]:
    result: dict[int, Tensor] = {}
    before: Tensor | None = None
    for index in sorted(seen):
        places, fused = seen[index]
        now = places if before is None else before.gather(1, places)
        if fused:
            now = torch.cat([now[:, :-fused], torch.full_like(now[:, -fused:], GONE)], dim=1)
        result[index], before = now, now
    return result
