"""The blocks of a transformer as one module, so that tokens may leave on the way.

A Trunk takes the place of a model's list of blocks as its only element: the model's own loop
calls it once. Which tokens are left is then a local variable of one forward pass, which keeps the
model re-entrant and exportable; a state shared between separate blocks would be neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_vision.layers.block import (
    BlockParts,
    attention_half,
    attention_of,
    mlp_half,
    refuse_mask,
)
from peft_vision.layers.prompts import Prompts, without

GONE = -1
"""Position of a token that stands for several patches."""


class Reducer(nn.Module, ABC):
    """Decides which tokens go on after the attention of one block."""

    @abstractmethod
    def forward(self, x: Tensor, q: Tensor, k: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        """Drop tokens.

        Args:
            x: the stream, B N C; the first `prefix` tokens are never dropped.
            q: the block's queries, B H N D; `k` its keys.
            prefix: how many class, distillation and register tokens come first.

        Returns:
            The shorter stream, and the places (B K, within the N - prefix patches) of the patches
            that go on; a fused token is listed with the place whose position it takes.
        """

    @property
    @abstractmethod
    def fused(self) -> int:
        """How many of the last tokens stand for several patches."""


class Trunk(nn.Module):
    """Blocks in a row, with reducers inside some of them. Input and output: B N C.

    Prompts join the stream before the blocks named, and have left it behind the last block.
    """

    def __init__(self, blocks: list[nn.Module], parts: BlockParts, prefix: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.reducers = nn.ModuleDict()
        self.prompts = nn.ModuleDict()
        self.parts = parts
        self.prefix = prefix
        self.checkpointing = False

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
        reducers, prompts = dict(self.reducers.items()), dict(self.prompts.items())
        extra = 0
        for index, block in enumerate(self.blocks):
            reducer, prompt = reducers.get(str(index)), prompts.get(str(index))
            if isinstance(prompt, Prompts):
                x, extra = prompt(x, self.prefix, extra), prompt.count
            if self.checkpointing and self.training:
                x, kwargs = checkpoint(
                    self._step, block, reducer, x, extra, args, kwargs, use_reentrant=False
                )
            else:
                x, kwargs = self._step(block, reducer, x, extra, args, kwargs)
        return without(x, self.prefix, extra)

    def _step(
        self,
        block: nn.Module,
        reducer: nn.Module | None,
        x: Tensor,
        extra: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Any]]:
        if reducer is None:
            return block(x, *args, **kwargs), kwargs
        rope = kwargs.get(self.parts.rope) if self.parts.rope else None
        x, q, k = attention_half(block, self.parts, x, rope)
        x, places = reducer(x, q, k, self.prefix + extra)
        if rope is not None and self.parts.rope is not None:
            kwargs = {**kwargs, self.parts.rope: take_positions(rope, places)}
        return mlp_half(block, self.parts, x), kwargs


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

    def note(index: int, reducer: nn.Module, before: Tensor, after: tuple[Tensor, Tensor]) -> None:
        shorter = after[0].shape[1] < before.shape[1]
        fused = reducer.fused if isinstance(reducer, Reducer) and shorter else 0
        seen[index] = (after[1], fused)

    hooks = [
        reducer.register_forward_hook(lambda m, given, out, i=int(name): note(i, m, given[0], out))
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
