"""The blocks of a transformer as one module, so that tokens may leave on the way.

A Trunk takes the place of a model's list of blocks as its only element: the model's own loop
calls it once. Which tokens are left is then a local variable of one forward pass, which keeps the
model re-entrant and exportable; a state shared between separate blocks would be neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from peft_vision.layers.reduction import InTurn, Reducer, Reduction, take, with_reducer
from peft_vision.layers.traits import Paced
from peft_vision.layers.votes import Half, Votes

GONE = -1
"""Position of a token that stands for several patches."""


class Stream(NamedTuple):
    """What flows through the blocks of a Trunk in one forward pass.

    Attributes:
        x: B N C. `sizes`: B P: how many patches each patch token stands for; None when one each.
        carriers: B P0: the token that carries each original patch now, -1 for none.
        idle: B P0 C: the last state of those that none carries.
        total: the sum of votes, if they are counted.
        attended: of a block before, where one that lost its attention chooses tokens by it.
        rope: rotary tables of the patches that are left. `extra`: prompts in the sequence.
    """

    x: Tensor
    sizes: Tensor | None = None
    carriers: Tensor | None = None
    idle: Tensor | None = None
    total: Tensor | None = None
    rope: Any = None
    proportional: bool = False
    extra: int = 0
    attended: Attended | None = None


Observer = Callable[[int, Half, Tensor, Tensor], None]
"""(block, half, the stream behind that half, what the half added to it): both B N C."""


class Trunk(nn.Module):
    """Blocks in a row, with reducers inside some of them. Input and output: B N C.

    Prompts join the stream before the blocks named, and have left it behind the last block.

    Attributes:
        reducers: block index -> what shortens the stream there.
        restore: all patches are there again behind the last block, each with the state of the token
            that carried it, or with its last own one.
        pooled: behind the last attention, which reads them all, only this many first tokens go on
            (see `rows_of`); None for all.
        votes: the result is the sum of scaled paths; None for the stream itself.
        checkpointing: blocks whose activations are computed again in the backward pass: all, none,
            or these.
        observer: is told what every branch adds. `given`: goes on behind the last block in the
            place of what the blocks would make, so that what follows them can be asked alone.
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
        self.observer: Observer | None = None
        self.given: Tensor | None = None
        self.checkpointing: bool | frozenset[int] = False

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
            if not isinstance(attention, Absent):
                setattr(attention, str(name), getattr(attention, str(name)) + prompts[first].count)

    def reduce(self, index: int, reducer: Reducer) -> None:
        """Put a reducer into block `index`, behind what shortens the stream there already."""
        self.reducers[str(index)] = with_reducer(self._reducer(index), reducer)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The stream after all blocks.

        Raises:
            UnsupportedSite: an attention mask was passed.
        """
        refuse_mask(self.parts, args, kwargs)
        if self.given is not None:
            return self.given
        if self.training and torch.is_grad_enabled():
            # Here, and not where a reducer is called: recomputing a block is not another pass.
            for module in self.reducers.modules():
                if isinstance(module, Paced):
                    module.advance()
        stream = self.enter(x, kwargs)
        for index in range(len(self.blocks)):
            if self.training and self._recomputes(index):
                stream = checkpoint(self.step, index, stream, args, kwargs, use_reentrant=False)
            else:
                stream = self.step(index, stream, args, kwargs)
            if self.votes is not None and stream.total is not None:
                self.votes.passed(index, stream.total)
        return self.leave(stream)

    def _recomputes(self, index: int) -> bool:
        on = self.checkpointing
        return on if isinstance(on, bool) else index in on

    def enter(self, x: Tensor, kwargs: dict[str, Any]) -> Stream:
        """What flows into the first block, from what the model calls its blocks with.

        Raises:
            UnsupportedSite: every token votes, and tokens leave on the way.
        """
        if self.votes is not None and self.votes.rows is None and len(self.reducers):
            raise UnsupportedSite(
                "Every token of this model votes in the result, and tokens that leave could not: "
                "only a model that reads its class token alone can have both."
            )
        rope = kwargs.get(self.parts.rope) if self.parts.rope else None
        return Stream(x, total=None if self.votes is None else self.votes.begin(x), rope=rope)

    def leave(self, stream: Stream) -> Tensor:
        """The sequence that the model goes on with behind the last block."""
        if stream.total is not None:
            return stream.total
        if self.pooled is not None:
            return stream.x
        return self._restored(stream._replace(x=without(stream.x, self.prefix, stream.extra)))

    def step(
        self, index: int, stream: Stream, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Stream:
        """The stream behind block `index`; `args` and `kwargs` are those of the model's call."""
        prompt = dict(self.prompts.items()).get(str(index))
        if isinstance(prompt, Prompts):
            x = prompt(stream.x, self.prefix, stream.extra)
            stream = stream._replace(x=x, extra=prompt.count)
        block, rows = self.blocks[index], self.rows_of(index)
        # Tokens that nobody reads any more leave anyway.
        reducer = self._reducer(index) if rows is None else None
        lends = rows is None and self._lends(index)
        untouched = stream.total is None and stream.carriers is None and self.observer is None
        opened = rows is not None or _cut(block, self.parts) or lends
        if untouched and reducer is None and not opened:
            return stream._replace(x=block(stream.x, *args, **kwargs))
        prefix = self.prefix + stream.extra
        half = attention_half(
            block,
            self.parts,
            stream.x,
            stream.rope,
            rows=rows,
            key_bias=_bias(stream, prefix),
            whole=reducer is not None or lends,
        )
        stream = self._counted(stream._replace(x=half.x), index, "attention", half.added)
        # Where the attention was removed, the one before says whom to choose; where there is none
        # either, or tokens have left since, every token goes on.
        attended = half.attended or _still(stream.attended, stream.x)
        if reducer is not None and attended is not None:
            reduction = reducer(stream.x, attended, prefix, stream.sizes)
            stream = _reduced(stream, reduction, prefix, reducer, keep=self.restore)
        x, added = mlp_half(block, self.parts, stream.x)
        stream = stream._replace(x=x, attended=attended if lends else None)
        return self._counted(stream, index, "mlp", added)

    def rows_of(self, index: int) -> int | None:
        """How many first tokens block `index` computes; None for all.

        Where the pooled ones alone are read, the last block that has attention needs no others but
        as keys and values, and what lies behind needs none.
        """
        behind = list(self.blocks)[index + 1 :]
        whole = any(not isinstance(getattr(b, self.parts.attention), Absent) for b in behind)
        return None if whole else self.pooled

    def _lends(self, index: int) -> bool:
        """Whether a block right behind, which lost its attention, chooses tokens by this one's."""
        for later in range(index + 1, len(self.blocks)):
            if not isinstance(getattr(self.blocks[later], self.parts.attention), Absent):
                return False
            if self._reducer(later) is not None:
                return True
        return False

    def _reducer(self, index: int) -> Reducer | None:
        found = dict(self.reducers.items()).get(str(index))
        return found if isinstance(found, Reducer) else None

    def _counted(self, stream: Stream, index: int, half: Half, added: Tensor | None) -> Stream:
        if added is not None and self.observer is not None:
            self.observer(index, half, stream.x, added)
        if self.votes is None or stream.total is None or added is None:
            return stream
        if self.votes.rows is None:  # prompts have no part in what the head reads
            added = without(added, self.prefix, stream.extra)
        return stream._replace(total=self.votes.add(stream.total, index, half, added))

    def _restored(self, stream: Stream) -> Tensor:
        if not self.restore or stream.carriers is None:
            return stream.x
        first, patches = stream.x[:, : self.prefix], stream.x[:, self.prefix :]
        carried = take(patches, stream.carriers.clamp_min(0))
        if stream.idle is not None:
            carried = torch.where(stream.carriers.unsqueeze(-1) < 0, stream.idle, carried)
        return torch.cat([first, carried], dim=1)


def _cut(block: nn.Module, parts: BlockParts) -> bool:
    """Whether a branch was removed from the block, which its own forward cannot know."""
    return any(isinstance(getattr(block, n), Absent) for n in (parts.attention, parts.mlp))


def _still(attended: Attended | None, x: Tensor) -> Attended | None:
    """An earlier block's attention, if the stream has the same tokens still."""
    return attended if attended is not None and attended.k.shape[2] == x.shape[1] else None


def _bias(stream: Stream, prefix: int) -> Tensor | None:
    """Log of how many patches each token stands for, B N, where attention counts that."""
    if stream.sizes is None or not stream.proportional:
        return None
    return nn.functional.pad(stream.sizes.log(), (prefix, 0))


def _reduced(
    stream: Stream, reduction: Reduction | None, prefix: int, reducer: Reducer, *, keep: bool
) -> Stream:
    if reduction is None:
        return stream
    carriers, idle = reduction.carriers, stream.idle
    if keep:
        carriers, idle = _followed(stream, reduction, prefix, drops=reducer.drops)
    rope = None if stream.rope is None else take_positions(stream.rope, reduction.places)
    return stream._replace(
        x=reduction.x,
        sizes=reduction.sizes,
        carriers=carriers,
        idle=idle,
        rope=rope,
        proportional=stream.proportional or reducer.proportional,
    )


def _followed(
    stream: Stream, reduction: Reduction, prefix: int, *, drops: bool
) -> tuple[Tensor, Tensor | None]:
    """Which token carries each original patch now, B P0, and the last states of the others.

    Those, B P0 C, are what patches had when they left: what was idle before stays as it was.
    """
    patches, before, idle = stream.x[:, prefix:], stream.carriers, stream.idle
    carriers = reduction.carriers
    if before is not None:
        there = before.clamp_min(0)
        carriers = torch.where(before < 0, before, carriers.gather(1, there))
        patches = take(patches, there) if drops else patches
    if not drops:
        return carriers, idle
    if before is None or idle is None:
        return carriers, patches
    gone = (carriers < 0) & (before >= 0)
    return carriers, torch.where(gone.unsqueeze(-1), patches, idle)


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
    seen: list[tuple[int, Tensor, int]] = []
    trunk = next((m for m in model.modules() if isinstance(m, Trunk)), None)
    if trunk is None:
        return {}

    def note(index: int, reducer: Reducer, reduction: Reduction | None) -> None:
        if reduction is not None:
            seen.append((index, reduction.places, reducer.fused))

    hooks = [
        reducer.register_forward_hook(lambda m, given, out, i=int(name): note(i, m, out))
        for name, present in trunk.reducers.items()
        for reducer in present.modules()
        if isinstance(reducer, Reducer) and not isinstance(reducer, InTurn)
    ]
    was_training = model.training
    try:
        model.eval()(images)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return _compose(seen)


def _compose(seen: list[tuple[int, Tensor, int]]) -> dict[int, Tensor]:
    result: dict[int, Tensor] = {}
    before: Tensor | None = None
    for index, places, fused in seen:
        now = places if before is None else before.gather(1, places)
        if fused:
            now = torch.cat([now[:, :-fused], torch.full_like(now[:, -fused:], GONE)], dim=1)
        result[index], before = now, now
    return result
