"""Hold less while training: what the settings say about memory, put in place for a run.

Nothing of it stays behind, and no tensor changes its name: checkpoints and adapters are those of a
run without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from peft_vision.backbones import view
from peft_vision.cost import unwrap
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.absent import Absent
from peft_vision.layers.gate_product import GateWatch
from peft_vision.layers.low_norm import keep_low
from peft_vision.layers.recomputed import unwatch, watch, watched
from peft_vision.layers.sample_subset import SampleSubset
from peft_vision.layers.stored_low import StoredLow
from peft_vision.layers.trunk import Trunk
from peft_vision.training.settings import require_bf16

if TYPE_CHECKING:
    from torch import nn

    from peft_vision.backbones.sites import Backbone
    from peft_vision.training.settings import TrainSettings


@contextmanager
def leaned(model: nn.Module, settings: TrainSettings) -> Iterator[None]:
    """Train with what `settings` says about memory, as long as the block runs.

    No number is looked at, so it works under fake tensors.

    Raises:
        BadSetting: frozen weights in bf16 were asked for in another precision, or more blocks than
            there are.
        UnsupportedSite: the backbone lacks what a setting acts on.
    """
    plain = unwrap(model)
    with ExitStack() as stack:
        stack.callback(_recompute(plain, settings))
        if settings.norms == "low":
            for norm in _norms(plain):
                stack.callback(norm.register_forward_hook(keep_low, prepend=True).remove)
        if settings.drop_path:
            for subset in _subsets(view(plain), settings.drop_path):
                stack.callback(subset.remove)
        if settings.gradient_checkpointing:
            backbone = view(plain)
            backbone.set_checkpointing(_blocks(backbone, settings.gradient_checkpointing))
            stack.callback(backbone.set_checkpointing, False)
        if settings.frozen == "bf16":
            require_bf16(settings, possible=settings.precision != "fp32")
            stack.callback(StoredLow(plain, torch.bfloat16).restore)
        yield


def _recompute(model: nn.Module, settings: TrainSettings) -> Callable[[], None]:
    """Have activations computed again, or none; gives what puts back how it was before."""
    before = watched(model)
    if settings.recompute == "nothing":
        unwatch(model)
        return lambda: watch(model) if before else None
    watch(model)
    gates = [
        GateWatch(site.mlp, site.parts)
        for site in view(model).hidden
        if len(site.parts.up) == 2 or site.parts.packed == 2
    ]

    def undo() -> None:
        for gate in gates:
            gate.remove()
        if not before:
            unwatch(model)

    return undo


def _norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if getattr(m, "normalized_shape", None) is not None]


def _subsets(backbone: Backbone, share: float) -> list[SampleSubset]:
    """Stochastic depth on both branches of every block.

    Raises:
        UnsupportedSite: the blocks are not understood, or they are not whole.
    """
    backbone.require("tokens", "blocks")
    if backbone.tokens is None:
        raise AssertionError("require() admits backbones with tokens only")
    parts, trunk = backbone.tokens.parts, backbone.tokens.trunk_if_any()
    halves = ((parts.norm1, parts.attention), (parts.norm2, parts.mlp))
    places = [(site.block, names) for site in backbone.blocks for names in halves]
    cut = any(isinstance(getattr(block, last), Absent) for block, (_, last) in places)
    if cut or (trunk is not None and not _whole(trunk)):
        raise UnsupportedSite(
            f"train.drop_path leaves samples out of branches, and in {type(backbone.core).__name__}"
            " tokens leave on the way or branches were removed. train.drop_path=0 works."
        )
    return [
        SampleSubset(getattr(block, norm), getattr(block, last), share)
        for block, (norm, last) in places
    ]


def _whole(trunk: Trunk) -> bool:
    return trunk.plain and trunk.observer is None and trunk.given is None


def _blocks(backbone: Backbone, wanted: bool | int) -> bool | list[int]:
    """Which blocks are recomputed: all, or so many of those that hold activations.

    Raises:
        BadSetting: there are not so many blocks. UnsupportedSite: there are none.
    """
    if isinstance(wanted, bool):
        return wanted
    backbone.require("blocks")
    if wanted > len(backbone.blocks):
        raise BadSetting(
            f"train.gradient_checkpointing={wanted}, but the model has {len(backbone.blocks)} "
            "blocks. true means all of them."
        )
    return _spread(wanted, holding(backbone))


def holding(backbone: Backbone) -> list[int]:
    """Indices of the blocks that hold activations for the backward pass.

    They begin with the first that trains, or whose input is computed from something that does. What
    is registered before the blocks is taken to come before them.
    """
    inside = {id(p): s.index for s in backbone.blocks for p in s.block.parameters()}
    trunk = None if backbone.tokens is None else backbone.tokens.trunk_if_any()
    if trunk is not None:
        prompts = ((int(name), module) for name, module in trunk.prompts.items())
        inside.update({id(p): index for index, module in prompts for p in module.parameters()})
    begun, first = False, len(backbone.blocks)
    for parameter in backbone.core.parameters():
        begun = begun or id(parameter) in inside
        if parameter.requires_grad:
            behind = first if begun else 0
            first = min(first, inside.get(id(parameter), behind))
    return [site.index for site in backbone.blocks if site.index >= first]


def _spread(count: int, among: Sequence[int]) -> list[int]:
    """`count` of the indices, evenly spaced; all of them where there are no more."""
    total = len(among)
    count = min(count, total)
    return [among[(2 * i + 1) * total // (2 * count)] for i in range(count)]
