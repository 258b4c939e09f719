"""Calibration images on their way through a model, block by block, and what they tell of a layer.

No labels are needed. Sums are kept in float64, for they are inverted later; the products of one
batch are taken in the images' own precision, float32 at least, without what all have in common.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_vision.backbones.sites import Backbone, HeadsSite, HiddenSite, device_of
from peft_vision.cost import run_images
from peft_vision.errors import BadSetting
from peft_vision.layers.bottleneck import inside
from peft_vision.layers.ownership import plain_of
from peft_vision.layers.showing import images_of
from peft_vision.layers.trunk import Stream, Trunk, blocks_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft_vision.backbones.queries import QueriesSite
    from peft_vision.plan import Decisions

Note = Callable[[int, Tensor, Tensor], None]
"""(number of the layer, its input, its output)"""


@dataclass
class Center:
    """Count and mean of vectors, as sums of what sets them apart from the first ones' mean.

    Of values that lie far from zero and vary little, products in float32 are nearly all mean: what
    they vary by is lost in the rounding. So the first batch's mean is taken off before.

    Attributes:
        count: vectors seen. `shift`: what is taken off, F. `total`: sum of what is left, F.
    """

    count: int
    shift: Tensor
    total: Tensor

    @classmethod
    def of_width(cls, width: int) -> Center:
        """Nothing seen yet."""
        return cls(0, *torch.zeros(2, width, dtype=torch.float64))

    def take(self, values: Tensor) -> Tensor:
        """Take in vectors, ... F; what is left of them without the shift, M F."""
        flat = rows_of(values)
        if self.count == 0 and len(flat) > 0:
            self.shift = flat.mean(0).float().double().cpu()  # the same in either precision
        left = flat - self.shift.to(flat)
        self.count += len(flat)
        self.total += left.sum(0, dtype=torch.float64).cpu()
        return left

    @property
    def offset(self) -> Tensor:
        """How far the mean is from the shift, F."""
        return self.total / self.count

    @property
    def mean(self) -> Tensor:
        """F."""
        return self.shift + self.offset


@dataclass
class Moments:
    """Count, mean and covariance of vectors of width F, gathered batch by batch.

    Attributes:
        center: their count and mean. `square`: sum of outer products about its shift, F F.
    """

    center: Center
    square: Tensor

    @classmethod
    def of_width(cls, width: int) -> Moments:
        """Nothing seen yet."""
        return cls(Center.of_width(width), torch.zeros(width, width, dtype=torch.float64))

    def add(self, values: Tensor) -> Tensor:
        """Take in vectors, ... F; what was multiplied, M F."""
        left = self.center.take(values)
        self.square += (left.t() @ left).double().cpu()
        return left

    @property
    def count(self) -> int:
        """Vectors seen."""
        return self.center.count

    @property
    def mean(self) -> Tensor:
        """F."""
        return self.center.mean

    @property
    def second(self) -> Tensor:
        """Mean outer product, F F."""
        return self.covariance + torch.outer(self.mean, self.mean)

    @property
    def covariance(self) -> Tensor:
        """F F."""
        return self.square / self.count - torch.outer(self.center.offset, self.center.offset)


def rows_of(values: Tensor) -> Tensor:
    """Vectors one below the other, in float32 or wider: ... F -> M F."""
    flat = values.detach().flatten(0, -2)
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


class _Entered(Exception):
    """The images have reached the blocks."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_given, self.kwargs_given = args, kwargs


class Walk:
    """Images inside a model, before its block number `index`.

    The model's weights may change on the way: blocks ahead see what the blocks behind make of the
    images now.

    Args:
        backbone: a transformer whose blocks can be run from their parts.
        batches: images B 3 H W, or (images, labels) pairs.

    Raises:
        UnsupportedSite: the model has no such blocks. BadSetting: there is no image.
    """

    def __init__(self, backbone: Backbone, batches: Iterable[Any]) -> None:
        backbone.require("tokens")
        site = backbone.tokens
        assert site is not None
        self.model, self.index = backbone.model, 0
        container: nn.Module = getattr(site.owner, site.attribute)
        blocks = [block for _, _, block in blocks_in(container)]
        present = site.trunk_if_any()
        self.trunk = present or Trunk(blocks, site.parts, site.prefix)
        self.trunk.train(backbone.model.training)  # a trunk of our own starts in training mode
        entered = [self._enter(present or blocks[0], images_of(batch)) for batch in batches]
        if not entered:
            raise BadSetting("The data gave no batch. An iterable of (images, labels) works.")
        self.given = [(args[1:], kwargs) for args, kwargs in entered]
        self.streams = [self.trunk.enter(args[0], kwargs) for args, kwargs in entered]

    @torch.no_grad()
    def _enter(self, first: nn.Module, images: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Entered(args, kwargs)

        handle = first.register_forward_pre_hook(stop, with_kwargs=True)
        parameter = next(self.model.parameters())
        try:
            run_images(self.model, images.to(device_of(self.model), parameter.dtype))
        except _Entered as entered:
            return entered.args_given, entered.kwargs_given
        finally:
            handle.remove()
        raise BadSetting("The images never reached the model's blocks.")

    @property
    def block(self) -> nn.Module:
        """The block that comes next."""
        return self.trunk.blocks[self.index]

    @torch.no_grad()
    def run(self) -> list[Stream]:
        """What the next block makes of the images, which stay where they are."""
        return [
            self.trunk.step(self.index, stream, args, kwargs)
            for stream, (args, kwargs) in zip(self.streams, self.given, strict=True)
        ]

    def watch(self, layers: Sequence[nn.Module], note: Note) -> list[Stream]:
        """Run the next block, calling `note` for each layer; the images stay where they are."""
        with noting(layers, note):
            return self.run()

    def moments(self, *layers: nn.Module) -> list[Moments | None]:
        """Of the inputs of layers of the next block; None for one that was not called."""
        found: list[Moments | None] = [None] * len(layers)

        def note(number: int, arriving: Tensor, _: Tensor) -> None:
            known = found[number] or Moments.of_width(arriving.shape[-1])
            known.add(arriving)
            found[number] = known

        self.watch(layers, note)
        return found

    def advance(self) -> None:
        """Take the images through the next block."""
        self.streams = self.run()
        self.index += 1


class FittedByBlock(ABC):
    """A method whose values come nearer to what blocks gave when it sees the images in them."""

    @abstractmethod
    def apply_at(self, backbone: Backbone, decisions: Decisions, walk: Walk) -> None:
        """Carry out decisions on the block that comes next, in place.

        As `apply` does, with values that fit the images there.
        """


def consumer_of(site: HeadsSite | HiddenSite | QueriesSite) -> nn.Module:
    """The linear that reads the members of a site, or what comes of them; with its adapters.

    Without a bottleneck behind it, which bends what it gives.
    """
    owner, name = (
        (site.mlp, site.parts.down)
        if isinstance(site, HiddenSite)
        else (site.attention, site.parts.out)
    )
    return inside(getattr(owner, name))


def lacks_bias(site: HeadsSite | HiddenSite | QueriesSite) -> bool:
    """Whether the linear that reads a site's members could be fitted, and has no bias for it."""
    layer = plain_of(consumer_of(site))
    return type(layer) is nn.Linear and layer.weight.is_floating_point() and layer.bias is None


def give_bias(site: HeadsSite | HiddenSite | QueriesSite) -> None:
    """A bias of zero to the linear that reads a site's members, where it has none, in place.

    It is structure: what a method decides says so, for a plan that is replayed needs it, too.
    """
    if lacks_bias(site):
        layer: Any = plain_of(consumer_of(site))
        zero = torch.zeros_like(layer.weight[:, 0])
        layer.bias = nn.Parameter(zero, requires_grad=layer.weight.requires_grad)


@contextmanager
def noting(layers: Sequence[nn.Module], note: Note) -> Iterator[None]:
    """Call `note` whenever one of the layers is called."""
    handles = [
        layer.register_forward_hook(lambda _, given, out, n=number: note(n, given[0], out))
        for number, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
