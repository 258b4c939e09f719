"""Images that wait before a block, and what the model makes of them from there on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from peft_vision.backbones.sites import Backbone
from peft_vision.calibration import Walk
from peft_vision.importance._probing import answer_of, evaluating
from peft_vision.layers.trunk import Trunk


@contextmanager
def opened(backbone: Backbone) -> Iterator[Trunk]:
    """The blocks as one Trunk in evaluation mode, for a while; the model is then as it was.

    Raises:
        UnsupportedSite: the blocks cannot be run from their parts.
    """
    backbone.require("tokens")
    site = backbone.tokens
    if site is None:
        raise AssertionError("require() has seen to it")
    container = getattr(site.owner, site.attribute)
    with evaluating(backbone.model):
        trunk = site.trunk().eval()
        try:
            yield trunk
        finally:
            trunk.given = None
            setattr(site.owner, site.attribute, container)


@contextmanager
def opened_if_possible(backbone: Backbone) -> Iterator[Trunk | None]:
    """As `opened`; None, and evaluation mode, where the blocks cannot be run from their parts."""
    if backbone.tokens is None:
        with evaluating(backbone.model):
            yield None
    else:
        with opened(backbone) as trunk:
            yield trunk


def read(backbone: Backbone, trunk: Trunk, sequence: Tensor, image: Tensor) -> Tensor:
    """The model's answer for a sequence behind its blocks, B ...

    Args:
        image: 1 3 H W, any: what the blocks would make of it is not computed.
    """
    trunk.given = sequence
    try:
        return answer_of(backbone.model(image))
    finally:
        trunk.given = None


class Ahead:
    """Images before a block of a model that is `opened`, or outside of one that cannot be.

    Args:
        trunk: the open blocks; None where answers have to be computed from the start each time.
    """

    def __init__(self, backbone: Backbone, images: Sequence[Tensor], trunk: Trunk | None) -> None:
        self.backbone, self.images, self.trunk = backbone, images, trunk
        self.walk = None if trunk is None else Walk(backbone, images)

    def go(self, block: int) -> None:
        """Take the images forward, as far as before a block."""
        while self.walk is not None and self.walk.index < block:
            self.walk.advance()

    @torch.no_grad()
    def answers(self) -> Iterator[Tensor]:
        """What the model makes of each batch as it is now: B ..."""
        if self.walk is None or self.trunk is None:
            for images in self.images:
                yield answer_of(self.backbone.model(images))
            return
        for number, (args, kwargs) in enumerate(self.walk.given):
            stream = self.walk.streams[number]
            for index in range(self.walk.index, len(self.trunk.blocks)):
                stream = self.trunk.step(index, stream, args, kwargs)
            image = self.images[number][:1]
            yield read(self.backbone, self.trunk, self.trunk.leave(stream), image)
