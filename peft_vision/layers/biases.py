"""Every bias of a model, under a name that stays the same however its blocks are housed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from peft_vision.layers.attention import attention_inside
from peft_vision.layers.bottleneck import Bottleneck, inside
from peft_vision.layers.ownership import is_copied, plain_of
from peft_vision.layers.positions import without_rows
from peft_vision.layers.readout import Readout
from peft_vision.layers.trunk import trunk_in

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Bias:
    """A bias: the parameter `attribute` of `owner`.

    Attributes:
        label: its dotted name without anybody's wrappers, e.g. ``blocks.3.mlp.fc1.bias``.
    """

    label: str
    owner: nn.Module
    attribute: str

    @property
    def of_norm(self) -> bool:
        """Whether it belongs to a norm."""
        return isinstance(self.owner, NORMS)


def biases_in(module: nn.Module, skip: Iterable[nn.Module] = (), label: str = "") -> Iterator[Bias]:
    """The biases below `module`, without those of heads and adapters of ours or of PEFT.

    Args:
        skip: modules that do not count.
        label: name of `module`.
    """
    skipped = list(skip)
    if is_copied(module) or isinstance(module, Readout | Bottleneck):
        return
    if any(module is one for one in skipped):
        return
    own = _opened(module)
    for name, parameter in own.named_parameters(recurse=False):
        if name.endswith("bias") and parameter.is_floating_point():
            yield Bias(f"{label}{name}", own, name)
    trunk = trunk_in(own)
    for name, child in (own if trunk is None else trunk.blocks).named_children():
        yield from biases_in(child, skipped, f"{label}{name}.")


def _opened(module: nn.Module) -> nn.Module:
    """The module inside wrappers of ours and of PEFT."""
    while True:
        inner = inside(without_rows(plain_of(module)))
        inner = attention_inside(inner)
        if inner is module:
            return module
        module = inner
