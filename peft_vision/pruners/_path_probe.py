"""A copy of a model whose branches can be taken out for a while, and what that does to its output.

Images stop before every block in turn; from there on only what lies behind is computed again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone, TokensSite, device_of
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.absent import Absent
from peft_vision.layers.block import mlp_half
from peft_vision.layers.showing import images_of
from peft_vision.layers.trunk import Stream, Trunk
from peft_vision.layers.votes import Half

Branch = tuple[int, Half]
"""(block, half)"""

OUTPUTS = ("logits", "pooler_output", "image_embeds", "last_hidden_state")
"""What is compared of an output object, in this order."""


@dataclass
class Entered:
    """One batch before the first block: its images B 3 H W, and how the blocks were called."""

    images: Tensor
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Probe:
    """A copy of a model, opened, in evaluation mode, with calibration images in it.

    Attributes:
        trunk: of the copy. `dense`: what the whole model gives, one tensor per batch.
        classifies: these are logits of classes, and not features.

    Args:
        batches: images B 3 H W, or (images, labels).
        limit: no more images than this are used.

    Raises:
        BadSetting: there is no image.
    """

    def __init__(self, backbone: Backbone, batches: Iterable[Any], limit: int) -> None:
        self.model = copy.deepcopy(backbone.model).eval().requires_grad_(False)
        site = view(self.model).tokens
        if site is None:
            raise AssertionError("the caller requires tokens")
        self.site: TokensSite = site
        self.trunk: Trunk = site.trunk().eval()
        self.trunk.checkpointing = False
        self.classifies = False
        self.batches: list[Entered] = []
        self.dense: list[Tensor] = []
        with torch.no_grad():
            for images in _limited(batches, limit):
                self._enter(images, bool(backbone.classifier))
        if not self.batches:
            raise BadSetting("The data gave no batch. An iterable of (images, labels) works.")

    def _enter(self, images: Tensor, has_classifier: bool) -> None:
        seen: list[Entered] = []
        placed = images.to(device_of(self.model), next(self.model.parameters()).dtype)

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(Entered(placed, args[0], args[1:], kwargs))

        handle = self.trunk.register_forward_pre_hook(note, with_kwargs=True)
        try:
            output = self.model(placed)
        finally:
            handle.remove()
        self.dense.append(_tensor_of(output))
        said = has_classifier if isinstance(output, Tensor) else "logits" in output
        self.classifies = said and self.dense[-1].dim() == 2
        self.batches += seen

    @property
    def count(self) -> int:
        """How many images there are."""
        return sum(len(batch.images) for batch in self.batches)

    def start(self, batch: Entered, x: Tensor | None = None) -> Stream:
        """A batch before the first block."""
        return self.trunk.enter(batch.x if x is None else x, batch.kwargs)

    def step(self, batch: Entered, index: int, stream: Stream) -> Stream:
        """A batch behind block `index`."""
        return self.trunk.step(index, stream, batch.args, batch.kwargs)

    def finish(self, batch: Entered, index: int, stream: Stream) -> Tensor:
        """What the model gives for a batch that is before block `index`: logits or features."""
        for later in range(index, len(self.trunk.blocks)):
            stream = self.step(batch, later, stream)
        return self.read(batch, self.trunk.leave(stream))

    def read(self, batch: Entered, sequence: Tensor) -> Tensor:
        """What the model gives for a sequence behind the blocks."""
        self.trunk.given = sequence
        try:
            return _tensor_of(self.model(batch.images))
        finally:
            self.trunk.given = None

    def harm(self, number: int, output: Tensor) -> float:
        """How far a batch's output is from the whole model's, summed over its images.

        KL(whole || this) of the classes for a classifier; else the squared distance of the
        features, relative to the whole model's.
        """
        whole, now = self.dense[number].double(), output.double()
        if self.classifies:
            p, q = whole.log_softmax(-1), now.log_softmax(-1)
            return float((p.exp() * (p - q)).sum())
        square = (whole - now).flatten(1).square().sum(1)
        return float((square / whole.flatten(1).square().sum(1).clamp_min(1e-30)).sum())

    def answers(self, number: int, output: Tensor) -> Tensor:
        """A number per image (B) of a batch whose gradient says how much the output would move.

        For a classifier the log-probability of the class that the whole model chooses (labels are
        not read); else a random direction in the space of features, the same for the same shape.
        """
        wide = output.float() if output.dtype != torch.float64 else output
        if self.classifies:
            chosen = self.dense[number].argmax(-1, keepdim=True)
            return wide.log_softmax(-1).gather(-1, chosen).flatten(1).sum(1)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(wide.shape, generator=generator).to(wide)
        return (wide * direction).flatten(1).sum(1)

    @torch.no_grad()
    def change(self, branch: Branch, module: nn.Module, behind: Tensor, added: Tensor) -> Tensor:
        """What a module at a branch's place would add to the stream, less what the branch did.

        Args:
            behind: the stream behind the branch; `added`: what the branch added to it. Both B N D,
                and so is the result, in float64.
        """
        before, (index, _) = behind - added, branch
        if isinstance(module, Absent):
            instead = module.added(before)
        else:
            with self.instead(branch, module):
                instead = mlp_half(self.trunk.blocks[index], self.site.parts, before)[1]
        change = -added.double()
        return change if instead is None else change + instead.double()

    def module(self, branch: Branch) -> nn.Module:
        """What stands at a branch's place."""
        index, half = branch
        found: nn.Module = getattr(self.trunk.blocks[index], self.name(half))
        return found

    def name(self, half: Half) -> str:
        """The family's name for a half."""
        return self.site.parts.attention if half == "attention" else self.site.parts.mlp

    def put(self, branch: Branch, module: nn.Module) -> None:
        """Put a module at a branch's place."""
        index, half = branch
        setattr(self.trunk.blocks[index], self.name(half), module)

    @contextmanager
    def instead(self, branch: Branch, module: nn.Module) -> Iterator[None]:
        """Another module at a branch's place, for a while."""
        own = self.module(branch)
        self.put(branch, module)
        try:
            yield
        finally:
            self.put(branch, own)

    @torch.no_grad()
    def observe(self, note: Callable[[Branch, Tensor, Tensor], None]) -> None:
        """Run all images; `note` is given each branch, the stream behind it, and what it added."""
        self.trunk.observer = lambda index, half, x, added: note((index, half), x, added)
        try:
            for batch in self.batches:
                stream = self.start(batch)
                for index in range(len(self.trunk.blocks)):
                    stream = self.step(batch, index, stream)
        finally:
            self.trunk.observer = None

    def harms(self, substitutes: Mapping[Branch, nn.Module]) -> dict[Branch, float]:
        """For each branch, the mean harm done by its substitute alone."""
        totals = dict.fromkeys(substitutes, 0.0)
        with torch.no_grad():
            for number, batch in enumerate(self.batches):
                stream = self.start(batch)
                for index in range(len(self.trunk.blocks)):
                    for branch in (b for b in substitutes if b[0] == index):
                        with self.instead(branch, substitutes[branch]):
                            output = self.finish(batch, index, stream)
                        totals[branch] += self.harm(number, output)
                    stream = self.step(batch, index, stream)
        return {branch: total / self.count for branch, total in totals.items()}


def _limited(batches: Iterable[Any], limit: int) -> Iterator[Tensor]:
    left = limit
    for batch in batches:
        if left <= 0:
            return
        images = images_of(batch)
        yield images[:left]
        left -= len(images)


def _tensor_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found: Sequence[Any] = [getattr(output, name, None) for name in OUTPUTS]
    for value in found:
        if isinstance(value, Tensor):
            return value
    raise UnsupportedSite(
        f"The model returns {type(output).__name__}; paths are ranked by a tensor, or by one of "
        f"{', '.join(OUTPUTS)}."
    )
