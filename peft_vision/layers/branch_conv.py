"""A depthwise convolution whose channels have kernels of different kinds.

The layout is InceptionNeXt's (Yu et al., CVPR 2024): a small square, a row, a column, and channels
that pass; here some may keep the whole kernel, and any channel may be of any kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("square", "row", "column", "identity")
"""What a channel's kernel becomes, unless it stays whole."""


class BranchConv(nn.Module):
    """B C H W -> B C H W, each channel by itself; padded so that the grid stays.

    Attributes:
        order: C, the channels that stay whole, then squares, rows, columns, and those that pass.
        back: C, undoes `order`.
    """

    order: Tensor
    back: Tensor

    def __init__(self, convs: Mapping[str, nn.Conv2d], passing: int, order: Tensor) -> None:
        super().__init__()
        for kind, conv in convs.items():
            self.add_module(kind, conv)
        self.sizes = [*(conv.out_channels for conv in convs.values()), passing]
        self.register_buffer("order", order)
        self.register_buffer("back", torch.argsort(order))

    @classmethod
    def instead_of(
        cls, layer: nn.Conv2d, channels: Mapping[str, Sequence[int]], square: int
    ) -> BranchConv:
        """The central part of each channel's kernel, in the place of the whole.

        Args:
            layer: depthwise, of odd size, stride 1 and padding of half its size.
            channels: kind -> the channels of that kind; those of no kind keep the whole kernel.
            square: side of the small square, odd.
        """
        gone = {channel for members in channels.values() for channel in members}
        whole = [channel for channel in range(layer.out_channels) if channel not in gone]
        side = int(layer.kernel_size[0])
        groups = {"whole": whole, **{kind: list(channels.get(kind, ())) for kind in KINDS}}
        kernels = {
            "whole": (side, side),
            "square": (square, square),
            "row": (1, side),
            "column": (side, 1),
        }
        convs = {k: _part(layer, groups[k], size) for k, size in kernels.items() if groups[k]}
        order = [channel for members in groups.values() for channel in members]
        device = layer.weight.device
        made = cls(convs, len(groups["identity"]), torch.tensor(order, device=device))
        return made.requires_grad_(layer.weight.requires_grad).train(layer.training)

    @property
    def in_channels(self) -> int:
        """C."""
        return int(self.order.shape[0])

    @property
    def out_channels(self) -> int:
        """C."""
        return int(self.order.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """The channels sorted by kind, convolved, and put back."""
        parts = list(torch.split(x.index_select(1, self.order), self.sizes, dim=1))
        for place, conv in enumerate(self.children()):
            parts[place] = conv(parts[place])
        return torch.cat(parts, dim=1).index_select(1, self.back)


def central(weight: Tensor, kernel: tuple[int, int]) -> Tensor:
    """The middle of a kernel: C 1 K K -> C 1 and `kernel`."""
    rows, columns = (
        (full - part) // 2 for full, part in zip(weight.shape[2:], kernel, strict=True)
    )
    return weight[:, :, rows : rows + kernel[0], columns : columns + kernel[1]]


def _part(layer: nn.Conv2d, members: Sequence[int], kernel: tuple[int, int]) -> nn.Conv2d:
    count = len(members)
    index = torch.tensor(list(members), device=layer.weight.device)
    half = (kernel[0] // 2, kernel[1] // 2)
    biased = layer.bias is not None
    made: Any = nn.Conv2d(
        count, count, kernel, padding=half, groups=count, bias=biased, device="meta"
    )
    weight = central(layer.weight.detach().index_select(0, index), kernel)
    # Copied, for kernels round otherwise where a weight's strides are not those of its file.
    made.weight = nn.Parameter(weight.new_empty(weight.shape).copy_(weight))
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().index_select(0, index))
    result: nn.Conv2d = made
    return result
