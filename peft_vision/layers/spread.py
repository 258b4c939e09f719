"""The kept features of a stream put back into their old places, with zeros between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Spread(nn.Module):
    """Stands where a module was that goes on reading the whole width, and calls it.

    For pooling by attention, whose heads divide the width among them.

    Attributes:
        inner: the module.
        places: where each feature of the stream has its place in the whole width.
        width: the whole width.
    """

    places: Tensor

    def __init__(self, inner: nn.Module, width: int, places: Sequence[int]) -> None:
        super().__init__()
        self.inner = inner
        self.width = width
        self.register_buffer("places", torch.as_tensor(list(places), dtype=torch.long))

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{len(self.places)} of {self.width}"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What `inner` gives for x (B N D')."""
        whole = x.new_zeros(*x.shape[:-1], self.width)
        return self.inner(whole.index_copy(-1, self.places, x), *args, **kwargs)

    def keep(self, indices: Sequence[int]) -> None:
        """Keep some features of the stream."""
        index = torch.as_tensor(list(indices), dtype=torch.long, device=self.places.device)
        self.register_buffer("places", self.places[index])


def spread(module: nn.Module, width: int, indices: Sequence[int]) -> Spread:
    """The module, reading some features of a stream that was `width` wide before."""
    if isinstance(module, Spread):
        module.keep(indices)
        return module
    device = next((p.device for p in module.parameters()), None)
    return Spread(module, width, indices).to(device).train(module.training)
