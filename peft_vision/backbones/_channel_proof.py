"""From a run to sites, and the proof that a model with some of them cut still computes the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.backbones._channel_sites import ChannelsSite, Member, Positions, keep_channels
from peft_vision.backbones._channel_trace import (
    FAILURES,
    Axis,
    Run,
    Traced,
    empty_copy,
    named_tensors,
    retrace,
    trace,
)
from peft_vision.backbones.sites import Backbone
from peft_vision.errors import UnsupportedSite
from peft_vision.plan import Decisions

SIDES = (224, 32, 64, 28, 96, 128, 256, 384, 448, 512)
"""Tried, in pixels, on a model that does not say which images it takes."""

ROUNDS = 12

SHARES = (0.5, 0.8)
"""Of every site, cut at random for the proof."""

FEWEST = 3
"""Sites of fewer units are not told from single channels, and are left alone."""


def proven(backbone: Backbone) -> tuple[ChannelsSite, ...]:
    """The sites of a model; see `channels`."""
    model = empty_copy(backbone.model)
    image, traced = _first_run(model, backbone)
    proof, barred = _Proof(model, image, traced, run_of(backbone)), set[int]()
    found = _sites(backbone.model, traced, barred)
    for _ in range(ROUNDS):
        culprits = proof.culprits(found)
        if not culprits:
            break
        barred |= culprits
        found = _sites(backbone.model, traced, barred)
    else:
        found = []
    if not found:
        why = ", ".join(reason for reason, _ in traced.atoms.reasons.most_common(3))
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} has no channels that could be removed on their own"
            + (f": {why}." if why else ".")
        )
    return tuple(one.site for one in found)


def _first_run(model: nn.Module, backbone: Backbone) -> tuple[Tensor, Traced]:
    failure: Exception | None = None
    for shape in _shapes(model, backbone):
        image = torch.zeros(1, *shape, device="meta", dtype=_dtype(model))
        try:
            return image, trace(model, image, run_of(backbone))
        except FAILURES as error:
            failure = failure or error
    said = str(failure or "it has no plain layer").splitlines() or [type(failure).__name__]
    raise UnsupportedSite(
        f"{type(model).__name__} has no channels: it cannot be run without numbers to see which of "
        f"them go together ({said[0]})."
    )


def run_of(backbone: Backbone) -> Run:
    """How images are shown to a model: as they are, unless it takes more than images."""
    return backbone.run or (lambda model, images: model(images))


def _shapes(model: nn.Module, backbone: Backbone) -> Iterable[tuple[int, ...]]:
    if backbone.input_size is not None:
        return [backbone.input_size]
    layers = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]  # noqa: SLF001
    if not layers:
        return []
    if isinstance(layers[0], nn.Linear):
        return [(layers[0].in_features,), (4, layers[0].in_features)]
    inner = len(layers[0].kernel_size)
    return [(layers[0].in_channels, *(side,) * inner) for side in SIDES]


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@dataclass(frozen=True)
class _Found:
    """A site and the sets (roots) that are its units."""

    site: ChannelsSite
    roots: Positions


def _sites(model: nn.Module, traced: Traced, barred: set[int]) -> list[_Found]:
    """Sets that are in the same weights, the same number of times each, as one site.

    Args:
        barred: sets that cannot be removed, besides those that the run has frozen.
    """
    present = named_tensors(model)
    normed = traced.atoms.marked("normed")
    found, taken = [], set[str]()
    for axes, roots in _alike(traced, barred).items():
        if len(roots) < FEWEST or not all(_is_plain(present, traced, axis) for axis, _ in axes):
            continue
        members = _members(traced, [(axis, _positions(traced, axis, roots)) for axis, _ in axes])
        first = members[0].positions[:, 0].argsort(kind="stable")
        members = tuple(replace(m, positions=m.positions[first]) for m in members)
        key = _key([axis for axis, _ in axes], taken)
        site = ChannelsSite(key, model, len(roots), members, bool(normed[roots[0]]))
        found.append(_Found(site, roots[first]))
    order = {path: n for n, path in enumerate(present)}
    return sorted(found, key=lambda one: order[one.site.members[0].paths[0]])


Signature = tuple[tuple[Axis, int], ...]
"""The weights that a set is in, and how many positions it has in each."""


def _alike(traced: Traced, barred: set[int]) -> dict[Signature, Positions]:
    """Sets that may be removed, by where they are."""
    atoms = traced.atoms
    free = ~atoms.marked("frozen") & atoms.marked("produced") & atoms.marked("consumed")
    free[list(barred)] = False
    where: dict[int, list[tuple[Axis, int]]] = defaultdict(list)
    for axis, own in traced.axes.items():
        roots = atoms.roots(own)
        names, counts = np.unique(roots[free[roots]], return_counts=True)
        for root, count in zip(names.tolist(), counts.tolist(), strict=True):
            where[root].append((axis, count))
    alike: dict[Signature, list[int]] = defaultdict(list)
    for root, signature in where.items():
        alike[tuple(signature)].append(root)
    return {signature: np.array(roots) for signature, roots in alike.items()}


def _positions(traced: Traced, axis: Axis, roots: Positions) -> Positions:
    """Where sets are along an axis: sets x positions of each, ascending."""
    present = traced.atoms.roots(traced.axes[axis])
    places = np.flatnonzero(np.isin(present, roots))
    by_root = places[present[places].argsort(kind="stable")].reshape(len(roots), -1)
    inverse = roots.argsort().argsort()
    found: Positions = by_root[inverse]
    return found


def _is_plain(present: dict[str, Tensor], traced: Traced, axis: Axis) -> bool:
    """Whether the model itself has that weight, in that size, and can be cut there."""
    path, dim = axis
    t = present.get(path)
    if t is None or not t.dtype.is_floating_point or t.dim() <= dim:
        return False
    return bool(t.shape[dim] == len(traced.axes[axis]))


def _members(traced: Traced, found: Sequence[tuple[Axis, Positions]]) -> tuple[Member, ...]:
    """One member for all tensors in which the units are at the same positions."""
    members: list[Member] = []
    for (path, dim), positions in found:
        groups = dim == 0 and traced.by_group.get(path, False)
        one = Member((path,), dim, len(traced.axes[path, dim]), positions, groups)
        for n, other in enumerate(members):
            if (other.dim, other.length, other.groups) == (dim, one.length, groups) and (
                np.array_equal(other.positions, positions)
            ):
                members[n] = replace(other, paths=(*other.paths, path))
                break
        else:
            members.append(one)
    return tuple(members)


def _key(axes: Sequence[Axis], taken: set[str]) -> str:
    """After the first weight whose rows are cut."""
    path = next((path for path, dim in axes if dim == 0), axes[0][0])
    name = path.rpartition(".")[0] or path
    key, n = f"{name}.channels", 1
    while key in taken:
        n += 1
        key = f"{name}.{n}.channels"
    taken.add(key)
    return key


@dataclass
class _Proof:
    """A model on `meta` that is cut at random, run again and compared with the first run."""

    model: nn.Module
    image: Tensor
    traced: Traced
    run: Run

    def culprits(self, found: Sequence[_Found]) -> set[int]:
        """Sets that cannot be removed after all."""
        for share in SHARES:
            barred = self.tried(found, share)
            if barred:
                return barred
        return set()

    def tried(self, found: Sequence[_Found], share: float) -> set[int]:
        """The same, for cutting a share of each site."""
        drawn = np.random.default_rng(0)
        gone = np.zeros(self.traced.atoms.count, dtype=bool)
        decisions: Decisions = {}
        for one in found:
            count = one.site.count
            kept = np.sort(drawn.permutation(count)[: max(FEWEST - 1, round((1 - share) * count))])
            gone[np.delete(one.roots, kept)] = True
            decisions[one.site.key] = one.site.decision(kept.tolist())
        cut = empty_copy(self.model)
        keep_channels(view(cut), decisions)
        everything = {int(root) for one in found for root in one.roots}
        try:
            met = retrace(self.traced, gone, everything, lambda: self.run(cut, self.image), cut)
            # What a site of the same weights has in common with a culprit, it is one itself.
            return {int(r) for one in found if met & set(one.roots.tolist()) for r in one.roots}
        except FAILURES:  # in the model's own code, outside of any operation
            return everything if len(found) < 2 else self._halves(found, share) or everything

    def _halves(self, found: Sequence[_Found], share: float) -> set[int]:
        middle = len(found) // 2
        return self.tried(found[:middle], share) | self.tried(found[middle:], share)
