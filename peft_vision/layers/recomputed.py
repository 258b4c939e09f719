"""Activations that need not be kept, because they can be computed again from what is kept anyway.

The backward of GELU, SiLU, LayerNorm and RMSNorm keeps their input. Whoever needs their output for
its own backward may therefore keep that same input (at no cost) and apply the module once more:
the same operation on the same numbers, so the result is the same bit for bit. `watch` makes such
modules write onto their output where it came from; the note is written only where autograd's own
graph shows that the output is this operation of that input and of nothing else. A dropout, a
product, or somebody's hook in between makes another tensor, without a note: that one is kept.
Functions of our own that keep something else write their notes themselves.

Two kinds of modules keep more than that: quick GELU, which is written out, and a norm whose input
was itself noted. They get a backward pass that runs them once more and asks autograd then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NOTE = "_peft_vision_origin"
CANDIDATES = re.compile("GELU|SiLU|Norm")
NORMS = {"NativeLayerNormBackward0", "FusedRmsNormBackward0"}
KEEPS_INPUT = {
    "GeluBackward0",
    "SiluBackward0",
    *NORMS,
}
"""Nodes of autograd's graph whose backward keeps the input, whatever else."""


@dataclass
class Origin:
    """Where a tensor came from.

    Attributes:
        sources: from what, detached; kept for backward by whoever made the tensor.
        version: of the tensor, when it was made.
        again: the computation, shared by all who need the tensor.
        exact: whether it gives the same bits.
    """

    sources: tuple[Tensor, ...]
    version: int
    again: Again
    exact: bool = True


class Again:
    """Computes a tensor again; several users in a row share one computation."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self.make = make
        self._value: Tensor | None = None
        self._users = 0
        self._left = 0

    def enter(self) -> None:
        """One more user, who will call `value` once in a backward pass."""
        self._users += 1

    def value(self, sources: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The tensor, in `dtype`; dropped after its last user, so that it is not kept after all."""
        self._left = (self._left or self._users) - 1
        value = self._value
        if value is None or value.dtype != dtype:
            with torch.no_grad():
                value = self.make(*sources).to(dtype)
        self._value = value if self._left else None
        return value


def note(
    x: Tensor, sources: tuple[Tensor, ...], make: Callable[..., Tensor], *, exact: bool = True
) -> None:
    """Let whoever needs `x` for backward keep `sources` and compute it again by `make`."""
    kept = tuple(tensor.detach() for tensor in sources)
    vars(x)[NOTE] = Origin(kept, _version(x), Again(make), exact)


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


def watched(model: nn.Module) -> bool:
    """Whether some module of `model` notes where its output comes from."""
    hooks = (m._forward_hooks.values() for m in model.modules())  # noqa: SLF001
    return any(hook is _note for own in hooks for hook in own)


def origin_of(x: Tensor) -> Origin | None:
    """Where `x` came from, if that is certain and `x` is still what it was."""
    origin = vars(x).get(NOTE)
    intact = isinstance(origin, Origin) and origin.version == _version(x)
    return origin if intact else None


def _version(x: Tensor) -> int:
    version: int = x._version  # noqa: SLF001 - torch's count of changes in place
    return version


def _note(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    if torch.compiler.is_compiling() or len(args) != 1 or not isinstance(output, Tensor):
        return None
    source = args[0]
    if not isinstance(source, Tensor) or not source.requires_grad or output.grad_fn is None:
        return None
    node, place = output.grad_fn, (source.grad_fn, source.output_nr)
    origin = origin_of(source)
    if origin is not None and origin.exact and _is_norm_of(node, place):
        return _run_again(module, source, output, origin.sources, origin.again.make)
    if _is_quick_gelu(node, place):
        return _run_again(module, source, output, (source.detach(),), _itself)
    if node.name() in KEEPS_INPUT and node.next_functions[0] == place:
        note(output, (source,), module.forward)
    return None


def _is_norm_of(node: Any, source: tuple[Any, int]) -> bool:
    """Whether `node` is a norm of `source`, which autocast may have cast to 32 bits before."""
    if node.name() not in NORMS:
        return False
    before = node.next_functions[0]
    cast = before[0] is not None and before[0].name() == "ToCopyBackward0"
    return bool(source in (before, before[0].next_functions[0] if cast else None))


def _is_quick_gelu(node: Any, source: tuple[Any, int]) -> bool:
    """Whether `node` is x * sigmoid(1.702 * x), of `source` alone."""
    edges = node.next_functions
    if node.name() != "MulBackward0" or edges[0] != source:
        return False
    gate = edges[1][0]
    if gate is None or gate.name() != "SigmoidBackward0":
        return False
    inner = gate.next_functions[0][0]
    return inner is not None and inner.name() == "MulBackward0" and _feeds(inner, source)


def _feeds(node: Any, source: tuple[Any, int]) -> bool:
    return all(edge in (source, (None, 0)) for edge in node.next_functions)


def _itself(source: Tensor) -> Tensor:
    return source


def _run_again(
    module: nn.Module,
    source: Tensor,
    output: Tensor,
    kept: tuple[Tensor, ...],
    make: Callable[..., Tensor],
) -> Tensor:
    """`output`, with a backward pass that makes `source` of what is kept and runs the module."""
    dtypes = source.dtype, output.dtype

    def forward(x: Tensor) -> Tensor:
        y: Tensor = module.forward(x.to(dtypes[1]))
        return y

    parameters = tuple(module.parameters())
    y: Tensor = _RunAgain.apply(output.detach(), (make, forward), kept, source, *parameters)
    note(y, kept, lambda *sources: forward(make(*sources).to(dtypes[0])))
    return y


class _RunAgain(torch.autograd.Function):
    """Gradients for what went into a module, and for its parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        how: tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]],
        kept: tuple[Tensor, ...],
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.how, ctx.dtype, ctx.parameters = how, x.dtype, parameters
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        make, forward = ctx.how
        needed = ctx.needs_input_grad[3:]
        with without_autocast(grad):
            x = make(*ctx.saved_tensors).to(ctx.dtype).detach().requires_grad_()
            with torch.enable_grad():
                y = forward(x)
            wanted = [t for t, need in zip((x, *ctx.parameters), needed, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, grad))
        return None, None, None, *(next(found) if need else None for need in needed)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Where autocast, if it is on for the device of `x`, is off."""
    kind = x.device.type
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()
