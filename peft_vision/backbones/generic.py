"""Any nn.Module: its linears and convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from peft_vision.backbones.assembly import (
    bypasses_in,
    is_bypassed,
    is_conv,
    is_linear,
    layers_in,
    readouts_in,
)
from peft_vision.backbones.positions import relative
from peft_vision.backbones.sites import Backbone, LayerSite, ReadoutSite
from peft_vision.errors import UnsupportedBackbone
from peft_vision.layers.readout import is_readout

HEADS = ("head", "heads", "fc", "classifier")
"""Names that timm, torchvision and transformers give to the last part of a classifier."""


def view(model: nn.Module, why: str = "") -> Backbone:
    """See the model as linears and convolutions; heads, units and tokens are not told apart.

    Args:
        model: any module.
        why: what keeps a family that knows the class from understanding this model.

    Raises:
        UnsupportedBackbone: it has neither linears nor convolutions.
    """
    linears, convs = _distinct(model, is_linear), _distinct(model, is_conv)
    own = _distinct(model, is_readout)
    if not linears and not convs:
        raise UnsupportedBackbone(f"{type(model).__name__} has neither linears nor convolutions.")
    classifier = tuple(own) or _classifier(model, [*linears, *convs])
    last = {(id(site.owner), site.attribute) for site in classifier}
    reason = why or "its architecture is not one of those understood in full"
    return Backbone(
        model=model,
        family="generic",
        input_size=_input_size(model, convs),
        linears=tuple(s for s in linears if (id(s.owner), s.attribute) not in last),
        convs=tuple(s for s in convs if (id(s.owner), s.attribute) not in last),
        classifier=classifier,
        readouts=_readouts(classifier),
        missing={
            **dict.fromkeys(("blocks", "heads", "hidden", "tokens"), reason),
            "positions": relative(model) or reason,
        },
        bypasses=bypasses_in(model),
        bypassed=is_bypassed(model),
    )


def _distinct(model: nn.Module, kind: Any) -> list[LayerSite]:
    """One site per layer, also where a model holds a layer under two names."""
    found: dict[int, LayerSite] = {}
    for site in layers_in(model, kind):
        found.setdefault(id(site.layer), site)
    return list(found.values())


def _classifier(model: nn.Module, layers: Sequence[LayerSite]) -> tuple[LayerSite, ...]:
    """The layers that timm says are last; else the last linear in a part named as a head."""
    config = getattr(model, "pretrained_cfg", None)
    said = config.get("classifier") if isinstance(config, Mapping) else None
    if said:
        names = (said,) if isinstance(said, str) else tuple(said)
        return tuple(site for site in layers if site.key in names)
    for name in HEADS:
        inside = [s for s in layers if s.key == name or s.key.startswith(f"{name}.")]
        if inside:
            return (inside[-1],)
    return ()


def _readouts(classifier: Sequence[LayerSite]) -> tuple[ReadoutSite, ...]:
    """The classifiers, where it is known what they read."""
    found = [
        replace(readout, key=site.key)
        for site in classifier
        for readout in readouts_in(site.owner, 0, site.attribute)
    ]
    return tuple(site for site in found if site.count is not None)


def _input_size(model: nn.Module, convs: Sequence[LayerSite]) -> tuple[int, int, int] | None:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(size, Sequence) and isinstance(config, Mapping):
        size = (config.get("input_size") or (0,))[1:]
    if not isinstance(size, Sequence):
        size = getattr(getattr(model, "config", None), "image_size", None)
        size = (size, size) if isinstance(size, int) else size
    if not isinstance(size, Sequence) or len(size) != 2:
        return None
    return (_channels(convs, config), int(size[0]), int(size[1]))


def _channels(convs: Sequence[LayerSite], config: Any) -> int:
    """What the first convolution takes, unless it is not given the images themselves.

    Some stems lay out squares of 2 or 4 pixels as channels, or take 8 x 8 cosine coefficients.
    """
    said = (config.get("input_size") or (3,))[0] if isinstance(config, Mapping) else 3
    if not convs:
        return int(said)
    stem: Any = convs[0].layer
    taken = int(stem.weight.shape[1])
    return int(said) if taken in (4 * said, 16 * said, 64) else taken
