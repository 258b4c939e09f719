"""Activations that need not be kept, because they can be computed again from what is kept anyway.

The backward of GELU, SiLU, LayerNorm and RMSNorm keeps their input. Whoever needs their output for
its own backward may therefore keep that same input (at no cost) and apply the module once more:
the same operation on the same numbers, so the result is the same bit for bit. `watch` makes such
modules write onto their output where it came from; the note is written only where autograd's own
graph shows that the output is this operation of that input and of nothing else. A dropout, a
product, or somebody's hook in between makes another tensor, without a note: that one is kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NOTE = "_peft_vision_origin"
CANDIDATES = re.compile("GELU|SiLU|Norm")
KEEPS_INPUT = {
    "GeluBackward0",
    "SiluBackward0",
    "NativeLayerNormBackward0",
    "FusedRmsNormBackward0",
}
"""Nodes of autograd's graph whose backward keeps the input, whatever else."""


@dataclass
class Origin:
    """Where a tensor came from.

    Attributes:
        module: what made it. `source`: from what, detached.
        version: of the tensor, when it was made.
        again: the computation, shared by all who need the tensor.
    """

    module: nn.Module
    source: Tensor
    version: int
    again: Again


class Again:
    """Computes a tensor again; several users in a row share one computation."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._value: Tensor | None = None
        self._users = 0
        self._left = 0

    def enter(self) -> None:
        """One more user, who will call `value` once in a backward pass."""
        self._users += 1

    def value(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor, in `dtype`; dropped after its last user, so that it is not kept after all."""
        self._left = (self._left or self._users) - 1
        value = self._value
        if value is None or value.dtype != dtype:
            with torch.no_grad():
                value = self._module.forward(source).to(dtype)
        self._value = value if self._left else None
        return value


def watch(model: nn.Module) -> None:
    """Let the activations and norms of `model` note where their outputs come from. Idempotent."""
    for module in model.modules():
        leaf = next(module.children(), None) is None
        if leaf and CANDIDATES.search(type(module).__name__):
            unwatch(module)
            module.register_forward_hook(_note, prepend=True)


def unwatch(model: nn.Module) -> None:
    """Undo `watch`."""
    for module in model.modules():
        hooks = module._forward_hooks  # noqa: SLF001 - torch gives handles, which no copy has
        for key in [key for key, hook in hooks.items() if hook is _note]:
            del hooks[key]


def origin_of(x: Tensor) -> Origin | None:
    """Where `x` came from, if that is certain and `x` is still what it was."""
    origin = vars(x).get(NOTE)
    intact = isinstance(origin, Origin) and origin.version == _version(x)
    return origin if intact else None


def _version(x: Tensor) -> int:
    version: int = x._version  # noqa: SLF001 - torch's count of changes in place
    return version


def _note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling() or len(args) != 1 or not isinstance(output, Tensor):
        return
    source = args[0]
    if not isinstance(source, Tensor) or not source.requires_grad or output.grad_fn is None:
        return
    if _is_kept(output.grad_fn, (source.grad_fn, source.output_nr)):
        again = Again(module)
        vars(output)[NOTE] = Origin(module, source.detach(), _version(output), again)


def _is_kept(node: Any, source: tuple[Any, int]) -> bool:
    """Whether `node` is an operation of `source` alone, and keeps it."""
    if source[0] is None:
        return False
    edges = node.next_functions
    if node.name() in KEEPS_INPUT:
        return bool(edges[0] == source)
    # Quick GELU is written out: x * sigmoid(1.702 * x).
    if node.name() != "MulBackward0" or edges[0] != source:
        return False
    gate = edges[1][0]
    if gate is None or gate.name() != "SigmoidBackward0":
        return False
    inner = gate.next_functions[0][0]
    return inner is not None and inner.name() == "MulBackward0" and _feeds(inner, source)


def _feeds(node: Any, source: tuple[Any, int]) -> bool:
    return all(edge in (source, (None, 0)) for edge in node.next_functions)
