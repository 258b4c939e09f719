"""The product of a gated MLP, ``act(gate) * value``, computed again in the backward pass.

Autograd keeps four times the width of the hidden units for it: gate, activated gate, value, and for
the linear behind them the product. Two of these are enough, gate and value; the others follow from
them by the same operations, so the gradients are the same bit for bit.

A family computes the product in its own forward. `GateWatch` sees what goes into it and what comes
out, and takes its place in autograd's graph where that graph shows that it is this product and
nothing else.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from peft_vision.layers.mlp import MlpParts
from peft_vision.layers.recomputed import note

ACTIVATIONS = {"SiluBackward0": "silu", "GeluBackward0": "gelu"}
Spec = tuple[str, str, int]
"""Name of the activation, its `approximate`, and which of the two, or which half, it acts on."""
Edge = tuple[Any, int]
"""A node of autograd's graph, and which of its outputs."""


class GateWatch:
    """Hooks on the linears of one gated MLP, for as long as `remove` is not called."""

    def __init__(self, mlp: nn.Module, parts: MlpParts) -> None:
        self._outputs: dict[str, Tensor] = {}
        self._parts = parts
        behind = parts.norm if parts.norm is not None else parts.down
        first: nn.Module = getattr(mlp, behind)
        self._handles: list[RemovableHandle] = [
            getattr(mlp, name).register_forward_hook(partial(self._seen, name)) for name in parts.up
        ]
        self._handles.append(first.register_forward_pre_hook(self._replace))
        # A pass that fails (out of memory) must not leave its graph behind.
        self._handles.append(mlp.register_forward_hook(self._forget, always_call=True))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _seen(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            self._outputs[name] = output

    def _forget(self, module: nn.Module, args: Any, output: Any) -> None:
        self._outputs = {}

    def _replace(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The product that goes on, with a backward pass of ours."""
        seen, self._outputs = [self._outputs.get(n) for n in self._parts.up], {}
        units = [t for t in seen if t is not None]
        usable = len(args) == 1 and isinstance(args[0], Tensor) and args[0].grad_fn is not None
        if torch.compiler.is_compiling() or not usable or len(units) != len(self._parts.up):
            return None
        spec = _spec(args[0], units)
        return None if spec is None else (_again(args[0], units, spec),)


def _again(z: Tensor, units: list[Tensor], spec: Spec) -> Tensor:
    y: Tensor = _GateProduct.apply(z.detach(), spec, *units)
    note(y, tuple(units), partial(_product, spec))
    return y


def _spec(z: Tensor, units: list[Tensor]) -> Spec | None:
    """How `z` is made of `units`, by autograd's graph; None where it is not certain.

    Args:
        units: gate and value, or the one tensor whose halves they are.
    """
    node: Any = z.grad_fn
    edges = node.next_functions
    acts = [i for i, (n, _) in enumerate(edges) if n is not None and n.name() in ACTIVATIONS]
    alike = all(u.dtype == z.dtype and u.shape[:-1] == z.shape[:-1] for u in units)
    if node.name() != "MulBackward0" or len(acts) != 1 or not alike:
        return None
    act = edges[acts[0]][0]
    half = _gated_half(z, units, act.next_functions[0], edges[1 - acts[0]])
    if half is None:
        return None
    name = ACTIVATIONS[act.name()]
    how = act._saved_approximate if name == "gelu" else "none"  # noqa: SLF001 - a word, no tensor
    return name, how, half


def _gated_half(z: Tensor, units: list[Tensor], gate: Edge, value: Edge) -> int | None:
    """Which of the units, or of the halves of one, is the gate; the value is the other."""
    places = [(unit.grad_fn, unit.output_nr) for unit in units]
    if len(units) == 2:
        same = all(unit.shape == z.shape for unit in units)
        return places.index(gate) if same and {gate, value} == set(places) else None
    node, number = gate
    halves = node is not None and node is value[0] and node.name() == "SplitBackward0"
    two = units[0].shape[-1] == 2 * z.shape[-1] and {number, value[1]} == {0, 1}
    return number if halves and two and node.next_functions[0] == places[0] else None


def _parted(spec: Spec, units: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Gate and value."""
    both = units[0].chunk(2, dim=-1) if len(units) == 1 else units
    return both[spec[2]], both[1 - spec[2]]


def _activated(spec: Spec, gate: Tensor) -> Tensor:
    name, how, _ = spec
    if name == "silu":
        return torch.ops.aten.silu(gate)  # type: ignore[no-any-return]
    return torch.ops.aten.gelu(gate, approximate=how)  # type: ignore[no-any-return]


def _product(spec: Spec, *units: Tensor) -> Tensor:
    gate, value = _parted(spec, units)
    return _activated(spec, gate) * value


class _GateProduct(torch.autograd.Function):
    """Gradients for gate and value, or for the tensor that holds both."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, spec: Spec, *units: Tensor) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(*units)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        units, spec = ctx.saved_tensors, ctx.spec
        gate, value = _parted(spec, units)
        grad_value = grad * _activated(spec, gate)
        along = grad * value
        if spec[0] == "silu":
            grad_gate = torch.ops.aten.silu_backward(along, gate)
        else:
            grad_gate = torch.ops.aten.gelu_backward(along, gate, approximate=spec[1])
        pair = (grad_gate, grad_value) if spec[2] == 0 else (grad_value, grad_gate)
        return None, None, *((torch.cat(pair, dim=-1),) if len(units) == 1 else pair)
