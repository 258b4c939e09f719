"""How large the grids are that reach the layers of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone, LayerSite
from peft_vision.cost import example_input_of, on_twin, run_images
from peft_vision.decomposers._job import KINDS
from peft_vision.layers.layer_shape import Sizes, shape_of, why_not_plain

Arriving = dict[str, tuple[int, Sizes]]
"""Key of a layer -> how many grids (or rows of a linear) reach it, and their size."""


def arriving_in(backbone: Backbone) -> Arriving:
    """What reaches each layer for one image; nothing where the model does not say its size."""
    size = backbone.input_size
    if size is None:
        return {}

    def run(model: nn.Module) -> Arriving:
        seen: Arriving = {}
        handles = [hook for site in all_layers(view(model)) for hook in _watch(site, seen)]
        try:
            with torch.no_grad():
                run_images(model.eval(), example_input_of(model, size))
        finally:
            for handle in handles:
                handle.remove()
        return seen

    return on_twin(backbone.model, run)


def _watch(site: LayerSite, seen: Arriving) -> Iterator[Any]:
    if why_not_plain(site.layer):
        return
    shape = shape_of(site.layer)

    def note(_: nn.Module, given: tuple[Any, ...]) -> None:
        arriving: Tensor = given[0]
        axes = len(shape.kernel)
        grid = tuple(arriving.shape[arriving.dim() - axes :]) if axes else ()
        rows = arriving.numel() // shape.inputs
        for size in grid:
            rows //= size
        before = seen.get(site.key, (0, grid))[0]
        seen[site.key] = (before + rows, grid)

    yield site.layer.register_forward_pre_hook(note)


def all_layers(backbone: Backbone) -> Iterator[LayerSite]:
    """Every layer that may be factored."""
    for kind in KINDS:
        yield from getattr(backbone, kind)
