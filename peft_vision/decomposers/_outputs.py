"""What layers give on images, and the directions in which it varies most.

The product of two matrices that comes nearest to W x on average, |W x - W' x|, is W projected on
the leading directions of what W x varies in. That is the singular value decomposition of the
weight times the root of its inputs' second moments, and no root or inverse is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones.sites import Backbone, LayerSite
from peft_vision.layers.layer_shape import LayerShape, per_group, shape_of
from peft_vision.layers.showing import show
from peft_vision.plan import Decisions

AT_ONCE = 2**25
"""Numbers of second moments that are held at once: 256 MB."""

SHRINK = 1e-3
"""Share of directions as they would be if all inputs varied alike: few images leave some unseen."""


class ByOutputs(ABC):
    """A method whose values come nearer to the layers it replaces when it sees images."""

    @abstractmethod
    def apply_on(self, backbone: Backbone, decisions: Decisions, batches: Iterable[Any]) -> None:
        """Carry decisions out, in place, as `apply` does, with values that fit these images.

        Args:
            batches: images B 3 H W, or (images, labels) pairs, that can be gone through again.
        """


@dataclass
class Outputs:
    """Count, sum (G O) and sum of outer products (G O O) of what a layer gave, group by group."""

    shape: LayerShape
    count: int
    total: Tensor
    square: Tensor

    @classmethod
    def of(cls, shape: LayerShape) -> Outputs:
        """Nothing seen yet."""
        size = (shape.groups, shape.outputs // shape.groups)
        zero = torch.zeros(size, dtype=torch.float64)
        return cls(shape, 0, zero, torch.zeros(*size, size[1], dtype=torch.float64))

    def add(self, given: Tensor) -> None:
        """Take in a layer's output: ... O, or B O and a grid."""
        last = given.movedim(1, -1) if self.shape.kernel else given
        rows = last.detach().reshape(-1, *self.total.shape)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.count += len(rows)
        self.total += rows.sum(0, dtype=torch.float64).cpu()
        self.square += torch.einsum("mgo,mgp->gop", rows, rows).double().cpu()

    def variation(self, kernels: Tensor, *, centered: bool) -> Tensor:
        """G O O: how outputs vary; with a bias, around their mean.

        Args:
            kernels: the layer's weight, G O I and kernel.
        """
        flat = kernels.double().flatten(2).cpu()
        blind = flat @ flat.transpose(1, 2)
        if self.count == 0:
            return blind
        seen = self.square / self.count
        if centered:
            mean = self.total / self.count
            seen = seen - mean[:, :, None] * mean[:, None]
        scale = _trace(seen).clamp_min(1e-300) / _trace(blind).clamp_min(1e-300)
        return seen + SHRINK * scale * blind


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum()


def seen_by(
    model: nn.Module, sites: Sequence[LayerSite], batches: Iterable[Any]
) -> dict[str, Outputs]:
    """What the layers of these sites give on images; the model is not changed."""
    found = {site.key: Outputs.of(shape_of(site.layer)) for site in sites}
    handles = [
        site.layer.register_forward_hook(lambda _, __, given, seen=found[site.key]: seen.add(given))
        for site in sites
    ]
    try:
        show(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    return found


def portions(sites: Sequence[LayerSite]) -> Iterator[list[LayerSite]]:
    """The sites in their order, so many together that their second moments can be held."""
    held = 0
    portion: list[LayerSite] = []
    for site in sites:
        shape = shape_of(site.layer)
        size = shape.outputs**2 // shape.groups
        if portion and held + size > AT_ONCE:
            yield portion
            held, portion = 0, []
        held += size
        portion.append(site)
    if portion:
        yield portion


def spectra(
    backbone: Backbone, sites: Sequence[LayerSite], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Key -> how much outputs vary along each of their directions, falling."""
    found = {}
    for portion in portions(sites):
        seen = seen_by(backbone.model, portion, batches)
        for site in portion:
            layer: Any = site.layer
            kernels = per_group(layer.weight.detach(), seen[site.key].shape.groups)
            varied = seen[site.key].variation(kernels, centered=layer.bias is not None)
            values = torch.linalg.eigvalsh(varied).clamp_min(0).sum(0).flip(0)
            found[site.key] = values[: min(kernels.shape[1], kernels[0, 0].numel())]
    return found
