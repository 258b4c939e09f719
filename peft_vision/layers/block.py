"""A pre-norm residual block as named parts, run half by half.

``x -> x + after1(attention(norm1(x)))`` and then ``x -> x + after2(mlp(norm2(x)))``; x is B N C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.absent import Absent
from peft_vision.layers.attention import Attended, attention_inside, branch_of
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.bottleneck import inside
from peft_vision.layers.mlp import MlpParts


@dataclass(frozen=True)
class BlockParts:
    """The names of the parts of a block, and of the arguments that its forward takes.

    Attributes:
        after1: what the attention branch passes through before it is added: modules are called,
            parameters multiply (LayerScale), absent ones (None) are skipped; `after2` likewise.
        mask: keyword of the attention mask, also accepted as the first positional argument.
        rope: keyword of the rotary positions, for families that have them.
    """

    norm1: str
    attention: str
    after1: tuple[str, ...]
    norm2: str
    mlp: str
    after2: tuple[str, ...]
    attention_parts: AttentionParts
    mlp_parts: MlpParts
    mask: str = "attn_mask"
    rope: str | None = None


def attention_of(block: nn.Module, parts: BlockParts) -> nn.Module:
    """The family's own attention module, also where it has been opened."""
    return attention_inside(getattr(block, parts.attention))


def mlp_of(block: nn.Module, parts: BlockParts) -> nn.Module:
    """The family's own MLP module, also where something stands beside it."""
    return inside(getattr(block, parts.mlp))


class Halfway(NamedTuple):
    """A block after its attention: the stream B R C, what was added to it, and how it came about.

    `attended` is None where the branch was removed, and so is `added` where nothing is left of it.
    """

    x: Tensor
    added: Tensor | None
    attended: Attended | None


def attention_half(
    block: nn.Module,
    parts: BlockParts,
    x: Tensor,
    rope: Any = None,
    *,
    rows: int | None = None,
    key_bias: Tensor | None = None,
    whole: bool = False,
) -> Halfway:
    """The attention branch added to the stream.

    Args:
        rows: go on with this many first tokens only; all tokens are still attended to.
        key_bias: see `attend`. `whole`: see `branch_of`.
    """
    module = getattr(block, parts.attention)
    stays = x if rows is None else x[:, :rows]
    if isinstance(module, Absent):
        return Halfway(module(stays), module.added(stays), None)
    normed = getattr(block, parts.norm1)(x)
    named = parts.attention_parts
    attended = branch_of(module, named, normed, rope, rows=rows, key_bias=key_bias, whole=whole)
    added = _through(block, parts.after1, attended.branch)
    return Halfway(stays + added, added, attended)


def mlp_half(block: nn.Module, parts: BlockParts, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The stream with the MLP branch added, and what was added (None where nothing is left)."""
    module = getattr(block, parts.mlp)
    if isinstance(module, Absent):
        return module(x), module.added(x)
    added = _through(block, parts.after2, module(getattr(block, parts.norm2)(x)))
    return x + added, added


def branch_scale(
    block: nn.Module, parts: BlockParts, half: Literal["attention", "mlp"], width: int
) -> Tensor:
    """What a branch is multiplied by before it is added, D: LayerScale, or ones."""
    names = parts.after1 if half == "attention" else parts.after2
    device = next(block.parameters()).device
    ones = torch.ones(1, 1, width, device=device)
    return _through(block, names, ones).detach().flatten()


def refuse_mask(parts: BlockParts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A mask cannot follow tokens that are dropped.

    Raises:
        UnsupportedSite: a mask was passed.
    """
    given = [mask for mask in (kwargs.get(parts.mask), *args[:1]) if mask is not None]
    if torch.compiler.is_exporting():
        # transformers then makes a mask of True alone where none was given, to look at no number.
        given = [mask for mask in given if mask.dtype is not torch.bool]
    if given or kwargs.get("is_causal"):
        raise UnsupportedSite(
            "This model drops tokens inside and was called with an attention mask, which would not "
            "follow them. Call it without a mask."
        )


def _through(block: nn.Module, names: tuple[str, ...], branch: Tensor) -> Tensor:
    for name in names:
        part = getattr(block, name)
        if isinstance(part, nn.Module):
            branch = part(branch)
        elif part is not None:
            branch = part * branch
    return branch
