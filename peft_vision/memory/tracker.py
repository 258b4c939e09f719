"""Counts the bytes that are alive while code runs, and what they are at the moment of the most.

Every tensor that comes out of an operation is seen by a dispatch mode; storages are counted once,
however many views there are of one, and until the last reference to them is gone. So it counts what
autograd keeps, too. It works on tensors with numbers and on fake ones alike. What a kernel takes
for itself and gives back before it returns is not seen.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from peft_vision.memory.places import OTHER, places_of

CUDA_BLOCK = 512
"""Bytes to multiples of which CUDA's caching allocator rounds."""

PACKED = "weights, packed"
COPIES = "copies of weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer state"
INPUTS = "inputs"
TEMPORARY = "temporary"
BEFORE = "made before"
WEIGHTS = {
    torch.float32: "weights, fp32",
    torch.bfloat16: "weights, bf16",
    torch.float16: "weights, fp16",
    torch.float64: "weights, fp64",
}


class PeakTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live bytes, category by category, and remembers them at their peak.

    The categories: weights by their dtype, copies made of weights alone (casts, dequantized ones),
    activations by the kind of module that made them (`peft_vision.memory.places`), gradients of
    parameters, optimizer state, inputs, and temporary ones (made in a backward pass).

    Args:
        model: its parameters and buffers count from the start, and its modules tell activations
            apart. Without it, what is met is counted from when it is met.
        block: sizes are rounded up to multiples of so many bytes; see `CUDA_BLOCK`.

    Attributes:
        live: bytes now. `now`: the same by category.
        peak: the most at once. `at_peak`: the same by category.
    """

    def __init__(self, model: nn.Module | None = None, *, block: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.now: dict[str, int] = defaultdict(int)
        self.at_peak: dict[str, int] = {}
        self._model, self._block = model, block
        self._known: dict[int, tuple[Any, int, str]] = {}
        self._places: dict[int, str] = {} if model is None else places_of(model)
        self._inside: list[str] = []
        self._phase: str | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> PeakTracker:
        if self._model is not None:
            self.hold_weights(self._model)
            self._watch_gradients(self._model)
        self._handles += [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles, self._known = [], {}

    def hold_weights(self, model: nn.Module, whose: str = "") -> None:
        """Count the parameters and buffers of a model that was made before."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.hold(f"{whose}{_weights(tensor)}", [tensor])

    def hold(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors as of `category`, whatever they were before."""
        for tensor in tensors:
            for storage in _storages(tensor):
                self._add(storage, category, again=True)

    @contextmanager
    def phase(self, category: str) -> Iterator[None]:
        """Count all that is made in the meantime as of `category`."""
        before, self._phase = self._phase, category
        try:
            yield
        finally:
            self._phase = before

    def reset_peak(self) -> None:
        """Forget the peak so far; what is alive counts on."""
        self.peak, self.at_peak = self.live, self._parts()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what is new in what it gives."""
        kwargs = kwargs or {}
        sources = [self._meet(tensor) for tensor in _tensors((*args, *kwargs.values()))]
        result = func(*args, **kwargs)
        category = None
        for tensor in _tensors((result,)):
            for storage in _storages(tensor):
                if id(storage) not in self._known:
                    category = category or self._category(sources)
                    self._add(storage, category)
        return result

    def _meet(self, tensor: Tensor) -> str:
        """The category of an operand, counted from now on where it was made before."""
        category = BEFORE
        for storage in _storages(tensor):
            known = self._known.get(id(storage))
            if known is None:
                category = _weights(tensor) if isinstance(tensor, nn.Parameter) else BEFORE
                self._add(storage, category)
            else:
                category = known[2]
        return category

    def _category(self, sources: list[str]) -> str:
        if self._phase is not None:
            return self._phase
        if sources and all(name == COPIES or name.startswith("weights") for name in sources):
            return COPIES
        if self._inside:
            return self._inside[-1]
        in_backward = torch._C._current_graph_task_id() != -1  # noqa: SLF001
        return TEMPORARY if in_backward else OTHER

    def _add(self, storage: Any, category: str, *, again: bool = False) -> None:
        key = id(storage)
        known = self._known.get(key)
        if known is not None:
            if again and known[2] != category:
                self.now[known[2]] -= known[1]
                self.now[category] += known[1]
                self._known[key] = (known[0], known[1], category)
            return
        size = -(-storage.nbytes() // self._block) * self._block
        reference = weakref.ref(storage, partial(self._drop, key))
        self._known[key] = (reference, size, category)
        self.live += size
        self.now[category] += size
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, self._parts()

    def _drop(self, key: int, _: Any) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self.live -= known[1]
            self.now[known[2]] -= known[1]

    def _parts(self) -> dict[str, int]:
        return {name: size for name, size in self.now.items() if size}

    def _watch_gradients(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                leaf: Any = parameter
                self._handles.append(leaf.register_post_accumulate_grad_hook(self._mark_gradient))

    def _mark_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.hold(GRADIENTS, [parameter.grad])

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        place = self._places.get(id(module))
        self._inside.append(place or (self._inside[-1] if self._inside else OTHER))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._inside:
            self._inside.pop()


def _weights(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return WEIGHTS.get(tensor.dtype, PACKED)
    return PACKED


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _storages(tensor: Tensor) -> tuple[Any, ...]:
    """The one storage of an ordinary tensor; sparse ones have none, their parts were seen."""
    return (tensor.untyped_storage(),) if tensor.layout is torch.strided else ()
