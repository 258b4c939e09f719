"""A model run once on `meta`, to see which channels of which weights go together."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_vision.backbones._channel_calls import Call, Colorings, pointwise, unknown
from peft_vision.backbones._channel_earlier import Earlier, Gone, Record, Result, alike
from peft_vision.backbones._channel_labels import Atoms, Coloring, along
from peft_vision.backbones._channel_layout import LAYOUT
from peft_vision.backbones._channel_sums import SUMS
from peft_vision.layers.quantized import Quantized

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
"""What a model's code raises on images or widths that it cannot take."""

RULES = LAYOUT | SUMS
"""Whatever enters an operation that has none is frozen, unless it works element by element."""

KEPT = {"base_layer", "original_module"}
"""Where PEFT's wrappers keep the layer that they took the place of."""

Axis = tuple[str, int]
"""(path of a parameter or buffer, dimension)"""


@dataclass
class Traced:
    """What a run told.

    Attributes:
        axes: the atom of each position of each dimension of the named tensors.
        by_group: convolution's weight -> whether whole groups go, or channels inside of all groups.
    """

    atoms: Atoms
    axes: dict[Axis, Coloring]
    by_group: dict[str, bool] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)


def empty_copy(model: nn.Module) -> nn.Module:
    """A copy on `meta` in evaluation mode; packed layers are plain in it."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, Quantized):
            memo[id(module)] = module.dense_twin()
            continue
        for table in (module._parameters, module._buffers):  # noqa: SLF001
            for t in table.values():
                if t is not None and id(t) not in memo:
                    empty = torch.empty_like(t, device="meta", requires_grad=False)
                    is_parameter = isinstance(t, nn.Parameter)
                    memo[id(t)] = (
                        nn.Parameter(empty, requires_grad=False) if is_parameter else empty
                    )
    return copy.deepcopy(model, memo).eval()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by path, each under every name that it has."""
    return {
        f"{prefix}.{name}" if prefix else name: t
        for prefix, module in model.named_modules()
        for table in (module._parameters, module._buffers)  # noqa: SLF001
        for name, t in table.items()
        if t is not None
    }


Run = Callable[[nn.Module, Tensor], Any]
"""(model, images) -> what the model makes of them."""


def trace(model: nn.Module, image: Tensor, run: Run) -> Traced:
    """Run a model on `meta` and follow the channels of all of its weights.

    Raises:
        FAILURES: as the model's own code does.
    """
    atoms = Atoms()
    named = named_tensors(model)
    sizes = {(path, d): t.shape[d] for path, t in named.items() for d in _dims_of(model, path, t)}
    pieces = np.split(atoms.fresh(sum(sizes.values())), np.cumsum(list(sizes.values()))[:-1])
    axes = dict(zip(sizes, pieces, strict=True))
    names = Counter(id(t) for t in named.values())
    wrapped = tuple(f"{name}." for name, m in model.named_modules() if KEPT & set(m._modules))  # noqa: SLF001
    for (path, _), atom in axes.items():
        if names[id(named[path])] > 1:
            atoms.freeze(atom, "a weight has two names")
        if path.startswith(wrapped):
            atoms.freeze(atom, "an adapter is around a layer; merge it first")
    traced = Traced(atoms, axes)
    follow = _Follow(named, traced)
    with torch.no_grad(), follow:
        leave(follow, run(model, image))
    return traced


def retrace(
    before: Traced, gone: Gone, cut: set[int], again: Callable[[], Any], model: nn.Module
) -> set[int]:
    """Run a model that was cut, and compare: what met before has to meet again.

    Args:
        model: on `meta`, without what is `gone` from `before`; `again` runs it.
        cut: sets (roots) of the sites that were cut, with those of their units that stay.

    Returns:
        Sets of `cut` that met others than before, or whose operation failed.

    Raises:
        FAILURES: as the model's own code does where no operation can be blamed.
    """
    atoms, axes = Atoms(before.atoms.count), {}
    for axis, atom in before.axes.items():
        roots = before.atoms.roots(atom)
        axes[axis] = roots[~gone[roots]]
    now = Traced(atoms, axes, dict(before.by_group))
    follow = _Follow(named_tensors(model), now, Earlier(before.records, before.atoms, gone))
    with torch.no_grad(), _Reshapes(follow), follow:
        leave(follow, again())
    found = atoms.touched & cut
    if not found and follow.recalls:
        raise RuntimeError("an operation failed on what was not cut")
    return found


def leave(follow: _Follow, output: Any) -> None:
    """What a model returns keeps its size."""
    for t in tree_leaves(output):
        if isinstance(t, Tensor):
            for c in follow.known(t):
                follow.traced.atoms.freeze(c, "the model returns them")


def _dims_of(model: nn.Module, path: str, t: Tensor) -> list[int]:
    owner = model.get_submodule(path.rpartition(".")[0])
    inner = isinstance(owner, nn.modules.conv._ConvNd) and t.dim() > 2  # noqa: SLF001
    return [d for d in range(2 if inner else t.dim()) if t.shape[d] > 1]


class _Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies a rule to every operation that runs."""

    def __init__(
        self,
        named: Mapping[str, Tensor],
        traced: Traced,
        earlier: Earlier | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traced = traced
        self.earlier = earlier
        self.recalls = 0
        self.path_of = {id(t): path for path, t in named.items()}
        self.colorings: dict[int, Colorings] = {}
        self.alive: list[Tensor] = list(named.values())
        self.made: set[int] = set(self.path_of)
        for (path, dim), atoms in traced.axes.items():
            t = named[path]
            if len(atoms) > 1:
                self.colorings.setdefault(id(t), []).append(along(atoms, dim, t.dim()))

    def known(self, t: Any) -> Colorings:
        """Colorings of a tensor."""
        return self.colorings.get(id(t), [])

    def is_data(self, t: Tensor) -> bool:
        """Whether it depends on the image: it was neither named nor made of named ones."""
        return id(t) not in self.made

    def by_group(self, weight: Tensor, groups: int) -> bool:
        """Whether a grouped convolution loses whole groups: where that is finer."""
        path = self.path_of.get(id(weight))
        if path is None:
            return True
        return self.traced.by_group.setdefault(path, groups >= weight.shape[1])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip([a.name for a in func._schema.arguments], args, strict=False))  # noqa: SLF001
        given.update(kwargs or {})
        read = {name: value for name, value in given.items() if name != "out"}
        tensors = [t for t in tree_leaves(read) if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__.rstrip("_")
        numbers = tuple(n for n in tree_leaves(given) if isinstance(n, float))
        expected = self.earlier.following(name) if self.earlier else None
        try:
            out = func(*args, **(kwargs or {}))
        except FAILURES:
            if expected is None:
                raise
            out = None
        if expected is not None and not alike(numbers, out, expected):
            return self._recall(expected, tensors)
        call = Call(
            name, given, out, tensors, self.traced.atoms, self.known, self.is_data, self.by_group
        )
        record = Record(name, numbers, [], not isinstance(out, Tensor))
        self._note(record, list(out) if record.several else [out], self._infer(call, func), tensors)
        return out

    def _infer(self, call: Call, func: Any) -> list[Colorings]:
        several = isinstance(call.out, tuple | list)
        if not any(self.known(t) for t in call.tensors):
            return [[] for _ in call.out] if several else [[]]
        found: Any
        if torch.Tag.pointwise in func.tags:
            found = pointwise(call)
        else:
            found = RULES.get(call.name, unknown)(call)
        if not several:
            return [found]
        per_result = found if found and isinstance(found[0], list) else [found]
        return [*per_result, *([] for _ in range(len(call.out) - len(per_result)))]

    def _note(
        self, record: Record, results: list[Any], found: list[Colorings], tensors: list[Tensor]
    ) -> None:
        data = any(self.is_data(t) for t in tensors)
        paths = {self.path_of[id(t)] for t in tensors if id(t) in self.path_of and t.dim() > 1}
        for t, colorings in zip(results, found, strict=False):
            if not isinstance(t, Tensor):
                continue
            self.alive.append(t)
            self.colorings[id(t)] = colorings
            record.results.append(Result(tuple(t.shape), t.dtype, colorings))
            if data:
                self.made.discard(id(t))
            else:
                self.made.add(id(t))
                if len(paths) == 1:
                    self.path_of[id(t)] = next(iter(paths))
        self.traced.records.append(record)

    def reshaped(self, tensors: list[Tensor]) -> Any:
        """What a reshape should have given that is impossible by now."""
        for name in ("view", "_unsafe_view"):
            expected = self.earlier.following(name) if self.earlier else None
            if expected is not None:
                return self._recall(expected, tensors)
        return None

    def _recall(self, expected: Record, tensors: list[Tensor]) -> Any:
        """Go on with what an operation should have given; what it was given cannot be cut."""
        for c in (c for t in tensors for c in self.known(t)):
            self.traced.atoms.freeze(c, f"{expected.name} is of a fixed size")
        self.recalls += 1
        made = [torch.empty(r.shape, dtype=r.dtype, device="meta") for r in expected.results]
        again = replace(expected, results=[])
        self._note(again, made, [r.colorings for r in expected.results], tensors)
        return made if expected.several else made[0]


class _Reshapes(TorchFunctionMode):
    """A reshape to a fixed size fails before it is an operation: goes on as after one that does."""

    def __init__(self, follow: _Follow) -> None:
        super().__init__()
        self.follow = follow

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except FAILURES:
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            recalled = self.follow.reshaped(tensors) if func is Tensor.reshape else None
            if recalled is None:
                raise
            return recalled
