"""Groups of channels as sites: where their units are in which weights, and how they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_vision.backbones.sites import Backbone
from peft_vision.errors import DamagedArtifact, UnsupportedSite
from peft_vision.layers.surgery import select_parameter, settle_sizes
from peft_vision.plan import Decisions, Json, pack_indices, unpack_indices

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Member:
    """Where the units of a site are in some tensors.

    Attributes:
        paths: of parameters and buffers. `dim`: the dimension that is cut; `length`: its size.
        positions: units x positions of one unit.
        groups: that many groups of a convolution go with the units, in proportion.
    """

    paths: tuple[str, ...]
    dim: int
    length: int
    positions: Positions
    groups: bool = False

    def to_json(self) -> Json:
        """Compact where the positions are evenly spaced, which they nearly always are."""
        first, (units, repeat) = int(self.positions[0, 0]), self.positions.shape
        step = int(self.positions[1, 0]) - first if units > 1 else 1
        inner = int(self.positions[0, 1]) - first if repeat > 1 else 1
        even = first + step * np.arange(units)[:, None] + inner * np.arange(repeat)[None, :]
        listed: Any = self.positions.tolist()
        if np.array_equal(even, self.positions):
            listed = [first, step, repeat, inner]
        return [list(self.paths), self.dim, self.length, listed, int(self.groups)]

    @classmethod
    def from_json(cls, content: Any, units: int) -> Member:
        """Read back what `to_json` wrote.

        Raises:
            DamagedArtifact: it is something else.
        """
        try:
            paths, dim, length, listed, groups = content
            positions = np.array(listed, dtype=np.int64)
            if positions.ndim == 1:
                first, step, repeat, inner = (int(n) for n in listed)
                positions = first + step * np.arange(units)[:, None] + inner * np.arange(repeat)
            found = cls(tuple(map(str, paths)), int(dim), int(length), positions, bool(groups))
            sound = len(positions) == units and 0 <= positions.min() <= positions.max() < length
        except (TypeError, ValueError) as error:
            raise DamagedArtifact(f"Not a member of a group of channels: {content!r}.") from error
        if not sound:
            raise DamagedArtifact(f"A group of channels has positions that do not exist: {paths}.")
        return found


@dataclass(frozen=True)
class ChannelsSite:
    """Units that go one by one, each from the same weights.

    Attributes:
        key: ``<first layer that makes them>.channels``.
        normed: they pass a statistic over channels (a LayerNorm, a response norm, a standardized
            weight), which changes when some go: the rest then computes something else.
    """

    key: str
    model: nn.Module
    count: int
    members: tuple[Member, ...]
    normed: bool = False

    @property
    def width(self) -> int:
        """Channels of one unit."""
        return max(1, min(int(m.positions.shape[1]) for m in self.members))

    def weights(self) -> list[Tensor]:
        """Every weight that belongs to a unit, one row per unit: tensors of U x anything."""
        found = []
        for member in self.members:
            for path in member.paths:
                owner, name = _place(self.model, path)
                tensor = getattr(owner, name).detach()
                scale = isinstance(owner, nn.modules.batchnorm._BatchNorm) and name == "weight"  # noqa: SLF001
                if tensor.dim() > 1 or scale:
                    index = torch.as_tensor(member.positions.ravel(), device=tensor.device)
                    rows = tensor.index_select(member.dim, index).movedim(member.dim, 0)
                    found.append(rows.reshape(self.count, -1))
        return found

    def decision(self, kept: Sequence[int]) -> Json:
        """What a plan says of it: the units that stay, and where they are."""
        return {
            "kept": pack_indices(kept, of=self.count),
            "members": [member.to_json() for member in self.members],
        }


def keep_channels(backbone: Backbone, decisions: Decisions) -> None:
    """Keep some units of each site, in place; works on `meta` too.

    All decisions that were made on one model have to come at once: sites share weights.

    Raises:
        UnsupportedSite: a weight is not where the plan says, or has another size.
    """
    model = backbone.model
    gone: dict[tuple[str, int], set[int]] = {}
    lengths: dict[tuple[str, int], int] = {}
    by_group: set[str] = set()
    for key, decision in decisions.items():
        kept, members = _read(key, decision)
        for member in members:
            lost = np.delete(member.positions, kept, axis=0).ravel().tolist()
            for path in member.paths:
                gone.setdefault((path, member.dim), set()).update(lost)
                lengths[path, member.dim] = member.length
                by_group |= {path} if member.groups else set()
    before = _widths(backbone)
    owners: dict[int, tuple[nn.Module, float]] = {}
    for (path, dim), lost in gone.items():
        owner, name = _place(model, path)
        _cut(owner, name, path, (dim, lengths[path, dim]), lost)
        share = 1 - len(lost) / lengths[path, dim]
        known = owners.get(id(owner), (owner, 1.0))
        owners[id(owner)] = (owner, share if path in by_group and dim == 0 else known[1])
    for owner, share in owners.values():
        settle_sizes(owner, share)
    _note_widths(backbone, before)


def _read(key: str, decision: Any) -> tuple[list[int], list[Member]]:
    try:
        packed, listed = decision["kept"], decision["members"]
    except (TypeError, KeyError) as error:
        raise DamagedArtifact(f"{key}: not a decision on channels.") from error
    kept = unpack_indices(packed)
    if not kept:
        raise UnsupportedSite(f"{key}: at least one unit has to stay.")
    return kept, [Member.from_json(content, int(packed["of"])) for content in listed]


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    try:
        return model.get_submodule(parent), name
    except AttributeError as error:
        raise UnsupportedSite(
            f"{type(model).__name__} has no {path} any more, which the plan cuts."
        ) from error


def _cut(owner: nn.Module, name: str, path: str, where: tuple[int, int], lost: set[int]) -> None:
    dim, length = where
    held = {**owner._parameters, **owner._buffers}.get(name)  # noqa: SLF001
    if held is None:
        raise UnsupportedSite(
            f"{path} is no weight of its own in {type(owner).__name__}: the layer was wrapped or "
            "replaced since the plan was made. Cut channels first."
        )
    if held.dim() <= dim or held.shape[dim] != length or not held.dtype.is_floating_point:
        raise UnsupportedSite(
            f"{path} is {tuple(held.shape)} ({held.dtype}); the plan cuts dimension {dim} of "
            f"{length} of it."
        )
    select_parameter(owner, name, [i for i in range(length) if i not in lost], dim)


BOOKKEEPING = ("num_features", "head_hidden_size", "in_features", "hidden_size", "embed_dim")
"""What timm's models and heads call the width that their classifier reads."""


def _widths(backbone: Backbone) -> list[tuple[nn.Module, int]]:
    """Classifiers, and how wide what they read is."""
    layers = [site.layer for site in backbone.classifier]
    return [(layer, int(w.shape[1])) for layer in layers if (w := _weight(layer)) is not None]


def _note_widths(backbone: Backbone, before: Sequence[tuple[nn.Module, int]]) -> None:
    """Let the model's own figures follow: a new classifier is made from them."""
    owners = [backbone.core, backbone.model, *(site.owner for site in backbone.classifier)]
    for layer, width in before:
        weight = _weight(layer)
        if weight is None or weight.shape[1] == width:
            continue
        for owner in owners:
            for name in BOOKKEEPING:
                if vars(owner).get(name) == width:
                    setattr(owner, name, int(weight.shape[1]))


def _weight(layer: nn.Module) -> Tensor | None:
    weight = layer._parameters.get("weight")  # noqa: SLF001
    return weight if weight is not None and weight.dim() > 1 else None
